# COCO as public data for a private set in MPII's format, with its joints in MPII's order. COCO does not annotate pelvis, thorax,
# upper neck and head top: they have weight 0 in public samples.
# A leaf config gives it the private set's pipeline, with dp_joints as the second step:
#   public=dict(_base_.dp_coco, pipeline=[_base_.train_pipeline[0], _base_.dp_joints, *_base_.train_pipeline[1:]])
dp_coco = dict(
    type='CocoDataset',
    data_root='data/coco/',
    data_mode='topdown',
    ann_file='annotations/person_keypoints_train2017.json',
    data_prefix=dict(img='train2017/'),
    metainfo=dict(from_file='configs/_base_/datasets/mpii.py'),  # flips and half bodies are those of the mapped joints
)
dp_joints = dict(
    type='KeypointConverter',
    num_keypoints=16,
    mapping=[
        *[(16, 0), (14, 1), (12, 2), (11, 3), (13, 4), (15, 5)],
        *[(10, 10), (8, 11), (6, 12), (5, 13), (7, 14), (9, 15)],
    ],
)
