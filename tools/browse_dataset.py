"""Look at a data set: MMPose's tool of this name, with its arguments, for private and plain configs.

python tools/browse_dataset.py CONFIG --not-show --output-dir FOLDER [--show-number 10] [--mode original] [--phase val]

Of a private training set it shows each sample as it is, with its keypoints, beside its public view and what an attacker recovers
from that view by total variation: what Feature DP publishes of your own data, and what it hides. The last one is left out, with
a line that says so, for a view that paints a region over and for a view of your own, whose kernel is not known. With --mode
transformed (the default) all go through the training pipeline with the same random numbers; with --mode original they are as large
as the file. It spends no budget and changes nothing.

THE PICTURES THAT IT SHOWS AND WRITES ARE PRIVATE. Keep them as private as the data itself: nothing protects them.
"""

import argparse
import copy
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
import cv2
import numpy as np
from audit_view import paints_over, reduced
from cli import add_cfg_options, merge_options, read_config, run
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from mmpose.registry import DATASETS
from mmpose.structures import PoseDataSample
from mmpose.utils import register_all_modules
from mmpose.visualization import PoseLocalVisualizer
from rich.progress import track

from mmpose_dp.auditing.view_inversion import invert_by_tv
from mmpose_dp.datasets import PublicPrivateDataset, PublicView
from mmpose_dp.datasets.randomness import fixed_randomness
from mmpose_dp.datasets.resolving import type_name
from mmpose_dp.datasets.transforms.public_view import eight_bits
from mmpose_dp.messages import failure
from mmpose_dp.privacy.errors import PrivacyError

ITERATIONS, SIZE = 200, 128  # of the inversion, and the side in pixels to which it reduces boxes
LEAST, MOST = 256, 720  # pixels of the longer side of a picture as it is shown
STRIP, FONT, WHITE = 20, cv2.FONT_HERSHEY_SIMPLEX, (255, 255, 255)
WARNING = 'PRIVATE: keep as private as the data'


@dataclass(frozen=True)
class Shown:
    """One picture of a panel.

    Attributes:
        title: what it is.
        image: (H, W, 3) uint8, in cv2's order of colours.
        keypoints, visible: (people, K, 2) in pixels, and (people, K); None to draw none.
    """

    title: str
    image: np.ndarray
    keypoints: np.ndarray | None = None
    visible: np.ndarray | None = None


def parse_args() -> argparse.Namespace:
    """MMPose's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--output-dir', type=Path, help='where to write the pictures; nobody else gets access to a new folder'
    )
    parser.add_argument('--not-show', action='store_true', help='open no window')
    parser.add_argument(
        '--show-number',
        '--max-item-per-dataset',
        type=int,
        default=10,
        help='how many samples, from the first on (default 10)',
    )
    parser.add_argument(
        '--phase', choices=['train', 'val', 'test'], default='train', help='which data set (default train)'
    )
    parser.add_argument('--show-interval', type=float, default=2, help='seconds that a window stays open')
    parser.add_argument(
        '--mode', choices=['original', 'transformed'], default='transformed', help='before or after the pipeline'
    )
    add_cfg_options(parser)
    return parser.parse_args()


def dataset_of(cfg: Config, phase: str, mode: str) -> Any:
    """The data set of a phase, whose pipeline keeps what is drawn."""
    loader = cfg.get(f'{phase}_dataloader')
    if loader is None:
        raise PrivacyError(f'{cfg.filename} has no {phase}_dataloader: choose another --phase')
    settings = copy.deepcopy(loader.dataset)
    private = settings.get('private', settings)
    if mode == 'transformed':
        for part in [private, *private.get('datasets', ())]:
            if part.get('pipeline') and type_name(part.pipeline[-1]['type']) == 'PackPoseInputs':
                part.pipeline[-1]['pack_transformed'] = True
    elif private is settings:
        settings.pipeline = []
    return DATASETS.build(settings)


def private_panel(dataset: PublicPrivateDataset, number: int, mode: str) -> list[Shown]:
    """A private sample, its public view and what is recovered from it; the sample alone if the config publishes no view."""
    steps = (dataset.private if dataset.views is None else dataset.views).pipeline.transforms
    kinds = [type(step).__name__ for step in steps]
    until = kinds.index('GetBBoxCenterScale') + 1 if dataset.views is not None else 0
    info = dataset.private.get_data_info(number) if dataset.views is None else dataset.view_info(number)
    loaded = Compose(list(steps[:until]))(copy.deepcopy(info))
    pictures = {'private picture': loaded}
    if dataset.views is not None:
        pictures |= _views(dataset.public_view, loaded)
    rest = list(steps[until + (dataset.views is not None) :])
    shown = []
    for title, results in pictures.items():
        if mode == 'transformed':
            with fixed_randomness([number] * 6):  # the same for all
                results = Compose(rest)(results)
        # keypoints on the private picture alone, to leave the others to be seen
        shown.append(_shown(title, results, mode, with_joints=not shown))
    return shown


def _views(view: Any, loaded: dict) -> dict[str, dict]:
    """The record as its public view shows it, and as it is recovered from there, where an inversion is known."""
    seen = view.transform(copy.deepcopy(loaded))
    found = {'public view': seen}
    if isinstance(view, PublicView) and not paints_over(view):
        # smaller, as an attacker would: a view has no detail that is lost so, and the inversion ends in fewer iterations
        person = reduced(loaded, loaded.get('view_box', float(np.max(loaded['bbox_scale'][0]))), SIZE)
        image = invert_by_tv(person.seen(view), view, person.center, person.box, person.view_box, ITERATIONS)
        size = loaded['img'].shape[1::-1]
        image = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC).astype(loaded['img'].dtype)
        found['recovered from the view'] = dict(copy.deepcopy(loaded), img=image)
    return found


def _shown(title: str, results: dict, mode: str, with_joints: bool = True) -> Shown:
    """A record before its pipeline, or what the pipeline gives."""
    if mode == 'original':
        image = results['img'] if 'img' in results else cv2.imread(results['img_path'])
        joints, visible = results['keypoints'], results['keypoints_visible']
    else:
        image, found = results['inputs'].permute(1, 2, 0).numpy(), results['data_samples'].gt_instances
        joints, visible = found.get('transformed_keypoints'), found.get('keypoints_visible')
    if image is None:
        raise OSError('the picture cannot be read')
    if not with_joints or joints is None:
        return Shown(title, eight_bits(image))
    return Shown(title, eight_bits(image), np.asarray(joints, float)[..., :2], _flat(visible))


def _flat(visible: Any) -> np.ndarray:
    """(people, K), of visibilities that some data sets give with weights behind them."""
    visible = np.asarray(visible)
    return visible[..., 0] if visible.ndim == 3 else visible


def panels(dataset: Any, mode: str, count: int) -> Iterator[tuple[str, list[Shown]]]:
    """A name and the pictures of each of the first ``count`` samples. Samples that cannot be used are left out."""
    private = isinstance(dataset, PublicPrivateDataset)
    total = min(len(dataset.private if private else dataset), count)
    for number in track(range(total), 'samples', disable=not sys.stdout.isatty()):
        try:
            if private:
                path, shown = dataset.private.get_data_info(number)['img_path'], private_panel(dataset, number, mode)
            else:
                item = dataset[number]
                path = item['img_path'] if mode == 'original' else item['data_samples'].img_path
                shown = [_shown('picture', item, mode)]
        except Exception as error:  # whatever the pipeline raises for a damaged file or annotation
            print(f'sample {number} is left out, since its pipeline fails: {failure(error)}')
            continue
        yield f'{number:06d}_{Path(path).stem}', shown


def panel(visualizer: PoseLocalVisualizer, shown: list[Shown], private: bool) -> np.ndarray:
    """(H, W, 3) uint8, in cv2's order of colours: the pictures side by side under their titles, and the warning above all."""
    columns = []
    for one in shown:
        longer = max(one.image.shape[:2])
        scale = np.clip(longer, LEAST, MOST) / longer
        size = [max(round(n * scale), 1) for n in one.image.shape[1::-1]]
        image = cv2.resize(
            one.image.astype(np.uint8), size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
        )
        if image.ndim == 2:
            image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
        columns.append(_titled(_with_joints(visualizer, image, one, scale), one.title))
    height = max(column.shape[0] for column in columns)
    gap = np.zeros((height, 4, 3), np.uint8)
    padded = [cv2.copyMakeBorder(c, 0, height - c.shape[0], 0, 0, cv2.BORDER_CONSTANT) for c in columns]
    joined = np.concatenate([part for column in padded for part in (column, gap)][:-1], 1)
    return _titled(joined, WARNING, colour=(40, 40, 180)) if private else joined


def _with_joints(visualizer: PoseLocalVisualizer, image: np.ndarray, shown: Shown, scale: float) -> np.ndarray:
    if shown.keypoints is None:
        return image
    people = InstanceData(keypoints=shown.keypoints * scale, keypoints_visible=shown.visible)
    sample = PoseDataSample(gt_instances=people)
    drawn = visualizer.add_datasample(
        'sample', image[..., ::-1].copy(), sample, draw_pred=False, draw_heatmap=False, draw_bbox=False, show=False
    )
    return (visualizer.get_image() if drawn is None else drawn)[..., ::-1]


def _titled(image: np.ndarray, title: str, colour: tuple[int, int, int] = (60, 60, 60)) -> np.ndarray:
    width = max(image.shape[1], cv2.getTextSize(title, FONT, 0.42, 1)[0][0] + 8)
    image = cv2.copyMakeBorder(image, STRIP, 0, 0, width - image.shape[1], cv2.BORDER_CONSTANT)
    image[:STRIP] = colour
    return cv2.putText(image, title, (4, STRIP - 6), FONT, 0.42, WHITE, 1, cv2.LINE_AA)


def main() -> None:
    """Shows or writes the samples, or both."""
    args = parse_args()
    if args.show_number < 1:
        raise PrivacyError('--show-number must be at least 1')
    if args.not_show and args.output_dir is None:
        raise PrivacyError('--not-show without --output-dir does nothing: write --output-dir FOLDER')
    display = sys.platform != 'linux' or os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY')
    if not args.not_show and not display:
        raise PrivacyError('there is no display for a window: write --not-show --output-dir FOLDER')
    register_all_modules(init_default_scope=False)
    cfg = read_config(args.config, 'train_dataloader')
    merge_options(cfg, args.cfg_options)
    init_default_scope(cfg.get('default_scope') or 'mmpose')
    dataset = dataset_of(cfg, args.phase, args.mode)
    private = isinstance(dataset, PublicPrivateDataset)
    visualizer = PoseLocalVisualizer(name='browse_dataset')
    visualizer.set_dataset_meta(dataset.metainfo)
    if args.output_dir:
        args.output_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    written = 0
    for name, shown in panels(dataset, args.mode, args.show_number):
        image = panel(visualizer, shown, private)
        if args.output_dir:
            written += cv2.imwrite(str(args.output_dir / f'{name}.png'), image)
        if not args.not_show:
            visualizer.show(image[..., ::-1], win_name=name, wait_time=args.show_interval)
    if args.output_dir:
        whose = 'PRIVATE pictures: keep them as private as the data' if private else 'pictures of the data set'
        print(f'{args.output_dir} has {written} {whose}')
    if private and dataset.views is not None and (why := _no_inversion(dataset.public_view)):
        print(f'There is no picture of what is recovered from the views: {why}')


def _no_inversion(view: Any) -> str:
    """Why ``_views`` shows no recovered picture, in words; empty if it does."""
    if not isinstance(view, PublicView):
        return (
            f'the kernel of {type(view).__name__} is not known. tools/audit_view.py CONFIG --public-images FOLDER attacks it with '
            'a network'
        )
    return 'this view paints a region over, and nothing of the region is left in them' if paints_over(view) else ''


if __name__ == '__main__':
    run(main)
