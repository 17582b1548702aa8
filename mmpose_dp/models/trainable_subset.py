"""Chooses the parameters that private training changes: the fewer there are, the less noise the same epsilon needs.

Must not ignore a name: a part of the setting that matches no parameter is an error.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from mmpose_dp.extras.experts import WEIGHTS, add_experts, mixed_in
from mmpose_dp.extras.lora import add_low_rank
from mmpose_dp.privacy.errors import ConfigError
from mmpose_dp.privacy.validation import as_whole

MIXING = 'experts', 'channel_experts'
MIX_FROM = 'mean', 'load_from'
_STAGES = re.compile(r'(layer|stage)\d+|(.+_)?(layers|stages|modules)|multi_stage_.+')


def choose_trainable(
    model: nn.Module,
    trainable: str = 'all',
    lora_rank: int = 8,
    experts: Sequence[Mapping[str, Tensor]] = (),
    mix_from: str = 'mean',
) -> int:
    """Freezes every parameter that ``trainable`` does not name and returns how many numbers are left to train.

    Args:
        trainable: 'all' (everything that the model trains), or parts joined by '+':
            'head' (neck and head), 'first_stage' (the backbone up to its first stage), 'last_stage' (from its last one on), 'norms'
            (scale and shift of every norm layer), 'bias' (every bias: BiTFiT, Bu et al. 2022), 'lora' (low-rank updates of
            linear layers and 1x1 convolutions: Hu et al. 2021, Yu et al. 2022), 'experts' (how much of each of ``experts`` is in
            each layer: :mod:`mmpose_dp.extras.experts`), 'channel_experts' (how much is in each output channel), or a pattern
            on parameter names such as 'backbone.stage4.*'. The paper's subset (arXiv 2504.10190) is 'head+last_stage+norms';
            docs/accuracy.md shows where 'norms+first_stage' helps: after epochs on public views, which lack the detail that the
            first layers see.
        lora_rank: rank of the updates that 'lora' adds.
        experts: state dicts of publicly trained models of the same architecture, which 'experts' and 'channel_experts' mix.
        mix_from: where mixing begins: 'mean' of the model and the experts, or 'load_from', the model alone. Models with BatchNorm
            may lose when they are averaged (docs/accuracy_people.md, "From MobileNetV2").

    Raises ConfigError for a part that matches no parameter, and for settings of other types.
    """
    if not isinstance(trainable, str):
        parts = trainable if isinstance(trainable, (list, tuple)) else ()
        example = '+'.join(map(str, parts)) or 'head+norms'
        raise ConfigError(
            f'optim_wrapper.trainable={trainable!r} must be a string, with + between its parts: write {example!r}'
        )
    lora_rank = as_whole(lora_rank, 'optim_wrapper.lora_rank')
    if mix_from not in MIX_FROM:
        raise ConfigError(f"optim_wrapper.mix_from={mix_from!r} is unknown; write 'mean' or 'load_from'")
    if trainable != 'all':
        chosen: set[str] = set()
        parts = [part.strip() for part in trainable.split('+')]
        if 'lora' in parts:
            add_low_rank(model, lora_rank)
        _mix(model, parts, experts, from_mean=mix_from == 'mean')
        names = {name for name, param in model.named_parameters() if param.requires_grad}
        for part in parts:
            found = names & _part(model, part)
            if not found:
                raise ConfigError(
                    f"optim_wrapper.trainable={trainable!r}: {part!r} matches no trainable parameter. Write 'all', or "
                    "parts joined by '+' from head, first_stage, last_stage, norms, bias, lora, experts, channel_experts and "
                    "patterns such as 'backbone.stage4.*' "
                    f'(this model has {", ".join(sorted(names)[:3])}, ...)'
                )
            chosen |= found
        for name, param in model.named_parameters():
            param.requires_grad_(name in chosen)
    elif experts:
        raise ConfigError("optim_wrapper.experts has no meaning with trainable='all': write trainable='experts'")
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _mix(model: nn.Module, parts: list[str], experts: Sequence[Mapping[str, Tensor]], from_mean: bool) -> None:
    """Adds the experts that 'experts' needs. Raises ConfigError where the settings do not go together."""
    mixing = [part for part in parts if part in MIXING]
    if bool(mixing) != bool(experts):
        raise ConfigError(
            f'optim_wrapper.trainable={mixing[0] if mixing else "experts"!r} and optim_wrapper.experts=[CHECKPOINT, ...] go '
            'together: write both or none'
        )
    if mixing and len(parts) > 1:
        raise ConfigError(
            f'optim_wrapper.trainable={"+".join(parts)!r}: {mixing[0]!r} cannot be joined with other parts: write it alone'
        )
    if mixing:
        add_experts(model, experts, mixing == ['channel_experts'], from_mean)
    for number in range(len(experts)):
        if not mixed_in(model, number):
            raise ConfigError(
                f'optim_wrapper.experts[{number}]: no layer of the model has the names and shapes of one of its layers: write a '
                'checkpoint of the same model'
            )


def _part(model: nn.Module, part: str) -> set[str]:
    names = [name for name, _ in model.named_parameters()]
    if part == 'head':
        return {name for name in names if name.startswith(('head.', 'neck.'))}
    if part == 'bias':
        return {name for name in names if name.rpartition('.')[2].endswith('bias')}
    if part in MIXING:
        return {name for name in names if name.endswith(f'.{WEIGHTS}')}
    if part == 'lora':
        return {name for name in names if '.lora_' in name}
    if part == 'norms':
        norms = [(n, m) for n, m in model.named_modules() if 'Norm' in type(m).__name__]
        return {f'{n}.{key}' for n, m in norms for key, _ in m.named_parameters(recurse=False)}
    if part in ('first_stage', 'last_stage'):
        prefixes = _stage(model, last=part == 'last_stage')
        return {name for name in names if name.startswith(prefixes)}
    return {name for name in names if fnmatchcase(name, part)}


def _stage(model: nn.Module, last: bool) -> tuple[str, ...]:
    """Prefixes of the backbone's last stage and everything defined after it, or of its first stage and everything before it."""
    children = list(getattr(model, 'backbone', nn.Module()).named_children())
    stages = [i for i, (name, _) in enumerate(children) if _STAGES.fullmatch(name)]
    if not stages:
        raise ConfigError(
            'optim_wrapper.trainable: this backbone has no known stages; write a pattern instead of the stage, such as '
            f"'backbone.{children[-1][0] if children else 'layer4'}.*'"
        )
    number = stages[-1 if last else 0]
    name, stage = children[number]
    if isinstance(stage, (nn.ModuleList, nn.Sequential)) and not name[-1].isdigit():
        name = f'{name}.{len(stage) - 1 if last else 0}'
    others = children[number + 1 :] if last else children[:number]
    return (f'backbone.{name}.', *(f'backbone.{other}.' for other, _ in others))
