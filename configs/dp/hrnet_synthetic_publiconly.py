# Training on the public views alone: what Feature DP gives for free. The row that a private method has to beat.
# No step is private: the budget, projector and clipping it inherits are not used.
# Validated on images as they are, tested on their public views.
_base_ = './hrnet_synthetic_hybrid_eps08.py'

train_dataloader = dict(batch_sampler=dict(public_batch_size=128))
train_cfg = dict(public_epochs=5)
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=1e-3))
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=1e-4, T_max=5, by_epoch=True)]
test_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImage'),
            dict(type='GetBBoxCenterScale'),
            _base_.public_view,
            dict(type='TopdownAffine', input_size=_base_.simcc.input_size),
            dict(type='PackPoseInputs'),
        ]
    )
)
