"""The accuracy benchmark on people: its rows build, and on 300 real ones, where they are beside the project, the order holds."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import accuracy
import norms
import numpy as np
import oracles
import pytest
import torch
import value
from accuracy_rows import adam
from accuracy_worker import config_of, plain_or_private, run_job
from mmengine.runner import Runner
from mmpose.registry import MODELS
from people_rows import STARTS, make_tuning_people, make_unusual_people, people_rows, people_size, unusualness
from scipy.io import loadmat

from mmpose_dp.datasets.mpii_files import estimated_head_boxes, write_mpii_split
from mmpose_dp.models.trainable_subset import choose_trainable
from tests.support.paths import shared
from tests.support.runs import unvalidated


def people_of(folder, split='train'):
    return json.loads((folder / f'annotations/mpii_{split}.json').read_text())


@pytest.fixture
def two_sets(tmp_path, synthetic, synthetic_public):
    """A folder of people whose two sets are synthetic."""
    folder = tmp_path / 'people'
    folder.mkdir()
    (folder / 'theirs').symlink_to(synthetic)
    (folder / 'public').symlink_to(synthetic_public)
    return folder


@pytest.mark.parametrize('start', ['movenet', 'mobilenetv2'])
def test_each_row_trains_the_right_people(start, two_sets, tmp_path, monkeypatch):
    """Private ones, public ones, or both; and tuning holds some of the private ones out."""
    command = ['accuracy.py', '--people', two_sets, '--people-sets', 'theirs', 'public', '--start', start]
    command += ['--weights', tmp_path, '--out', tmp_path / 'out', '--data', tmp_path / 'data']
    monkeypatch.setattr(sys, 'argv', [str(part) for part in command])
    benchmark = accuracy.Benchmark(accuracy.parse_args())
    assert {'ours', 'dpsgd', 'nonprivate', 'public_people', 'publiconly_papers', 'hybrid_paper'} <= set(benchmark.rows)
    for name, row in benchmark.rows.items():
        for split, private in (('reported', 'theirs'), ('tuning', 'theirs_tuning')):
            if split == 'tuning' and name not in ('ours', 'public_people'):
                continue  # made in the same way
            identity = benchmark._identity(name, row.candidates[-1], 2.0 if row.private else None, 0, split)
            cfg = config_of(benchmark._job(identity))
            data = str(cfg.train_dataloader.dataset)
            alone = row.public_alone or row.start is None
            assert (f'/{private}/' in data) != alone, name
            public = '/public_unusual/' if row.unusual else '/public/'
            assert (public in data) == (alone or row.pictures or row.config.startswith('projected')), name
            assert not cfg.optim_wrapper.get('public_optimizer'), (
                name
            )  # a row's learning rate is that of its public epochs
            if row.private:
                assert cfg.default_hooks.privacy_budget.target_epsilon == 2.0 and row.start in benchmark.rows


def test_a_longer_start_differs_in_its_pretraining_alone(two_sets):
    size = people_size(two_sets / 'theirs', two_sets / 'public')
    short, longer = (people_rows(size, STARTS[name]) for name in ('mobilenetv2', 'mobilenetv2_longer'))
    assert [name for name in short if short[name] != longer[name]] == ['pretrain']
    epochs = [rows['pretrain'].settings['train_cfg.max_epochs'] for rows in (short, longer)]
    assert epochs[1] == 2 * epochs[0]


def test_tuning_people_are_held_out(synthetic, tmp_path):
    out = make_tuning_people(synthetic, tmp_path / 'tuning', tested=10)
    train, val, whole = people_of(out), people_of(out, 'val'), people_of(synthetic)
    assert len(val) == 8 and train + val == whole  # at most a fifth
    assert (out / 'images' / val[0]['image']).exists()
    heads = loadmat(out / 'annotations/mpii_gt_val.mat')['headboxes_src']
    size = 0.6 * np.linalg.norm(heads[1] - heads[0], axis=0)
    assert size.shape == (8,) and (size > 0).all()


def test_unusual_people_are_those_whose_limbs_point_up(synthetic, tmp_path):
    standing = np.array(
        [[x, y] for x, y in zip([4, 4, 4, 6, 6, 6, 5, 5, 5, 5, 3, 3, 4, 6, 7, 7], [9, 8, 6, 6, 8, 9] + [3] * 10)]
    )
    standing[[10, 11, 14, 15], 1] = 5, 4, 4, 5
    person = dict(joints=standing.tolist(), joints_vis=[1] * 16)
    upside_down = dict(person, joints=(-standing).tolist())
    assert unusualness(person) < 0.1 and unusualness(upside_down) > 0.9
    assert unusualness(dict(person, joints_vis=[1] * 5 + [0] * 11)) == -1  # three limbs
    assert unusualness(dict(person, joints=[[1, 1]] * 16)) == 0
    out = make_unusual_people(synthetic, tmp_path / 'unusual')
    chosen, whole = people_of(out), people_of(synthetic)
    assert len(chosen) == len(whole) // 3 and all(person in whole for person in chosen)
    others = [person for person in whole if person not in chosen]
    assert min(map(unusualness, chosen)) >= max(map(unusualness, others))
    assert (out / 'images' / chosen[0]['image']).exists()


@pytest.mark.parametrize('start', ['movenet', 'mobilenetv2'])
def test_the_few_parameters_exist(start):
    """The weights load, and what *ours* trains is there in the model, and is few."""
    weights = shared('weights')
    cfg = plain_or_private(dict(family=STARTS[start].model, weights=str(weights)), 'nonprivate')
    model = MODELS.build(cfg.model)
    model.init_weights()
    total = sum(p.numel() for p in model.parameters())
    assert 1000 < choose_trainable(model, STARTS[start].few) < total / 20


def test_the_quick_backbone_computes_what_the_file_does():
    weights = shared('weights')
    cfg = plain_or_private(dict(family='movenet', weights=str(weights)), 'nonprivate')
    torch.manual_seed(0)
    ours = MODELS.build(cfg.model).backbone.net.double()  # float32 rounds some values across 0 and 6
    spec = importlib.util.spec_from_file_location('movenet_as_it_is', weights / 'movenet_torch.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = module.MoveNet().double()
    theirs.load_state_dict(torch.load(weights / 'movenet_lightning.pth', weights_only=True))
    with torch.no_grad():
        for parameter in ours.parameters():  # no value is exactly 0 or 6, where the two gradients differ
            parameter += 1e-3 * torch.rand_like(parameter)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    images = torch.rand(2, 3, 128, 96, dtype=torch.float64) * 2 - 1
    found, wanted = ours.features(images), theirs.features(images)
    torch.testing.assert_close(found, wanted)
    for features in (found, wanted):
        features.square().sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        scale = float(gradients[name].abs().max())
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-6, atol=1e-8 * scale, msg=name)


@pytest.fixture(scope='module')
def people_300(tmp_path_factory):
    """The first 300 real people of each set to train on, and 100 to score."""
    folder = tmp_path_factory.mktemp('people_300')
    for name in ('lspet', 'coco_val2017'):
        source, out = shared(f'people/{name}'), folder / name
        (out / 'annotations').mkdir(parents=True)
        (out / 'images').symlink_to(source / 'images')
        write_mpii_split(out, 'train', people_of(source)[:300])
        tested = people_of(source, 'val')[:100]
        write_mpii_split(out, 'val', tested, estimated_head_boxes(tested))
    return folder


@pytest.mark.slow
def test_the_order_on_real_people(people_300, tmp_path):
    """Non-private above the start, and private (the last layer, epsilon 8) not below it. A minute on one core."""
    private, public = people_300 / 'lspet', people_300 / 'coco_val2017'
    rows = people_rows(people_size(private, public), STARTS['movenet'])
    frozen = {'model.backbone.frozen': True}
    trained = {
        'pretrain': {'train_cfg.max_epochs': 4},
        'nonprivate': {'train_cfg.max_epochs': 2},
        'dpsgd': {
            **frozen,
            'optim_wrapper.trainable': 'head.final_layer.*',
            **adam(3e-4)[0],
            'train_cfg.max_epochs': 6,
            'train_dataloader.batch_sampler.expected_batch_size': 150,
        },
    }
    found, start = {}, None
    for name, changes in trained.items():
        row = rows[name]
        job = dict(
            family='movenet',
            weights=str(shared('weights')),
            config=row.config,
            settings={**row.settings, **row.candidates[0], **changes},
            epsilon=8.0 if row.private else None,
            seed=0,
            folder=str(tmp_path / name),
            load_from=start,
            train_on=f'{private if row.start else public}/',
            pictures=False,
            public=f'{public}/',
            test_on=[f'{private}/'],
        )
        result = run_job(job)
        start = start or result['checkpoint']
        found[name], spent = result['scores'][0], result['epsilon_spent']
    assert 7.9 < spent <= 8.0
    assert found['nonprivate'] > found['pretrain'] and found['dpsgd'] > found['pretrain'] - 1, found


def test_the_value_of_private_people(two_sets, tmp_path):
    """Each cell trains the first people of both sides; the page says where private people pay, and where the forecast was wrong."""
    given = dict(people=two_sets, people_sets=('theirs', 'public'), weights=tmp_path, data=tmp_path / 'data')
    surface = value.Surface(Namespace(**given, seeds=1, lanes=1, epsilons=(0.8, 8.0)))
    for public, names in ((0, ['alone', 'nonprivate']), (10, ['ours', 'ours_channels', 'nonprivate', 'public_people'])):
        cell = surface.benchmark(20, public, tmp_path / f'out_{public}')
        for name in names:
            job = cell._job(surface.job(cell, name, 8.0 if cell.rows[name].private else None, 0))
            own = people_of(tmp_path / 'data/sets' / ('public_10' if name == 'public_people' else 'private_20'))
            assert people_of(Path(job['train_on'])) == own and len(own) == (10 if name == 'public_people' else 20)
            assert bool(job['load_from']) == bool(public)
    assert people_of(two_sets / 'theirs')[:20] == people_of(tmp_path / 'data/sets/private_20')
    settings = {'train_dataloader.batch_sampler.expected_batch_size': 31, 'train_cfg.max_epochs': 6}
    little, much = (value.ratio(settings, 500, epsilon, 'ours_channels') for epsilon in (0.2, 8.0))
    assert little < much < value.ratio({**settings, 'train_cfg.max_epochs': 3}, 500, 8.0, 'ours')
    cells = [
        value.Cell(10, 20, 0.8, 'ours', 41.0, 40.0, 50.0, 1.0),
        value.Cell(10, 20, 0.8, 'ours_channels', 39.5, 40.0, 50.0, 0.01),
        value.Cell(10, 20, 8.0, 'ours', 38.0, 40.0, 50.0, 0.05),
        value.Cell(10, 20, 8.0, 'ours_channels', 39.0, 40.0, 50.0, 1.0),
        value.Cell(0, 20, 0.8, 'alone', 1.0, 0.0, 9.0, 1.0),
        value.Cell(0, 20, 8.0, 'alone', 2.0, 0.0, 9.0, 1.0),
    ]
    page = tmp_path / 'page.md'
    for _ in range(2):
        value.write_page(page, cells, (0.8, 8.0))
    text = page.read_text()
    assert (
        text.count('| 10 | 20 | 40.0 | **41.0** l | 39.0 c (!) | 50.0 |') == 1
        and 'right in 1 of 2 cells with public people ("it pays", always, in 1) and right in 3 of 4 runs' in text
    )
    assert '| 0 | 20 |  | 1.0 | 2.0 | 9.0 |' in text
    assert '| cannot learn | 0.01 to 0.05 | 2 | 0 | -1.2 |' in text
    assert page.with_name('value.png').exists()


def test_statistics_of_the_same_people_change_nothing(synthetic, tmp_path):
    """And an offset of every joint is found again."""
    sets = Namespace(people=synthetic.parent, people_sets=(synthetic.name,) * 2, start='mobilenetv2', weights=tmp_path)
    found = oracles.Oracles(sets, tmp_path)
    model = MODELS.build(plain_or_private(found.job(), 'nonprivate').model)
    path = str(tmp_path / 'model.pth')
    torch.save(dict(state_dict=model.state_dict()), path)
    plain = found.as_it_is(path)
    assert found.colours(path) == pytest.approx(plain) and found.power(path) == pytest.approx(plain)
    assert 0 <= found.batch_norm(path) <= 100
    truth = np.random.default_rng(0).normal(size=(50, 16, 2)) * 10
    axes = oracles.torso(truth)
    shifted = truth + 0.2 * axes[:, None, :, 0]
    shifted[:, oracles.HIPS + oracles.SHOULDERS] = truth[
        :, oracles.HIPS + oracles.SHOULDERS
    ]  # the torso is where it was
    seen, head = np.ones((50, 16), bool), np.full(50, 0.1)
    found.predictions = lambda *_, **__: (shifted, truth, seen, head)
    assert found.offsets(path) == 100


def test_bands_of_frequency():
    """All at gain 1 leave an image as it is; the first alone is its mean."""
    image = torch.rand(3, 32, 24)
    assert set(oracles.bands(128, 128).unique().tolist()) == set(range(oracles.BANDS))
    for gains, wanted in (([1.0] * oracles.BANDS, image), ([1.0] + [0.0] * (oracles.BANDS - 1), None)):
        filtered = oracles.BandPreprocessor(gains)(dict(inputs=[image], data_samples=[]))['inputs'][0]
        wanted = image.mean((1, 2), keepdim=True).expand_as(image) if wanted is None else wanted
        torch.testing.assert_close(filtered, wanted, rtol=1e-4, atol=1e-5)


def test_norms_are_found_before_the_first_step(synthetic, tmp_path):
    runner, hook = Runner.from_cfg(unvalidated(synthetic, tmp_path)), norms.NormsHook(8)
    runner.register_hook(hook)
    runner.train()
    assert len(hook.people) == len(hook.noise) == 8
    assert not runner.optim_wrapper.ledger.steps and runner.iter == 0
