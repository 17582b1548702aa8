_base_ = ['../_base_/hrnet_synthetic.py', '../_base_/feature.py']

model = dict(head=dict(type='PrivateSimCCHead'))
train_dataloader = dict(
    batch_sampler=dict(_base_.dp_batch_sampler, expected_batch_size=256, public_batch_size=128),
    dataset=dict(_base_.dp_dataset, private=_base_.train_dataloader.dataset),
)
custom_imports = _base_.dp_imports
train_cfg = _base_.dp_train_cfg
optim_wrapper = _base_.dp_optim_wrapper
param_scheduler = _base_.dp_param_scheduler
default_hooks = _base_.dp_hooks
