# Feature DP as in "ours" of docs/accuracy.md: the public epochs train the whole model on the views alone; private images then
# train only the norm layers and the backbone up to its first stage, the parameters that see what a blur removes. These are so few
# that their noise is small without a projector.
_base_ = './private.py'

dp_dataset = dict(public_view=dict(type='PublicView', mode='blur'))
dp_batch_sampler = dict(expected_batch_size=1024, public_batch_size=32)
dp_optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=3e-3),
    public_optimizer=dict(type='AdamW', lr=5e-4),
    public_weight=2e-4,
    trainable='norms+first_stage',
)
dp_train_cfg = dict(max_epochs=35, public_epochs=10)
dp_param_scheduler = [dict(type='MultiStepLR', milestones=[30], gamma=0.1, by_epoch=True)]
