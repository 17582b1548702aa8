"""The rows of accuracy.py on real people, and the folder in which it tunes them. Must not train anything.

They are the rows of accuracy_rows.py, adapted to a start that has seen millions of pictures: smaller learning rates, and few
parameters to train privately. A row without views is private in the usual sense: nothing about a private person is published.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_rows import (
    DEFAULT_VIEW,
    IN_PROCESS,
    OPTIMIZER,
    PAPERS_VIEW,
    PROJECTOR,
    PUBLIC_WEIGHT,
    Row,
    Settings,
    Size,
    adam,
    rows_of,
    schedule,
    sgd,
)

from mmpose_dp.datasets.mpii_files import estimated_head_boxes, write_mpii_split

TRAINABLE = 'optim_wrapper.trainable'

TURNED = {
    'train_dataloader.dataset.pipeline.4.rotate_factor': 180.0,
    'train_dataloader.dataset.pipeline.4.rotate_prob': 1.0,
}
# the start of what mixes, and what it mixes
EXPERTS: dict[str, Any] = dict(start='public_people', experts=('public_turned', 'pretrain'))
FOUR: dict[str, Any] = dict(EXPERTS, experts=(*EXPERTS['experts'], 'public_unusual'))
FROM_BEST: dict[str, Any] = dict(start='public_unusual', experts=('public_turned', 'public_people', 'pretrain'))
# MPII's joints at both ends of each upper arm, forearm, thigh, shank and side
LIMBS = ((12, 2), (13, 3), (2, 1), (1, 0), (3, 4), (4, 5), (12, 11), (11, 10), (13, 14), (14, 15))


@dataclass(frozen=True)
class Start:
    """What training on people starts from.

    Attributes:
        text: what the page calls it.
        model: the name of its plain config in people/.
        few: the parameters that the rows *few parameters* train privately.
        pretrain: settings of the training of a head on public people, and of the features if they are no people's yet.
        rates: AdamW's learning rates that are tried where every parameter is trained without noise.
        norms: clipping norms that fit, of the rows that are also run with them because their own, 0.1 or 5e-4, is too long.
    """

    text: str
    model: str
    few: str
    pretrain: Settings
    rates: tuple[float, ...]
    norms: dict[str, float] = field(default_factory=dict)


CLIP = 'optim_wrapper.max_grad_norm'
STARTS = {
    'movenet': Start(
        'MoveNet Lightning',
        'movenet',
        'head+backbone.net.lateral.[123].*+backbone.net.smooth.*+backbone.net.stem.*',
        {'model.backbone.frozen': True, **adam(3e-3)[0], **schedule(6)},
        (2e-4, 1e-4, 4e-4),
    ),
    'mobilenetv2': Start(
        'MobileNetV2, ImageNet',
        'mobilenetv2',
        'norms+backbone.conv1.*+backbone.layer1.*+head.final_layer.*',
        {**adam(1e-3)[0], **schedule(15)},
        (2e-4, 1e-4, 4e-4),
        # a third to a half of the median norm of noise (norms.py)
        norms=dict(few_unusual=7e-3, ours_channels_best=8e-5, dpsgd_paper=1e-2, feature=1e-2, hybrid_paper=1e-2),
    ),
}
STARTS['mobilenetv2_longer'] = replace(
    STARTS['mobilenetv2'],
    text='MobileNetV2, ImageNet, twice the epochs',
    pretrain={**STARTS['mobilenetv2'].pretrain, **schedule(30)},
)


def add_people_sets(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names the two sets in the folder of ``--people``."""
    parser.add_argument(
        '--people-sets',
        nargs=2,
        metavar=('PRIVATE', 'PUBLIC'),
        default=('lspet', 'coco_val2017'),
        help='names of their folders in --people (default lspet coco_val2017)',
    )


def people_parser(description: str | None, page: Path) -> argparse.ArgumentParser:
    """The arguments that name people and the weights of a start, as absolute paths, and a page; ``page`` is the default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder: dict[str, Any] = dict(type=lambda path: Path(path).resolve(), required=True, metavar='FOLDER')
    parser.add_argument('--people', **folder, help="two sets in MPII's layout")
    add_people_sets(parser)
    parser.add_argument('--weights', **folder, help='folder that holds the weights of --start')
    parser.add_argument('--start', choices=STARTS, default='movenet', help='what the checkpoints were trained from')
    parser.add_argument('--page', type=Path, default=page, help='page whose table is rewritten')
    return parser


def people_size(private: Path, public: Path, quick: bool = False) -> Size:
    """The numbers of people in two folders of MPII's layout, and a grid that two CPU cores run in one night."""
    counts = [len(json.loads((folder / 'annotations/mpii_train.json').read_text())) for folder in (private, public)]
    epochs = dict(public_epochs=3, epochs=3, few_epochs=4, plain_epochs=3)
    epsilons = (8.0,) if quick else (0.8, 8.0)
    return Size(private=counts[0], public=counts[1], epsilons=epsilons, seeds=1, tuned=False, **epochs)


def public_rows(size: Size, start: Start, plain: tuple[Settings, ...]) -> dict[str, Row]:
    """The rows on public people alone: a start, two models trained from it, and the mean of the three."""
    alone: dict[str, Any] = dict(private=False, public_alone=True)
    longer = {**IN_PROCESS, **schedule(2 * size.epochs)}
    return {
        'pretrain': Row(
            f'start: {start.text}, head on public people',
            'pretrain',
            None,
            {**IN_PROCESS, **start.pretrain},
            private=False,
        ),
        'public_people': Row('public-only: on public people', 'nonprivate', 'pretrain', longer, plain, **alone),
        'public_turned': Row(
            'public-only: on turned public people', 'nonprivate', 'pretrain', {**longer, **TURNED}, plain[:1], **alone
        ),
        'public_mean': Row(
            'public-only: mean of the three models above', 'nonprivate', private=False, mean=True, **EXPERTS
        ),
        'public_unusual': Row(
            'public-only: on turned public people in unusual poses',
            'nonprivate',
            'pretrain',
            {**longer, **TURNED, **schedule(6 * size.epochs)},
            plain[:1],
            unusual=True,
            **alone,
        ),
        'public_mean_four': Row(
            'public-only: mean of the four models above', 'nonprivate', private=False, mean=True, **FOUR
        ),
    }


def mixing_rows(size: Size, dpsgd: Settings) -> dict[str, Row]:
    """The rows that train privately how much of each of several public models there is, with the settings of ``dpsgd``."""
    mixed = {**dpsgd, TRAINABLE: 'experts', CLIP: 5e-4, **schedule(size.epochs)}
    layers = Row(
        'ours, layer by layer: private weights of the same three models',
        'dpsgd_eps08',
        settings=mixed,
        candidates=tuple(adam(3e-2, 1e-2, 1e-1)),
        **EXPERTS,
    )
    channels = Row(
        'ours, channel by channel: private weights of the same three models',
        'dpsgd_eps08',
        settings={**mixed, TRAINABLE: 'channel_experts', **schedule(2 * size.epochs)},
        candidates=tuple(adam(3e-2, 1e-2, 6e-2)),
        **EXPERTS,
    )
    of_four = replace(channels, text=channels.text.replace('three', 'four'), **FOUR)
    best = replace(
        of_four,
        text='ours, channel by channel, from the best of the same four models',
        settings={**of_four.settings, 'optim_wrapper.mix_from': 'load_from'},
        **FROM_BEST,
    )
    return {'ours': layers, 'ours_channels': channels, 'ours_channels_four': of_four, 'ours_channels_best': best}


def shorter_rows(start: Start, rows: dict[str, Row]) -> dict[str, Row]:
    """Some rows of a start again, with clipping norms that fit it."""
    return {
        f'{name}_short': replace(
            rows[name],
            text=f'{rows[name].text}, clipped to {norm:g}',
            candidates=tuple(clipped_to(norm, rows[name], one) for one in rows[name].candidates),
        )
        for name, norm in start.norms.items()
    }


def clipped_to(norm: float, row: Row, candidate: Settings) -> Settings:
    """A candidate of a row with a shorter clipping norm, and steps that are as long for a record that is clipped by both."""
    settings = {**row.settings, **candidate}
    factor = settings.get(CLIP, 0.1) / norm
    shorter: Settings = {**candidate, CLIP: norm}
    if PUBLIC_WEIGHT in settings:
        shorter[PUBLIC_WEIGHT] = settings[PUBLIC_WEIGHT] / factor
    optimizer = settings[OPTIMIZER]
    if optimizer['type'] == 'SGD':
        shorter[OPTIMIZER] = {**optimizer, 'lr': optimizer['lr'] * factor}
    return shorter


def kronecker_rows(size: Size, dpsgd: Settings) -> dict[str, Row]:
    """The rows whose private steps are in coordinates that turned public people in unusual poses have, from three starts."""
    settings = {
        **dpsgd,
        PROJECTOR: dict(_delete_=True, type='KroneckerProjector'),
        CLIP: 5e-3,
        **{key.replace('dataset.', 'dataset.public.', 1): value for key, value in TURNED.items()},
        **schedule(2),
    }
    row = Row(
        'ours, in Kronecker coordinates of public gradients, from the mean of the four models',
        'projected_eps08',
        'public_mean_four',
        settings,
        tuple(sgd(10.0, 5.0, 20.0)),
        unusual=True,
    )
    unusual = replace(
        row,
        text='ours, in Kronecker coordinates, from public-only on turned public people in unusual poses',
        start='public_unusual',
    )
    alone = replace(row, text='ours, in Kronecker coordinates, from the start', start='pretrain')
    twice = replace(
        unusual,
        text=f'{unusual.text}, twice the steps and rate',
        settings={**settings, **schedule(4)},
        candidates=tuple(sgd(20.0, 10.0, 15.0)),
    )
    return {
        'ours_kronecker': row,
        'kronecker_unusual': unusual,
        'kronecker_unusual_longer': twice,
        'kronecker': alone,
    }


def longer(size: Size, dpsgd: Settings, times: int = 1) -> Settings:
    """``dpsgd`` with the epochs of the rows that train few parameters, this many times."""
    return {**dpsgd, **schedule(times * (size.few_epochs or size.epochs))}


def from_public_rows(size: Size, dpsgd: Settings, few: tuple[Settings, ...]) -> dict[str, Row]:
    """The rows of DP-SGD, with the settings of ``dpsgd``, that begin at a model which public people have trained."""
    first = Row(
        'DP-SGD, large batch, few parameters, from public-only on public people',
        'dpsgd_eps08',
        'public_people',
        longer(size, dpsgd),
        few,
    )
    unusual = replace(
        first,
        text='DP-SGD, large batch, few parameters, from public-only on turned public people in unusual poses',
        start='public_unusual',
    )
    # for as many steps, there is half the noise for the same signal
    quarter = {**longer(size, dpsgd, 4), 'train_dataloader.batch_sampler.expected_batch_size': size.private // 4}
    return {
        'few': first,
        'few_unusual': unusual,
        'quarter_unusual': replace(
            unusual,
            text='DP-SGD, a quarter of all people per step, all parameters, from the same model',
            settings=quarter,
            candidates=tuple(adam(6e-4, 3e-4, 1e-3)),
        ),
    }


def people_rows(size: Size, start: Start, public_view: Settings = DEFAULT_VIEW) -> dict[str, Row]:
    """The table's rows, the cheapest and most telling first."""
    table, _ = rows_of(size, IN_PROCESS, public_view)
    under_papers, _ = rows_of(size, IN_PROCESS, PAPERS_VIEW)
    plain, few = tuple(adam(*start.rates)), {TRAINABLE: start.few}
    # AdamW moves each parameter by its rate in a noisy step: 1e-3 undoes a start without BatchNorm. For a head alone, the
    # features are computed without gradients.
    head = {TRAINABLE: 'head', **adam(1e-3)[0]}
    private = ({**few, **adam(2e-4)[0]}, head, {**few, **adam(6e-4)[0]})
    rates = tuple(adam(2e-4, 6e-4, 6e-5))
    # SGD stays in the subspace, which AdamW leaves: see engine/training_settings.py
    in_subspace = (*sgd(0.002), *adam(3e-5), *sgd(0.0005))

    def with_(name: str, **changed: object) -> Row:
        return replace(table[name], **changed)

    views = dict(start='public_people', candidates=plain)
    dpsgd = table['dpsgd'].settings
    ours_views = {**table['ours'].settings, **table['ours'].candidates[2], **few}
    best = {**mixing_rows(size, dpsgd), **from_public_rows(size, dpsgd, private[::-1])}
    rows = {
        **public_rows(size, start, plain),
        'nonprivate': with_('nonprivate', candidates=plain),
        **best,
        **kronecker_rows(size, dpsgd),
        'dpsgd': with_(
            'dpsgd', text='DP-SGD, large batch, few parameters', settings=longer(size, dpsgd), candidates=private
        ),
        'publiconly': with_('publiconly', **views),
        'publiconly_papers': replace(
            under_papers['publiconly'], text="public-only: then on views under the paper's blur", **views
        ),
        'public_pictures': with_('public_pictures', **views),
        'ours_pictures': with_('ours_pictures', settings=ours_views, candidates=rates),
        'nonprivate_pictures': with_('nonprivate_pictures', candidates=plain),
        'dpsgd_all': with_(
            'dpsgd', text='DP-SGD, large batch, all parameters', candidates=tuple(adam(1e-4, 3e-5, 3e-4))
        ),
        'dpsgd_paper': with_('dpsgd_paper', candidates=tuple(adam(3e-5, 1e-4, 1e-5))),
        'feature': with_('feature', candidates=tuple(adam(3e-5, 1e-4, 1e-5))),
        'projected': with_('projected', candidates=in_subspace),
        'hybrid_paper': with_('hybrid_paper', candidates=in_subspace),
    }
    return {**rows, **shorter_rows(start, rows)}


def new_set(source: Path, out: Path, linked: Sequence[str] = ('images',)) -> None:
    """Makes the folder of a set without annotations, in place of what was there; ``linked`` are links into ``source``."""
    shutil.rmtree(out, ignore_errors=True)
    (out / 'annotations').mkdir(parents=True)
    for name in linked:
        (out / name).symlink_to((source / name).resolve())


def make_tuning_people(private: Path, out: Path, tested: int = 500) -> Path:
    """Divides the private training people into some to train on and the last ``tested`` to tune with; returns ``out``.

    The pictures are a link. Their size of the head is estimated (:func:`estimated_head_boxes`).
    """
    people = json.loads((private / 'annotations/mpii_train.json').read_text())
    tested = min(tested, len(people) // 5)
    new_set(private, out)
    write_mpii_split(out, 'train', people[:-tested])
    write_mpii_split(out, 'val', people[-tested:], estimated_head_boxes(people[-tested:]))
    return out


def unusualness(person: dict) -> float:
    """How far a person's limbs are from hanging down: 0 if all do, 1 if all point up; -1 if fewer than four are annotated."""
    joints, seen = np.array(person['joints'], float), person['joints_vis']
    limbs = np.array([joints[end] - joints[start] for start, end in LIMBS if seen[start] and seen[end]])
    lengths = np.linalg.norm(limbs.reshape(-1, 2), axis=1)
    return -1.0 if len(limbs) < 4 else float((lengths - limbs[:, 1]).sum() / (2 * lengths.sum() + 1e-9))


def make_unusual_people(public: Path, out: Path) -> Path:
    """A set with the third of the public training people in the most unusual poses; returns ``out``. The pictures are a link."""
    people = json.loads((public / 'annotations/mpii_train.json').read_text())
    order = np.argsort([-unusualness(person) for person in people], kind='stable')
    new_set(public, out)
    write_mpii_split(out, 'train', [people[i] for i in order[: max(len(people) // 3, 1)]])
    return out
