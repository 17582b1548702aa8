r"""What private statistics could bring at most: a few numbers of the private people, exact and without noise, on public models.

    python tools/benchmarks/oracles.py --people FOLDER_OF_PEOPLE --weights FOLDER_OF_WEIGHTS --start movenet \
        --checkpoints "the mean of the public models=mean.pth" "ours at epsilon 8=epoch_6.pth"

A statistic that gains less than 0.3 points without noise is not worth building with it. Rewrites the table of
docs/accuracy_people.md between its marks. The columns are the checkpoints. NOT private: it reads private people without noise, to
decide what to build. Must not write a model.
"""

import argparse
import os
import pickle
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
import numpy as np
import torch
from accuracy_rows import IN_PROCESS
from accuracy_worker import REPO, plain_or_private, score, set_up, tested
from mmengine.config import Config
from mmengine.runner import Runner
from mmpose.models.data_preprocessors import PoseDataPreprocessor
from mmpose.registry import MODELS
from people_rows import STARTS, people_parser
from performance_page import table, write_between
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

BANDS = 12
JOINTS = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]  # those that both sets have, in MPII's order
HIPS, SHOULDERS = [2, 3], [12, 13]


@MODELS.register_module(force=True)  # a test imports this file twice
class BandPreprocessor(PoseDataPreprocessor):
    """Multiplies the amplitude of each band of spatial frequency of an image by one of ``gains``."""

    def __init__(self, gains: list[float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gains = torch.tensor(gains)

    def forward(self, data: dict, training: bool = False) -> dict:
        """As the base class's, with filtered images."""
        data = super().forward(data, training)
        images = data['inputs']
        filtered = torch.fft.rfft2(images) * self.gains[bands(*images.shape[-2:])]
        data['inputs'] = torch.fft.irfft2(filtered, s=images.shape[-2:])
        return data


def bands(height: int, width: int) -> Tensor:
    """The band of each frequency of ``torch.fft.rfft2``; band 0 is the mean alone."""
    down, right = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
    radius = (down**2 + right**2).sqrt() / 0.5**0.5
    return (radius.sqrt() * (BANDS - 1)).long()


class Oracles:
    """Statistics of ``count`` training people of each set, and the scores that they give on the private test people."""

    def __init__(self, args: argparse.Namespace, work: Path, count: int = 2000) -> None:
        self.args, self.work, self.count = args, work, count
        self.private, self.public = (f'{args.people}/{name}/' for name in args.people_sets)

    def job(self, settings: dict | None = None) -> dict:
        """A job as accuracy_worker.py knows it."""
        job = dict(family=STARTS[self.args.start].model, weights=str(self.args.weights), config='nonprivate', seed=0)
        return dict(job, settings={**IN_PROCESS, **(settings or {})}, folder=str(self.work))

    def test_config(self, root: str, training: bool) -> Config:
        """The config that tests on the people of ``root``: those to train on, without augmentation, or those to score."""
        cfg = plain_or_private(self.job(), 'nonprivate')
        data = cfg.test_dataloader.dataset
        data.data_root, data.headbox_file = root, f'{root}annotations/mpii_gt_val.mat'
        if training:
            data.ann_file, data.headbox_file, data.indices = 'annotations/mpii_train.json', None, self.count
        return cfg

    @cache  # noqa: B019 (one object per run of the command; two statistics and every column need them)
    def images(self, root: str) -> Tensor:
        """The crops of some training people, (people, 3, height, width), red first."""
        loader = Runner.build_dataloader(self.test_config(root, training=True).test_dataloader, seed=0)
        return torch.cat([torch.stack(batch['inputs']).float() for batch in loader])[:, [2, 1, 0]]

    # ---- the statistics -------------------------------------------------------------------------------------------
    def as_it_is(self, checkpoint: str) -> float:
        """The score of the checkpoint."""
        return score(self.job(), checkpoint, self.private)

    def colours(self, checkpoint: str) -> float:
        """With private pictures brought to the public ones' mean and deviation of each colour: 6 numbers."""
        cfg = plain_or_private(self.job(), 'nonprivate').model.data_preprocessor
        mean, std = torch.tensor(cfg.mean), torch.tensor(cfg.std)
        crops = [self.images(root).transpose(0, 1).flatten(1) for root in (self.private, self.public)]
        (own_mean, own_std), (their_mean, their_std) = ((x.mean(1), x.std(1)) for x in crops)
        settings = {
            'model.data_preprocessor.mean': (own_mean - (their_mean - mean) * own_std / their_std).tolist(),
            'model.data_preprocessor.std': (std * own_std / their_std).tolist(),
        }
        return score(self.job(settings), checkpoint, self.private)

    def power(self, checkpoint: str) -> float:
        """With private pictures brought to the public ones' power in each band of frequencies: one number per band."""
        power = []
        for root in (self.private, self.public):
            spectrum = torch.fft.rfft2(self.images(root)).abs().square().mean((0, 1))
            band = bands(spectrum.shape[0], 2 * (spectrum.shape[1] - 1))
            power.append(torch.stack([spectrum[band == number].mean() for number in range(BANDS)]))
        gains = (power[1] / power[0]).sqrt()
        gains[0] = 1.0
        settings = {'model.data_preprocessor.type': 'BandPreprocessor', 'model.data_preprocessor.gains': gains.tolist()}
        return score(self.job(settings), checkpoint, self.private)

    def batch_norm(self, checkpoint: str) -> float:
        """With the mean and variance of each channel of each BatchNorm's input over private pictures."""
        cfg = self.test_config(self.private, training=True)
        model = MODELS.build(cfg.model)
        model.load_state_dict(
            torch.load(checkpoint, map_location='cpu', weights_only=False)['state_dict'], strict=False
        )
        for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
        model.train()
        with torch.no_grad():
            for batch in Runner.build_dataloader(cfg.test_dataloader, seed=0):
                model(**model.data_preprocessor(batch), mode='tensor')
        path = self.work / 'batch_norm.pth'
        torch.save(dict(state_dict=model.state_dict(), meta={}), path)
        return score(self.job(), str(path), self.private)

    def offsets(self, checkpoint: str) -> float:
        """With each joint moved by its median error along and across the predicted torso: 2 numbers per joint."""
        found, truth, seen, _ = self.predictions(checkpoint, training=True)
        axes = torso(found)
        shift = np.einsum('njd,nda->nja', truth - found, axes) / np.linalg.norm(axes, axis=1)[:, None] ** 2
        near = seen & (np.linalg.norm(shift, axis=2) < 0.5)
        medians = np.array([np.median(shift[near[:, j], j], axis=0) for j in JOINTS])
        found, truth, seen, head = self.predictions(checkpoint, training=False)
        moved = found[:, JOINTS] + np.einsum('ja,nda->njd', medians, torso(found))
        hit = np.linalg.norm(moved - truth[:, JOINTS], axis=2) <= 0.5 * head[:, None]
        return float(100 * np.mean([hit[seen[:, j], n].mean() for n, j in enumerate(JOINTS)]))

    def predictions(self, checkpoint: str, training: bool) -> tuple[np.ndarray, ...]:
        """Predicted and true joints (people, 16, 2), which of them are annotated, and the size of the head (people,)."""
        cfg, out = self.test_config(self.private, training), self.work / 'predictions.pkl'
        cfg.test_evaluator = [dict(type='mmengine.DumpResults', out_file_path=str(out))]
        tested(cfg, self.job(), checkpoint)
        people = pickle.loads(out.read_bytes())
        found = np.concatenate([p['pred_instances']['keypoints'] for p in people])
        true = [p['gt_instances'] for p in people]
        truth = np.concatenate([instance['keypoints'] for instance in true])
        seen = np.concatenate([np.reshape(instance['keypoints_visible'], (1, 16, -1))[..., 0] > 0 for instance in true])
        head = np.array([np.ravel(instance.get('head_size', 1.0))[0] for instance in true])
        return found, truth, seen, head


def torso(joints: np.ndarray) -> np.ndarray:
    """From the middle of the hips to that of the shoulders, and this turned by 90 degrees, as columns: (people, 2, 2)."""
    up = joints[:, SHOULDERS].mean(1) - joints[:, HIPS].mean(1) + 1e-6
    return np.stack([up, np.stack([-up[:, 1], up[:, 0]], 1)], 2)


ROWS: dict[str, Callable[[Oracles, str], float]] = {
    'as it is': Oracles.as_it_is,
    'colours of the private pictures (6 numbers)': Oracles.colours,
    f'power by frequency ({BANDS - 1} numbers)': Oracles.power,
    'inputs of BatchNorm (2 numbers per channel)': Oracles.batch_norm,
    f'offset of each joint ({2 * len(JOINTS)} numbers)': Oracles.offsets,
}


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = people_parser(__doc__, REPO / 'docs/accuracy_people.md')
    parser.add_argument('--checkpoints', nargs='+', required=True, metavar='TEXT=FILE', help='a column each')
    return parser.parse_args()


def main() -> None:
    """Scores each checkpoint with each statistic, and rewrites the table."""
    args = parse_args()
    os.environ['OMP_NUM_THREADS'] = '1'
    set_up()
    columns = dict(text.rsplit('=', 1) for text in args.checkpoints)
    with tempfile.TemporaryDirectory() as work:
        oracles = Oracles(args, Path(work))
        lines = []
        for text, oracle in ROWS.items():
            scores = [f'{oracle(oracles, str(Path(path).resolve())):.1f}' for path in columns.values()]
            lines.append([text, *scores])
            print(*lines[-1], sep=' | ', flush=True)
    marks = f'<!-- oracles_{args.start} -->', f'<!-- /oracles_{args.start} -->'
    write_between(args.page, marks, table(['exact, without noise', *columns], lines))


if __name__ == '__main__':
    main()
