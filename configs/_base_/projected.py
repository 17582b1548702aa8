# Projected DP-SGD: the subspace comes from a data set that is really public. The default is the synthetic public domain:
#   python tools/make_synthetic_mpii.py --out data/synthetic_public --domain public --train 6000 --val 1000 --image-size 128
# A leaf config gives it the private set's own pipeline: dataset=dict(public=dict(_base_.dp_public, pipeline=...)).
_base_ = './private.py'

dp_public = dict(
    type='MpiiDataset',
    data_root='data/synthetic_public/',
    data_mode='topdown',
    ann_file='annotations/mpii_train.json',
    data_prefix=dict(img='images/'),
)
# not the paper's AdamW, which scales the noised update out of the subspace (docs/accuracy.md)
dp_optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='SGD', lr=0.2, momentum=0.9),
    projector=dict(rank=100, refresh_interval=50, dtype='bfloat16'),
)
dp_hooks = dict(public_data=dict(type='ProjectorRefreshHook'))
