"""The parts of tools/make_report.py that are read from a work dir: budget, scores, settings, the view audit, example predictions.

Not a tool itself. Must not read a picture or a figure of the private set, and must not run code of the work dir, except that
``example_people`` reads its config to find out who is private.
"""

import ast
import json
import math
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import cv2
import mmengine
import numpy as np
from html_page import Plot, picture, plot
from matplotlib.ticker import MaxNLocator
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpose.utils import register_all_modules

from mmpose_dp.datasets.building import build_part
from mmpose_dp.datasets.overlap import private_among
from mmpose_dp.datasets.privacy_units import image_paths
from mmpose_dp.engine.view_audit import AUDIT_NAME, PICTURES_NAME, PRIVATE, VALIDATION, figure_rows
from mmpose_dp.extras.evidence import file_sha256
from mmpose_dp.messages import failure
from mmpose_dp.privacy.accounting import History, epsilon
from mmpose_dp.privacy.calibration import first_steps
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.validation import rounded_up

_POINTS = 20  # of the curve
_ROWS = 20  # of the table of steps
_TIMES = ('time', 'data_time', 'step')  # beside the scores in a line of mmengine's log
_MAIN_SCORES = ('coco/AP', 'PCK')
_SETTINGS = (  # what decides training and guarantee, and names no data
    'model',
    'optim_wrapper',
    'param_scheduler',
    'train_cfg',
    'default_hooks.privacy_budget',
    'default_hooks.public_data',
    'train_dataloader.batch_size',
    'train_dataloader.batch_sampler',
    'train_dataloader.dataset.privacy_unit',
    'train_dataloader.dataset.public_view',
    'train_dataloader.dataset.augmentations',
)
_PEOPLE, _SIDE = 6, 224  # example predictions, and the side of their pictures in pixels


# ---- the budget --------------------------------------------------------------------------------------------------------
def budget_curve(history: History, delta: float, accountant: str, target: float | None) -> Plot | None:
    """Epsilon over the private steps; None if it is not bounded, or there is no step."""
    total = sum(steps for _, steps in history)
    # the first step costs most: a line from 0 to a later one would show too little of it
    at = sorted({min(1, total), *(round(x) for x in np.linspace(0, total, _POINTS + 1))})
    try:
        spent = [epsilon(first_steps(history, steps), delta, accountant) for steps in at]
    except PrivacyError:  # an accountant whose numerics fail for a part
        return None
    spent = list(np.maximum.accumulate(spent))  # each is an upper bound, so that a later one may be lower
    if total == 0 or not math.isfinite(spent[-1]):
        return None

    def draw(axes: Any, colours: tuple[str, str]) -> None:
        axes.plot(at, spent, color=colours[0], label='spent')
        if target is not None:
            axes.axhline(target, color=colours[1], linestyle='--', label='budget')
        axes.set(xlabel='private steps', ylabel='epsilon', xlim=(0, total), ylim=(0, None))
        axes.legend(frameon=False, loc='lower right')

    some = ', '.join(
        f'{rounded_up(spent[i])} after {at[i]}' for i in np.unique(np.linspace(1, len(at) - 1, 4).astype(int))
    )
    return plot(draw, f'Epsilon spent, by private steps: {some}')


def step_rows(history: History) -> list[tuple[str, str, str, str]]:
    """The steps in order: which, how many, noise multiplier, sample rate; equal ones in one row, and not all of very many."""
    joined: list[list[Any]] = []
    for event, steps in history:
        if joined and joined[-1][0] == event:
            joined[-1][1] += steps
        else:
            joined.append([event, steps])
    rows, done = [], 0
    for event, steps in joined:
        sigma, rate = f'{event.noise_multiplier:.4g}', str(event.sample_rate)
        rows.append((f'{done + 1} to {done + steps}', str(steps), sigma, rate))
        done += steps
    if len(rows) > _ROWS:
        rows[_ROWS // 2 : -_ROWS // 2] = [(f'{len(rows) - _ROWS} more rows', '', '', '')]
    return rows


# ---- scores ------------------------------------------------------------------------------------------------------------
def validation_scores(work_dir: Path) -> dict[int, dict[str, float]]:
    """The scores that the training logged, by epoch or iteration. A line of a private batch is never read as one of scores."""
    found: dict[int, dict[str, float]] = {}
    for file in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in file.read_text(errors='replace').splitlines():
            step, scores = _scores_in(line)
            if scores:
                # a resume goes back to its checkpoint, another training to the start
                found = {at: kept for at, kept in found.items() if at < step} | {step: scores}
    return found


def _scores_in(line: str) -> tuple[int, dict[str, float]]:
    """Step and scores of a line of the log; no scores if it is of a training iteration, or damaged."""
    with suppress(ValueError, TypeError, KeyError):
        values = json.loads(line)
        names = {name.rpartition('/')[2] for name in values}
        if not names & {'iter', 'lr', 'acc_pose'} and not any('loss' in name for name in names):
            return int(values['step']), _numbers(values)
    return 0, {}


def _numbers(values: Any) -> dict[str, float]:
    kept = {name: value for name, value in values.items() if name not in _TIMES}
    return {n: float(v) for n, v in kept.items() if isinstance(v, (int, float)) and math.isfinite(v)}


def given_scores(named: list[str]) -> dict[str, dict[str, float]]:
    """The scores in the files of ``--scores NAME=FILE``. Raises PrivacyError for another form."""
    found = {}
    for one in named:
        name, equal, file = one.rpartition('=')
        if not equal or not name:
            raise PrivacyError(f'--scores {one}: write NAME=FILE, with a file that tools/test.py --out wrote')
        try:
            found[name] = _numbers(json.loads(Path(file).read_text()))
        except (OSError, ValueError, AttributeError) as error:
            raise PrivacyError(
                f'--scores {one}: {file} cannot be read ({error}). Write a JSON file of tools/test.py --out'
            ) from error
        if not found[name]:
            raise PrivacyError(f'--scores {one}: {file} has no score. Write a JSON file of tools/test.py --out')
    return found


def scores_section(logged: dict[int, dict[str, float]], given: dict[str, dict[str, float]], unit: str) -> dict | None:
    """The table of scores, a column per training, and the course of the main score; None without any."""
    columns = dict(given)
    if logged:
        last = max(logged)
        columns = {f'this training, {unit} {last}': logged[last], **given}
    names = list(dict.fromkeys(name for scores in columns.values() for name in scores))
    if not names:
        return None
    rows = [(name, *(f'{c[name]:.4g}' if name in c else '' for c in columns.values())) for name in names]
    main = next((name for name in _MAIN_SCORES if name in names), names[0])
    points = [(at, scores[main]) for at, scores in logged.items() if main in scores]

    def draw(axes: Any, colours: tuple[str, str]) -> None:
        axes.plot(*zip(*points), 'o-', color=colours[0])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel=unit, ylabel=main)

    words = f'{main} by {unit}: ' + ', '.join(f'{value:.4g} at {at}' for at, value in points)
    return dict(head=['', *columns], rows=rows, curve=plot(draw, words) if len(points) > 1 else None)


# ---- the config --------------------------------------------------------------------------------------------------------
def settings_of(config: str) -> dict[str, str]:
    """The part of a config that decides training and guarantee, by key, as written, with paths cut down to file names.

    The config is not run. A key that it lacks, or computes, is left out.
    """
    try:
        tree = ast.parse(config)
    except (SyntaxError, ValueError):
        return {}
    top = {
        target.id: line.value
        for line in tree.body
        if isinstance(line, ast.Assign)
        for target in line.targets
        if isinstance(target, ast.Name)
    }
    found = {}
    for name in _SETTINGS:
        first, *inner = name.split('.')
        node = top.get(first)
        for key in inner:
            node = _entry(node, key)
        if node is not None:
            found[name] = _source(config, node)
    return found


def _entry(node: ast.expr | None, key: str) -> ast.expr | None:
    """The value of a key in ``dict(...)`` or ``{...}``."""
    if isinstance(node, ast.Call):
        return next((word.value for word in node.keywords if word.arg == key), None)
    if isinstance(node, ast.Dict):
        named = zip(node.keys, node.values)
        return next((value for name, value in named if isinstance(name, ast.Constant) and name.value == key), None)
    return None


def _source(config: str, node: ast.expr) -> str:
    text = ast.get_source_segment(config, node) or ''
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and _is_path(part.value):
            name = PureWindowsPath(part.value).name  # takes both kinds of slash
            text = text.replace(ast.get_source_segment(config, part) or '', repr(name))
    return textwrap.dedent(' ' * node.col_offset + text)


def _is_path(text: str) -> bool:
    absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return absolute or bool(set('/\\') & set(text)) and not any(map(str.isspace, text))


# ---- the view audit ----------------------------------------------------------------------------------------------------
def view_sections(work_dir: Path, statement: dict[str, Any], with_pictures: bool) -> list[dict[str, Any]]:
    """What tools/audit_view.py found: words, and the table and pictures if they show validation people alone.

    Raises PrivacyError if pictures are wanted and there are none that may be shown.
    """
    words = statement.get('recoverable_from_view', '')
    if PRIVATE in words:
        words = (
            'The view was examined on private pictures: what was found is outside the guarantee, and not on this page'
        )
    section: dict[str, Any] = dict(words=words[:1].upper() + words[1:], rows=[], head=[], pictures={})
    with suppress(OSError, ValueError, LookupError, TypeError):
        audit = json.loads((work_dir / AUDIT_NAME).read_text())
        if audit['sample'] == VALIDATION and audit['in_words'] in words and audit['view'] in statement['public_views']:
            head, rows = figure_rows(audit)
            section.update(head=head, rows=rows, pictures=_view_pictures(work_dir, audit) if with_pictures else {})
    if with_pictures and not section['pictures']:
        raise PrivacyError(
            f'--view-pictures: {work_dir} has no pictures of validation people for this view. Run tools/audit_view.py CONFIG '
            '--work-dir WORK_DIR, with a val_dataloader whose people are not in the private set'
        )
    return [section]


def _view_pictures(work_dir: Path, audit: dict[str, Any]) -> dict[str, list[str]]:
    """Data URIs of a few people, by what is shown of them."""
    with np.load(work_dir / PICTURES_NAME, allow_pickle=False) as file:
        if str(file['sample']) != VALIDATION or str(file['view']) != audit['view']:
            return {}
        shown = {name: file[name][:_PEOPLE] for name in file.files if file[name].ndim == 4}
    return {name: [picture(image) for image in images] for name, images in shown.items()}


# ---- example predictions -----------------------------------------------------------------------------------------------
def example_people(predictions: Path, config: Path) -> list[str]:
    """Data URIs of people with their predicted joints, from a file of ``tools/test.py --dump``.

    Raises PrivacyError if a picture is in the private set, by its path or its content, or if that cannot be found out.
    """
    register_all_modules(init_default_scope=False)
    cfg = Config.fromfile(config)
    init_default_scope(cfg.get('default_scope') or 'mmpose')
    private = build_part(cfg.train_dataloader.dataset.private, 'private')
    try:
        samples = mmengine.load(predictions)
        chosen = [samples[i] for i in np.unique(np.linspace(0, len(samples) - 1, _PEOPLE).astype(int))]
        paths = [str(sample['img_path']) for sample in chosen]
        if private_among(paths, image_paths(private)):
            raise PrivacyError(
                '--predictions has pictures of the private set, which a report must not show: test on other people'
            )
        return [picture(_with_joints(sample, private.metainfo)) for sample in chosen]
    except PrivacyError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, cv2.error) as error:
        raise PrivacyError(
            f'--predictions {predictions}: no picture can be drawn from it ({failure(error)}). Give a file that '
            'tools/test.py --dump wrote, in the folder where it wrote it'
        ) from error


def _with_joints(sample: dict[str, Any], metainfo: dict[str, Any]) -> np.ndarray:
    """(side, side, 3) uint8: the surroundings of a person, with the predicted joints and the lines between them."""
    image = cv2.imread(sample['img_path'])
    box = np.asarray(sample['pred_instances']['bboxes'][0], float)
    joints = np.asarray(sample['pred_instances']['keypoints'][0], float)[:, :2]
    scale = _SIDE / (1.1 * max(box[2] - box[0], box[3] - box[1]))
    shift = _SIDE / 2 - scale * (box[:2] + box[2:]) / 2
    matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
    drawn = cv2.warpAffine(image, matrix, (_SIDE, _SIDE), flags=cv2.INTER_CUBIC)
    points = [tuple(int(x) for x in point) for point in (joints * scale + shift).round()]
    for (a, b), colour in zip(metainfo['skeleton_links'], metainfo['skeleton_link_colors']):
        cv2.line(drawn, points[a], points[b], [int(c) for c in colour[::-1]], 2, cv2.LINE_AA)
    for point, colour in zip(points, metainfo['keypoint_colors']):
        cv2.circle(drawn, point, 4, (255, 255, 255), -1, cv2.LINE_AA)
        cv2.circle(drawn, point, 3, [int(c) for c in colour[::-1]], -1, cv2.LINE_AA)
    return drawn


def config_of(work_dir: Path, sha256: str | None) -> Iterator[Path]:
    """The config files of the work dir that a statement names."""
    for path in [*sorted(work_dir.glob('*.py')), *sorted(work_dir.glob('*/vis_data/config.py'))]:
        if file_sha256(path) == sha256:
            yield path
