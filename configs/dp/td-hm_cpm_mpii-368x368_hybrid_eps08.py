_base_ = 'mmpose::body_2d_keypoint/topdown_heatmap/mpii/td-hm_cpm_8xb64-210e_mpii-368x368.py'
from mmpose_dp.configs import private

globals().update(private(_base_, 'hybrid', model=dict(backbone=dict(init_cfg=None))))
