"""The demo's pictures: the training curve, and people with their public view and the predicted skeletons.

Shows synthetic people only: on real data such a page would publish private images.
"""

import json
import pickle
from pathlib import Path

import cv2
import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from mmengine.config import Config
from mmpose.registry import DATASETS

from mmpose_dp.auditing.view_inversion import invert_by_tv
from mmpose_dp.datasets import PublicView

CONFIG = Path(__file__).resolve().parents[2] / 'configs/dp/hrnet_synthetic_hybrid_eps08.py'
PEOPLE = 6


def draw_page(run: Path, out: Path) -> None:
    """Writes curve.png and pictures.png to ``out``, from the stages in ``run``."""
    draw_curve(run, out / 'curve.png')
    draw_people(run, out / 'pictures.png')


def scalars(work_dir: Path) -> list[dict]:
    """What mmengine logged in a work dir, oldest first."""
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def draw_curve(run: Path, path: Path) -> None:
    """Accuracy and epsilon over the hybrid's epochs, beside the other two trainings."""
    figure, left = plt.subplots(figsize=(7, 4), layout='constrained')
    names = {'hybrid': 'hybrid', 'publiconly': 'public-only', 'nonprivate': 'non-private'}
    for (folder, name), colour in zip(names.items(), ('tab:blue', 'tab:orange', 'tab:grey')):
        points = [(line['step'], line['PCK']) for line in scalars(run / folder) if 'PCK' in line]
        left.plot(*zip(*points), 'o-', color=colour, label=name)
    left.set_xlabel('epoch')
    left.set_ylabel('mean PCKh@0.5 on the images')
    left.legend(loc='lower right')
    lines = [line for line in scalars(run / 'hybrid') if 'epsilon' in line]
    last = lines[-1]  # of the last epoch
    spent = [(line['step'] * last['epoch'] / last['step'], line['epsilon']) for line in lines]
    right = left.twinx()
    right.fill_between(*zip((0, 0), *spent), color='tab:red', alpha=0.15)
    right.set_ylim(0)
    right.set_ylabel('epsilon spent by the hybrid', color='tab:red')
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_people(run: Path, path: Path) -> None:
    """One row per person: private image, public view, what is recovered from the view, and the skeletons of the start, the
    hybrid and the annotation."""
    cfg = Config.fromfile(CONFIG)
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    links = dataset.metainfo['skeleton_links']
    view = PublicView(**{k: v for k, v in cfg.train_dataloader.dataset.public_view.items() if k != 'type'})
    predictions = {name: load(run / f'{name}_test/predictions.pkl') for name in ('start', 'hybrid')}
    figure, axes = plt.subplots(PEOPLE, 6, figsize=(14, 2.5 * PEOPLE), layout='constrained')
    chosen = np.linspace(0, len(dataset) - 1, PEOPLE).astype(int)
    for number, (row, index) in enumerate(zip(axes, chosen)):
        info = dataset.get_data_info(int(index))
        image = cv2.imread(info['img_path'])
        padded = info['bbox_scale'] * 1.25
        seen = view.transform(dict(info, img=image.copy(), bbox_scale=padded))['img']
        recovered = invert_by_tv(seen, view, info['bbox_center'][0], float(padded.max()))
        columns = {
            'private image': (image, None),
            'public view': (seen, None),
            'recovered from the view': (recovered, None),
            'public-pretrained start': (image, predictions['start'][info['id']]),
            'hybrid': (image, predictions['hybrid'][info['id']]),
            'annotation': (image, info['keypoints'][0]),
        }
        (x, y), half = info['bbox_center'][0], info['bbox_scale'][0].max() * 0.62
        for axis, (title, (picture, joints)) in zip(row, columns.items()):
            axis.imshow(picture[..., ::-1])
            for a, b in links if joints is not None else ():
                if (joints[[a, b]] > 0).all():
                    axis.plot(*joints[[a, b]].T, '-', linewidth=2)
            axis.set(xlim=(x - half, x + half), ylim=(y + half, y - half), xticks=[], yticks=[])
            if number == 0:
                axis.set_title(title)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def load(path: Path) -> dict[int, np.ndarray]:
    """Predicted joints (16, 2) by annotation id, from tools/test.py --dump."""
    with open(path, 'rb') as file:
        return {sample['id']: sample['pred_instances']['keypoints'][0] for sample in pickle.load(file)}
