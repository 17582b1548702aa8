"""A program that test_distributed.py starts: each rank takes one step of each method on its share of the samples, and saves
how the parameters moved.

python -m torch.distributed.run --nproc_per_node 2 -m tests.support.rank_steps OUT SYNTHETIC
"""

import json
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dist import get_dist_info
from mmengine.model import MMDistributedDataParallel
from torch.optim import SGD

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.engine import DPOptimWrapper
from mmpose_dp.engine.basis import fit_basis, table_of
from mmpose_dp.engine.checks.own_state import refuse_other_models
from mmpose_dp.engine.hooks.planning import refuse_other_plans
from mmpose_dp.engine.hooks.projector_refresh_hook import share_factors
from mmpose_dp.extras.kronecker import KroneckerProjector
from mmpose_dp.privacy.errors import ConfigError
from mmpose_dp.privacy.plan import PrivacyPlan
from mmpose_dp.privacy.projection import Projector
from tests.support.models import batch, build, flat, take
from tests.support.paths import REPO
from tests.support.runs import config as config_of_run

SAMPLES = [0, 1, 2, 3, 4, None, None, None, None]
METHODS = {
    'dpsgd': dict(),
    'projected': dict(projector=True),
    'feature': dict(public_weight=0.7),
    'hybrid': dict(projector=True, public_weight=0.7),
    'adaptive': dict(clipping='adaptive'),
}
B = 4
LR = 1e6  # so large that the rounding of the parameters does not matter


def config():
    """The small HRNet of the synthetic configs."""
    return Config.fromfile(REPO / 'configs/_base_/hrnet_synthetic.py')


def movement(settings, keys, noise_multiplier=0.0, steps=1):
    """(p,) how far SGD moves the parameters, in units of its lr; ``keys`` are this rank's indices into SAMPLES."""
    cfg = config()
    model = build(cfg, private=True)
    params = [p for p in model.parameters() if p.requires_grad]
    settings = dict(settings)
    if settings.pop('projector', False):
        generator = torch.Generator().manual_seed(0)
        gradients = torch.randn(5, sum(p.numel() for p in params), generator=generator)
        settings['projector'] = Projector(rank=4)
        parts = gradients.split([p.numel() for p in params], 1)
        batches = [[r.view(-1, *p.shape) for r, p in zip(parts, params)]]
        fit_basis(settings['projector'], table_of(batches, len(parts[0]), torch.float32))
    wrapper = DPOptimWrapper(
        SGD(params, lr=LR), max_grad_norm=0.05, expected_batch_size=B, noise_multiplier=noise_multiplier, **settings
    )
    runner_model = model
    if get_dist_info()[1] > 1:
        runner_model = MMDistributedDataParallel(model, broadcast_buffers=False)
    data = batch(cfg, SAMPLES)
    mine = {key: [values[i] for i in keys] for key, values in data.items()}
    before = flat(params).clone()
    for _ in range(steps):
        if keys:
            take(runner_model, mine, wrapper)
        else:  # no record of this rank was sampled
            wrapper.prepare(model)
            wrapper.finish_step()
    return (before - flat(params)) / LR


def plan(max_grad_norm=0.05, noise_multiplier=3.0):
    """A plan of three steps."""
    return PrivacyPlan(
        method='dpsgd',
        privacy_unit='instance',
        num_records=100,
        expected_batch_size=B,
        steps=3,
        max_grad_norm=max_grad_norm,
        noise_multiplier=noise_multiplier,
        target_delta=1e-3,
    )


def ledger():
    """The ledger of a rank after three steps of a plan."""
    model = build(config(), private=True)
    wrapper = DPOptimWrapper(SGD(model.parameters(), lr=LR), max_grad_norm=0.05)
    wrapper.mechanism.attach(plan())
    wrapper.prepare(model)
    for _ in range(3):
        wrapper.finish_step()
    return wrapper.ledger.state_dict()


def refused_for(weight, expert):
    """The message of the error for a rank that starts with this weight and this digest of an expert; empty without one."""
    model = torch.nn.Linear(1, 1)
    torch.nn.init.constant_(model.weight, weight)
    torch.nn.init.zeros_(model.bias)
    try:
        refuse_other_models(model, [('expert.pth', expert)])
    except ConfigError as error:
        return str(error)
    return ''


def refused_with(folder, people, **settings):
    """The message of the error for a rank with these people in an annotation file of its own, and a plan of its own."""
    file = Path(folder, f'rank{get_dist_info()[0]}', 'train.json')
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(people))
    dataset = config_of_run(sys.argv[2], folder, 'dpsgd').train_dataloader.dataset
    dataset = PublicPrivateDataset(private=dict(dataset.private, ann_file=str(file)))
    try:
        refuse_other_plans(plan(**settings), dataset)
    except ConfigError as error:
        return str(error)
    return ''


def shared_factors(device='cpu'):
    """The coordinates of a gradient on this rank, of a basis that the first one has found."""
    numbers = torch.Generator().manual_seed(0)
    params = [torch.zeros(5, 4), torch.zeros(3)]
    projector = KroneckerProjector(rank=6, width=2)
    if get_dist_info()[0] == 0:
        batches = [[torch.randn(8, *p.shape, generator=numbers) for p in params]]
        projector.fit(params, [batches] * 3)
    share_factors(projector, torch.device(device))
    return projector.coordinates([0, 1], torch.arange(23.0)[None])


def main():
    """Saves {method: movement} of this rank."""
    torch.distributed.init_process_group('gloo')
    rank, world = get_dist_info()
    mine = range(rank, len(SAMPLES), world)
    moved = {name: movement(settings, mine) for name, settings in METHODS.items()}
    moved['one rank without records'] = movement({}, range(5) if rank == 0 else [])
    moved['one rank without records, adaptive'] = movement(
        dict(clipping='adaptive'), range(5) if rank == 0 else [], steps=2
    )
    moved['noise'] = movement({}, [], noise_multiplier=3.0)
    moved['ledger'] = ledger()
    moved['factors'] = shared_factors()
    moved['refused'] = [refused_for(1.0, 'a'), refused_for(1.0 + rank, 'a'), refused_for(1.0, 'ab'[rank])]
    people = json.loads(Path(sys.argv[2], 'annotations/mpii_train.json').read_text())
    moved['refused with other records'] = [
        refused_with(sys.argv[1], people, noise_multiplier=3.0 + rank),  # the first one makes the noise
        refused_with(sys.argv[1], people[rank:] + people[:rank]),  # the same people, in another order
        refused_with(sys.argv[1], people, max_grad_norm=0.05 * (1 + rank)),
    ]
    torch.save(moved, Path(sys.argv[1]) / f'rank{rank}.pt')
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main()
