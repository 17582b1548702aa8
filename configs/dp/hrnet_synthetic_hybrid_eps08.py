# The demo's private training, tuned on the synthetic set. Drawn people have flat colours and sharp edges, which the default
# view leaves as they are at 64 pixels: the public view is blurred more here, and views first do not help.
_base_ = ['../_base_/hrnet_synthetic.py', '../_base_/hybrid.py']

model = dict(head=dict(type='PrivateSimCCHead'))
public_view = dict(type='PublicView', mode='blur', sigma=14.0)
train_dataloader = dict(
    batch_sampler=dict(_base_.dp_batch_sampler, expected_batch_size=400),
    dataset=dict(_base_.dp_dataset, private=_base_.train_dataloader.dataset, public_view=public_view),
)
custom_imports = _base_.dp_imports
train_cfg = dict(_base_.dp_train_cfg, max_epochs=5, public_epochs=0, val_interval=1)
optim_wrapper = dict(
    _base_.dp_optim_wrapper,
    # plain SGD: Adam's scaling by coordinate would lead out of the subspace, and back into the full dimension's noise
    optimizer=dict(type='SGD', lr=1.2),
    public_optimizer=None,
    projector=dict(rank=100, refresh_interval=5, dtype='bfloat16'),
)
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=0.03, T_max=5, by_epoch=True)]
default_hooks = dict(
    _base_.dp_hooks,
    privacy_budget=dict(_base_.dp_hooks.privacy_budget, interval=5),
    public_data=dict(type='ProjectorRefreshHook'),
    logger=dict(interval=5),
)
