"""What a checkpoint may hold of a model: its parameters and buffers with their values, and nothing that other code adds.

The fingerprint covers parameters and buffers only, so a module's extra state, or a hook on its state dict, could put values of
a private batch into a checkpoint. Must not call anything in a model that may make such values.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

from mmengine.dist import all_gather_object, get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from mmpose_dp.extras.experts import Mixed, digest_of
from mmpose_dp.extras.lora import LowRank
from mmpose_dp.models import unwrapped
from mmpose_dp.privacy.errors import ConfigError, UnsupportedModelError

_EXTRA = '_extra_state'
_STATISTICS = 'running_mean', 'running_var'
BEFORE_TRAINING = (
    'It does so before training: replace the file that it comes from (load_from, optim_wrapper.experts or an init_cfg) by an '
    'intact one'
)
AFTER_PUBLIC_EPOCHS = (
    'Public epochs diverged, and no private step was made: write a smaller learning rate for them (optim_wrapper.public_optimizer, '
    'or optim_wrapper.optimizer without it), and another work_dir'
)


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and persistent buffers by name; layers with low-rank updates or experts hold what they add to these."""
    found: OrderedDict[str, Tensor] = OrderedDict()
    for prefix, module in _modules(model):
        nn.Module._save_to_state_dict(module, found, prefix, False)
        if isinstance(module, (LowRank, Mixed)):  # whose own class may put more there
            module.put_whole(found, prefix)
        found.pop(f'{prefix}{_EXTRA}', None)
    setattr(found, '_metadata', {prefix[:-1]: {'version': m._version} for prefix, m in _modules(model)})  # noqa: B010
    return found


def refuse_other_state(model: nn.Module) -> None:
    """Raises UnsupportedModelError, naming it, for anything else that a model's state dict holds, or may hold later."""
    for prefix, module in _modules(model):
        if getattr(module.get_extra_state, '__func__', None) is not nn.Module.get_extra_state:
            raise UnsupportedModelError(
                f'model.{prefix}get_extra_state puts something into checkpoints that no noise covers: keep it in a buffer that '
                'private training does not change, or take the method out'
            )
    own = own_state(model)
    other = [name for name in model.state_dict() if name not in own]
    if other:
        raise UnsupportedModelError(
            f'model.state_dict() holds {other[0]}, which is neither a parameter nor a buffer of the model, so no noise covers it: '
            'take out the state_dict hook, or the method, that puts it there'
        )


def refuse_not_finite(model: nn.Module, when: str = BEFORE_TRAINING) -> None:
    """Raises ConfigError, naming it, for a weight or a BatchNorm statistic with NaN or infinity: nothing could be learnt.

    ``when``: when it was found, and what to do.
    """
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in own_state(model).items():
        if (name in own or name.endswith(_STATISTICS)) and not bool(value.isfinite().all()):
            raise ConfigError(
                f'{name} holds NaN or infinity, so that private steps would spend privacy and learn nothing. {when}'
            )


def refuse_other_models(model: nn.Module, experts: Sequence[tuple[str, str]]) -> None:
    """Raises ConfigError, on every process, if they hold different weights or experts: each machine reads its own files."""
    if get_world_size() == 1:
        return
    held = all_gather_object((digest_of(own_state(model)), [digest for _, digest in experts]))
    if different := [rank for rank, one in enumerate(held) if one != held[0]]:
        raise ConfigError(
            f'process {different[0]} starts with other weights or experts than process 0: put the same files of load_from, '
            'init_cfg and optim_wrapper.experts on every machine'
        )


def restore_own_values(model: nn.Module, saved: dict) -> None:
    """Gives the entries of a state dict that are a model's own the values that they have in the model, in place."""
    saved.update({name: value.cpu() for name, value in own_state(model).items() if name in saved})


class OwnStateHook(Hook):
    """Drops from a checkpoint what is not the model's own, from EMAHook's state dict too, which has the same names and hooks."""

    priority = 'LOWEST'

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keeps the names of the model's own tensors alone; beside averaged weights, with the values that both models have."""
        own = own_state(unwrapped(runner.model))
        for key, names in (('state_dict', {*own}), ('ema_state_dict', {'steps', *(f'module.{name}' for name in own)})):
            if key in checkpoint:
                kept = OrderedDict((name, value) for name, value in checkpoint[key].items() if name in names)
                setattr(kept, '_metadata', own._metadata if key == 'state_dict' else {})  # type: ignore[attr-defined]  # noqa: B010
                checkpoint[key] = kept
        averaged = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
        # EMAHook has swapped the two, and its copy has the model's hooks
        if averaged and 'ema_state_dict' in checkpoint:
            restore_own_values(averaged[-1], checkpoint['state_dict'])
            other = checkpoint['ema_state_dict']
            other.update((f'module.{name}', value.cpu()) for name, value in own.items() if f'module.{name}' in other)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module with the prefix of its names in a state dict."""
    for name, module in model.named_modules(remove_duplicate=False):
        yield (f'{name}.' if name else ''), module
