"""Builds DPOptimWrapper for a model: treats its norms, chooses what is trained, and checks it. Must not train anything."""

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
from mmengine.optim import DefaultOptimWrapperConstructor
from mmpose.engine.optim_wrappers import LayerDecayOptimWrapperConstructor
from mmpose.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import Tensor, nn

from mmpose_dp.extras.experts import digest_of
from mmpose_dp.messages import failure, reason
from mmpose_dp.models import (
    choose_trainable,
    freeze_batch_norm,
    read_checkpoint,
    replace_batch_norm,
    unwrapped,
    weights_of,
)
from mmpose_dp.privacy.errors import ConfigError, PrivacyError

from ..leftovers import without_deletions
from .dp_optim_wrapper import DPOptimWrapper
from .validation import check_paramwise


def experts_of(paths: Any) -> list[dict[str, Tensor]]:
    """The state dicts of ``optim_wrapper.experts``. Raises ConfigError for a file that cannot be read or holds no weights."""
    if not isinstance(paths, (list, tuple)) or not all(isinstance(path, str) for path in paths):
        raise ConfigError(f'optim_wrapper.experts={paths!r} must be a list of checkpoints')
    key = 'optim_wrapper.experts'
    return [weights_of(read_checkpoint(path, key), f'{key}: checkpoint={path}') for path in paths]


def _try_step(settings: dict, model: nn.Module) -> None:
    """A step of an optimizer on small parameters, one for each number of dimensions that the model's have."""
    kinds = {p.dim(): p for p in model.parameters() if p.requires_grad}
    small = nn.ParameterList(torch.zeros((2,) * dims, dtype=p.dtype, device=p.device) for dims, p in kinds.items())
    for param in small:
        param.grad = torch.ones_like(param)
    DefaultOptimWrapperConstructor(dict(type='OptimWrapper', optimizer=settings))(small).optimizer.step()


class LayeredConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, which also takes the two keys of MMPose's LayerDecayOptimWrapperConstructor."""

    key = 'optim_wrapper.optimizer'

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        try:
            super().__init__(optim_wrapper_cfg, paramwise_cfg)
        except (TypeError, ValueError, AssertionError) as error:  # mmengine's
            if 'base_wd' not in str(error):
                raise PrivacyError(f'optim_wrapper: {reason(error)}') from error
            raise PrivacyError(
                f'optim_wrapper.paramwise_cfg multiplies the weight decay (decay_mult), and {self.key} has none: write '
                f'{self.key}.weight_decay, such as 0.01, or take the keys that end in decay_mult out'
            ) from error

    def __call__(self, model: nn.Module) -> Any:
        """As mmengine's. Raises PrivacyError for an optimizer that cannot be built, or cannot take a step on plain gradients."""
        settings = dict(self.optimizer_cfg)
        try:
            _try_step(settings, unwrapped(model))
        except Exception as error:  # an optimizer can raise anything
            raise ConfigError(f'{self.key}={settings!r} cannot be used: {failure(error, 300)}') from error
        return super().__call__(model)

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **inner: Any) -> None:
        """As mmengine's; with ``layer_decay_rate`` as MMPose's LayerDecayOptimWrapperConstructor, which ViTPose's configs name.

        Raises PrivacyError where layer decay knows no layer of the model, and so would change no learning rate.
        """
        if 'layer_decay_rate' not in self.paramwise_cfg:
            super().add_params(params, module, prefix, **inner)
            return
        decayed = LayerDecayOptimWrapperConstructor(
            dict(self.optim_wrapper_cfg, optimizer=self.optimizer_cfg), self.paramwise_cfg
        )
        with redirect_stdout(StringIO()):  # it prints its settings
            decayed.add_params(params, module)
        for group in params if self.base_wd is None else ():
            del group['weight_decay']  # the optimizer's own: MMPose would put None there
        if len({group['lr'] for group in params}) == 1 and self.paramwise_cfg['layer_decay_rate'] != 1:
            raise PrivacyError(
                'optim_wrapper.paramwise_cfg.layer_decay_rate changes no learning rate of this model: it is for vision '
                'transformers, whose layers are backbone.layers. Take out layer_decay_rate and num_layers, or write custom_keys'
            )


class _PublicConstructor(LayeredConstructor):
    key = 'optim_wrapper.public_optimizer'


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DPOptimWrapperConstructor(LayeredConstructor):
    """mmengine's constructor for private training. A model that cannot be made private is refused before data is read.

    Beside DPOptimWrapper's own arguments, ``optim_wrapper`` may hold

    - ``norm``: 'frozen' (default; every BatchNorm keeps the statistics it was loaded with, scale and shift are trained) or
      'group' (GroupNorm in its place: :func:`mmpose_dp.models.replace_batch_norm`).
    - ``trainable``, ``lora_rank``, ``experts`` (a list of checkpoints) and ``mix_from``: what is trained, see
      :func:`mmpose_dp.models.choose_trainable`.
    - ``public_optimizer``: what optimizer takes the steps of ``train_cfg.public_epochs``, such as dict(type='AdamW', lr=1e-3).
      It trains all that the model does, whatever ``trainable`` leaves to the private steps. None: the same one, and the
      same parameters, as in private steps. ``param_scheduler`` moves both in proportion.

    Examples:
        >>> optim_wrapper = dict(type='DPOptimWrapper', max_grad_norm=0.1, optimizer=dict(type='SGD', lr=0.1),
        ...                      constructor='DPOptimWrapperConstructor', trainable='head+last_stage+norms')
        >>> DPOptimWrapperConstructor(optim_wrapper).subset
        {'trainable': 'head+last_stage+norms'}
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        settings = without_deletions(dict(optim_wrapper_cfg))
        self.norm = settings.pop('norm', 'frozen')
        self.public_optimizer = settings.pop('public_optimizer', None)
        self.subset = {key: settings.pop(key) for key in ('trainable', 'lora_rank', 'mix_from') if key in settings}
        self.experts = settings.pop('experts', None) or ()
        if self.public_optimizer is not None and not (
            isinstance(self.public_optimizer, dict) and 'type' in self.public_optimizer
        ):
            raise PrivacyError(
                f"optim_wrapper.public_optimizer={self.public_optimizer!r} must be None or like dict(type='AdamW', lr=1e-3)"
            )
        if self.norm not in ('frozen', 'group'):
            raise PrivacyError(f"optim_wrapper.norm={self.norm!r} is unknown; write 'frozen' or 'group'")
        check_paramwise(paramwise_cfg)
        super().__init__(settings, paramwise_cfg)

    def __call__(self, model: nn.Module) -> DPOptimWrapper:
        """Returns the wrapper, prepared for the model. Raises PrivacyError."""
        core = unwrapped(model)
        if model is not core and not isinstance(model, nn.parallel.DistributedDataParallel):
            raise PrivacyError(
                f'model_wrapper_cfg.type={type(model).__name__!r} cannot be used: each process must hold the whole model, and '
                "run its own samples through it. Write type='MMDistributedDataParallel', or leave model_wrapper_cfg out"
            )
        # or each forward would wait for the processes that sampled no record
        if getattr(model, 'broadcast_buffers', False):
            setattr(model, 'broadcast_buffers', False)  # noqa: B010  (mypy takes it for a tensor)
        if self.norm == 'group':
            replace_batch_norm(core)
        freeze_batch_norm(core)
        core.train()  # many backbones freeze their stages (frozen_stages) only here
        before = {param for param in core.parameters() if param.requires_grad}
        if not before:
            raise PrivacyError(
                'the model has no parameter to train: lower model.backbone.frozen_stages, or set requires_grad in its head'
            )
        experts = experts_of(self.experts)
        choose_trainable(core, **self.subset, experts=experts)
        core.train()  # and frozen stages stay frozen, with the updates that 'lora' added to them
        wrapper = super().__call__(model)
        wrapper.experts = [(path, digest_of(weights)) for path, weights in zip(self.experts, experts)]
        wrapper.left_out = [p for p in core.parameters() if p in before and not p.requires_grad]
        if self.public_optimizer is not None:
            plain = dict(type='OptimWrapper', optimizer=self.public_optimizer)
            wrapper.public_optimizer = _PublicConstructor(plain, self.paramwise_cfg)(model).optimizer
            wrapper.public_params = [p for p in core.parameters() if p in before or p.requires_grad]
        wrapper.prepare(core)
        return wrapper
