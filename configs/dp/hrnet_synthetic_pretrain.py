# Public pretraining for the synthetic set: plain training on the public domain. Offers NO privacy and needs none.
#   python tools/make_synthetic_mpii.py --out data/synthetic_public --domain public --train 6000 --val 1000
_base_ = '../_base_/hrnet_synthetic.py'

data_root = 'data/synthetic_public/'
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root, headbox_file=f'{data_root}annotations/mpii_gt_val.mat'))
test_dataloader = val_dataloader
