# The same model and people as small_nonprivate.py with DP-SGD at epsilon 0.8.
_base_ = './small_nonprivate.py'
from mmpose_dp.configs import private

globals().update(
    private(
        _base_,
        'dpsgd',
        epsilon=0.8,
        train_dataloader=dict(batch_sampler=dict(expected_batch_size=25)),
        train_cfg=dict(max_epochs=20),
        default_hooks=dict(privacy_budget=dict(target_delta=1e-3)),
    )
)
