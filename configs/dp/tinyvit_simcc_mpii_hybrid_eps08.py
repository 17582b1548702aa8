_base_ = 'mmpose::body_2d_keypoint/simcc/mpii/simcc_res50_wo-deconv-8xb64-210e_mpii-256x256.py'
from mmpose_dp.configs import private

globals().update(
    private(
        _base_,
        'hybrid',
        model=dict(
            backbone=dict(
                _delete_=True,
                type='mmpretrain.TinyViT',
                arch='5m',
                img_size=(256, 256),
                out_indices=(3,),
                gap_before_final_norm=False,
            ),
            head=dict(in_channels=320),
        ),
    )
)
