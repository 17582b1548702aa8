# Plain training of the project's own data set and model with MMPose.
_base_ = 'mmpose::_base_/default_runtime.py'
custom_imports = dict(imports=['datasets', 'models'], allow_failed_imports=False)

codec = dict(type='MSRAHeatmap', input_size=(64, 64), heatmap_size=(16, 16), sigma=1.5)
model = dict(
    type='TopdownPoseEstimator',
    data_preprocessor=dict(
        type='PoseDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    ),
    backbone=dict(type='ExampleBackbone', channels=32),
    head=dict(type='ExampleHead', in_channels=32, out_channels=5, loss=dict(type='VisibleJointsLoss'), decoder=codec),
)

dataset_type, data_mode, data_root = 'FiveJointsDataset', 'topdown', 'data/five_joints/'
shared = dict(type=dataset_type, data_mode=data_mode, data_root=data_root, data_prefix=dict(img='images/'))
load = [dict(type='LoadImage'), dict(type='GetBBoxCenterScale')]
pack = [dict(type='TopdownAffine', input_size=codec['input_size']), dict(type='PackPoseInputs')]
train_pipeline = [
    *load,
    dict(type='RandomFlip', direction='horizontal'),
    pack[0],
    dict(type='GenerateTarget', encoder=codec),
    pack[1],
]
loader = dict(batch_size=32, num_workers=2, persistent_workers=True)
train_dataloader = dict(
    **loader,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(**shared, ann_file='train.json', pipeline=train_pipeline),
)
val_dataloader = dict(
    **loader,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    drop_last=False,
    dataset=dict(**shared, ann_file='val.json', test_mode=True, pipeline=[*load, *pack]),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='PCKAccuracy', thr=0.2)
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=10, val_interval=5)
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=2e-3))
default_hooks = dict(checkpoint=dict(interval=5))
