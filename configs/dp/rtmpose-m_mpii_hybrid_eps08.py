_base_ = [
    'mmpose::body_2d_keypoint/rtmpose/mpii/rtmpose-m_8xb64-210e_mpii-256x256.py',
    '../_base_/hybrid.py',
]

model = dict(backbone=dict(init_cfg=None), head=dict(type='PrivateRTMCCHead'))  # start from load_from
train_dataloader = dict(
    batch_sampler=_base_.dp_batch_sampler,
    dataset=dict(_base_.dp_dataset, private=_base_.train_dataloader.dataset),
)
custom_imports = _base_.dp_imports
train_cfg = _base_.dp_train_cfg
optim_wrapper = _base_.dp_optim_wrapper
param_scheduler = _base_.dp_param_scheduler
default_hooks = _base_.dp_hooks
custom_hooks = _base_.custom_hooks[
    :1
]  # averages the weights; the other changes the pipeline at an epoch that is not reached
