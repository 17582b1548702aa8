_base_ = '../_base_/hrnet_synthetic.py'
from mmpose_dp.configs import private

globals().update(
    private(
        _base_, 'feature', train_dataloader=dict(batch_sampler=dict(expected_batch_size=256, public_batch_size=128))
    )
)
