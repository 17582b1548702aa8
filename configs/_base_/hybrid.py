# Hybrid: Feature DP with a projector whose subspace comes from the public views of the training set. The first epochs train on the
# views alone and spend no privacy; private images follow. These are not the paper's settings but those that work from epsilon 0.2
# on in docs/accuracy.md: a large batch, coordinates clipped in a preconditioned subspace, and plain SGD, since Adam would scale the
# noised update out of the subspace.
_base_ = './private.py'

dp_dataset = dict(public_view=dict(type='PublicView', mode='blur'))
dp_batch_sampler = dict(expected_batch_size=1024, public_batch_size=32)
dp_optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='SGD', lr=25.0, momentum=0.9),
    public_optimizer=dict(type='AdamW', lr=5e-4),
    public_weight=5e-5,
    projector=dict(rank=25, refresh_interval=8, preconditioned=True, dtype='bfloat16'),
)
dp_train_cfg = dict(max_epochs=35, public_epochs=10)
dp_param_scheduler = [dict(type='MultiStepLR', milestones=[30], gamma=0.1, by_epoch=True)]
dp_hooks = dict(public_data=dict(type='ProjectorRefreshHook', num_samples=100))
