_base_ = 'mmpose::body_2d_keypoint/topdown_heatmap/humanart/td-hm_hrnet-w32_8xb64-210e_humanart-256x192.py'
from mmpose_dp.configs import private

globals().update(
    private(
        _base_,
        'hybrid',
        train_dataloader=dict(
            batch_sampler=dict(expected_batch_size=256),
            dataset=dict(private=dict(ann_file='HumanArt/annotations/training_humanart.json')),
        ),
        default_hooks=dict(privacy_budget=dict(target_delta=1e-6)),
    )
)
