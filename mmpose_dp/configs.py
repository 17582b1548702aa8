"""Makes a config of MMPose's private: three statements make a private config.

A text config::

    _base_ = 'mmpose::body_2d_keypoint/topdown_heatmap/mpii/td-hm_res50_8xb64-210e_mpii-256x256.py'
    from mmpose_dp.configs import private
    globals().update(private(_base_, 'hybrid'))

A new-style config, in which mmengine does not execute imports of other packages::

    with read_base():
        from .my_plain_config import *
    from importlib import import_module
    globals().update(import_module('mmpose_dp.configs').private(globals(), 'hybrid'))

``_base_`` comes first, since mmengine recognises a text config by it. The settings of a method are in
``configs/_base_/<method>.py``. Must not hold settings of a method.
"""

import copy
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from mmpose_dp.engine.half_private import is_private, private_parts
from mmpose_dp.engine.leftovers import without_deletions
from mmpose_dp.engine.spelling import refuse_misspelled, refuse_unknown_top
from mmpose_dp.engine.training_settings import REPLACED, WRITTEN, settings_in_words
from mmpose_dp.privacy.errors import ConfigError

__all__ = ['private']  # a config's variables are what it imports by *

FOLDER = Path(__file__).parent / '.mim/configs'  # in a checkout, a link to configs/
METHODS = ('dpsgd', 'projected', 'kronecker', 'experts', 'feature', 'first_stage', 'hybrid')


def _parts(name: str) -> ConfigDict:
    """The content of ``configs/_base_/<name>.py``, such as ``dp_dataset``."""
    lazy, ConfigDict.lazy = ConfigDict.lazy, False
    try:
        return Config.fromfile(FOLDER / '_base_' / f'{name}.py', import_custom_modules=False)._cfg_dict
    finally:
        ConfigDict.lazy = lazy


def private(base: dict, method: str, epsilon: float = 0.8, public: str | None = None, **changes: Any) -> dict[str, Any]:
    """The keys to add to a config so that it trains privately.

    Args:
        base: ``_base_`` of a text config, ``globals()`` of a new-style one.
        method: 'dpsgd', 'projected', 'kronecker', 'experts', 'feature', 'first_stage' or 'hybrid' (``configs/_base_/``).
        epsilon: the budget.
        public: 'coco_as_mpii' for COCO as public data beside a private set with MPII's joints.
        changes: further changes, as in a config that inherits the result: dicts are merged key by key, and ``_delete_=True``
            replaces one. Example: ``train_dataloader=dict(batch_sampler=dict(expected_batch_size=512))``.

    Optimizer, epochs, schedule and intervals become those of the method (docs/private_config.md); tools/check_config.py shows
    what was replaced. The backbone's own pretrained weights are removed: set ``load_from``.

    Raises ConfigError for an unknown method or public data, for a base without a training set, and for a change that nothing
    would read, such as a misspelled argument.
    """
    if isinstance(base, (str, list, tuple)):
        raise ConfigError(
            f'private({base!r}, {method!r}): the first argument is the config itself. Write _base_ = {base!r} on a line above, and '
            f'private(_base_, {method!r})'
        )
    if method not in METHODS:
        raise ConfigError(f'private(_base_, {method!r}): unknown method; write one of {", ".join(METHODS)}')
    if public not in (None, 'coco_as_mpii'):
        raise ConfigError(
            f"private(_base_, ..., public={public!r}): write 'coco_as_mpii', or the data set itself in changes"
        )
    private_set = ((base or {}).get('train_dataloader') or {}).get('dataset')
    if not isinstance(private_set, dict):
        raise ConfigError(
            'private(_base_, ...): the base has no train_dataloader.dataset; inherit from a config that trains, or, if '
            'train_dataloader is in the same file, give private(globals(), ...) below it'
        )
    if private_parts(base)['train_dataloader.dataset']:
        raise ConfigError(
            'private(_base_, ...): the base is private already. Give the plain config that it inherits from, or leave '
            'private() out and write only what changes, such as '
            'default_hooks = dict(privacy_budget=dict(target_epsilon=2.0))'
        )
    refuse_unknown_top(changes, base, ('method', 'epsilon', 'public'), 'private(_base_, ..., {}=...)')
    recipe = _parts(method)
    if public is not None:
        recipe['dp_public'] = _coco(private_set)
    added = _added(base, recipe, private_set, epsilon)
    text = '__builtins__' not in base  # mmengine merges a text config into its base; a new-style one is merged here
    whole = {}
    for key in {**added, **changes}:
        value = _merged(base.get(key), added.get(key)) if key in added else base.get(key)
        value = _merged(value, changes[key]) if key in changes else value
        whole[key] = dict(value, _delete_=True) if text and isinstance(value, dict) and key in base else value
    is_private({**base, **whole}, meant=True)
    refuse_misspelled({**base, **whole}, complete=False)
    return {**whole, REPLACED: base.get(REPLACED) or settings_in_words(base), WRITTEN: sorted(whole)}


def _added(base: dict, recipe: dict, private_set: dict, epsilon: float) -> dict[str, Any]:
    """The settings of a method, under the keys that MMPose's configs use."""
    dataset = dict(recipe['dp_dataset'], private=private_set)
    if 'dp_public' in recipe:
        dataset['public'] = dict(dict(pipeline=private_set.get('pipeline', [])), **recipe['dp_public'])
    backbone = (base.get('model') or {}).get('backbone') or {}
    imports = (base.get('custom_imports') or {}).get('imports', [])
    imports = [imports] if isinstance(imports, str) else imports
    hooks = dict(recipe['dp_hooks'])
    hooks['privacy_budget'] = dict(hooks['privacy_budget'], target_epsilon=epsilon)
    return dict(
        **(dict(model=dict(backbone=dict(init_cfg=None))) if backbone.get('init_cfg') else {}),
        # a new-style config may name each class itself; the names of ours are MMPose's
        **({} if base.get('default_scope') else dict(default_scope='mmpose')),
        train_dataloader=dict(batch_sampler=recipe['dp_batch_sampler'], dataset=dataset),
        custom_imports=dict(
            recipe['dp_imports'], imports=[*dict.fromkeys([*imports, *recipe['dp_imports']['imports']])]
        ),
        train_cfg=recipe['dp_train_cfg'],
        optim_wrapper=recipe['dp_optim_wrapper'],
        param_scheduler=recipe['dp_param_scheduler'],
        default_hooks=hooks,
    )


def _coco(private_set: dict) -> dict:
    """COCO in MPII's joints, through the private set's pipeline."""
    coco, (first, *others) = _parts('coco_as_mpii'), private_set['pipeline']
    return dict(coco['dp_coco'], pipeline=[first, coco['dp_joints'], *others])


def _merged(old: Any, new: Any) -> Any:
    """``new`` merged into ``old`` as mmengine inherits, without changing either."""
    if not isinstance(new, dict) or not isinstance(old, dict):
        return without_deletions(copy.deepcopy(new))
    whole = ConfigDict(copy.deepcopy(old))
    whole.merge(ConfigDict(copy.deepcopy(new)))
    return without_deletions(whole)
