# The paper's backbone (TinyViT-5M, SimCC head), through mmpretrain. Window sizes are the model zoo's, so that its weights fit.
_base_ = [
    'mmpose::body_2d_keypoint/simcc/mpii/simcc_res50_wo-deconv-8xb64-210e_mpii-256x256.py',
    '../_base_/hybrid.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.TinyViT',
        arch='5m',
        img_size=(256, 256),
        out_indices=(3,),
        gap_before_final_norm=False,
    ),
    head=dict(type='PrivateSimCCHead', in_channels=320),
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
