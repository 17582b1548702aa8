"""MMPose's own configs made small, and records for them: its pipelines on annotation files that are written here."""

import copy
import json
from pathlib import Path

import mmpose
import numpy as np
import torch
from mmengine import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import set_random_seed
from mmpose.datasets.datasets.utils import parse_pose_metainfo
from mmpose.registry import DATASETS

FOLDER = Path(mmpose.__file__).parent / '.mim/configs'
SIZES = ('input_size', 'heatmap_size', 'in_featuremap_size', 'img_size', 'out_shape')


def small(name: str, height: int) -> Config:
    """A config of MMPose without pretrained weights, with images of the given height and of its own proportions."""
    cfg = Config.fromfile(FOLDER / name)
    cfg.model.backbone.init_cfg = None
    codec = cfg.codec[0] if isinstance(cfg.codec, list) else cfg.codec
    old = codec.input_size[1]
    for part in (cfg.codec, cfg.model, cfg.train_dataloader.dataset, cfg.train_pipeline):
        _scale(part, lambda size: int(size * height / old))
    cfg.train_dataloader.dataset.pipeline = cfg.train_pipeline
    return cfg


def _scale(node, scale) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            if key in SIZES and isinstance(value, (tuple, list)):
                node[key] = tuple(map(scale, value))
            elif key in SIZES and isinstance(value, int):
                node[key] = scale(value)
            else:
                _scale(value, scale)
    elif isinstance(node, list):
        for value in node:
            _scale(value, scale)


def records(cfg: Config, mpii_root: Path, count: int, seed: int = 0) -> dict:
    """A collated batch of the first records, through the config's dataset class and training pipeline, in float64."""
    dataset = copy.deepcopy(cfg.train_dataloader.dataset)
    dataset.data_root = str(mpii_root)
    if dataset.type == 'MpiiDataset':
        dataset.update(ann_file='annotations/mpii_train.json', data_prefix=dict(img='images/'))
    else:
        cls = DATASETS.get(dataset.type)
        ann_file = _coco_style(mpii_root, cls.__name__, parse_pose_metainfo(cls.METAINFO)['num_keypoints'])
        dataset.update(ann_file=ann_file, data_prefix=dict(img='images/'))
    set_random_seed(seed)  # of the augmentations
    data = pseudo_collate([DATASETS.build(dataset)[i] for i in range(count)])
    for sample in data['data_samples']:
        for element in (sample.gt_instance_labels, sample.get('gt_fields')):
            for key, value in element.items() if element is not None else ():
                if torch.is_tensor(value) and value.is_floating_point():
                    element.set_field(value.double(), key)
    return data


def _coco_style(root: Path, name: str, joints: int) -> str:
    """Writes 4 people with keypoints at random places in the COCO manner and its further fields; returns the path."""
    rng = np.random.default_rng(0)
    images, people = [], []
    files = sorted({a['image'] for a in json.loads((root / 'annotations/mpii_train.json').read_text())})
    for i, file in enumerate(files[:4]):
        images.append(dict(id=i, file_name=file, width=96, height=96))
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
