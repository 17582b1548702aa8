# DP-SGD that mixes public models channel by channel ("ours, channel by channel" of docs/accuracy_people.md). It trains few numbers,
# so their noise is small, and publishes nothing about a private person. It needs optim_wrapper=dict(experts=[CHECKPOINT, ...]):
# models of the same architecture, trained on public data.
_base_ = './private.py'

dp_batch_sampler = dict(expected_batch_size=1024)
dp_optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=3e-2),
    max_grad_norm=1e-4,  # gradients of mixing weights are shorter
    trainable='channel_experts',
)
dp_train_cfg = dict(max_epochs=6, val_interval=3)
dp_param_scheduler = [dict(type='CosineAnnealingLR', T_max=6, eta_min=0.0, by_epoch=True, convert_to_iter_based=True)]
dp_hooks = dict(checkpoint=dict(interval=1))
