"""Weights to start from: what a file holds, what of it fits, and output layers matched by joint name for another data set.

Must not change a checkpoint that training resumes from.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from mmpose_dp.extras.checkpoint_file import without_updates
from mmpose_dp.messages import failure
from mmpose_dp.privacy.errors import ConfigError


def fit_joints(
    saved: dict[str, Tensor], wanted: dict[str, Tensor], saved_joints: Sequence[str], wanted_joints: Sequence[str]
) -> list[str]:
    """Makes ``saved`` fit a model with other joints, in place. Returns a line per tensor that did not fit, and what to do.

    A tensor with one row per joint (an output layer: COCO's has 17, MPII's 16) is replaced by the model's own, into which the
    rows of the joints that both have are copied. Any other tensor of another shape is left as it is; loading skips it.

    Args:
        saved: a checkpoint's state dict.
        wanted: the model's state dict.
        saved_joints: names of the joints in the order of the checkpoint's rows; empty if unknown.
        wanted_joints: names of the joints in the model's order.
    """
    both = [name for name in wanted_joints if name in saved_joints]
    new = [name for name in wanted_joints if name not in both]
    lines = []
    for key, own in wanted.items():
        if key not in saved or saved[key].shape == own.shape:
            continue
        shapes = f'{key} is {tuple(saved[key].shape)} in the checkpoint and {tuple(own.shape)} in the model'
        rows = (len(saved[key]), len(own)) if saved[key].dim() and own.dim() else None
        if both and rows == (len(saved_joints), len(wanted_joints)) and saved[key].shape[1:] == own.shape[1:]:
            fitted = own.detach().clone()
            for name in both:
                fitted[wanted_joints.index(name)] = saved[key][saved_joints.index(name)].to(fitted)
            saved[key] = fitted
            lines.append(f'{shapes}: kept for {len(both)} joints, new for {", ".join(new) or "none"}')
        else:
            lines.append(f'{shapes}: not kept')
    return lines + _how_to_keep_joints(lines, saved_joints, wanted_joints)


def fit_checkpoint(checkpoint: dict[str, Any], model: nn.Module, metainfo: dict[str, Any]) -> list[str]:
    """As ``fit_joints``, for a whole checkpoint, which may name its joints, and the metainfo of a data set."""
    joints = _joints_of(checkpoint, metainfo)
    saved = checkpoint.get('state_dict', checkpoint)
    for name in [name for name in saved if str(name).startswith('module.')]:  # as mmengine will do
        saved[name.removeprefix('module.')] = saved.pop(name)
    return fit_joints(saved, model.state_dict(), *joints)


def moved_joints(checkpoint: Any, metainfo: dict[str, Any]) -> list[str]:
    """The joints that a checkpoint has in another row than a data set with as many, so that no shape tells them apart."""
    saved, wanted = _joints_of(checkpoint, metainfo)
    if len(saved) != len(wanted):
        return []
    return [name for name in wanted if name and name in saved and saved.index(name) != wanted.index(name)]


def _joints_of(checkpoint: Any, metainfo: dict[str, Any]) -> list[list[str]]:
    """The names of a checkpoint's joints, none where it does not say, and of a data set's, in the order of their rows."""
    meta = checkpoint.get('meta')
    known = meta.get('dataset_meta') if isinstance(meta, dict) else None
    return [
        [of.get('keypoint_id2name', {}).get(i, '') for i in range(of.get('num_keypoints', 0))]
        for of in (known if isinstance(known, dict) else {}, metainfo)
    ]


def _how_to_keep_joints(lines: Sequence[str], saved: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """What to write if joints of a checkpoint were not kept, or were kept under other names: none or one sentence."""
    both, unused = [name for name in wanted if name in saved], ', '.join(name for name in saved if name not in wanted)
    if lines and unused and 0 < len(both) < len(wanted):
        return [
            f'joints are matched by name, and the data set has none named {unused}. To keep the weights of one of these, give '
            'the joint this name in the metainfo of your data set'
        ]
    moved = [name for name in both if saved.index(name) != wanted.index(name)]
    if len(saved) == len(wanted) and moved:  # as many as the model has: nothing says which tensors have a row per joint
        return [
            f'{len(moved)} joints are in another place in the checkpoint than in the data set, such as {moved[0]}: number '
            f'{saved.index(moved[0])} there and {wanted.index(moved[0])} here. The output layer is loaded as it is, so it must '
            "learn them anew. To avoid that, write your joints in the checkpoint's order"
        ]
    return []


class LoadWatch:
    """Records which tensors of a model are actually loaded, by any code, until ``close``.

    Only floating-point tensors count: BatchNorm's counters fit into any model.

    Attributes:
        loads: for each load, oldest first, the module that was loaded ('' for the whole model) and the tensors that fit.
        shapes: the shapes of the model's floating-point tensors by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.loads: list[tuple[str, set[str]]] = []
        self.shapes = shapes_of(model)
        self._names = {id(module): name for name, module in model.named_modules()}
        self._handles = [
            module._register_load_state_dict_pre_hook(self._note, with_module=True) for module in model.modules()
        ]

    def __deepcopy__(self, memo: dict) -> 'LoadWatch':
        return self  # loads into a copy of the model (EMAHook makes one) are ignored, see _note

    def _note(self, module: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
        name = self._names.get(id(module))
        if name is None:
            return
        if not prefix:
            self.loads.append((name, set()))
        inside = f'{name}.' if name else ''
        for own, value in state_dict.items():
            key = own[len(prefix) :]
            if '.' not in key and isinstance(value, Tensor) and self.shapes.get(inside + key) == value.shape:
                self.loads[-1][1].add(inside + key)

    def found(self, module: str, start: int = 0, end: int | None = None) -> set[str] | None:
        """The tensors that fit in loads ``start`` to ``end`` of ``module`` or a part of it; None if it was not loaded."""
        found = [tensors for name, tensors in self.loads[start:end] if is_within(name, module)]
        return set().union(*found) if found else None

    def inside(self, module: str) -> dict[str, torch.Size]:
        """The shapes of a module's tensors by their names within it."""
        start = len(module) + 1 if module else 0
        return {name[start:]: shape for name, shape in self.shapes.items() if is_within(name, module)}

    def close(self) -> None:
        """Stops watching."""
        for handle in self._handles:
            handle.remove()


def is_within(name: str, module: str) -> bool:
    """Whether a dotted name is that of a module or of something in it; every name is in ''."""
    return not module or name == module or name.startswith(f'{module}.')


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """The shapes of a model's floating-point tensors, by their names in plain MMPose: of those beside them, a start has none."""
    return {
        name: value.shape
        for name, value in without_updates(model.state_dict()).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def read_checkpoint(path: str, key: str) -> Any:
    """The checkpoint at a file or an address that a config names under ``key``. Raises ConfigError if it cannot be read."""
    try:
        return CheckpointLoader.load_checkpoint(path, 'cpu')
    except Exception as error:  # a file or an address can be wrong in any way
        raise ConfigError(f'{key}: checkpoint={path} cannot be read: {failure(error, 300)}') from error


def weights_of(checkpoint: Any, where: str) -> dict[str, Tensor]:
    """The tensors that mmengine reads from a checkpoint, by the names it gives them.

    Raises ConfigError if there are none; if they are under another key, the message names it.
    """
    if not isinstance(checkpoint, dict):
        raise ConfigError(
            f'{where} holds a {type(checkpoint).__name__} instead of weights by name: save the state_dict() of the model'
        )
    weights = checkpoint.get('state_dict', checkpoint)
    weights = weights if isinstance(weights, dict) else {}
    found = {_as_loaded(str(name)): value for name, value in weights.items() if isinstance(value, Tensor)}
    if not found:
        holds = [
            key
            for key, part in checkpoint.items()
            if isinstance(part, dict) and any(isinstance(value, Tensor) for value in part.values())
        ]
        advice = (
            f'Its weights are under the key {holds[0]!r}: save them as dict(state_dict=checkpoint[{holds[0]!r}])'
            if holds
            else f'It has {", ".join(map(repr, list(checkpoint)[:4])) or "nothing"}'
        )
        raise ConfigError(f'{where} holds no weights where mmengine looks for them. {advice}')
    return found


def _as_loaded(name: str) -> str:
    """The name by which mmengine and MMPose load a tensor of a checkpoint: that of several processes, or of MMPose before 1.0."""
    return re.sub(r'^keypoint_head\.', 'head.', re.sub(r'^module\.', '', name))


def explain_misfit(given: dict[str, torch.Size], wanted: dict[str, torch.Size], into: str) -> str:
    """Says why no tensor of a file fits a module, and what to write if the names differ only in their prefix.

    Args:
        given: the file's shapes by name.
        wanted: the module's shapes by name.
        into: the module's config key, such as 'model.backbone'.
    """
    first = [', '.join([*list(shapes)[:3], '...']) for shapes in (given, wanted)]
    words = f'It has {first[0]} and {into} has {first[1]}'
    if any(name in wanted for name in given):
        return f'{words}. The names agree but the shapes do not: it is of a model of another size'
    before: Counter[tuple[str, str]] = Counter()
    ends = {name[i:]: name[:i] for name in wanted for i in (0, *(j + 1 for j, x in enumerate(name) if x == '.'))}
    for name, shape in given.items():
        for i in (0, *(j + 1 for j, x in enumerate(name) if x == '.')):
            if name[i:] in ends:
                start = ends[name[i:]]
                before[name[:i], start] += wanted[start + name[i:]] == shape
                break
    (strip, add), count = before.most_common(1)[0] if before else (('', ''), 0)
    if 2 * count < len(given):
        return words
    key = '.'.join([into, *add.rstrip('.').split('.')]).rstrip('.')
    prefix = f', prefix={strip!r}' if strip else ''
    return f"{words}. Write {key}.init_cfg=dict(type='Pretrained', checkpoint=...{prefix})"
