"""Says what private training would do with a config, without training: run it first on a model of your own.

    python tools/check_config.py my_config.py

It builds the model with random weights, takes a few records (yours if the data set is there, random ones if not), finds each
record's gradient as private training does and once more by looping plain MMPose over single records, and compares the two.
It also prints the noise, the steps, epsilon as it would be spent, and the memory. The exit status is 0 if the config can be
made private, 2 with a message if not. Must not train, download or write anything.
"""

import argparse
import copy
from collections import Counter
from pathlib import Path
from typing import Any

import mmpose_dp  # noqa: F401  (first: checks and mends the install)

# isort: split
import numpy as np
import torch
from cli import run
from mmengine.config import Config, DictAction
from mmengine.dataset import Compose
from mmengine.optim import build_optim_wrapper
from mmpose.datasets.datasets.utils import parse_pose_metainfo
from mmpose.registry import DATASETS, MODELS
from mmpose.utils import register_all_modules
from torch import nn

from mmpose_dp.datasets import collate_rows
from mmpose_dp.datasets.records import group_rows
from mmpose_dp.engine import DPOptimWrapper
from mmpose_dp.engine.hooks.planning import method_of
from mmpose_dp.privacy import PrivacyError, PrivacyPlan, Schedule, as_given, epsilon_curve, rounded_up
from mmpose_dp.privacy.plan import METHODS

TOLERANCE = 1e-4  # of a parameter's gradient, in float64: what is above is a wrong rule and not rounding


def parse_args() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file, private or not yet')
    parser.add_argument('--records', type=int, default=2, help='how many records to compare (default 2)')
    parser.add_argument('--num-records', type=int, help='N, where the data set is not there to be counted')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE')
    return parser.parse_args()


def private_model(cfg: Config) -> tuple[nn.Module, DPOptimWrapper]:
    """The model with its private head and the wrapper that the config asks for, without noise. Raises PrivacyError."""
    head, settings = cfg.model.head, cfg.get('optim_wrapper') or {}
    if not head.type.startswith('Private'):
        if MODELS.get(f'Private{head.type}') is None:
            raise PrivacyError(
                f'model.head.type={head.type!r} has no private twin. If its loss calls self.forward(feats) and compares the '
                f'result with the data samples, make one: mmpose_dp.models.private_twin({head.type})'
            )
        print(f"To be made private: write model.head.type='Private{head.type}'.")
        head.type = f'Private{head.type}'
    if settings.get('type') != 'DPOptimWrapper':
        print(
            'To be made private: put the parts of configs/_base_/hybrid.py (or dpsgd.py ...) in their places, see README.'
        )
        settings = dict(type='DPOptimWrapper', optimizer=dict(type='SGD', lr=1.0), max_grad_norm=1.0)
        settings['constructor'] = 'DPOptimWrapperConstructor'
    _without_downloads(cfg.model)
    model = MODELS.build(cfg.model).train()
    wrapper = build_optim_wrapper(model, Config(dict(settings))._cfg_dict)
    assert isinstance(wrapper, DPOptimWrapper)
    report_method(cfg, wrapper)
    wrapper.amp_dtype = None  # gradients are compared in float64
    return model, wrapper


def report_method(cfg: Config, wrapper: DPOptimWrapper) -> None:
    """Prints what a private config's method is called. Raises PrivacyError for parts that do not go together."""
    data, settings = cfg.train_dataloader.dataset, cfg.get('optim_wrapper') or {}
    if data.type == 'PublicPrivateDataset' and settings.get('type') == 'DPOptimWrapper':
        halves = (data.get(half) is not None for half in ('public_view', 'public'))
        print(f'Method: {METHODS[method_of(*halves, wrapper, cfg.train_cfg.get("public_epochs", 0))]}')


def _without_downloads(node: Any) -> None:
    if isinstance(node, dict):
        if isinstance(node.get('init_cfg'), dict) and node['init_cfg'].get('type') == 'Pretrained':
            node['init_cfg'] = None
        for value in node.values():
            _without_downloads(value)


def private_data(cfg: Config) -> tuple[dict, Any]:
    """The private data set's config, and the data set itself where its files are there."""
    whole = cfg.train_dataloader.dataset
    dataset = whole.get('private', whole)
    built = DATASETS.build(dict(dataset, lazy_init=True))
    if not Path(built.ann_file).is_file():
        return dataset, None
    if whole.type == 'PublicPrivateDataset':  # refuses what is wrong with either half
        return dataset, DATASETS.build(whole).private
    built.full_init()
    return dataset, built


def records(settings: dict, dataset: Any, count: int) -> dict:
    """``count`` rows through the training pipeline: the data set's first, or random pictures of random joints."""
    if dataset is not None:
        rows = [dataset.prepare_data(i) for i in range(min(count, len(dataset)))]
    else:
        rng = np.random.default_rng(0)
        meta = parse_pose_metainfo(settings.get('metainfo') or DATASETS.get(settings['type']).METAINFO)
        pipeline = Compose([step for step in settings['pipeline'] if step['type'] != 'LoadImage'])
        rows = [pipeline(_random_person(rng, meta)) for _ in range(count)]
    return collate_rows([[row for row in rows if row is not None]])


def _random_person(rng: np.random.Generator, meta: dict) -> dict:
    joints, side = meta['num_keypoints'], 256
    return dict(
        copy.deepcopy(meta),
        img=rng.integers(0, 255, (side, side, 3), dtype=np.uint8),
        img_shape=(side, side),
        ori_shape=(side, side),
        img_path='random',
        id=0,
        img_id=0,
        category_id=1,
        bbox=np.array([[24, 24, 232, 232]], dtype=np.float32),
        bbox_score=np.ones(1, dtype=np.float32),
        keypoints=rng.uniform(40, 216, (1, joints, 2)).astype(np.float32),
        keypoints_visible=np.ones((1, joints), dtype=np.float32),
    )


def compare(model: nn.Module, wrapper: DPOptimWrapper, batch: dict) -> dict[str, float]:
    """Largest deviation of each parameter's gradients over the records, relative to the reference. In float64."""
    model.double()
    for module in model.modules():
        if 'Drop' in type(module).__name__:
            module.eval()  # or no two forwards are the same
    for sample in batch['data_samples']:
        sample.set_metainfo({'dp_record': None})  # a row by itself, whose gradient may be looked at
        for part in (sample.gt_instance_labels, sample.get('gt_fields')):
            for key, value in part.items() if part is not None else ():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    part.set_field(value.double(), key)
    wrapper.prepare(model)
    plain = copy.deepcopy(model)
    plain.head.__class__ = type(plain.head).__mro__[2]  # MMPose's own head
    params = [p for p in plain.parameters() if p.requires_grad]
    ours = wrapper.public_gradients(batch)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    order = {id(p): i for i, p in enumerate(wrapper.params)}
    places = [order[id(p)] for p in model.parameters() if p.requires_grad]
    gaps = dict.fromkeys(names, 0.0)
    for row in range(len(batch['inputs'])):
        alone = plain.data_preprocessor({key: [values[row]] for key, values in batch.items()}, True)
        losses = plain(**alone, mode='loss')
        total = sum(value.sum() for key, value in losses.items() if 'loss' in key)
        grads = torch.autograd.grad(total, params, allow_unused=True)
        size = float(torch.stack([g.norm() for g in grads if g is not None]).norm())
        for name, place, grad in zip(names, places, grads):
            want = torch.zeros_like(ours[place][row]) if grad is None else grad
            scale = max(float(want.norm()), 1e-3 * size)  # a gradient that is all but zero is all rounding
            gaps[name] = max(gaps[name], float((ours[place][row].double() - want).norm()) / scale)
    return gaps


def report_gradients(model: nn.Module, wrapper: DPOptimWrapper, batch: dict) -> bool:
    """Prints how gradients are found and how far they are from the reference; whether they are right."""
    gaps = compare(model, wrapper, copy.deepcopy(batch))
    ways = wrapper.engine.ways()
    owner = {
        f'{n}.{key}': type(m).__name__ for n, m in model.named_modules() for key, _ in m.named_parameters(recurse=False)
    }
    print(f'\nPer-sample gradients: {wrapper.engine}.')
    for way, title in (('rule', 'by the layer'), ('operations', 'by the operations that use it'), ('loop', 'looped')):
        kinds = Counter(owner.get(name, '?').removeprefix('Frozen') for name, found in ways.items() if found == way)
        if kinds:
            print(f'  {title}: ' + ', '.join(f'{count} parameters of {kind}' for kind, count in kinds.most_common()))
    worst = max(gaps, key=lambda name: gaps[name])
    trained, count = sum(p.numel() for p in wrapper.params), sum(p.numel() for p in model.parameters())
    print(f'  {trained:,} of {count:,} parameters are trained')
    print(f'Against plain MMPose, one record at a time: largest deviation {gaps[worst]:.1e} ({worst})')
    return gaps[worst] <= TOLERANCE


def report_budget(cfg: Config, num_records: int | None) -> None:
    """Prints sigma, steps and epsilon over the epochs. Raises PrivacyError for a budget that cannot be met."""
    hooks, loader = cfg.get('default_hooks', {}), cfg.train_dataloader
    budget, size = hooks.get('privacy_budget'), loader.get('batch_sampler', {}).get('expected_batch_size')
    if not budget or not size:
        print('\nNo budget yet: default_hooks.privacy_budget and train_dataloader.batch_sampler say it.')
        return
    if num_records is None:
        print('\nThe data set is not there: give --num-records N to see noise and epsilon.')
        return
    per_epoch, first = num_records // size, cfg.train_cfg.get('public_epochs', 0)
    settings = dict(
        method='dpsgd',  # the noise of every method is that of DP-SGD
        privacy_unit=loader.dataset.get('privacy_unit', 'instance'),
        num_records=num_records,
        expected_batch_size=size,
        steps=(cfg.train_cfg.max_epochs - first) * per_epoch,
        max_grad_norm=cfg.optim_wrapper.max_grad_norm,
        target_delta=budget.target_delta,
        accountant=budget.get('accountant', 'pld'),
        schedule=Schedule(**cfg.optim_wrapper.get('schedule') or {}),
    )
    sigma, target = cfg.optim_wrapper.get('noise_multiplier'), budget.get('target_epsilon')
    if sigma is None and target is None:
        raise PrivacyError('give PrivacyBudgetHook a target_epsilon, or DPOptimWrapper a noise_multiplier')
    plan = (
        PrivacyPlan.calibrate(target_epsilon=target, **settings)
        if sigma is None
        else PrivacyPlan(noise_multiplier=sigma, target_epsilon=target, **settings)
    )
    print(
        f'\nBudget: epsilon {target}, delta {as_given(plan.target_delta)}, N {num_records:,} '
        f'(one record: one {plan.privacy_unit}), '
        f'expected batch {size}:\n  noise_multiplier {plan.noise_multiplier:.4f}, {plan.steps:,} private steps '
        f'(accountant {plan.accountant})\n  epoch    epsilon spent'
    )
    for steps, spent in epsilon_curve(plan, 5):
        print(f'  {first + steps / per_epoch:5.1f}    {rounded_up(spent)}')
    for warning in plan.warnings:
        print(f'  {warning}')


def _count(cfg: Config, dataset: Any) -> int | None:
    if dataset is None:
        return None
    ours = cfg.train_dataloader.dataset
    return len(group_rows(dataset, ours.get('privacy_unit', 'instance'), ours.get('subjects')))


def report_memory(cfg: Config, model: nn.Module, wrapper: DPOptimWrapper, batch: dict) -> None:
    """Prints what training is expected to hold, from the tensors that one forward of the records keeps."""
    model.float()
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(**model.data_preprocessor(batch, True), mode='loss')
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    a_row = sum(size for key, size in kept.items() if key not in own) / len(batch['inputs'])
    rows, trained = cfg.train_dataloader.get('batch_size', 32), sum(p.numel() for p in wrapper.params)
    largest = max(p.numel() for p in wrapper.params)
    projector = (cfg.get('optim_wrapper') or {}).get('projector')
    parts = {
        'weights': weights,
        'sums, noise and optimizer state': 5 * 4 * trained,
        f'activations of {rows} rows (train_dataloader.batch_size)': a_row * rows,
        f"the largest parameter's gradients for {rows} rows": 4.0 * largest * rows,
    }
    if projector:
        size = 2 if projector.get('dtype') in ('bfloat16', 'float16') else 4
        parts[f'subspace of rank {projector.get("rank")}'] = float(trained * projector.get('rank', 0) * size)
    print(f'\nMemory: about {sum(parts.values()) / 2**30:.2f} GiB')
    for name, size in parts.items():
        print(f'  {size / 2**30:6.2f} GiB  {name}')


def main() -> None:
    """Prints the report."""
    args = parse_args()
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    register_all_modules()
    torch.manual_seed(0)
    print(f'Config {Path(args.config).name}')
    model, wrapper = private_model(cfg)
    settings, dataset = private_data(cfg)
    print(f'Records: {"random" if dataset is None else f"{len(dataset):,} of " + type(dataset).__name__}')
    batch = records(settings, dataset, args.records)
    right = report_gradients(model, wrapper, batch)
    report_budget(cfg, args.num_records or _count(cfg, dataset))
    report_memory(cfg, model, wrapper, batch)
    if not right:
        raise PrivacyError(
            "the gradients are not those of plain MMPose: write optim_wrapper.engine='loop', and please report the model"
        )
    print('\nThis config can be made private.')


if __name__ == '__main__':
    run(main)
