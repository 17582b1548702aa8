# A small HRNet (0.8 M parameters, 64x64 input) on the synthetic set: the demo's model, fast on two CPU cores, without privacy.
#   python tools/make_synthetic_mpii.py --out data/synthetic_private --domain private --train 4000 --val 1000 --image-size 128
_base_ = 'mmpose::body_2d_keypoint/topdown_heatmap/mpii/td-hm_hrnet-w32_8xb64-210e_mpii-256x256.py'

simcc = dict(type='SimCCLabel', input_size=(64, 64), sigma=3.0, simcc_split_ratio=2.0)
codec = dict(_delete_=True, **simcc)
model = dict(
    backbone=dict(
        init_cfg=None,
        extra=dict(
            stage1=dict(num_blocks=(1,), num_channels=(16,)),
            stage2=dict(num_blocks=(1, 1), num_channels=(16, 32)),
            stage3=dict(num_modules=1, num_blocks=(1, 1, 1), num_channels=(16, 32, 64)),
            stage4=dict(num_modules=1, num_blocks=(1, 1, 1, 1), num_channels=(16, 32, 64, 128)),
        ),
    ),
    head=dict(
        _delete_=True,
        type='SimCCHead',
        in_channels=16,
        out_channels=16,
        input_size=simcc['input_size'],
        in_featuremap_size=(16, 16),
        simcc_split_ratio=simcc['simcc_split_ratio'],
        deconv_out_channels=None,
        loss=dict(type='KLDiscretLoss', use_target_weight=True),
        decoder=simcc,
    ),
    test_cfg=dict(_delete_=True, flip_test=False),
)

data_root = 'data/synthetic_private/'
train_pipeline = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    dict(type='RandomFlip', direction='horizontal'),
    dict(type='RandomBBoxTransform', shift_prob=0),
    dict(type='TopdownAffine', input_size=simcc['input_size']),
    dict(type='GenerateTarget', encoder=simcc),
    dict(type='PackPoseInputs'),
]
val_pipeline = [
    dict(type='LoadImage'),
    dict(type='GetBBoxCenterScale'),
    dict(type='TopdownAffine', input_size=simcc['input_size']),
    dict(type='PackPoseInputs'),
]
train_dataloader = dict(batch_size=128, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=128,
    dataset=dict(data_root=data_root, headbox_file=f'{data_root}annotations/mpii_gt_val.mat', pipeline=val_pipeline),
)
test_dataloader = val_dataloader
default_hooks = dict(checkpoint=dict(interval=100, save_best=None), logger=dict(interval=20))
train_cfg = dict(max_epochs=20, val_interval=5)
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=2e-3))
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=2e-5, T_max=20, by_epoch=True)]
