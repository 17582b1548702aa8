_base_ = 'mmpose::body_2d_keypoint/topdown_heatmap/mpii/td-hm_hrnet-w32_8xb64-210e_mpii-256x256.py'
from mmpose_dp.configs import private

globals().update(private(_base_, 'kronecker', public='coco_as_mpii'))
