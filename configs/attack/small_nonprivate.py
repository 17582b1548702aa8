# A small model that learns some synthetic people by heart, for tools/audit.py --attack lira. Offers NO privacy.
#   python tools/make_synthetic_mpii.py --out data/synthetic_attack --domain private --train 100 --val 12 --image-size 96
_base_ = '../_base_/hrnet_synthetic.py'

model = dict(
    backbone=dict(_delete_=True, type='ResNet', depth=18, base_channels=8, stem_channels=8),
    head=dict(
        in_channels=64,
        in_featuremap_size=(2, 2),
        # MMPose's own initialization is so small that a picture changes nothing at first
        init_cfg=[dict(type='Normal', layer=layer, std=0.1) for layer in ('Conv2d', 'Linear')],
    ),
)
plain = [step for step in _base_.train_pipeline if not step['type'].startswith('Random')]
train_dataloader = dict(batch_size=25, num_workers=0, persistent_workers=False)
train_dataloader.update(dataset=dict(data_root='data/synthetic_attack/', pipeline=plain))
train_cfg = dict(max_epochs=80)
param_scheduler = []
