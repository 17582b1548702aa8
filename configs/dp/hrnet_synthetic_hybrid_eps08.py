_base_ = '../_base_/hrnet_synthetic.py'
from mmpose_dp.configs import private

public_view = dict(type='PublicView', mode='blur', sigma=14.0)
globals().update(
    private(
        _base_,
        'hybrid',
        train_dataloader=dict(batch_sampler=dict(expected_batch_size=400), dataset=dict(public_view=public_view)),
        train_cfg=dict(max_epochs=5, public_epochs=0, val_interval=1),
        optim_wrapper=dict(
            # plain SGD: Adam's scaling by coordinate would lead out of the subspace, and back into the full dimension's noise
            optimizer=dict(_delete_=True, type='SGD', lr=1.2),
            max_grad_norm=0.1,
            public_optimizer=None,
            projector=dict(_delete_=True, rank=100, refresh_interval=5, dtype='bfloat16'),
        ),
        param_scheduler=[dict(type='CosineAnnealingLR', eta_min=0.03, T_max=5, by_epoch=True)],
        default_hooks=dict(public_data=dict(_delete_=True, type='ProjectorRefreshHook'), logger=dict(interval=5)),
    )
)
