# Public pretraining for the synthetic set: plain training on the public domain. Offers NO privacy and needs none.
#   python tools/make_synthetic_mpii.py --out data/synthetic_public --domain public --train 6000 --val 1000 --image-size 128
_base_ = '../_base_/hrnet_synthetic.py'

data_root = 'data/synthetic_public/'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root, headbox_file=f'{data_root}annotations/mpii_gt_val.mat'))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=8, val_interval=4)
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=2e-5, T_max=8, by_epoch=True)]
