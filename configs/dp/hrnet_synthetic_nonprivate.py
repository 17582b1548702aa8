# The non-private twin of configs/dp/hrnet_synthetic_*: plain training on the private domain. Offers NO privacy.
_base_ = '../_base_/hrnet_synthetic.py'

train_cfg = dict(max_epochs=8, val_interval=2)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=2e-5, T_max=8, by_epoch=True)]
