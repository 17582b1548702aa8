"""Builds DPOptimWrapper for a model: its norms first, then what is trained, then the checks. Must not train anything."""

import warnings

from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor
from mmpose.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from mmpose_dp.models import choose_trainable, freeze_batch_norm, replace_batch_norm
from mmpose_dp.privacy import PrivacyError

from .dp_optim_wrapper import DPOptimWrapper


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DPOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor for private training. A model that cannot be made private is refused before data is read.

    Beside DPOptimWrapper's own arguments, ``optim_wrapper`` may hold

    - ``norm``: 'frozen' (default; every BatchNorm keeps the statistics it was loaded with, scale and shift are trained) or
      'group' (GroupNorm in its place: :func:`mmpose_dp.models.replace_batch_norm`).
    - ``trainable`` and ``lora_rank``: what is trained, see :func:`mmpose_dp.models.choose_trainable`.
    - ``public_optimizer``: what optimizer takes the steps of ``train_cfg.public_epochs``, such as dict(type='AdamW', lr=1e-3).
      It trains all that the model does, whatever ``trainable`` leaves to the private steps. None: the same one, and the
      same parameters, as in private steps. ``param_scheduler`` moves both in proportion.

    Examples:
        >>> optim_wrapper = dict(_base_.dp_optim_wrapper, trainable='head+last_stage+norms')
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        settings = dict(optim_wrapper_cfg)
        self.norm = settings.pop('norm', 'frozen')
        self.public_optimizer = settings.pop('public_optimizer', None)
        self.subset = {key: settings.pop(key) for key in ('trainable', 'lora_rank') if key in settings}
        if self.public_optimizer is not None and not (
            isinstance(self.public_optimizer, dict) and 'type' in self.public_optimizer
        ):
            raise PrivacyError(
                f"optim_wrapper.public_optimizer={self.public_optimizer!r} must be None or like dict(type='AdamW', lr=1e-3)"
            )
        if self.norm not in ('frozen', 'group'):
            raise PrivacyError(f"optim_wrapper.norm={self.norm!r} is unknown; write 'frozen' or 'group'")
        super().__init__(settings, paramwise_cfg)

    def __call__(self, model: nn.Module) -> DPOptimWrapper:
        """Returns the wrapper, prepared for the model. Raises PrivacyError."""
        core = model.module if is_model_wrapper(model) else model
        if self.norm == 'group':
            replace_batch_norm(core)
        freeze_batch_norm(core)
        core.train()  # many backbones freeze their stages (frozen_stages) only here
        before = {param for param in core.parameters() if param.requires_grad}
        if not before:
            raise PrivacyError(
                'the model has no parameter to train: lower model.backbone.frozen_stages, or thaw its head'
            )
        choose_trainable(core, **self.subset)
        core.train()  # and frozen stages stay frozen, with the updates that 'lora' added to them
        wrapper = super().__call__(model)
        if self.public_optimizer is not None:
            # in public epochs it is this one that steps before the scheduler does
            warnings.filterwarnings('ignore', 'Detected call of `scheduler.step')
            plain = dict(type='OptimWrapper', optimizer=self.public_optimizer)
            wrapper.public_optimizer = DefaultOptimWrapperConstructor(plain, self.paramwise_cfg)(model).optimizer
            wrapper.public_params = [p for p in core.parameters() if p in before or p.requires_grad]
        wrapper.prepare(core)
        return wrapper
