"""MobileNetV2 with ImageNet weights at 128 x 128 on real people, without privacy. accuracy.py --people sets folders and weights."""

_base_ = 'mmpose::body_2d_keypoint/topdown_heatmap/mpii/td-hm_mobilenetv2_8xb64-210e_mpii-256x256.py'

heatmap = dict(type='MSRAHeatmap', input_size=(128, 128), heatmap_size=(32, 32), sigma=1.5)
# the joints that LSP and COCO share: the others have weight 0 in training and are not scored
shared_joints = dict(
    type='KeypointConverter', num_keypoints=16, mapping=[(i, i) for i in (0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15)]
)
codec = dict(_delete_=True, **heatmap)
model = dict(
    backbone=dict(init_cfg=dict(checkpoint='mobilenetv2_imagenet.pth')),
    head=dict(deconv_out_channels=(64, 64, 64), deconv_kernel_sizes=(4, 4, 4), decoder=heatmap),
    test_cfg=dict(_delete_=True, flip_test=False),
)
train_pipeline = [
    dict(type='LoadImage'),
    shared_joints,
    dict(type='GetBBoxCenterScale'),
    dict(type='RandomFlip', direction='horizontal'),
    dict(type='RandomBBoxTransform', shift_prob=0),
    dict(type='TopdownAffine', input_size=heatmap['input_size']),
    dict(type='GenerateTarget', encoder=heatmap),
    dict(type='PackPoseInputs'),
]
val_pipeline = [
    dict(type='LoadImage'),
    shared_joints,
    dict(type='GetBBoxCenterScale'),
    dict(type='TopdownAffine', input_size=heatmap['input_size']),
    dict(type='PackPoseInputs'),
]
train_dataloader = dict(num_workers=0, persistent_workers=False, batch_size=32, dataset=dict(pipeline=train_pipeline))
test_dataloader = dict(num_workers=0, persistent_workers=False, batch_size=64, dataset=dict(pipeline=val_pipeline))
val_dataloader = test_dataloader
val_evaluator = dict(_delete_=True, type='PCKAccuracy', thr=0.5, norm_item='head')
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(interval=100, save_best=None), logger=dict(interval=20))
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=1e-3))
