"""Two real processes: sums are added, noise enters once, all ranks end with the same parameters and ledger."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmengine.model import MMDistributedDataParallel

from mmpose_dp.engine.optim_wrappers import DPOptimWrapperConstructor
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger
from tests.support.models import build
from tests.support.paths import REPO
from tests.support.processes import environment, free_port, run
from tests.support.rank_steps import METHODS, SAMPLES, B, config, movement


def launch(*command):
    done = run(*command, PYTHON=sys.executable, PORT=free_port())
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope='module')
def ranks(synthetic, tmp_path_factory):
    out = tmp_path_factory.mktemp('ranks')
    launcher = ('-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={free_port()}')
    launch(sys.executable, *launcher, '-m', 'tests.support.rank_steps', out, synthetic)
    return [torch.load(out / f'rank{rank}.pt') for rank in range(2)]


@pytest.mark.parametrize('method', METHODS)
def test_two_processes_move_as_one(ranks, method):
    alone = movement(METHODS[method], range(len(SAMPLES)))
    assert torch.equal(ranks[0][method], ranks[1][method])
    assert (ranks[0][method] - alone).norm() <= 1e-6 * alone.norm()  # another order of summation


@pytest.mark.parametrize(('name', 'settings', 'steps'), [('', {}, 1), (', adaptive', dict(clipping='adaptive'), 2)])
def test_a_rank_without_records_takes_part(ranks, name, settings, steps):
    alone = movement(settings, range(5), steps=steps)
    got = [rank[f'one rank without records{name}'] for rank in ranks]
    assert torch.equal(*got) and (got[0] - alone).norm() <= 1e-6 * alone.norm()


def test_a_forward_waits_for_no_process_that_has_none(tmp_path):
    """``model_wrapper_cfg`` without broadcast_buffers has torch's True: the first forward would wait after a step is counted."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try:
        model = MMDistributedDataParallel(build(config(), private=True), broadcast_buffers=True)
        assert model.will_sync_module_buffers()
        optimizer = dict(type='SGD', lr=0.1)
        DPOptimWrapperConstructor(dict(type='DPOptimWrapper', max_grad_norm=1.0, optimizer=optimizer))(model)
        assert not model.will_sync_module_buffers()
    finally:
        torch.distributed.destroy_process_group()


def test_noise_enters_once_in_total(ranks):
    """Over 790 000 entries the deviation is known to 0.08 percent, a sixth of what is allowed; noise from both ranks would be 41
    percent more."""
    noise = ranks[0]['noise']
    assert torch.equal(noise, ranks[1]['noise'])
    assert float(noise.std()) == pytest.approx(3.0 * 0.05 / B, rel=0.005)


def test_all_ranks_hold_one_ledger(ranks):
    assert ranks[0]['ledger'] == ranks[1]['ledger'] and ranks[0]['ledger']['entries'] == [[3.0, '1/25', 3]]


def test_all_ranks_hold_the_factors_that_the_first_has_found(ranks):
    assert ranks[0]['factors'].abs().min() > 0 and torch.equal(ranks[0]['factors'], ranks[1]['factors'])


def test_ranks_that_start_with_different_files_are_refused(ranks):
    """Each machine reads its own: with other weights, or another expert, the sum would be of gradients of several models."""
    for rank in ranks:
        same, *different = rank['refused']
        assert not same and all('process 1 starts with other weights or experts' in words for words in different)


def test_ranks_with_other_records_or_another_norm_are_refused(ranks):
    """Each samples its share by number: a person in another place could be in both and weigh 2 C; rank 0 makes the noise."""
    for rank in ranks:
        same, order, norm = rank['refused with other records']
        assert not same and 'process 1 has other records (annotation file, or its order) than process 0' in order
        assert 'process 1 has other max_grad_norm than process 0' in norm


def options(data, method, **more):
    """--cfg-options of a small training."""
    settings = {
        'train_dataloader.dataset.private.data_root': data,
        'env_cfg.dist_cfg.backend': 'gloo',
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'train_dataloader.batch_sampler.expected_batch_size': 10,
        'default_hooks.privacy_budget.target_epsilon': 8,
        'default_hooks.privacy_budget.target_delta': 1e-3,
        **more,
    }
    given = [f'{key}={value}' for key, value in settings.items()]
    return [REPO / f'configs/dp/hrnet_synthetic_{method}_eps08.py', 2], ['--no-validate', '--cfg-options', *given]


def test_a_hybrid_training_on_two_processes(synthetic, tmp_path):
    more = {
        'train_dataloader.batch_sampler.public_batch_size': 8,
        'optim_wrapper.projector.rank': 6,
        'train_cfg.max_epochs': 2,
        'train_cfg.public_epochs': 1,
    }
    config, given = options(synthetic, 'hybrid', **more)
    launch(REPO / 'tools/dist_train.sh', *config, '--work-dir', tmp_path, *given)
    statement = json.loads((tmp_path / 'privacy_statement.json').read_text())
    assert statement['private'] and statement['steps'] == 4 and statement['num_records'] == 40


def test_two_machines_with_another_annotation_file_each_take_no_step(synthetic, tmp_path):
    people = json.loads((synthetic / 'annotations/mpii_train.json').read_text())
    for rank in range(2):
        (tmp_path / f'of_rank{rank}.json').write_text(json.dumps(people[rank:] + people[:rank]))
    (config, _), given = options(synthetic, 'dpsgd')
    own = tmp_path / 'own.py'
    own.write_text(
        f"""
import os
_base_ = '{config}'
rank = os.environ['RANK']
train_dataloader = dict(dataset=dict(private=dict(ann_file=f'{tmp_path}/of_rank{{rank}}.json')))
"""
    )
    command = [REPO / 'tools/dist_train.sh', own, 2, '--work-dir', tmp_path / 'run', *given]
    done = run(*command, PYTHON=sys.executable, PORT=free_port())
    assert done.returncode and 'process 1 has other records' in done.stderr
    assert not (tmp_path / 'run' / LEDGER_NAME).exists()


def process_of_rank(rank, work_dir):
    """The process number, found by its environment and command."""
    for entry in Path('/proc').iterdir():
        try:
            environ, command = (entry / 'environ').read_bytes(), (entry / 'cmdline').read_bytes()
        except OSError:
            continue
        if (
            entry.name.isdigit()
            and f'\0RANK={rank}\0'.encode() in b'\0' + environ
            and str(work_dir).encode() in command
        ):
            return int(entry.name)
    raise LookupError(rank)


@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='finds a rank by /proc')
@pytest.mark.parametrize('rank', [0, 1])
def test_a_rank_that_dies_stops_the_training_with_the_ledger_right(synthetic, tmp_path, rank):
    more = {'train_dataloader.batch_sampler.expected_batch_size': 2, 'train_cfg.max_epochs': 50}
    config, given = options(synthetic, 'dpsgd', **more)
    command = [REPO / 'tools/dist_train.sh', *config, '--work-dir', tmp_path, *given]
    log, path = open(tmp_path / 'output', 'w'), tmp_path / LEDGER_NAME
    training = subprocess.Popen(
        [str(c) for c in command], env=environment(PYTHON=sys.executable, PORT=free_port()), stdout=log, stderr=log
    )
    until = time.monotonic() + 300
    while Ledger.read(path).steps < 5:
        assert training.poll() is None and time.monotonic() < until, (tmp_path / 'output').read_text()[-2000:]
        time.sleep(0.05)
    os.kill(process_of_rank(rank, tmp_path), signal.SIGKILL)
    assert training.wait(300) != 0
    log.close()
    ledger = Ledger.read(path)
    assert 5 <= ledger.steps < 1000 and len(ledger.runs) == 1
    time.sleep(0.5)
    assert Ledger.read(path).steps == ledger.steps  # nobody goes on
