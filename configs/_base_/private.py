# What every private training shares: DP-SGD with the paper's settings (arXiv 2504.10190), but for the learning rate: with the
# paper's 1e-3, the methods scored 6 to 22 points less than with 1e-4 ("What was tried" in docs/accuracy.md). No name here is one
# that MMPose's configs use, so a leaf config can inherit from both; the leaf assigns each part to its key (see configs/dp/).
dp_imports = dict(imports=['mmpose_dp'], allow_failed_imports=False)

dp_dataset = dict(_delete_=True, type='PublicPrivateDataset', privacy_unit='instance')
dp_batch_sampler = dict(type='PoissonBatchSampler', expected_batch_size=32)
dp_optim_wrapper = dict(
    _delete_=True,
    type='DPOptimWrapper',
    constructor='DPOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-4),
    # Records of most models are longer, and are clipped. Any shorter norm gives the same training with Adam, or with SGD and a rate
    # that is longer by the same factor (docs/private_config.md). public_weight is a weight beside this norm.
    max_grad_norm=1e-3,
)
dp_train_cfg = dict(_delete_=True, type='PrivateTrainLoop', max_epochs=25, val_interval=5)
dp_param_scheduler = [dict(type='MultiStepLR', milestones=[20], gamma=0.1, by_epoch=True)]
dp_hooks = dict(
    privacy_budget=dict(type='PrivacyBudgetHook', target_epsilon=0.8, target_delta=1 / 22000),
    checkpoint=dict(interval=5, max_keep_ckpts=3),
)
