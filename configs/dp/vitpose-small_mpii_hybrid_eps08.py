_base_ = 'mmpose::body_2d_keypoint/topdown_heatmap/mpii/td-hm_hrnet-w32_8xb64-210e_mpii-256x256.py'
from mmpose_dp.configs import private

globals().update(
    private(
        _base_,
        'hybrid',
        model=dict(
            backbone=dict(
                _delete_=True,
                type='mmpretrain.VisionTransformer',
                arch=dict(embed_dims=384, num_layers=12, num_heads=12, feedforward_channels=1536),
                img_size=(256, 256),
                drop_path_rate=0.1,
                with_cls_token=False,
                out_type='featmap',
                patch_cfg=dict(padding=2),
            ),
            head=dict(in_channels=384, deconv_out_channels=(256, 256), deconv_kernel_sizes=(4, 4)),
        ),
    )
)
