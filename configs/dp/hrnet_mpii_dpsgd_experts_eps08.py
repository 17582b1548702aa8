# Needs --cfg-options load_from=PUBLIC.pth optim_wrapper.experts="['OTHER_PUBLIC.pth']", or these in a config that inherits from it
_base_ = 'mmpose::body_2d_keypoint/topdown_heatmap/mpii/td-hm_hrnet-w32_8xb64-210e_mpii-256x256.py'
from mmpose_dp.configs import private

globals().update(private(_base_, 'experts'))
