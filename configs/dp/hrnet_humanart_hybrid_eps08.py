# HumanArt as the private set, as in the paper. Its own annotations alone: MMPose's training_humanart_coco.json holds COCO too,
# which the weights that you start from have seen.
_base_ = [
    'mmpose::body_2d_keypoint/topdown_heatmap/humanart/td-hm_hrnet-w32_8xb64-210e_humanart-256x192.py',
    '../_base_/hybrid.py',
]

model = dict(backbone=dict(init_cfg=None), head=dict(type='PrivateHeatmapHead'))  # start from load_from
train_dataloader = dict(
    batch_sampler=dict(_base_.dp_batch_sampler, expected_batch_size=256),
    dataset=dict(
        _base_.dp_dataset,
        private=dict(_base_.train_dataloader.dataset, ann_file='HumanArt/annotations/training_humanart.json'),
    ),
)
custom_imports = _base_.dp_imports
train_cfg = _base_.dp_train_cfg
optim_wrapper = _base_.dp_optim_wrapper
param_scheduler = _base_.dp_param_scheduler
default_hooks = dict(_base_.dp_hooks, privacy_budget=dict(_base_.dp_hooks.privacy_budget, target_delta=1e-6))
