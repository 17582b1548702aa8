"""MoveNet Lightning's features with a heatmap head at 128 x 128 on real people, without privacy."""

_base_ = './mobilenetv2.py'

model = dict(
    data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3),
    backbone=dict(
        _delete_=True,
        type='FeaturesFromFile',
        file='movenet_torch.py',
        network='MoveNet',
        unused=('head',),
        checkpoint='movenet_lightning.pth',
    ),
    head=dict(
        in_channels=24, deconv_out_channels=(), deconv_kernel_sizes=(), conv_out_channels=(32,), conv_kernel_sizes=(3,)
    ),
)
