"""Finds what a config asks for that its training ends before: a switch of the pipeline, a validation, a checkpoint.

Settings of MMPose's own trainings, of hundreds of epochs, remain in a config of few. Must not change a hook.
"""

from typing import Any

from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner


def never_reached(runner: Runner) -> list[str]:
    """A sentence for each such setting. Without a checkpoint, the weights are lost, for which privacy is spent."""
    loop = runner.train_loop
    validates = runner.val_loop is not None and loop.val_begin <= loop.max_epochs
    found = []
    if not any(_saves(hook, loop, validates) for hook in runner.hooks if isinstance(hook, CheckpointHook)):
        found.append(
            'default_hooks.checkpoint writes no checkpoint of this training, so its weights are lost when the process ends, and '
            "the privacy is spent: write default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, save_last=True))"
        )
    if runner.val_loop is not None and not validates:
        found.append(
            f'train_cfg.val_begin={loop.val_begin} is after the last of {loop.max_epochs} epochs, so nothing is validated: write a '
            'smaller number'
        )
    return found + [
        f'{type(hook).__name__}.switch_epoch={hook.switch_epoch} is after the last of {loop.max_epochs} epochs, so its '
        'switch_pipeline is never used: write a smaller switch_epoch in custom_hooks, or take the hook out'
        for hook in runner.hooks
        if hasattr(hook, 'switch_pipeline') and type(getattr(hook, 'switch_epoch', None)) is int
        if hook.switch_epoch >= loop.max_epochs
    ]


def _saves(hook: CheckpointHook, loop: Any, validates: bool) -> bool:
    """Whether a hook writes a checkpoint before or at the end of training."""
    last = loop.max_epochs if hook.by_epoch else loop.max_iters
    first = hook.save_begin or hook.interval
    return hook.save_last or (hook.interval > 0 and first <= last) or (bool(hook.save_best) and validates)
