"""Forecast what a budget can buy, before any training: noise, epsilon, and how much of the training is signal.

    python tools/plan_budget.py CONFIG                                  # the records are counted in the data set
    python tools/plan_budget.py CONFIG --num-records 5000 --subjects 75 # no data set needed
    python tools/plan_budget.py CONFIG --measure --json plan.json --plot plan.png

It prints sigma, the steps, epsilon by epoch, and for each choice of what to train the ratio of signal to noise of the whole
training, r N mu / sqrt(d), with a verdict and what to change; then which batch is best for the same epsilon, what ten more epochs
bring, what people with several records get, and what a second training costs. r is --r, or measured on public samples (--measure),
or that of the project's benchmark. docs/plan.md says how well the verdicts fit the runs of docs/accuracy.csv. Must not train, and
looks at public samples only.
"""

import argparse
import copy
import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
import torch
from cli import add_cfg_options, merge_options, read_config, run
from forecast_page import SUBSPACE, advice, page, plot
from mmengine.config import Config
from mmengine.runner import Runner
from mmpose.utils import register_all_modules
from rich.console import Console
from rich.progress import track
from trial import (
    annotations_of,
    check_head_of,
    is_start_known,
    is_there,
    planned,
    private_model,
    start_of,
    trained_part,
    trial,
    without_downloads,
)

from mmpose_dp.datasets import batches_of
from mmpose_dp.engine import config_warnings, left_random
from mmpose_dp.engine.basis import fit_basis, table_of
from mmpose_dp.engine.half_private import is_private
from mmpose_dp.engine.optim_wrappers.constructor import experts_of
from mmpose_dp.engine.optim_wrappers.validation import projector_from
from mmpose_dp.engine.signal import measure
from mmpose_dp.extras import forecast
from mmpose_dp.extras.accountability import plan_warnings
from mmpose_dp.extras.forecast import Choice
from mmpose_dp.extras.kronecker import KroneckerProjector, in_passes, samples_for
from mmpose_dp.models import choose_trainable
from mmpose_dp.models.trainable_subset import MIXING
from mmpose_dp.privacy.errors import ConfigError, PrivacyError
from mmpose_dp.privacy.plan import PrivacyPlan
from mmpose_dp.privacy.projection import Projector
from mmpose_dp.privacy.validation import as_whole

SUBSETS = ('all', 'head+last_stage+norms', 'norms+first_stage', 'norms', 'bias', 'head')
SAMPLES, TOGETHER = 256, 8  # public samples for r, and how many gradients are held at once


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='a private config')
    parser.add_argument(
        '--num-records', type=int, help='number of records N, if the data set is not there to be counted'
    )
    parser.add_argument('--subjects', type=int, help='number of people that the records are of')
    parser.add_argument('--r', type=float, help='length of the mean clipped gradient, in units of max_grad_norm')
    parser.add_argument(
        '--measure',
        nargs='?',
        type=int,
        const=SAMPLES,
        metavar='SAMPLES',
        help=f'measure r on so many public samples (default {SAMPLES}), with the weights of load_from',
    )
    parser.add_argument('--json', type=Path, metavar='FILE', help='write everything as JSON')
    parser.add_argument('--plot', type=Path, metavar='FILE', help='write a plot')
    add_cfg_options(parser)
    return parser.parse_args()


# ---- from the config -------------------------------------------------------------------------------------------------
def private_config(args: argparse.Namespace) -> tuple[Config, set[str] | None]:
    """The config, and the names of the tensors that files fill; None where that is not known from here.

    Raises PrivacyError for a config that is missing, not private, or makes no private step.
    """
    cfg = read_config(args.config, 'model', 'train_dataloader', 'train_cfg')
    merge_options(cfg, args.cfg_options)
    start, known = start_of(cfg), is_start_known(cfg)
    without_downloads(cfg.model)
    register_all_modules()
    check_head_of(cfg)
    if not is_private(cfg):
        raise PrivacyError(
            f'{args.config} is not a private config: tools/check_config.py says what to write, or see README, "Make your own '
            'config private"'
        )
    if cfg.train_cfg.get('public_epochs', 0) >= cfg.train_cfg.max_epochs:
        raise PrivacyError(
            'train_cfg.public_epochs is as large as max_epochs: no private step is made, so there is nothing to plan. Write fewer '
            'public_epochs'
        )
    filled = set() if start is None else {*start[0].shapes}
    return cfg, filled if known else None


def plan_of(cfg: Config, args: argparse.Namespace, folder: str) -> PrivacyPlan:
    """The plan that training would make; of --num-records or --subjects where they are given. Raises PrivacyError."""
    size = (cfg.train_dataloader.get('batch_sampler') or {}).get('expected_batch_size')
    unit = cfg.train_dataloader.dataset.get('privacy_unit')
    for key, value in (
        ('train_dataloader.batch_sampler.expected_batch_size', size),
        ('default_hooks.privacy_budget', (cfg.get('default_hooks') or {}).get('privacy_budget')),
    ):
        if not value:
            raise PrivacyError(
                f'{key} is not set, so there is no budget to plan: set it, or make the config with mmpose_dp.configs.private()'
            )
    records = args.num_records
    if unit == 'subject' and (records is not None or args.subjects is not None):
        if args.subjects is None:
            raise PrivacyError("privacy_unit='subject': one subject is one record, so give --subjects")
        records = args.subjects
    if records is not None:
        return planned(cfg, as_whole(records, '--num-records' if unit != 'subject' else '--subjects'), size)
    if not is_there(cfg.train_dataloader.dataset.get('private')):
        raise PrivacyError(
            f'train_dataloader.dataset.private: there is no {annotations_of(cfg.train_dataloader.dataset.private)}. Correct '
            'ann_file or data_root, or, if the data are on another machine, give --num-records N (and --subjects, with '
            "privacy_unit='subject')"
        )
    return trial(cfg, folder).optim_wrapper.plan


def subsets(
    model: torch.nn.Module, names: list[str], lora_rank: int, experts: list[dict[str, torch.Tensor]]
) -> dict[str, tuple[int, list[str]]]:
    """Of each choice of ``trainable`` that the model has: how many numbers it trains, and the names of their parameters."""
    found = {}
    for name in names:
        own = copy.deepcopy(model)
        try:
            numbers = choose_trainable(own, name, lora_rank, experts if name in MIXING else ())
        except ConfigError:
            continue  # a model without norms, say
        found[name] = numbers, [key for key, param in own.named_parameters() if param.requires_grad]
    return found


def choices_of(cfg: Config, args: argparse.Namespace, folder: str) -> list[Choice]:
    """Everything that may be trained, the configured one included. Raises PrivacyError."""
    own, projector = trained_part(cfg), cfg.optim_wrapper.get('projector')
    private_model(copy.deepcopy(cfg))  # refuses what training would
    whole = copy.deepcopy(cfg)
    whole.optim_wrapper.trainable, whole.optim_wrapper.experts = 'all', ()
    model, _ = private_model(whole)
    experts = experts_of(cfg.optim_wrapper.get('experts') or ())
    names = list(dict.fromkeys([*SUBSETS, *(MIXING if experts else ()), own]))
    found = subsets(model, names, cfg.optim_wrapper.get('lora_rank', 8), experts)
    measured = measured_r(cfg, args.measure, folder, found) if args.measure else {}
    choices = []
    for name, (numbers, _) in found.items():
        r, source = r_of(args, measured, name)
        choices.append(Choice(name, numbers, r, source, name == own and not projector))
    if projector:
        r, source = r_of(args, measured, SUBSPACE)
        rank = min(projector_from(projector).max_rank, found[own][0])
        choices.append(Choice(f'{SUBSPACE} of rank {rank}', rank, r, source, True))
    return choices


def r_of(args: argparse.Namespace, measured: dict[str, float], name: str) -> tuple[float, str]:
    """r of a choice, and where it is from."""
    if args.r is not None:
        return args.r, 'given'
    if name in measured:
        return measured[name], 'measured'
    return forecast.default_r(name), 'default'


# ---- r ---------------------------------------------------------------------------------------------------------------
def measured_r(cfg: Config, count: int, folder: str, found: dict[str, tuple[int, list[str]]]) -> dict[str, float]:
    """r of each choice on ``count`` public samples, with the weights of load_from. Raises PrivacyError."""
    own, count = trained_part(cfg), as_whole(count, '--measure', 2)
    cfg = copy.deepcopy(cfg)
    if not cfg.get('load_from'):
        raise PrivacyError('--measure needs the weights that training starts from: set load_from, or give --r')
    if not is_there(cfg.train_dataloader.dataset.get('private')):
        raise PrivacyError('--measure needs the data set, whose private part is not on this machine: give --r')
    if not {'lora', *MIXING} & {*own.split('+')}:
        cfg.optim_wrapper.trainable = 'all'
    runner = trial(cfg, folder)
    runner.load_or_resume()
    wrapper, dataset = runner.optim_wrapper, runner.train_dataloader.dataset
    fitted = (
        (getattr(_refresher(runner), 'num_samples', None) or samples_for(wrapper.projector)) if wrapper.projector else 0
    )
    if dataset.num_public < fitted + count:
        raise PrivacyError(
            f'--measure needs {fitted + count} public samples and train_dataloader.dataset has {dataset.num_public}: set '
            'public_view or public where the method uses one (never for this alone: a view is published), write a smaller '
            '--measure, or give --r'
        )
    order = runner.train_loop.sampler.sampling.random.choice(dataset.num_public, fitted + count)
    chosen = [dataset.public_samples[int(i)] for i in order]
    return measured_on(runner, {name: keys for name, (_, keys) in found.items()}, own, chosen[:fitted], chosen[fitted:])


def measured_on(
    runner: Runner, keys_of: dict[str, list[str]], own: str, fitted: list[int], chosen: list[int]
) -> dict[str, float]:
    """r of choices on public samples.

    Args:
        runner: of a private training, its weights loaded.
        keys_of: the names of each choice's parameters; a choice that needs others than those of the wrapper is left out.
        own: the choice that the projector is for.
        fitted: the samples that the projector's basis is found on, if there is a projector.
        chosen: those that r is measured on.
    """
    model, wrapper = runner.model.train(), runner.optim_wrapper
    places = {id(param): place for place, param in enumerate(wrapper.params)}
    names = {name: places[id(param)] for name, param in model.named_parameters() if id(param) in places}
    parts: dict[str, tuple[list[int], Projector | None]] = {
        choice: ([names[key] for key in keys], None) for choice, keys in keys_of.items() if set(keys) <= set(names)
    }
    if wrapper.projector:
        indices = parts[own][0]
        _fit(runner, fitted, indices)
        parts[SUBSPACE] = indices, wrapper.projector
    steps = -(-len(chosen) // TOGETHER)
    batches = _progress(_gradients(runner, chosen), 'Public samples', steps)
    return measure(wrapper.mechanism, batches, parts)


def _refresher(runner: Runner) -> Any:
    return next((hook for hook in runner.hooks if hasattr(hook, 'num_samples')), None)


def _progress(steps: Iterable[Any], what: str, total: int) -> Iterator[Any]:
    """The steps, with a bar on a terminal."""
    console = Console(stderr=True)
    yield from track(steps, what, total, transient=True, console=console, disable=not console.is_terminal)


def _fit(runner: Runner, fitted: list[int], indices: list[int]) -> None:
    """Finds the projector's basis, of the parameters at ``indices``, on public samples."""
    projector, params = runner.optim_wrapper.projector, runner.optim_wrapper.params

    def of(samples: list[int]) -> Any:
        return ([batch[i] for i in indices] for batch in _gradients(runner, samples))

    if isinstance(projector, KroneckerProjector):
        projector.fit([params[i] for i in indices], [of(part) for part in in_passes(fitted)])
    else:
        fit_basis(projector, table_of(of(fitted), len(fitted), projector.dtype))


def _gradients(runner: Runner, chosen: list[int]) -> Any:
    """Batches of per-sample gradients of public samples of the data set; a sample that cannot be used is left out."""
    for batch in batches_of(runner.train_dataloader.dataset, chosen, TOGETHER):
        yield runner.optim_wrapper.public_gradients(batch)


# ---- the forecast ----------------------------------------------------------------------------------------------------
def per_person(plan: PrivacyPlan, args: argparse.Namespace) -> int | None:
    """Records of one person on average, rounded up; None if the number of people is not known, or each is one record."""
    if args.subjects is None or plan.privacy_unit == 'subject':
        return None
    if not 1 <= args.subjects <= plan.num_records:
        raise PrivacyError(
            f'--subjects {args.subjects} must be between 1 and the number of records, {plan.num_records}'
        )
    return -(-plan.num_records // args.subjects)


def forecast_of(plan: PrivacyPlan, choices: list[Choice], most_records: int | None) -> dict[str, Any]:
    """Everything that the page shows, plain JSON values."""
    sizes = forecast.batch_sizes(plan)
    tried = _progress((forecast.with_batch(plan, size) for size in sizes), 'Batch sizes', len(sizes))
    batches = [batch for batch in tried if batch is not None]
    strength = forecast.strength(plan)
    rows = []
    for choice in choices:
        value = forecast.ratio(plan, choice.r, choice.numbers)
        useful = forecast.useful(value, choice.r)
        limits = dict(zip(('can_learn', 'may_learn_a_little'), forecast.limits(choice.trainable)))
        words = forecast.verdict(value, choice.trainable)
        rows.append(dict(vars(choice), ratio=value, useful=useful, thresholds=limits, verdict=words))
    whole = next(choice for choice in choices if choice.trainable == 'all')
    found = dict(
        num_records=plan.num_records,
        privacy_unit=plan.privacy_unit,
        expected_batch_size=plan.expected_batch_size,
        steps=plan.steps,
        epsilon=plan.epsilon,
        delta=plan.target_delta,
        accountant=plan.accountant,
        noise_multiplier=plan.noise_multiplier,
        gdp_mu=forecast.gaussian_mu(plan),
        mu_of_the_steps=strength / plan.num_records,
        strength=strength,
        most_numbers=[forecast.most_numbers(plan, whole.r, least) for least in (1.0, forecast.LITTLE)],
        choices=rows,
        epsilon_by_epoch=forecast.epsilon_by_epoch(plan),
        batches=[vars(batch) for batch in batches],
        best_batch=forecast.best_batch(batches).size,
        more_epochs=forecast.with_more_epochs(plan),
        people=_bounded(
            forecast.for_people(plan, sorted({*forecast.PEOPLE, *([most_records] if most_records else [])}))
        ),
        second_training=forecast.second_training(plan),
    )
    return dict(found, advice=advice(found))


def _bounded(people: list[tuple[int, float]]) -> list[tuple[int, float | None]]:
    """JSON has no infinity: None is 'not computed'."""
    return [(count, spent if math.isfinite(spent) else None) for count, spent in people]


def frozen_at_random(cfg: Config, filled: set[str] | None, found: dict[str, Any]) -> list[str]:
    """A warning for what the config trains, and for what the forecast suggests, if it leaves random weights frozen.

    ``filled``: as ``private_config`` returns it.
    """
    public = cfg.train_cfg.get('public_epochs') and cfg.optim_wrapper.get('public_optimizer')
    if filled is None or public:
        return []
    best = max(
        (row for row in found['choices'] if not row['trainable'].startswith(SUBSPACE)), key=lambda row: row['useful']
    )
    lines = []
    for name in dict.fromkeys([trained_part(cfg), best['trainable']]):
        one = copy.deepcopy(cfg)
        one.optim_wrapper.trainable = name
        one.optim_wrapper.experts = one.optim_wrapper.get('experts', ()) if name in MIXING else ()
        model, wrapper = private_model(one)
        words = left_random(model, wrapper.left_out, filled, name)
        lines += [f'Careful: the ratio does not see that {words}.'] if words else []
    return lines


def main() -> None:
    """Builds the plan as training does, and prints the forecast."""
    args = parse_args()
    if args.r is not None:
        forecast.check_r(args.r)
    for path in filter(None, (args.json, args.plot)):
        if not path.parent.is_dir():
            raise PrivacyError(f'{path} cannot be written: there is no such folder')
    cfg, filled = private_config(args)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_of(cfg, args, f'{folder}/plan')
        if not plan.is_private:
            raise PrivacyError(f'there is no budget to plan: {plan_warnings(plan)[-1]}')
        most_records = per_person(plan, args)
        choices = choices_of(cfg, args, f'{folder}/measure')
    found = forecast_of(plan, choices, most_records)
    if args.measure and cfg.train_dataloader.dataset.get('public_view'):
        found['advice'].append(
            'r is of public views, which ask for other changes than pictures: see docs/plan.md, "Where r comes from".'
        )
    found['advice'] += [
        *(f'Careful: {words}.' for words in config_warnings(cfg)),
        *frozen_at_random(cfg, filled, found),
    ]
    print(f'Config {Path(args.config).name}\n{page(found)}')
    for warning in plan_warnings(plan):
        print(warning)
    try:
        if args.json:
            args.json.write_text(json.dumps(found, indent=2) + '\n')
        if args.plot:
            plot(found, args.plot)
    except OSError as error:
        raise PrivacyError(f'the forecast cannot be written: {error}') from error


if __name__ == '__main__':
    run(main)
