"""Data sets for tests: one laid out as MPII, COCO annotations written here, and records of MMPose's own configs."""

import copy
import json
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import set_random_seed
from mmpose.datasets.datasets.utils import parse_pose_metainfo
from mmpose.registry import DATASETS


def pipeline(codec: dict, *augmentations: dict) -> list[dict]:
    """A training pipeline that ends in the codec's targets; ``augmentations`` come after the flip."""
    return [
        dict(type='LoadImage'),
        dict(type='GetBBoxCenterScale'),
        dict(type='RandomFlip', direction='horizontal'),
        *augmentations,
        dict(type='TopdownAffine', input_size=codec['input_size']),
        dict(type='GenerateTarget', encoder=codec),
        dict(type='PackPoseInputs'),
    ]


CODEC = dict(type='MSRAHeatmap', input_size=(64, 64), heatmap_size=(16, 16), sigma=2)
PIPELINE = pipeline(CODEC, dict(type='RandomBBoxTransform', shift_prob=0))


def mpii(root: Path, split: str = 'train') -> dict:
    """The config of a data set laid out as MPII."""
    return dict(
        type='MpiiDataset',
        data_root=str(root),
        data_mode='topdown',
        ann_file=f'annotations/mpii_{split}.json',
        data_prefix=dict(img='images/'),
        pipeline=PIPELINE,
    )


def records(cfg: Config, mpii_root: Path, count: int, seed: int = 0) -> dict:
    """A collated batch of the first records, through the config's dataset class and training pipeline, in float64."""
    dataset = copy.deepcopy(cfg.train_dataloader.dataset)
    dataset.data_root = str(mpii_root)
    if dataset.type == 'MpiiDataset':
        dataset.update(ann_file='annotations/mpii_train.json', data_prefix=dict(img='images/'))
    else:
        cls = DATASETS.get(dataset.type)
        ann_file = coco_style(mpii_root, cls.__name__, parse_pose_metainfo(cls.METAINFO)['num_keypoints'])
        dataset.update(ann_file=ann_file, data_prefix=dict(img='images/'))
    set_random_seed(seed)  # of the augmentations
    data = pseudo_collate([DATASETS.build(dataset)[i] for i in range(count)])
    return with_targets_in(torch.float64, data)


def with_targets_in(dtype: torch.dtype, data: dict) -> dict:
    """The batch, whose floating-point targets are cast in place."""
    for sample in data['data_samples']:
        for element in (sample.gt_instance_labels, sample.get('gt_fields')):
            for key, value in element.items() if element is not None else ():
                if torch.is_tensor(value) and value.is_floating_point():
                    element.set_field(value.to(dtype), key)
    return data


def coco_style(root: Path, name: str, joints: int) -> str:
    """Writes COCO annotations of 4 people with random keypoints, and the further fields of MMPose's data sets; returns the path."""
    rng = np.random.default_rng(0)
    images, people = [], []
    files = sorted({a['image'] for a in json.loads((root / 'annotations/mpii_train.json').read_text())})
    for i, file in enumerate(files[:4]):
        height, width = cv2.imread(str(root / 'images' / file)).shape[:2]
        images.append(dict(id=i, file_name=file, width=width, height=height))
        box = [8.0, 8.0, 80.0, 80.0]

        def points(count, rng=rng):
            seen = rng.integers(1, 3, count)
            return np.column_stack([rng.uniform(12, 84, (count, 2)), seen]).ravel().tolist()

        person = dict(
            id=i, image_id=i, category_id=1, bbox=box, area=6400.0, iscrowd=0, num_keypoints=joints, segmentation=[]
        )
        person.update(keypoints=points(17 if 'WholeBody' in name else joints), center=[48.0, 48.0], scale=0.4)
        for part, count in dict(foot=6, face=68, lefthand=21, righthand=21).items():
            person.update({f'{part}_kpts': points(count), f'{part}_valid': True, f'{part}_box': box})
        people.append(person)
    path = root / f'annotations/{name}.json'
    path.write_text(json.dumps(dict(images=images, annotations=people, categories=[dict(id=1, name='person')])))
    return f'annotations/{name}.json'
