"""Examine a public view: how much of your pictures can be recovered from what Feature DP publishes?

python tools/audit_view.py CONFIG [--work-dir W] [--images 24] [--public-images FOLDER]
python tools/audit_view.py --table [--images 24] --public-images FOLDER

Reconstructs pictures from their views as an attacker who knows everything but the picture would: by total variation with the known
kernel, and by a small network that refines the result, trained for minutes on public people (the config's `public` data set, or a
folder of pictures of one person each). A view of your own, whose kernel is not known, is attacked by the network alone. Prints
PSNR, SSIM and the share of detail recovered by frequency. Writes view_audit.json (figures), and view_audit.html and .npz (THEY
SHOW THE PICTURES: never publish them), into the work dir; a privacy statement there includes the figures. --table compares all
views on a folder of public pictures instead, and trains on every second picture.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
import cv2
import numpy as np
from cli import add_cfg_options, merge_options, positive, read_config, run
from html_page import picture, write_page
from mmengine.config import Config
from mmengine.dataset import BaseDataset, Compose
from mmengine.registry import init_default_scope
from mmpose.registry import DATASETS
from mmpose.utils import register_all_modules
from rich.console import Console
from rich.progress import track

from mmpose_dp.auditing.view_inversion import figures, invert_by_tv, train_network
from mmpose_dp.datasets import PublicPrivateDataset, PublicView, View
from mmpose_dp.datasets.overlap import private_among
from mmpose_dp.datasets.privacy_units import all_images
from mmpose_dp.datasets.transforms.public_view import REGION_MODES, eight_bits
from mmpose_dp.engine.view_audit import (
    AUDIT_NAME,
    PICTURES_NAME,
    PRIVATE,
    VALIDATION,
    figure_rows,
    in_words,
    update_statement,
)
from mmpose_dp.privacy.errors import PrivacyError

TV, NETWORK = 'total variation', 'a network'
PUBLIC_PEOPLE, QUICK = 1000, 20  # people that the network learns from; iterations of its input's reconstruction
TABLE = {
    'blur (default)': {},
    'blur_full_resolution (the paper: 25, sigma 10)': dict(mode='blur_full_resolution'),
    'pixelate (block 16)': dict(mode='pixelate'),
}


@dataclass(frozen=True)
class Person:
    """A picture with one person's padded box, and the box that the picture's view is sized for.

    Attributes:
        image: (H, W, 3) uint8, in cv2's order of colours.
        center: (2,), of the box.
        box, view_box: pixels.
        annotation: what a view reads beside the picture.
    """

    image: np.ndarray
    center: np.ndarray
    box: float
    view_box: float
    annotation: dict

    def seen(self, view: View) -> np.ndarray:
        """(H, W, 3) uint8: the person's public view."""
        scale = np.array([[self.box, self.box]])
        known = dict(self.annotation, img=self.image.copy(), bbox_center=self.center[None], bbox_scale=scale)
        return view.transform(dict(known, people=[], view_box=self.view_box))['img']

    def cut(self, picture: np.ndarray, size: int) -> np.ndarray:
        """(size, size, 3): the padded box of a picture like ``image``."""
        scale = size / self.box
        shift = size / 2 - scale * self.center
        matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
        return cv2.warpAffine(picture, matrix, (size, size), borderMode=cv2.BORDER_REPLICATE)


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', nargs='?', help='config with a public_view')
    parser.add_argument('--table', action='store_true', help='compare the views on --public-images instead')
    parser.add_argument('--work-dir', help="where to write the audit (default: the config's work dir)")
    parser.add_argument('--images', type=positive, default=24, help='number of people to reconstruct (default 24)')
    parser.add_argument('--public-images', help='folder of public pictures of one person each, to train the network on')
    parser.add_argument('--minutes', type=float, default=4.0, help='how long to train the network (default 4)')
    parser.add_argument(
        '--size', type=int, default=128, help='side in pixels to which boxes are reduced, a multiple of 8 (default 128)'
    )
    add_cfg_options(parser)
    return parser.parse_args()


def people_of(dataset: BaseDataset, count: int, size: int) -> list[Person]:
    """Up to ``count`` people, spread over the data set, in boxes of at most ``size`` pixels. Leaves out who cannot be read."""
    steps = dataset.pipeline.transforms
    until = next((i for i, step in enumerate(steps) if type(step).__name__ == 'GetBBoxCenterScale'), None)
    if until is None:
        raise PrivacyError(f'{type(dataset).__name__}.pipeline has no GetBBoxCenterScale, so a view has no size')
    load, center_scale = Compose(list(steps[: until + 1])), steps[until]
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    sharing: dict[str, list[dict]] = {}
    for info in infos:
        sharing.setdefault(info['img_path'], []).append(info)
    found = []
    for index in np.unique(np.linspace(0, len(infos) - 1, count).astype(int)):
        info = infos[index]
        try:
            together = [center_scale.transform(dict(other)) for other in sharing[info['img_path']]]
            view_box = max(float(np.max(other['bbox_scale'][0])) for other in together)
            found.append(reduced(load(dict(info)), view_box, size))
        except Exception as error:  # whatever the pipeline raises for a damaged file or annotation
            print(f'one person is left out, since the picture cannot be used: {type(error).__name__}')
    return found


def reduced(loaded: dict, view_box: float, size: int) -> Person:
    """A loaded record, its picture, box and joints scaled down to a box of at most ``size`` pixels."""
    box, center = float(np.max(loaded['bbox_scale'][0])), np.asarray(loaded['bbox_center'][0], float)
    factor = min(1.0, size / box)
    image = np.ascontiguousarray(eight_bits(loaded['img']))
    if image.ndim == 2 or image.shape[2] == 1:
        image = np.repeat(image.reshape(*image.shape[:2], 1), 3, 2)
    if factor < 1:
        shape = [max(round(n * factor), 1) for n in image.shape[1::-1]]
        image = cv2.resize(image, shape, interpolation=cv2.INTER_AREA)
    joints = {'keypoints': loaded['keypoints'] * factor, 'keypoints_visible': loaded['keypoints_visible']}
    return Person(image, center * factor, box * factor, view_box * factor, joints)


def pictures_in(folder: str) -> list[Path]:
    """The picture files in a folder and those below it. Raises PrivacyError if there are none."""
    paths = sorted(p for p in Path(folder).rglob('*') if p.suffix.lower() in ('.jpg', '.jpeg', '.png', '.webp'))
    if not paths:
        raise PrivacyError(f'--public-images {folder} holds no picture (jpg, png or webp)')
    return paths


def people_in(folder: str, count: int, size: int) -> list[Person]:
    """Up to ``count`` pictures of a folder, each as one person. Raises PrivacyError if it holds none."""
    paths, found = pictures_in(folder), []
    for index in np.unique(np.linspace(0, len(paths) - 1, count).astype(int)):
        image = cv2.imread(str(paths[index]))
        if image is not None:
            height, width = image.shape[:2]
            box = dict(bbox_center=np.array([[width / 2, height / 2]]), bbox_scale=np.full((1, 2), max(height, width)))
            nobody = dict(keypoints=np.zeros((1, 16, 2)), keypoints_visible=np.zeros((1, 16)))
            found.append(reduced(dict(box, img=image, **nobody), float(max(height, width)), size))
    return found


def paints_over(view: View) -> bool:
    """Whether nothing of what the view hides is left to be recovered."""
    return isinstance(view, PublicView) and view.mode in REGION_MODES


def examine(
    view: View, people: Sequence[Person], public: Sequence[Person], minutes: float, size: int
) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """Figures of the view and of each reconstruction, and the pictures, (size, size, 3), by name."""
    views = [person.seen(view) for person in people]
    pictures = {
        'original': [p.cut(p.image, size) for p in people],
        'public view': [p.cut(seen, size) for p, seen in zip(people, views)],
    }
    recovered: dict[str, Any] = {}
    if isinstance(view, PublicView) and not paints_over(view):
        seen_people = track([*zip(people, views)], 'total variation', console=Console(stderr=True))
        solved = [invert_by_tv(seen, view, p.center, p.box, p.view_box) for p, seen in seen_people]
        pictures[TV] = [p.cut(found, size) for p, found in zip(people, solved)]
        recovered[TV] = figures(pictures['original'], pictures[TV])
    elif not paints_over(view):
        recovered[TV] = f'not run, since the kernel of {type(view).__name__} is not known'
    if not paints_over(view):
        name = f'{NETWORK} trained on {len(public)} public people' if public else NETWORK
        recovered[name] = 'not run, since no public people were given (--public-images)'
        if public:
            originals = np.stack([p.cut(p.image, size) for p in public])
            known = track(public, 'public people', console=Console(stderr=True))
            given = np.stack([_known_of(p, p.seen(view), view, size) for p in known])
            network = train_network(originals, given, 60 * minutes)
            shown = np.stack([_known_of(p, seen, view, size) for p, seen in zip(people, views)])
            pictures[name] = list(network.restore(shown))
            recovered[name] = figures(pictures['original'], pictures[name])
    shown_figures = figures(pictures['original'], pictures['public view'])
    return dict(pictures=len(people), shown=shown_figures, recovered=recovered), pictures


def _known_of(person: Person, seen: np.ndarray, view: View, size: int) -> np.ndarray:
    """(size, size, 6): the network's input for one person, the view and a quick reconstruction: the view again if there is none."""
    if not isinstance(view, PublicView):
        return np.concatenate([person.cut(seen, size)] * 2, 2)
    quick = invert_by_tv(seen, view, person.center, person.box, person.view_box, iterations=QUICK)
    return np.concatenate([person.cut(seen, size), person.cut(quick, size)], 2)


def print_table(audit: dict[str, Any]) -> None:
    """Prints a line for the view and one for each reconstruction."""
    head, rows = figure_rows(audit)
    for name, *cells in [head, *rows]:
        print(f'{name:48s}' + ''.join(f'{cell:>16}' for cell in cells))
    for name, found in audit['recovered'].items():
        if not isinstance(found, dict):
            print(f'{name:48s} {found}')


def write_pictures(audit: dict[str, Any], pictures: dict[str, list[np.ndarray]], work_dir: Path) -> None:
    """Writes the pictures side by side into a page, and as arrays, for a report that may show them."""
    head, rows = figure_rows(audit)
    shown = {name: [picture(one) for one in images] for name, images in pictures.items()}
    words = in_words(audit)
    page = dict(audit=audit, words=words[:1].upper() + words[1:], head=head, rows=rows, pictures=shown, zip=zip)
    write_page(work_dir / 'view_audit.html', 'view_audit.html', **page)
    arrays = {name: np.stack(images) for name, images in pictures.items()}
    np.savez_compressed(work_dir / PICTURES_NAME, sample=audit['sample'], view=audit['view'], **arrays)


def _sample(cfg: Config, dataset: PublicPrivateDataset) -> tuple[BaseDataset, str]:
    """Whom to reconstruct, and in words who that is: validation people, or private ones if there are no others."""
    if cfg.get('val_dataloader') is None:
        return dataset.private, PRIVATE
    source = DATASETS.build(cfg.val_dataloader.dataset)
    shared = private_among(all_images(source), dataset.images)  # copies too: a report may show these people
    return source, f'{VALIDATION}, some in {PRIVATE}' if shared else VALIDATION


def audit_config(args: argparse.Namespace) -> None:
    """Examines a config's view and writes what it found."""
    cfg = read_config(args.config, 'train_dataloader')
    merge_options(cfg, args.cfg_options)
    init_default_scope(cfg.get('default_scope') or 'mmpose')
    if not cfg.train_dataloader.dataset.get('public_view'):
        raise PrivacyError(
            f'{args.config} has no train_dataloader.dataset.public_view: it publishes no view to examine'
        )
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    assert isinstance(dataset, PublicPrivateDataset)
    view = dataset.public_view
    source, sample = _sample(cfg, dataset)
    people = people_of(source, args.images, args.size)
    public = _public_people(args, dataset)
    if not people:
        raise PrivacyError(
            f'no picture of {sample} can be used (see above), so there is nothing to reconstruct: check the folder of pictures'
        )
    found, pictures = examine(view, people, public, args.minutes, args.size)
    audit = dict(view=dataset.view_description, **found, sample=sample, note='')
    if paints_over(view):
        audit['note'] = (
            'the view paints a region over and leaves the rest as it is: nothing of the region is there to be recovered, and '
            'everything else is published'
        )
    audit['in_words'] = in_words(audit)
    print_table(audit)
    work_dir = Path(args.work_dir or cfg.get('work_dir') or Path('work_dirs') / Path(args.config).stem)
    work_dir.mkdir(parents=True, exist_ok=True)
    (work_dir / AUDIT_NAME).write_text(json.dumps(audit, indent=2) + '\n')
    write_pictures(audit, pictures, work_dir)
    print(f'{work_dir}/view_audit.html and .npz show {audit["sample"]}: do not publish them')
    if update_statement(work_dir):
        print(f'{work_dir}/privacy_statement.md now has these figures')


def _public_people(args: argparse.Namespace, dataset: PublicPrivateDataset) -> list[Person]:
    if args.public_images:
        if private_among([*map(str, pictures_in(args.public_images))], dataset.images):
            raise PrivacyError(
                f'--public-images {args.public_images} holds private pictures of {args.config}, so an attacker does not have it: '
                'give a folder of other pictures'
            )
        return people_in(args.public_images, PUBLIC_PEOPLE, args.size)
    return [] if dataset.public is None else people_of(dataset.public, PUBLIC_PEOPLE, args.size)


def print_comparison(args: argparse.Namespace) -> None:
    """Prints all views, compared on public pictures, as a Markdown table."""
    if not args.public_images:
        raise PrivacyError('--table needs public pictures to compare the views on: write --public-images FOLDER')
    people = people_in(args.public_images, 2 * PUBLIC_PEOPLE, args.size)
    tested, trained = people[::2], people[1::2]
    tested = [tested[i] for i in np.unique(np.linspace(0, len(tested) - 1, args.images).astype(int))]
    print('| view | view dB (SSIM) | total variation dB (SSIM) | gain | network dB (SSIM) | gain |')
    print('| --- | ---: | ---: | ---: | ---: | ---: |')
    for name, settings in TABLE.items():
        found, _ = examine(PublicView(**settings), tested, trained, args.minutes, args.size)
        shown, by = found['shown'], list(found['recovered'].values())
        cells = [f'{shown["psnr"]:.1f} ({shown["ssim"]:.2f})']
        for one in by:
            cells += [f'{one["psnr"]:.1f} ({one["ssim"]:.2f})', f'{one["psnr"] - shown["psnr"]:+.1f}']
        print(f'| {name} | {" | ".join(cells)} |', flush=True)


def main() -> None:
    """Examines a config, or compares the views."""
    args = parse_args()
    if args.size < 16 or args.size % 8 or args.images < 1 or not args.minutes > 0:
        raise PrivacyError('--size must be a multiple of 8, 16 or above; --images and --minutes must be above 0')
    register_all_modules(init_default_scope=False)
    if args.table:
        print_comparison(args)
    elif args.config:
        audit_config(args)
    else:
        raise PrivacyError('give a config, or --table with --public-images')


if __name__ == '__main__':
    run(main)
