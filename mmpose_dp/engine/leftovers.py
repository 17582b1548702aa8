"""Removes leftovers of inheritance from a config, which no class accepts. Must not change what a setting means.

``_delete_=True`` removes a base's keys; without a base, mmengine leaves it among the settings. MMPose's ``default_runtime.py``
has ``train_cfg.by_epoch``, which mmengine does not accept beside ``train_cfg.type``.
"""

from typing import Any

from mmengine.config import Config
from mmpose.registry import LOOPS

from mmpose_dp.datasets.resolving import every_dict, resolved
from mmpose_dp.privacy.errors import ConfigError


def without_deletions(node: Any) -> Any:
    """Removes every ``_delete_`` from nested dicts and lists, in place, and returns ``node``."""
    for part in every_dict(node):
        part.pop('_delete_', None)
    return node


def without_leftovers(cfg: Config) -> Config:
    """Removes leftovers of inheritance from a config, in place. Raises ConfigError for ``train_cfg.by_epoch=False``."""
    without_deletions(cfg._cfg_dict)
    train_cfg = cfg.get('train_cfg')
    if isinstance(train_cfg, dict) and 'by_epoch' in train_cfg:
        loop = resolved(LOOPS, train_cfg.get('type'))
        if getattr(loop, '__name__', '') == 'PrivateTrainLoop' and train_cfg.pop('by_epoch') is not True:
            raise ConfigError(
                'train_cfg.by_epoch must be True or left out: private training counts epochs, of num_records // '
                'expected_batch_size steps each. Write train_cfg.max_epochs'
            )
    return cfg
