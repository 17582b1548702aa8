# The same, private: what the blur removes is protected with epsilon 8.
_base_ = './five-joints_plain.py'
from mmpose_dp.configs import private

globals().update(
    private(
        _base_,
        'hybrid',
        epsilon=8.0,
        # below 1 / number of people
        default_hooks=dict(privacy_budget=dict(target_delta=5e-4), checkpoint=dict(interval=5)),
        # a tenth of the people, on average, in each private step; the default is for a set like MPII
        train_dataloader=dict(batch_sampler=dict(expected_batch_size=100, public_batch_size=32)),
        # two epochs on public views, then eight on pictures
        train_cfg=dict(max_epochs=10, public_epochs=2, val_interval=5),
        param_scheduler=[dict(type='MultiStepLR', milestones=[8], gamma=0.1, by_epoch=True)],
    )
)
