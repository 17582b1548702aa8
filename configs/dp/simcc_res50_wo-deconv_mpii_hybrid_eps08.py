_base_ = 'mmpose::body_2d_keypoint/simcc/mpii/simcc_res50_wo-deconv-8xb64-210e_mpii-256x256.py'
from mmpose_dp.configs import private

globals().update(private(_base_, 'hybrid'))
