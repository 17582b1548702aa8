# ViTPose-small for MPII at 256x256. MMPose has it at 256x192 only, and mmpretrain resizes position embeddings of square images
# alone: start from MAE's weights (224x224) or a training at 256x256.
_base_ = [
    'mmpose::body_2d_keypoint/topdown_heatmap/mpii/td-hm_hrnet-w32_8xb64-210e_mpii-256x256.py',
    '../_base_/hybrid.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=384, num_layers=12, num_heads=12, feedforward_channels=1536),
        img_size=(256, 256),
        drop_path_rate=0.1,
        with_cls_token=False,
        out_type='featmap',
        patch_cfg=dict(padding=2),
    ),
    head=dict(type='PrivateHeatmapHead', in_channels=384, deconv_out_channels=(256, 256), deconv_kernel_sizes=(4, 4)),
)
train_dataloader = dict(
    batch_sampler=_base_.dp_batch_sampler,
    dataset=dict(_base_.dp_dataset, private=_base_.train_dataloader.dataset),
)
custom_imports = _base_.dp_imports
train_cfg = _base_.dp_train_cfg
optim_wrapper = _base_.dp_optim_wrapper
param_scheduler = _base_.dp_param_scheduler
default_hooks = _base_.dp_hooks
