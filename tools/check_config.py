"""Report what private training would do with a config, without training. Run it first on your own model.

    python tools/check_config.py my_config.py

It builds the model with random weights, takes a few samples (yours if the data set is there, random ones if not), computes each
sample's gradient as private training does and again by looping plain MMPose over single samples, and compares the two.
It also prints what the training settings are, the noise, the number of steps, the epsilon that would be spent, and the memory. If
the data set is there, everything that training checks before its first step is checked here too; if it is elsewhere, say so with
--num-records. The exit status is 0 if the config is private or can be made so, and 2, with a message, if not. Must not train,
download or leave anything behind.
"""

import argparse
import copy
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mmpose_dp  # noqa: F401  (first: checks and repairs the install)

# isort: split
import torch
from cli import add_cfg_options, merge_options, positive, read_config, run
from mmengine.config import Config
from mmengine.runner import Runner
from mmpose.registry import TRANSFORMS
from mmpose.utils import register_all_modules
from reference_gradients import TOLERANCE, compare, records
from torch import nn
from trial import (
    annotations_of,
    check_head_of,
    has_private_data,
    has_private_wrapper,
    is_start_known,
    is_there,
    planned,
    private_data,
    private_model,
    start_of,
    trained_part,
    trial,
    without_downloads,
)

from mmpose_dp.datasets import View
from mmpose_dp.datasets.annotation_file import unused_in_words
from mmpose_dp.datasets.missing_files import path_in_words
from mmpose_dp.datasets.resolving import is_kind
from mmpose_dp.engine import REPLACED, DPOptimWrapper, config_warnings, left_random, mostly_random, settings_in_words
from mmpose_dp.engine.dry_run import blank_batch, try_batch
from mmpose_dp.engine.half_private import is_private
from mmpose_dp.engine.hooks.fitting_norm import unfitting_norms
from mmpose_dp.engine.hooks.planning import method_of
from mmpose_dp.engine.hooks.provenance import Start, idle_experts
from mmpose_dp.engine.never_reached import never_reached
from mmpose_dp.engine.schedules import idle_steps
from mmpose_dp.engine.training_settings import FROM_RANDOM
from mmpose_dp.extras.accountability import plan_warnings
from mmpose_dp.extras.experts import mixed_in
from mmpose_dp.extras.kronecker import basis_bytes
from mmpose_dp.models import fit_checkpoint, unwrapped, weights_of
from mmpose_dp.models.joint_remap import shapes_of
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.plan import METHODS, PrivacyPlan
from mmpose_dp.privacy.validation import as_given, rounded_up


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file, private or not yet')
    parser.add_argument('--records', type=positive, default=2, help='number of samples to compare (default 2)')
    parser.add_argument(
        '--num-records',
        type=positive,
        help='number of records N, if the data set is on another machine: its data are not checked',
    )
    add_cfg_options(parser)
    return parser.parse_args()


def how_to_make_private(file: str | None) -> str:
    """What to write for the plain config in ``file``."""
    if file and Config._is_lazy_import(file):
        return (
            'To be made private: write at its end "from importlib import import_module" and '
            "\"globals().update(import_module('mmpose_dp.configs').private(globals(), 'hybrid'))\", see README."
        )
    name = Path(file).name if file else 'this_config.py'
    return (
        f'To be made private: write a new config beside it, with three lines: "_base_ = {name!r}", "from mmpose_dp.configs import '
        'private" and "globals().update(private(_base_, \'hybrid\'))", see README.'
    )


def report_method(cfg: Config) -> None:
    """Prints the method of a private config. Raises PrivacyError if its parts do not go together."""
    if not (cfg.get('train_dataloader') or {}).get('dataset'):
        raise PrivacyError('train_dataloader.dataset is missing: give a config that trains')
    data, settings = cfg.train_dataloader.dataset, cfg.get('optim_wrapper') or {}
    if has_private_data(cfg) and has_private_wrapper(cfg):
        wrapper = SimpleNamespace(projector=settings.get('projector'), public_weight=settings.get('public_weight', 0.0))
        public = (data.get(part) is not None for part in ('public_view', 'public'))
        print(f'Method: {METHODS[method_of(*public, wrapper, (cfg.get("train_cfg") or {}).get("public_epochs", 0))]}')


def report_gradients(model: nn.Module, wrapper: DPOptimWrapper, batch: dict) -> bool:
    """Prints how gradients are computed and how far they are from the reference. Returns whether they are right.

    Raises PrivacyError if no sample has a finite gradient.
    """
    gaps, left_out = compare(model, wrapper, copy.deepcopy(batch))
    methods = wrapper.engine.gradient_methods()
    owner = {
        f'{n}.{key}': type(m).__name__ for n, m in model.named_modules() for key, _ in m.named_parameters(recurse=False)
    }
    print(f'\nPer-sample gradients: {wrapper.engine}.')
    for method, title in (
        ('rule', 'by the layer'),
        ('operations', 'by the operations that use it'),
        ('loop', 'looped'),
    ):
        kinds = Counter(
            owner.get(name, '?').removeprefix('Frozen') for name, found in methods.items() if found == method
        )
        if kinds:
            print(f'  {title}: ' + ', '.join(f'{count} parameters of {kind}' for kind, count in kinds.most_common()))
    worst = max(gaps, key=lambda name: gaps[name])
    trained, count = sum(p.numel() for p in wrapper.params), sum(p.numel() for p in model.parameters())
    print(f'  {trained:,} of {count:,} parameters are trained')
    tried = len(batch['inputs'])
    if left_out == tried:
        raise PrivacyError(
            f'none of the {tried} samples that were tried has a finite gradient, here or in plain MMPose, so training would learn '
            'nothing: change the loss of model.head, or the weights with which it begins'
        )
    if left_out:
        print(
            f'WARNING: {left_out} of {tried} samples that were tried have no finite gradient, here or in plain MMPose: such a '
            'sample teaches nothing'
        )
    print(f'Against plain MMPose, one sample at a time: largest deviation {gaps[worst]:.1e} ({worst})')
    return gaps[worst] <= TOLERANCE


def report_budget(cfg: Config, num_records: int | None, plan: PrivacyPlan | None = None) -> None:
    """Prints sigma, steps and epsilon over the epochs: of ``plan``, or of the config and ``num_records`` if there is none."""
    loader, train_cfg = cfg.train_dataloader, cfg.get('train_cfg') or {}
    size, first = loader.get('batch_sampler', {}).get('expected_batch_size'), train_cfg.get('public_epochs', 0)
    if not cfg.get('default_hooks', {}).get('privacy_budget') or not size:
        print('\nNo budget yet: set default_hooks.privacy_budget and train_dataloader.batch_sampler.')
        return
    if first and first == train_cfg.get('max_epochs'):
        print(
            f'\nBudget: all {first} epochs are public (train_cfg.public_epochs), so no private step is made and no epsilon spent.'
        )
        return
    if num_records is None and plan is None:
        print('\nNo budget: the data set is not there to be counted. --num-records N shows noise and epsilon.')
        return
    plan = plan or planned(cfg, num_records or 0, size)
    print(
        f'\nBudget: epsilon {plan.target_epsilon}, delta {as_given(plan.target_delta)}, N {plan.num_records:,} (one record: one '
        f'{plan.privacy_unit}), expected batch {size}:\n  noise_multiplier {plan.noise_multiplier:.4f}, {plan.steps:,} private '
        f'steps (accountant {plan.accountant})\n  epoch    epsilon spent'
    )
    for steps in sorted({max(plan.steps * i // 5, 1) for i in range(1, 6)}):
        spent = plan.epsilon_after(steps)
        print(f'  {first + steps / (plan.num_records // size):5.1f}    {rounded_up(spent)}')
    for warning in plan_warnings(plan):
        print(f'  {warning}')


def report_memory(cfg: Config, model: nn.Module, wrapper: DPOptimWrapper, batch: dict, largest_forward: int) -> None:
    """Prints the memory that training is expected to need, from the tensors that one forward of the records keeps.

    ``largest_forward``: the most samples in one forward, more than ``batch_size`` if a record has more.
    """
    model.float()
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(**model.data_preprocessor(batch, True), mode='loss')
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    per_sample = sum(size for key, size in kept.items() if key not in own) / len(batch['inputs'])
    usual, trained = cfg.train_dataloader.get('batch_size', 32), sum(p.numel() for p in wrapper.params)
    samples = max(usual, largest_forward)
    whose = 'train_dataloader.batch_size' if samples == usual else 'of one record, which go through one forward'
    largest = max(p.numel() for p in wrapper.params)
    parts = {
        'weights': weights,
        'sums, noise and optimizer state': 6 * 4 * trained,
        f'activations of {samples} samples ({whose})': per_sample * samples,
        f"the largest parameter's gradients for {samples} samples": 4.0 * largest * samples,
    }
    if wrapper.projector:
        parts[f'subspace of rank {wrapper.projector.max_rank}'] = float(basis_bytes(wrapper.projector, wrapper.params))
    print(f'\nMemory: about {sum(parts.values()) / 2**30:.2f} GiB')
    for name, size in parts.items():
        print(f'  {size / 2**30:6.2f} GiB  {name}')
    if samples > usual:
        print(
            f'  A record has up to {samples} samples, more than train_dataloader.batch_size={usual}: write '
            'train_dataloader.batch_sampler.max_rows_per_record to choose fewer of them per step'
        )


def report(cfg: Config, args: argparse.Namespace, folder: str) -> bool:
    """Prints all parts. Returns whether the gradients are right. Raises PrivacyError for what training would refuse."""
    plan, largest, idle, runner = None, 0, [], None
    check_head_of(cfg)
    report_method(cfg)
    settings, words = cfg.train_dataloader.dataset, settings_in_words(cfg)
    start_known = is_start_known(cfg)
    without_downloads(cfg.model)
    if is_private(cfg) and is_there(cfg.train_dataloader.dataset.get('private')):
        runner = trial(cfg, folder)
        model, wrapper, whole = runner.model, runner.optim_wrapper, runner.train_dataloader.dataset
        dataset, largest = whole.private, runner.train_loop.sampler.largest_forward
        plan = None if args.num_records else wrapper.plan
        view, idle = whole.view_description, [*never_reached(runner), *idle_steps(runner)]
        inside = f', in {whole.num_records:,} records (one record: one {whole.privacy_unit})'
    else:
        if not has_private_wrapper(cfg):
            print(how_to_make_private(cfg.filename))
        model, wrapper = private_model(cfg)
        settings, dataset = private_data(cfg)
        inside, view = '', described(cfg.train_dataloader.dataset.get('public_view'))
    wrapper.amp_dtype = None  # gradients are compared in float64
    if view:
        print(f'Public view, which is treated as published: {view}')
    print(f'Samples: {"random" if dataset is None else f"{len(dataset):,} of {type(dataset).__name__}{inside}"}')
    if dataset is not None and (unused := unused_in_words(dataset.ann_file)):
        print(f'  {unused}')
    start = start_of(cfg)
    report_experts(start, unwrapped(model), wrapper)  # first: below, the checkpoint is fitted to the model's joints
    filled = report_start(cfg, start, unwrapped(model), None if dataset is None else dataset.metainfo)
    batch = records(settings, dataset, args.records)
    for index in range(len(batch['inputs'])):
        one = {key: values[index] for key, values in batch.items()}
        try_batch(model, blank_batch(one), 'train_dataloader.dataset')
    right = report_gradients(model, wrapper, batch)
    report_settings(cfg, words, model, wrapper, filled if start_known else None, idle)
    known = len(dataset) if dataset is not None and plan is None and is_private(cfg) else None
    report_budget(cfg, args.num_records or known, plan)
    report_memory(cfg, model, wrapper, batch, largest)
    if runner is not None and start_known:
        report_norm(runner)
    return right


def report_norm(runner: Runner) -> None:
    """Prints a warning if max_grad_norm is longer than gradients of the weights that training starts from."""
    runner.load_or_resume()
    for warning in unfitting_norms(runner):
        print(f'\nWARNING: {warning}')


def described(view: Any) -> str:
    """What the public view of a config says that it keeps; empty if there is none."""
    return TRANSFORMS.build(view).description if is_kind(TRANSFORMS, view or {}, View) else ''


def report_experts(start: tuple[Start, Any] | None, model: nn.Module, wrapper: DPOptimWrapper) -> None:
    """Prints how much of the model is mixed with each of ``optim_wrapper.experts``, and which of them can change nothing."""
    wanted = len(shapes_of(model))
    for number, (expert, _) in enumerate(wrapper.experts):
        print(
            f'Experts: {len(mixed_in(model, number)):,} of {wanted:,} tensors of the model are mixed with those of {expert}'
        )
    for words in () if start is None else idle_experts(wrapper.experts, start[1]):
        print(f'  WARNING: {words}')


def report_start(cfg: Config, start: tuple[Start, Any] | None, model: nn.Module, metainfo: dict | None) -> set[str]:
    """Prints how much of the model load_from fills, which joints too, and returns the names, fitted output layers among them.

    ``start``: as ``start_of`` returns it. Raises PrivacyError for a file that fits nothing, as training does.
    """
    if start is None:
        return set()
    file, checkpoint = start
    wanted = shapes_of(model)
    found = {name for name, shape in file.shapes.items() if wanted.get(name) == shape}
    joints = [cfg.model.head.get('out_channels')]  # of an output layer for other joints, training keeps what fits
    if not found and not any([*wanted.get(name, ())[:1]] == joints for name in file.shapes):
        raise PrivacyError(file.misfit(wanted))
    print(f'Weights: {len(found):,} of {len(wanted):,} tensors of the model are those of {Path(file.path).name}')
    for line in () if metainfo is None else fit_checkpoint(checkpoint, model, metainfo):
        print(f'  {line}')
    fitted = weights_of(checkpoint, 'load_from')
    return {name for name, value in fitted.items() if wanted.get(name) == value.shape}


def report_settings(
    cfg: Config,
    now: dict[str, str],
    model: nn.Module,
    wrapper: DPOptimWrapper,
    filled: set[str] | None,
    idle: list[str],
) -> None:
    """Prints what a private config trains with, beside what it inherited, and what of it can have no effect.

    ``now``: the settings, in words. ``filled``: the names of the tensors that files fill; None where that is not known from here.
    ``idle``: warnings of steps that change nothing.
    """
    if not is_private(cfg):
        return
    inherited = cfg.get(REPLACED) or {}
    print(f'\nTraining settings{" (* not as in the config that it inherits from)" if inherited else ""}')
    for name, words in now.items():
        old = inherited.get(name, words)
        print(f'  {name:<24} {words}' + ('' if old == words else f'  * instead of: {old}'))
    whole = bool(cfg.train_cfg.get('public_epochs')) and wrapper.public_params is not None
    left = '' if filled is None or whole else left_random(model, wrapper.left_out, filled, trained_part(cfg))
    start = FROM_RANDOM if filled == set() and not wrapper.experts else ''
    of_start = filter(None, [start, mostly_random(model, filled or ()), left])
    for warning in [*config_warnings(cfg), *idle, *of_start]:
        print(f'  WARNING: {warning}')


def missing(key: str, dataset: Any) -> str:
    """A sentence with the key and the path of a data set whose annotations are not on this machine; empty if they are."""
    return '' if is_there(dataset) else f'{key}: there is no {annotations_of(dataset)}'


def instead(dataset: Any) -> str:
    """What to write for the annotations of a data set that are not there."""
    return path_in_words(str(annotations_of(dataset))) or 'Correct ann_file or data_root.'


def verdict(cfg: Config, elsewhere: bool) -> str:
    """The last line of the report. Raises PrivacyError if data are missing and the user has not said that they are elsewhere."""
    train, private = cfg.train_dataloader.dataset, is_private(cfg)
    parts = (
        ('train_dataloader.dataset.private', train['private'])
        if 'private' in train
        else ('train_dataloader.dataset', train)
    )
    lost = missing(*parts)
    if lost and private and not elsewhere:
        raise PrivacyError(
            f'{lost}, so nothing about the data was checked, and training would stop. {instead(parts[1])} If the data are on '
            'another machine, give --num-records N, and only the model and the budget are checked'
        )
    if lost:
        what = 'The model and the budget are those of a private config' if private else 'The model can be made private'
        return f'{what}. THE DATA WERE NOT CHECKED: {lost}.'
    if not private:
        return 'This config can be made private.'
    validated = (cfg.get('val_dataloader') or {}).get('dataset')
    lost = missing('val_dataloader.dataset', validated)
    if lost and elsewhere:
        return f'This config is private. VALIDATION WAS NOT CHECKED: {lost}.'
    if lost:
        raise PrivacyError(
            f'VALIDATION WAS NOT CHECKED: {lost}. Training would stop because of that. {instead(validated)} Or train without '
            'validation (val_cfg, val_dataloader and val_evaluator None, or train.py --no-validate)'
        )
    return 'This config is private and ready to train.'


def main() -> None:
    """Prints the report."""
    args = parse_args()
    cfg = read_config(args.config, 'model')
    merge_options(cfg, args.cfg_options)
    register_all_modules()
    torch.manual_seed(0)
    print(f'Config {Path(args.config).name}')
    with tempfile.TemporaryDirectory() as folder:
        right = report(cfg, args, folder)
    if not right:
        raise PrivacyError(
            "the gradients are not those of plain MMPose: write optim_wrapper.engine='loop', and please report the model"
        )
    print(f'\n{verdict(cfg, args.num_records is not None)}')


if __name__ == '__main__':
    run(main)
