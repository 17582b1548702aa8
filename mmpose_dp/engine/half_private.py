"""Refuses a config that is private only in part, also one that ``private()`` made and that lost some of its parts afterwards.

Such a config would train without the guarantee that its file seems to promise, or stop with an error of mmengine that does not say
why. Must not build anything.
"""

from typing import Any

from mmpose.registry import DATASETS, HOOKS, LOOPS, OPTIM_WRAPPERS

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.datasets.resolving import is_kind, resolved, type_name
from mmpose_dp.privacy.errors import ConfigError

from .loops import PrivateTrainLoop
from .optim_wrappers import DPOptimWrapper
from .training_settings import REPLACED

_HOOK = 'default_hooks.privacy_budget'
_NEEDED = {'optim_wrapper': 'DPOptimWrapper', 'train_cfg': 'PrivateTrainLoop', _HOOK: 'PrivacyBudgetHook'}


def private_parts(cfg: Any) -> dict[str, bool]:
    """Of the keys that make a config private, whether each does."""
    hooks = [*(cfg.get('default_hooks') or {}).values(), *(cfg.get('custom_hooks') or [])]
    budget = resolved(HOOKS, 'PrivacyBudgetHook')
    return {
        'optim_wrapper': is_kind(OPTIM_WRAPPERS, cfg.get('optim_wrapper') or {}, DPOptimWrapper),
        'train_dataloader.dataset': is_kind(
            DATASETS, (cfg.get('train_dataloader') or {}).get('dataset') or {}, PublicPrivateDataset
        ),
        'train_cfg': is_kind(LOOPS, cfg.get('train_cfg') or {}, PrivateTrainLoop),
        _HOOK: any(isinstance(hook, dict) and is_kind(HOOKS, hook, budget) for hook in hooks),
    }


def is_private(cfg: Any, meant: bool = False) -> bool:
    """Whether a config is private.

    Raises ConfigError, with what to write, if only some of its parts are, or if none is any more although it was ``meant`` to be
    (``private()`` made it).
    """
    plain = [key for key, private in private_parts(cfg).items() if not private]
    if len(plain) < len(_NEEDED) + 1 and plain or plain and (meant or REPLACED in cfg):
        top = plain[0].partition('.')[0]
        place = (
            f'The arguments of private(_base_, ...) are merged into what the method needs, and _delete_=True or None removes that: '
            f'leave them out of {top}, or write what is needed too'
            if meant
            else f'An assignment below private() replaces what it wrote: give {top}=... to private(_base_, ...) instead'
        )
        instead = ' '.join(filter(None, (_instead(cfg, key) for key in plain)))
        raise ConfigError(
            f'{", ".join(plain)} configure{"s" * (len(plain) == 1)} plain training, while the rest of this config is private.'
            f'{instead and " " + instead} {place}'
        )
    return not plain


def _instead(cfg: Any, key: str) -> str:
    """What to write in place of a part of plain training; empty where only the place is wrong."""
    part = cfg.get(key)
    if key not in _NEEDED or not isinstance(part, dict) or not {'type', 'max_iters'} & {*part}:
        return ''
    words = f'Private training needs {_NEEDED[key]!r}'
    if 'type' in part:
        words = f'Leave out {key}.type={type_name(part["type"])!r}, since private training needs {_NEEDED[key]!r}'
    if 'Amp' in type_name(part.get('type', '')):
        words += (
            "; for mixed precision write optim_wrapper=dict(amp_dtype='bfloat16'), without loss_scale, or give --amp"
        )
    if 'max_iters' in part:
        words += '; in place of max_iters write max_epochs, each of num_records // expected_batch_size steps'
    return f'{words}.'
