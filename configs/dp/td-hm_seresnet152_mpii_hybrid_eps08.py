_base_ = 'mmpose::body_2d_keypoint/topdown_heatmap/mpii/td-hm_seresnet152_8xb32-210e_mpii-256x256.py'
from mmpose_dp.configs import private

globals().update(private(_base_, 'hybrid', model=dict(backbone=dict(init_cfg=None))))
