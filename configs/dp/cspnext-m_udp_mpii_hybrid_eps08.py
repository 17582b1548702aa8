_base_ = 'mmpose::body_2d_keypoint/topdown_heatmap/mpii/cspnext-m_udp_8xb64-210e_mpii-256x256.py'
from mmpose_dp.configs import private

# custom_hooks: the first averages the weights; the other changes the pipeline at an epoch that is not reached
globals().update(private(_base_, 'hybrid', custom_hooks=_base_.custom_hooks[:1]))
