"""A checkpoint of a private training holds the model's parameters and buffers, and nothing that other code puts beside them."""

from functools import partial
from pathlib import Path

import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.evaluator import Evaluator
from mmengine.hooks import EMAHook, Hook
from mmengine.model import ExponentialMovingAverage
from mmengine.runner import LogProcessor, Runner
from mmengine.visualization import LocalVisBackend
from mmpose.codecs import SimCCLabel
from mmpose.evaluation import PCKAccuracy
from mmpose.models.heads import SimCCHead
from mmpose.registry import DATASETS, KEYPOINT_CODECS, LOG_PROCESSORS, METRICS, MODELS, TRANSFORMS, VISBACKENDS
from publish_model import published
from torch import nn
from torch.utils.data import Dataset

from mmpose_dp.engine.checks.own_state import own_state, refuse_other_state, restore_own_values
from mmpose_dp.engine.optim_wrappers import DPOptimWrapperConstructor
from mmpose_dp.engine.own_parts import names_in, own_code_in_words, own_parts
from mmpose_dp.extras.experts import add_experts
from mmpose_dp.extras.lora import add_low_rank
from mmpose_dp.gradients import layer_rules
from mmpose_dp.privacy.accounting import ACCOUNTANTS
from mmpose_dp.privacy.errors import PrivacyError, UnsupportedModelError
from tests.support.runs import config, tiny

RAW = 77.0  # stands for a value of a private batch


@MODELS.register_module()
class HookedHead(SimCCHead):
    """Puts values into the state dict, from the first checkpoint on: under a new name, under an old one, and into its metadata."""

    saving = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._register_state_dict_hook(type(self)._put)

    def _put(self, state, prefix, meta):
        if HookedHead.saving:
            state[f'{prefix}mem'] = torch.full((3,), RAW)
            state[f'{prefix}final_layer.bias'] = torch.full_like(self.final_layer.bias, RAW)
            meta['mem'] = RAW


class Begin(Hook):
    def before_train(self, runner):
        HookedHead.saving = True


@MODELS.register_module()
class Averaged(ExponentialMovingAverage):
    """Of EMAHook, which is mmengine's."""


@DATASETS.register_module()
class Wrapped(Dataset):
    """A data set for validation."""

    def __init__(self, inner):
        self.inner = DATASETS.build(inner)
        self.metainfo = self.inner.metainfo

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        return self.inner[index]


@METRICS.register_module()
class OwnMetric(PCKAccuracy):
    """A metric for validation."""


@KEYPOINT_CODECS.register_module()
class OwnLabel(SimCCLabel):
    """A codec inside of a transform, GenerateTarget."""


@TRANSFORMS.register_module()
class OwnStep(BaseTransform):
    """A transform for validation."""

    def transform(self, results):
        return results


@VISBACKENDS.register_module()
class OwnBackend(LocalVisBackend):
    """Shows what a training shows."""


@LOG_PROCESSORS.register_module()
class OwnLogProcessor(LogProcessor):
    """Makes the lines of the log."""


@pytest.fixture(scope='module')
def saved(synthetic, tmp_path_factory):
    """(runner, its last checkpoint) of a training with HookedHead and averaged weights."""
    cfg = tiny(config(synthetic, tmp_path_factory.mktemp('own_state'), 'dpsgd', train_cfg__max_epochs=1))
    cfg.val_dataloader.dataset.pipeline.insert(0, dict(type='OwnStep'))
    cfg.visualizer.vis_backends = [dict(type='OwnBackend')]
    cfg.log_processor.type = 'OwnLogProcessor'
    cfg.val_dataloader.dataset = dict(type='Wrapped', inner=cfg.val_dataloader.dataset)
    cfg.val_evaluator = dict(type='OwnMetric')
    cfg.model.head.type = 'HookedHead'
    for step in cfg.train_dataloader.dataset.private.pipeline:
        if step['type'] == 'GenerateTarget':
            step['encoder'] = dict(step['encoder'], type='OwnLabel')
    cfg.custom_hooks = [dict(type='EMAHook', ema_type='Averaged')]
    runner = Runner.from_cfg(cfg)
    runner.register_hook(Begin())
    try:
        runner.train()
    finally:
        HookedHead.saving = False
    return runner, torch.load(f'{cfg.work_dir}/epoch_1.pth', weights_only=False)


def test_what_a_state_dict_hook_puts_there_is_not_in_a_checkpoint(saved):
    runner, checkpoint = saved
    own = own_state(runner.model)
    assert checkpoint['state_dict'].keys() == own.keys() and set(checkpoint['state_dict']._metadata['head']) == {
        'version'
    }
    # EMAHook has swapped the two
    assert checkpoint['ema_state_dict'].keys() == {'steps', *(f'module.{name}' for name in own)}
    for name, value in own.items():
        assert torch.equal(checkpoint['ema_state_dict'][f'module.{name}'], value), name
    (ema,) = (hook for hook in runner.hooks if isinstance(hook, EMAHook))
    for name, value in own_state(ema.ema_model.module).items():  # whose copy of the head has the same hook
        assert torch.equal(checkpoint['state_dict'][name], value), name


def test_nothing_else_is_published(saved):
    _, checkpoint = saved
    given = published(checkpoint)
    assert given['state_dict'].keys() == checkpoint['state_dict'].keys()
    for name, value in (('head.mem', torch.ones(3)), ('head._extra_state', torch.ones(3)), ('mem', [0.5])):
        more = dict(checkpoint, state_dict=dict(checkpoint['state_dict'], **{name: value}))
        with pytest.raises(PrivacyError, match=f'{name}, which is neither a parameter nor a buffer'):
            published(more)


def test_the_statement_names_the_code_that_is_neither_ours_nor_openmmlabs(saved):
    runner, checkpoint = saved
    kinds = 'Begin HookedHead Averaged Wrapped OwnMetric OwnLabel OwnStep OwnBackend OwnLogProcessor'.split()
    kinds.append('HookedHead._put')  # a hook of torch's
    names = {f'{__name__}.{kind}' for kind in kinds}
    statement = checkpoint['privacy']['statement']
    assert own_parts(runner) == names_in(statement) == names
    page = (Path(runner.work_dir) / 'privacy_statement.md').read_text()
    assert statement['own_code'].endswith('mmpose_dp cannot check that in full') and statement['own_code'] in page
    assert own_code_in_words(set()) == 'none' and not names_in({}) and not names_in(dict(own_code='none'))


def own_rule(module, a, b):
    """Of a layer's gradients."""


def own_epsilon(history, delta):
    """An accountant."""


def own_collate(samples):
    """Of a data loader."""


def own_watch(module, *given):
    """A hook of all modules."""


class OwnOptimizer(torch.optim.SGD):
    """For public epochs."""


class OwnEvaluator(Evaluator):
    """For validation."""


class OwnConstructor(DPOptimWrapperConstructor):
    """Of the optimizer wrapper, of which nothing is left afterwards."""


def test_code_is_named_that_is_no_object_in_a_runner(saved, monkeypatch):
    """The statement said 'none' of a rule for gradients, or an accountant, of one's own, on which epsilon rests."""
    runner, _ = saved
    before, wrapper, cfg = own_parts(runner), runner.optim_wrapper, runner.cfg
    monkeypatch.setitem(layer_rules._RULES, nn.Conv2d, own_rule)
    monkeypatch.setitem(ACCOUNTANTS, wrapper.plan.accountant, partial(own_epsilon))
    monkeypatch.setattr(wrapper, 'public_optimizer', OwnOptimizer(wrapper.params, 0.1))
    monkeypatch.setattr(runner.val_loop, 'evaluator', OwnEvaluator([]))
    monkeypatch.setattr(runner.val_loop.dataloader, 'collate_fn', partial(own_collate))
    monkeypatch.setitem(cfg, 'optim_wrapper', dict(cfg.optim_wrapper, constructor=OwnConstructor))
    monkeypatch.setitem(cfg, 'custom_imports', dict(imports=['mmpose_dp', 'own_patch', __name__]))
    handle = nn.modules.module.register_module_forward_hook(own_watch)
    kinds = 'own_rule own_epsilon own_collate own_watch OwnOptimizer OwnEvaluator OwnConstructor'.split()
    found = own_parts(runner) - before
    handle.remove()
    assert found == {'own_patch', *(f'{__name__}.{kind}' for kind in kinds)}


class Extra(nn.Linear):
    def get_extra_state(self):
        return torch.zeros(1)

    def set_extra_state(self, state):
        pass


class Adding(nn.Linear):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f'{prefix}seen'] = torch.zeros(1)


def with_hook(model, where='register_state_dict_post_hook'):
    getattr(model, where)(lambda module, state, *args: state.update(seen=torch.zeros(1)))
    return model


@pytest.mark.parametrize(
    ('part', 'match'),
    [
        (Extra(2, 2), r'model.1.get_extra_state'),
        (Adding(2, 2), r'holds 1.seen'),
        (with_hook(nn.Linear(2, 2), '_register_state_dict_hook'), r'holds seen'),
        (with_hook(nn.Linear(2, 2)), r'holds seen'),
    ],
)
def test_what_can_be_seen_is_refused_before_training(part, match):
    with pytest.raises(UnsupportedModelError, match=match):
        refuse_other_state(nn.Sequential(nn.Linear(2, 2), part))


@pytest.mark.parametrize('kind', ['lora', 'experts'])
def test_a_layer_of_ones_own_puts_nothing_more_there_where_it_has_updates_or_experts(kind):
    model = nn.Sequential(Adding(2, 2))
    if kind == 'lora':
        add_low_rank(model, 2)
    else:
        add_experts(model, [{'0.weight': torch.ones(2, 2), '0.bias': torch.ones(2)}])
    assert '0.seen' in model.state_dict() and '0.seen' not in own_state(model)
    with pytest.raises(UnsupportedModelError, match=r'holds 0.seen'):
        refuse_other_state(model)


@pytest.mark.parametrize('kind', ['plain', 'lora', 'experts'])
def test_layers_of_this_project_are_saved_as_they_save_themselves(kind):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model[1].register_buffer('passing', torch.zeros(1), persistent=False)
    if kind == 'lora':
        add_low_rank(model, 2)
        nn.init.ones_(model[3].lora_up.weight)
    if kind == 'experts':
        add_experts(model, [{name: value + 1 for name, value in model.state_dict().items()}])
    refuse_other_state(model)
    expected, found = model.state_dict(), {name: torch.zeros(1) for name in model.state_dict()}
    restore_own_values(model, found)
    assert [*own_state(model)] == [*expected] and 'passing' not in ''.join(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    model.load_state_dict(found)
