# Projected DP-SGD in thousands of coordinates: the rows and columns of each weight in which gradients of public people are large
# ("ours, in Kronecker coordinates" of docs/accuracy_people.md). Nothing about a private person is published. The public people
# should resemble the private ones; a leaf config replaces those of projected.py.
_base_ = './projected.py'

dp_batch_sampler = dict(expected_batch_size=1024)
dp_optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='SGD', lr=10.0, momentum=0.9),
    max_grad_norm=5e-3,  # of the scaled coordinates: so small that all are clipped, and lr times it is the length of a step
    projector=dict(_delete_=True, type='KroneckerProjector'),
)
dp_train_cfg = dict(max_epochs=2, val_interval=1)
dp_param_scheduler = [dict(type='CosineAnnealingLR', T_max=2, eta_min=0.0, by_epoch=True, convert_to_iter_based=True)]
dp_hooks = dict(checkpoint=dict(interval=1))
