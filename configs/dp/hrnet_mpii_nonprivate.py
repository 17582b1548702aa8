# The non-private twin of configs/dp/hrnet_mpii_*: plain training in the same setting. Offers NO privacy.
_base_ = 'mmpose::body_2d_keypoint/topdown_heatmap/mpii/td-hm_hrnet-w32_8xb64-210e_mpii-256x256.py'

model = dict(backbone=dict(init_cfg=None))
train_dataloader = dict(batch_size=32)
train_cfg = dict(max_epochs=25, val_interval=5)
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=1e-3))
param_scheduler = [dict(type='MultiStepLR', milestones=[20], gamma=0.1, by_epoch=True)]
