"""What weights were trained on is not forgotten: not after a hop over another training, not after one that spent nothing."""

import copy
import json
import sys
from collections import OrderedDict

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import PretrainedInit
from mmengine.runner import FlexibleRunner, Runner
from torch import nn

from mmpose_dp.engine import PrivacyBudgetHook, ProvenanceHook
from mmpose_dp.engine.hooks.provenance import Lineage, pretraining_in
from mmpose_dp.extras.evidence import file_sha256
from mmpose_dp.models import LoadWatch
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger
from tests.support.paths import REPO
from tests.support.runs import Interruption, tiny, train, train_until, unvalidated
from tests.support.runs import config as validated

sys.path.insert(0, str(REPO / 'tools'))
from publish_model import published  # noqa: E402

VIEWS = dict(train_cfg__max_epochs=1, train_cfg__public_epochs=1)


def config(data, work_dir, method='dpsgd', **options):
    return unvalidated(data, work_dir, method, **{'train_cfg__max_epochs': 1, **options})


def pretraining(work_dir):
    return json.loads((work_dir / 'privacy_statement.json').read_text())['pretraining']


@pytest.fixture(scope='module')
def views(synthetic, tmp_path_factory):
    """A training on public views alone."""
    work_dir = tmp_path_factory.mktemp('views')
    train(config(synthetic, work_dir, 'feature', **VIEWS))
    return work_dir


def test_views_alone_open_a_ledger(views, synthetic):
    assert Ledger.read(views / LEDGER_NAME).runs[0]['public_view'] and not Ledger.read(views / LEDGER_NAME).steps
    with pytest.raises(PrivacyError, match='public_view.*another work_dir'):
        train(config(synthetic, views))


def test_views_elsewhere_are_told(views, synthetic, tmp_path):
    train(config(synthetic, tmp_path / 'a', load_from=str(views / 'epoch_1.pth')))
    assert 'public views (Gaussian blur' in pretraining(tmp_path / 'a')
    given = published(torch.load(tmp_path / 'a/epoch_1.pth', weights_only=False))
    torch.save(given, tmp_path / 'given.pth')
    train(config(synthetic, tmp_path / 'b', load_from=str(tmp_path / 'given.pth')))
    assert 'private training made' in pretraining(tmp_path / 'b')
    assert 'public views (Gaussian blur' in pretraining(tmp_path / 'b')  # of the training before the published one


def test_public_pictures_elsewhere_are_told(synthetic, synthetic_public, tmp_path):
    cfg = config(synthetic, tmp_path / 'a', 'feature', **VIEWS)
    dataset = cfg.train_dataloader.dataset
    dataset.public = dict(dataset.private, data_root=f'{synthetic_public}/')
    train(cfg)
    train(config(synthetic, tmp_path / 'b', load_from=str(tmp_path / 'a/epoch_1.pth')))
    assert 'trained on MpiiDataset mpii_train.json' in pretraining(tmp_path / 'b')


def test_a_private_folder_takes_no_training_on_views_alone(synthetic, tmp_path):
    train(config(synthetic, tmp_path))
    with pytest.raises(PrivacyError, match='views alone.*another work_dir'):
        train(config(synthetic, tmp_path, 'feature', **VIEWS))


def test_a_hop_over_a_training_that_spends_nothing(synthetic, tmp_path):
    train(config(synthetic, tmp_path / 'a'))
    train(config(synthetic, tmp_path / 'b', 'feature', load_from=str(tmp_path / 'a/epoch_1.pth'), **VIEWS))
    train(config(synthetic, tmp_path / 'c', load_from=str(tmp_path / 'b/epoch_1.pth')))
    assert 'private training made' in pretraining(tmp_path / 'c') and 'public views (' in pretraining(tmp_path / 'c')
    again = Lineage.of(torch.load(tmp_path / 'c/epoch_1.pth', weights_only=False))
    assert again.private and len(again.public_views) == 1


def test_steps_without_noise_are_no_private_training(synthetic, tmp_path):
    """Whatever is trained from their weights says so, also after a training in between."""
    noiseless = dict(optim_wrapper__noise_multiplier=0.0, default_hooks__privacy_budget__target_epsilon=None)
    train(config(synthetic, tmp_path / 'a', **noiseless))
    for before, after in ('ab', 'bc'):
        train(config(synthetic, tmp_path / after, load_from=str(tmp_path / before / 'epoch_1.pth')))
        words = 'trained on private records (NOT PRIVATE: a debug seed or no noise) without privacy'
        assert words in pretraining(tmp_path / after)


def test_weights_that_init_cfg_loads_are_named(synthetic, tmp_path):
    runner = train(config(synthetic, tmp_path / 'a'))
    start = str(tmp_path / 'backbone.pth')
    kept = torch.load(tmp_path / 'a/epoch_1.pth', weights_only=False)
    torch.save({**kept, 'state_dict': runner.model.backbone.state_dict()}, start)
    cfg = config(synthetic, tmp_path / 'b')
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=start)
    train(cfg)
    count = sum(x.is_floating_point() for x in runner.model.backbone.state_dict().values())
    digest = file_sha256(start)[:16]
    share = f'({count} of {count} tensors of model.backbone; SHA-256 {digest}...)'
    assert f'init_cfg from backbone.pth {share}' in pretraining(tmp_path / 'b')
    assert 'private training made' in pretraining(tmp_path / 'b')
    head = {k: v for k, v in runner.model.state_dict().items() if k == 'head.final_layer.bias'}
    torch.save(dict(state_dict=head), tmp_path / 'head.pth')  # leaves the backbone as it is
    cfg = config(synthetic, tmp_path / 'c', load_from=str(tmp_path / 'head.pth'))
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=start)
    train(cfg)
    total = sum(x.is_floating_point() for x in runner.model.state_dict().values())
    digest = file_sha256(tmp_path / 'head.pth')[:16]
    share = f'(1 of {total} tensors of model; SHA-256 {digest}...)'
    assert f'; and loaded from head.pth {share}, of unknown origin' in pretraining(tmp_path / 'c')
    assert 'backbone.pth' in pretraining(tmp_path / 'c') and 'private training made' in pretraining(tmp_path / 'c')
    assert Lineage.of(torch.load(tmp_path / 'c/epoch_1.pth', weights_only=False)).unknown == ('head.pth',)


def test_private_steps_without_the_hook_are_refused(synthetic, tmp_path):
    cfg = config(synthetic, tmp_path, optim_wrapper__noise_multiplier=1.0, optim_wrapper__expected_batch_size=10)
    del cfg.default_hooks.privacy_budget
    with pytest.raises(PrivacyError, match='no ledger would count.*PrivacyBudgetHook'):
        train(cfg)
    assert not list(tmp_path.glob('*.pth'))


class _OneMore(Hook):
    def after_train_epoch(self, runner):
        runner.train_loop._max_epochs = 2


def test_a_hook_cannot_add_private_steps_to_a_training_on_views(synthetic, tmp_path):
    runner = Runner.from_cfg(config(synthetic, tmp_path, 'feature', **VIEWS, optim_wrapper__noise_multiplier=1.0))
    runner.register_hook(_OneMore())
    with pytest.raises(PrivacyError, match='no ledger would count.*let no hook change the number of epochs'):
        runner.train()
    assert not (tmp_path / 'epoch_2.pth').exists()


# ---- trainings without privacy in between --------------------------------------------------------------------------
def plain(data, work_dir, load_from=None, resume=False, epochs=1):
    """A training of MMPose's own, as tools/train.py runs it, of one epoch."""
    cfg = tiny(Config.fromfile(REPO / 'configs/dp/hrnet_synthetic_nonprivate.py'))
    cfg.update(work_dir=str(work_dir), load_from=load_from and str(load_from), resume=resume)
    cfg.experiment_name = cfg.visualizer.name = f'plain_{work_dir.name}_{epochs}'
    cfg.train_dataloader.dataset.data_root = str(data)
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False, batch_size=20)
    for key in ('val_cfg', 'val_dataloader', 'val_evaluator', 'test_cfg', 'test_dataloader', 'test_evaluator'):
        cfg[key] = None
    cfg.train_cfg.max_epochs = epochs
    cfg.default_hooks.checkpoint.update(interval=1, published_keys=['meta', 'state_dict'])
    runner = Runner.from_cfg(cfg)
    runner.register_hook(ProvenanceHook())
    runner.train()
    return work_dir / f'epoch_{epochs}.pth'


def lineage_in(path):
    return Lineage.of(torch.load(path, weights_only=False), path.name)


def test_a_plain_training_in_between_hands_it_on(views, synthetic, tmp_path):
    """Loaded, resumed and loaded again: the lineage is the same, and the training's own data is named."""
    first = plain(synthetic, tmp_path / 'a', load_from=views / 'epoch_1.pth')
    second = plain(synthetic, tmp_path / 'a', load_from=first, resume=True, epochs=2)
    third = plain(synthetic, tmp_path / 'b', load_from=second)
    (mmengines,) = third.parent.glob('epoch_1-*.pth')  # which it publishes, with published_keys alone
    for path in (first, second, third, mmengines):
        found = lineage_in(path)
        assert found.plain_data_sets == ('MpiiDataset mpii_train.json',) and not found.unknown
        assert len(found.public_views) == 1 and 'Gaussian blur' in found.public_views[0]
    train(config(synthetic, tmp_path / 'c', load_from=str(third)))
    assert 'public views (Gaussian blur' in pretraining(tmp_path / 'c')
    assert 'trained on MpiiDataset mpii_train.json without privacy' in pretraining(tmp_path / 'c')
    with pytest.raises(PrivacyError, match='NOT PRIVATE: made by a training without privacy'):
        published(torch.load(third, weights_only=False))


def test_a_plain_training_from_a_foreign_file(synthetic, tmp_path, start_file):
    assert lineage_in(plain(synthetic, tmp_path / 'a', load_from=start_file)).unknown == ('start.pth',)
    assert lineage_in(plain(synthetic, tmp_path / 'b')) == Lineage(plain_data_sets=('MpiiDataset mpii_train.json',))


def test_what_nobody_recorded_is_of_unknown_origin():
    """Whatever a file holds: a lineage is read from our own key only, and an odd one counts as none."""
    for odd in (
        None,
        3,
        {},
        dict(state_dict={}),
        dict(privacy=None),
        dict(privacy_statement='none'),
        dict(meta={'x': 1}),
    ):
        assert Lineage.of(odd, 'x.pth') == Lineage(unknown=('x.pth',))
    for key in ('lineage', 'descent'):  # older checkpoints have the second
        kept = {key: dict(unknown=['coco.pth'])}
        for checkpoint in (dict(privacy=kept), dict(privacy_statement=dict(private=True), meta=kept)):
            known = Lineage.of(checkpoint, 'x.pth')
            assert 'descend from coco.pth, of unknown origin' in known.in_words('x.pth')
    assert 'descend' not in Lineage(unknown=('x.pth',)).in_words('x.pth')
    words = Lineage(private=True, public_views=('a blur',), plain_data_sets=('LSP',)).in_words('x.pth')
    assert words.startswith(', which a private') and '; they were trained on public views (a blur)' in words
    assert words.count(', which') == 1 and '; they were trained on LSP without privacy' in words
    assert pretraining_in(dict(privacy=dict(pretraining='weights loaded from coco.pth'))).endswith('treated as public')


# ---- what was really loaded ----------------------------------------------------------------------------------------
class Begun(Hook):
    def before_train_epoch(self, runner):
        raise Interruption


def beginning(data, work_dir, backbone=None, **options):
    """Goes as far as the first epoch and returns what the statement would say of the weights."""
    options = {'optim_wrapper__noise_multiplier': 1.0, 'default_hooks__privacy_budget__target_epsilon': None, **options}
    cfg = config(data, work_dir, **options)
    cfg.model.backbone.init_cfg = backbone
    runner = Runner.from_cfg(cfg)
    runner.register_hook(Begun())
    with pytest.raises(Interruption):
        runner.train()
    return next(hook for hook in runner.hooks if isinstance(hook, PrivacyBudgetHook)).origin.pretraining


@pytest.fixture(scope='module')
def weights(synthetic, tmp_path_factory):
    """The tensors of a model as ``config`` builds it."""
    return Runner.from_cfg(config(synthetic, tmp_path_factory.mktemp('weights'))).model.state_dict()


@pytest.fixture(scope='module')
def start_file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp('start') / 'start.pth'
    torch.save(dict(state_dict=weights), path)
    return path


def backbone(weights):
    return {k.removeprefix('backbone.'): v for k, v in weights.items() if k.startswith('backbone.')}


MISFITS = {
    'no prefix': (lambda w: dict(state_dict=backbone(w)), r'model\.backbone\.init_cfg=.*checkpoint=\.\.\.\)'),
    'another prefix': (
        lambda w: {f'encoder.{k}': v for k, v in backbone(w).items()},
        r"model\.backbone.*prefix='encoder\.'",
    ),
    'a prefix too many': (lambda w: {f'model.{k}': v for k, v in w.items()}, r"model\.init_cfg.*prefix='model\.'"),
    'other shapes': (lambda w: {k: torch.stack([v, v]) for k, v in w.items()}, 'of another size'),
    'under model': (lambda w: dict(model=dict(w), epoch=3), "under the key 'model'"),
    'under state_dict_ema': (lambda w: dict(state_dict_ema=dict(w)), "under the key 'state_dict_ema'"),
    'nothing': (lambda w: dict(state_dict={}), 'no weights where mmengine looks'),
    'no dict': (lambda w: list(w.values()), 'a list instead of weights'),
    'something else': (
        lambda w: dict(state_dict={'a.b': torch.ones(2)}),
        r'It has a\.b, \.\.\. and model has backbone',
    ),
}


@pytest.mark.parametrize('case', MISFITS)
def test_a_file_that_fits_nothing_is_refused(synthetic, tmp_path, weights, case):
    """Before a step is counted: it would be a training from random weights whose statement names the file."""
    make, message = MISFITS[case]
    torch.save(make(weights), tmp_path / 'odd.pth')
    with pytest.raises(PrivacyError, match=f'(?s)load_from=.*odd.pth.*{message}'):
        beginning(synthetic, tmp_path / 'w', load_from=str(tmp_path / 'odd.pth'))
    assert not (tmp_path / 'w' / LEDGER_NAME).exists()


@pytest.mark.parametrize('kind', ['bare', 'module.', 'every second'])
def test_a_file_that_fits_is_counted(synthetic, tmp_path, weights, kind):
    found = {k: v for k, v in weights.items() if v.is_floating_point()}
    count = len(found)
    given = {
        'bare': weights,
        'module.': {f'module.{k}': v for k, v in weights.items()},
        'every second': dict(list(found.items())[::2]),
    }
    torch.save(given[kind], tmp_path / 'start.pth')
    words = beginning(synthetic, tmp_path / 'w', load_from=str(tmp_path / 'start.pth'))
    share = (count + 1) // 2 if kind == 'every second' else count
    assert words.startswith(f'weights loaded from start.pth ({share} of {count} tensors of model; SHA-256 ')


def test_a_file_of_another_model_is_warned_of(synthetic, tmp_path, weights):
    """Some of its tensors fit by chance, such as a bias per joint; all of a model's own file, or all but the head, is enough."""
    head = {k: v for k, v in weights.items() if k.startswith('head.') and v.dim() <= 1}
    own = {k: v for k, v in weights.items() if not k.startswith('head.')}
    for name, given, warned in (('other', head, True), ('own', own, False)):
        torch.save(given, tmp_path / f'{name}.pth')
        beginning(synthetic, tmp_path / name, load_from=str(tmp_path / f'{name}.pth'))
        (log,) = (tmp_path / name).glob('*/*.log')
        assert ('weights of the model come from a file, and the rest starts at random' in log.read_text()) == warned


def test_a_resume_of_nothing_says_what_was_loaded(synthetic, tmp_path, weights):
    """resume=True after a kill before the first checkpoint: there is only a ledger, and the backbone is init_cfg's."""
    torch.save({f'net.{k}': v for k, v in backbone(weights).items()}, tmp_path / 'b.pth')
    settings = dict(type=PretrainedInit, checkpoint=str(tmp_path / 'b.pth'), prefix='net.')
    settings = [dict(type='Kaiming', layer='Conv2d'), settings]
    beginning(synthetic, tmp_path / 'w', settings)
    words = beginning(synthetic, tmp_path / 'w', settings, resume=True)
    assert words.startswith('weights loaded by init_cfg from b.pth (')
    assert beginning(synthetic, tmp_path / 'w', resume=True) == 'none: random weights'


def test_a_model_that_is_not_new_is_no_random_weights(synthetic, tmp_path):
    """A notebook gives the runner a model with weights, which mmengine leaves as they are."""
    runner = Runner.from_cfg(config(synthetic, tmp_path, train_cfg__max_epochs=1))
    runner.model.init_weights()
    runner.model.load_state_dict({key: value + 0.01 for key, value in runner.model.state_dict().items()})
    runner.train()
    kept = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)['privacy']
    words = 'weights of a model that had weights when its runner got it, of unknown origin'
    assert pretraining(tmp_path).startswith(words) and kept['lineage']['unknown']


def test_a_start_is_named_that_was_validated_before_training(synthetic, tmp_path, weights):
    """mmengine loads it once, before anybody watches, and then gives the model random weights."""
    torch.save(weights, tmp_path / 'start.pth')
    cfg = tiny(validated(synthetic, tmp_path / 'w', 'dpsgd', train_cfg__max_epochs=1))
    cfg.load_from = str(tmp_path / 'start.pth')
    runner = Runner.from_cfg(cfg)
    runner.val()
    runner.train()
    assert pretraining(tmp_path / 'w').startswith('weights loaded from start.pth')


def test_a_runner_that_loads_before_anybody_looks_is_refused(synthetic, tmp_path):
    with pytest.raises(PrivacyError, match="runner_type='FlexibleRunner' cannot be used.*Leave runner_type out"):
        FlexibleRunner.from_cfg(config(synthetic, tmp_path)).train()


def test_a_runner_does_not_train_again_after_an_interruption(synthetic, tmp_path):
    """Its model has private steps behind it, of which the statement of a new training would know nothing."""
    options = dict(train_cfg__max_epochs=2, optim_wrapper__noise_multiplier=2.0)
    runner = train_until(config(synthetic, tmp_path, default_hooks__privacy_budget__target_epsilon=None, **options), 5)
    before = (tmp_path / LEDGER_NAME).read_bytes()
    with pytest.raises(PrivacyError, match=r'this runner has trained before.*resume=True and load_from=None to go on'):
        runner.train()
    assert (tmp_path / LEDGER_NAME).read_bytes() == before


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(), r'model\.backbone\.init_cfg: checkpoint=.* fits nothing of model\.backbone.*prefix=.net\.'),
        (dict(prefix='neck.'), r"model\.backbone\.init_cfg: .*no tensor under prefix='neck\.': it has net\."),
        (dict(checkpoint='nowhere.pth'), r'model\.backbone\.init_cfg: checkpoint=nowhere\.pth cannot be read'),
    ],
    ids=['prefix missing', 'prefix wrong', 'no file'],
)
def test_an_init_cfg_that_loads_nothing_is_refused(synthetic, tmp_path, weights, settings, message):
    torch.save({f'net.{k}': v for k, v in backbone(weights).items()}, tmp_path / 'b.pth')
    settings = {**dict(type='Pretrained', checkpoint=str(tmp_path / 'b.pth')), **settings}
    with pytest.raises(PrivacyError, match=f'(?s){message}'):
        beginning(synthetic, tmp_path / 'w', settings)
    assert not (tmp_path / 'w' / LEDGER_NAME).exists()


def test_loads_are_noted_wherever_they_come_from():
    """By a part's own code, into one part, in any order; a copy of the model (EMA's) does not count."""
    model = nn.Sequential(OrderedDict(a=nn.Linear(2, 3), b=nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))))
    watch = LoadWatch(model)
    copy.deepcopy(model).load_state_dict(model.state_dict())
    assert watch.loads == [] and watch.found('') is None and len(watch.shapes) == 8
    model.b.load_state_dict(model.b.state_dict())
    assert watch.found('b') == {
        f'b.{k}' for k in ('0.weight', '0.bias', '0.running_mean', '0.running_var', '1.weight', '1.bias')
    }
    assert watch.found('a') is None and watch.found('') == watch.found('b')
    model.load_state_dict({'a.weight': torch.ones(3, 2), 'a.bias': torch.ones(3)}, strict=False)
    assert watch.found('', 1) == {'a.weight', 'a.bias'} and watch.found('a') is None
    watch.close()
    model.a.load_state_dict(model.a.state_dict())
    assert len(watch.loads) == 2
