"""Checks the settings of DPOptimWrapper and its model: what cannot be is refused by name. Must not train anything."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from mmpose_dp.extras.adaptive_norm import LEAST_NORM
from mmpose_dp.extras.clipping_variants import mechanism_of
from mmpose_dp.extras.kronecker import projector_class
from mmpose_dp.models import FeatureMaskingHead, make_private
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.mechanism import GaussianMechanism
from mmpose_dp.privacy.projection import Projector

# what mmengine's DefaultOptimWrapperConstructor reads, and what MMPose's LayerDecayOptimWrapperConstructor reads
_PARAMWISE = {
    *('bias_lr_mult', 'bias_decay_mult', 'norm_decay_mult', 'flat_decay_mult', 'dwconv_decay_mult'),
    *('dcn_offset_lr_mult', 'bypass_duplicate', 'custom_keys'),
}
# the last is in MMPose's configs of ViTPose, where nothing reads it
_FACTORS = {'lr_mult', 'decay_mult', 'decay_multi'}
_LAYER_DECAY = {'layer_decay_rate', 'num_layers'}


def is_number(value: Any) -> bool:
    """Whether a setting is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_settings(plain_settings: dict, **own: Any) -> None:
    """Raises PrivacyError, naming the key of ``optim_wrapper``, for a value that cannot be."""
    for key, value in plain_settings.items():
        if key not in ('clip_grad', 'accumulative_counts'):
            raise PrivacyError(f'optim_wrapper.{key} is unknown to DPOptimWrapper: take it out')
        if value not in (None, 1):
            raise PrivacyError(
                f'optim_wrapper.{key}={value!r} cannot be kept in private training: clipping is per record '
                f'(max_grad_norm), large batches come from expected_batch_size. Write {key}=None'
            )
    wanted = {
        'max_grad_norm': (lambda x: is_number(x) and x >= LEAST_NORM, f'a number, {LEAST_NORM:g} or above'),
        'noise_multiplier': (lambda x: x is None or is_number(x) and x >= 0, 'a number, 0 or above, or None'),
        'expected_batch_size': (lambda x: x is None or type(x) is int and x > 0, 'a whole number above 0, or None'),
        'public_weight': (lambda x: is_number(x) and x >= 0, 'a number, 0 or above'),
        'amp_dtype': (lambda x: x in (None, 'bfloat16', 'float16'), "'bfloat16', 'float16' or None"),
        'loss_scale': (
            # below 1, squares of gradients could vanish, and clipping with them
            lambda x: x is None or is_number(x) and x >= 1,
            'a fixed number, 1 or above: a dynamic scale would follow the private gradients and reveal something of them',
        ),
    }
    for key, (fits, what) in wanted.items():
        if not fits(own[key]):
            raise PrivacyError(f'optim_wrapper.{key}={own[key]!r} must be {what}')


def check_paramwise(paramwise_cfg: Any) -> None:
    """Raises PrivacyError for a key of ``optim_wrapper.paramwise_cfg`` that nothing would read."""
    if paramwise_cfg is None:
        return
    if not isinstance(paramwise_cfg, dict):
        raise PrivacyError(f'optim_wrapper.paramwise_cfg={paramwise_cfg!r} must be a dict, or left out')
    unknown = sorted(set(paramwise_cfg) - _PARAMWISE - _LAYER_DECAY)
    if unknown:
        raise PrivacyError(
            f'optim_wrapper.paramwise_cfg.{unknown[0]} is unknown to DPOptimWrapperConstructor, which takes '
            f'{", ".join(sorted(_PARAMWISE | _LAYER_DECAY))}: take it out'
        )
    custom = paramwise_cfg.get('custom_keys')
    for name, factors in custom.items() if isinstance(custom, dict) else ():
        if not isinstance(factors, dict) or set(factors) - _FACTORS or not all(map(is_number, factors.values())):
            raise PrivacyError(
                f'optim_wrapper.paramwise_cfg.custom_keys[{name!r}]={factors!r} must be a dict of numbers named lr_mult and '
                'decay_mult, which multiply lr and weight_decay'
            )
    given = _LAYER_DECAY & set(paramwise_cfg)
    if not given:
        return
    if given != _LAYER_DECAY:
        raise PrivacyError(
            'optim_wrapper.paramwise_cfg: layer_decay_rate and num_layers go together; give both or none'
        )
    rate, layers = paramwise_cfg['layer_decay_rate'], paramwise_cfg['num_layers']
    if not (is_number(rate) and rate > 0) or type(layers) is not int or layers < 1:
        raise PrivacyError(
            f'optim_wrapper.paramwise_cfg: layer_decay_rate={rate!r} must be a number above 0 and num_layers={layers!r} a whole '
            'number above 0'
        )


def projector_from(value: Any) -> Projector | None:
    """The projector of ``optim_wrapper.projector``, of its type. Raises ConfigError for an unknown type."""
    if not isinstance(value, Mapping):
        return from_settings(Projector, value, 'projector')
    return from_settings(projector_class(value), {key: x for key, x in value.items() if key != 'type'}, 'projector')


def from_settings(kind: type, value: Any, key: str) -> Any:
    """An object from the arguments in ``optim_wrapper.<key>``, or as it was given, or None."""
    if value is None or isinstance(value, kind):
        return value
    try:
        return kind(**value)
    except TypeError as error:
        raise PrivacyError(f'optim_wrapper.{key}={value!r} does not fit: {error}') from error


def private_head(model: nn.Module) -> FeatureMaskingHead:
    """The model's head, made private in place. Raises PrivacyError for a head that cannot be, or several private ones."""
    heads = [m for m in model.modules() if isinstance(m, FeatureMaskingHead)]
    if len(heads) > 1:
        raise PrivacyError(f'the model has {len(heads)} private heads, and one is supported: leave one head in model')
    return heads[0] if heads else make_private(getattr(model, 'head', None))


def build_mechanism(clipping: str, schedule: Any, **settings: Any) -> GaussianMechanism:
    """The mechanism of ``optim_wrapper.clipping``. Raises PrivacyError for a pair of settings that has no meaning."""
    if clipping == 'per-layer':
        warnings.warn(
            "optim_wrapper.clipping='per-layer' is now called 'per-parameter'", DeprecationWarning, stacklevel=3
        )
        clipping = 'per-parameter'
    if clipping == 'adaptive' and schedule is not None and schedule.max_grad_norm != 1:
        raise PrivacyError(
            f"optim_wrapper.schedule.max_grad_norm={schedule.max_grad_norm} and clipping='adaptive' both move C: "
            "write clipping='flat', or take max_grad_norm out of the schedule"
        )
    last = settings['max_grad_norm'] * (1 if schedule is None else schedule.max_grad_norm)
    if last < LEAST_NORM:
        raise PrivacyError(
            f'optim_wrapper.schedule.max_grad_norm={schedule.max_grad_norm} makes C {last:g} at the end, where squares of '
            f'gradients vanish in float32: write a factor that leaves {LEAST_NORM:g} or more'
        )
    return mechanism_of(clipping)(**settings)
