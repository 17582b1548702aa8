"""A user's own data set in COCO's format: small pictures of people with five joints."""

import copy
import json

import cv2
import numpy as np

from tests.support.datasets import pipeline

JOINTS = ['head', 'left_hand', 'right_hand', 'left_foot', 'right_foot']
SWAP = ['', 'right_hand', 'left_hand', 'right_foot', 'left_foot']
META = dict(
    dataset_name='own',
    keypoint_info={
        i: dict(name=name, id=i, color=[255, 0, 0], type='upper', swap=SWAP[i]) for i, name in enumerate(JOINTS)
    },
    skeleton_info={},
    joint_weights=[1.0] * 5,
    sigmas=[0.05] * 5,
)
CODEC = dict(type='MSRAHeatmap', input_size=(32, 32), heatmap_size=(8, 8), sigma=1)
PIPELINE = pipeline(CODEC)


def content(count=8):
    """``count`` people in pictures of 48 x 40 pixels."""
    rng = np.random.default_rng(0)
    images = [dict(id=i + 1, file_name=f'{i:02d}.png', width=48, height=40) for i in range(count)]
    annotations = []
    for i in range(count):
        joints = rng.uniform((14, 10), (34, 30), (5, 2))
        annotations.append(
            dict(
                id=i + 1, image_id=i + 1, category_id=1, iscrowd=0, num_keypoints=5, area=400.0, bbox=[12.0, 8.0, 24.0, 24.0],
                keypoints=[float(v) for joint in joints for v in (*joint, 2)],
            )
        )  # fmt: skip
    categories = [dict(id=1, name='person', supercategory='person', keypoints=JOINTS, skeleton=[])]
    return dict(images=images, annotations=annotations, categories=categories)


def write(folder, data=None):
    """Writes annotations and pictures; returns the data set's config."""
    data = data or content()
    (folder / 'img').mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    for image in data['images']:
        path = folder / 'img' / str(image['file_name'])
        if not path.exists():
            cv2.imwrite(str(path), rng.integers(0, 255, (40, 48, 3), np.uint8))
    (folder / 'own.json').write_text(json.dumps(data))
    return dict(
        type='CocoDataset',
        data_root=f'{folder}/',
        data_mode='topdown',
        ann_file='own.json',
        data_prefix=dict(img='img/'),
        serialize_data=False,  # mmengine takes half a second to serialize annotations
        metainfo=copy.deepcopy(META),
        pipeline=copy.deepcopy(PIPELINE),
    )
