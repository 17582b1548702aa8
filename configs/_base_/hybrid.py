# Hybrid: Feature DP with a projector whose subspace comes from the public views of the training set. Public views first, private
# images second: the first epochs train on the views alone and spend nothing.
_base_ = './private.py'

dp_dataset = dict(public_view=dict(type='PublicView', mode='blur'))
dp_batch_sampler = dict(public_batch_size=32)
dp_optim_wrapper = dict(public_weight=0.1, projector=dict(rank=100, refresh_interval=50, dtype='bfloat16'))
dp_train_cfg = dict(max_epochs=35, public_epochs=10)
dp_param_scheduler = [dict(type='MultiStepLR', milestones=[30], gamma=0.1, by_epoch=True)]
dp_hooks = dict(public_data=dict(type='PublicDataHook'))
