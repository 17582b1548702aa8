"""What DPOptimWrapper refuses: each with a message that says what to write instead."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch.optim import SGD

from mmpose_dp.engine import DPOptimWrapper
from mmpose_dp.engine.optim_wrappers import DPOptimWrapperConstructor
from mmpose_dp.engine.unbuildable import unbuildable_in_words
from mmpose_dp.privacy.errors import PrivacyError
from tests.support.models import batch, build, small_hrnet

B = 4
PRIVATE = [0, 1, 2]


@pytest.fixture(scope='module')
def hrnet():
    return small_hrnet()


class TestRefusals:
    def test_private_and_public_samples_in_one_forward(self, hrnet):
        """The last bits of the public gradient, which no noise hides, would reveal how many private samples there are."""
        model = build(hrnet, private=True)
        wrapper = self.wrapper(model, public_weight=1.0, noise_multiplier=1.0, expected_batch_size=B)
        with pytest.raises(PrivacyError, match='private and public samples separately'):
            model.train_step(batch(hrnet, [0, None]), wrapper)

    def test_several_records_where_the_engine_wants_one(self, hrnet):
        model = build(hrnet, private=True)
        wrapper = self.wrapper(model, engine='loop', noise_multiplier=1.0, expected_batch_size=B)
        with pytest.raises(PrivacyError, match='one record at a time'):
            model.train_step(batch(hrnet, [0, 1]), wrapper)

    def wrapper(self, model, **settings):
        return DPOptimWrapper(SGD(model.parameters(), 1.0), **{'max_grad_norm': 1.0, **settings})

    @pytest.mark.parametrize('key', ['optimizer', 'public_optimizer'])
    def test_a_factor_for_a_weight_decay_that_is_not_there(self, hrnet, key):
        """mmengine says "base_wd should not be None"."""
        settings = dict(type='AdamW', lr=1e-3, weight_decay=0.1)
        wrapper = dict(type='DPOptimWrapper', max_grad_norm=0.1, optimizer=settings, public_optimizer=settings)
        wrapper[key] = dict(type='AdamW', lr=1e-3)
        with pytest.raises(
            PrivacyError, match=rf'paramwise_cfg multiplies .* write optim_wrapper\.{key}\.weight_decay'
        ):
            DPOptimWrapperConstructor(wrapper, dict(norm_decay_mult=0))(build(hrnet, private=True))

    def test_a_head_without_per_record_losses(self, hrnet):
        model = build(hrnet, private=False)
        model.head.__class__ = torch.nn.Identity
        with pytest.raises(PrivacyError, match='model.head is Identity, which has no per-record losses'):
            model.train_step(batch(hrnet, PRIVATE), self.wrapper(model))

    def test_batch_norm_in_train_mode(self, hrnet):
        from mmpose.registry import MODELS

        cfg = hrnet.model.copy()
        cfg['head'] = dict(cfg['head'], type='PrivateHeatmapHead')
        model = MODELS.build(cfg).train()
        with pytest.raises(PrivacyError, match='bn1.*train mode.*DPOptimWrapperConstructor'):
            model.train_step(batch(hrnet, PRIVATE), self.wrapper(model))

    def test_batch_norm_that_keeps_no_statistics(self, hrnet):
        """It uses the batch's in eval mode too."""
        model = build(hrnet, private=True)
        model.backbone.bn1.running_mean = model.backbone.bn1.running_var = None
        with pytest.raises(PrivacyError, match="bn1.*keeps none.*norm='group'"):
            model.train_step(batch(hrnet, PRIVATE), self.wrapper(model))

    def test_a_buffer_that_a_batch_changes(self, hrnet):
        model = build(hrnet, private=True)
        model.register_buffer('seen', torch.zeros(1))
        model.backbone.register_forward_pre_hook(lambda *_: model.seen.add_(1) and None)
        with pytest.raises(PrivacyError, match='seen was changed by the training forward'):
            model.train_step(batch(hrnet, PRIVATE), self.wrapper(model, noise_multiplier=0.0, expected_batch_size=B))

    def test_a_loss_beside_the_head(self, hrnet):
        model = build(hrnet, private=True)
        inner = model.loss
        model.loss = lambda *a: dict(inner(*a), loss_extra=torch.ones(()))
        with pytest.raises(PrivacyError, match='private head'):
            model.train_step(batch(hrnet, PRIVATE), self.wrapper(model, noise_multiplier=0.0, expected_batch_size=B))

    def test_a_loss_scale_that_could_hide_a_gradient_from_clipping(self, hrnet):
        """1e-20 of it has squares that are 0 in float32: its norm would be 0, and nothing would be clipped."""
        with pytest.raises(PrivacyError, match='loss_scale=1e-20 must be a fixed number, 1 or above'):
            self.wrapper(build(hrnet, private=True), loss_scale=1e-20)

    def test_no_sigma(self, hrnet):
        model = build(hrnet, private=True)
        with pytest.raises(PrivacyError, match='PrivacyBudgetHook'):
            model.train_step(batch(hrnet, PRIVATE), self.wrapper(model))

    @pytest.mark.parametrize(
        ('settings', 'message'),
        [
            (dict(clip_grad=dict(max_norm=1.0)), 'clip_grad'),
            (dict(accumulative_counts=4), 'accumulative_counts'),
            (dict(max_grad_norm=0), 'max_grad_norm'),
            (dict(max_grad_norm=1e-13), 'max_grad_norm=1e-13 must be a number, 1e-12 or above'),
            (
                dict(max_grad_norm=1e-3, schedule=dict(max_grad_norm=1e-10)),
                'schedule.max_grad_norm=1e-10 makes C 1e-13',
            ),
            (dict(noise_multiplier=-1.0), 'noise_multiplier'),
            (dict(public_weight=-1.0), 'public_weight'),
            (dict(amp_dtype='int8'), 'amp_dtype'),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(PrivacyError, match=message):
            self.wrapper(torch.nn.Linear(1, 1), **settings)
        with pytest.raises(PrivacyError, match='colour'):
            self.wrapper(torch.nn.Linear(1, 1), colour='red')


@pytest.mark.parametrize(
    ('optimizer', 'reason'),
    [
        (dict(type='AdamW', lr='1e-3x'), 'TypeError'),
        (dict(type='AdamW', lr=1e-3, momentum=0.9), "unexpected keyword argument 'momentum'"),
        (dict(type='SGD', lr=-1.0), 'Invalid learning rate'),
        (dict(type='LBFGS', lr=0.1), "missing 1 required positional argument: 'closure'"),
        (dict(type='SparseAdam', lr=0.1), 'dense gradients'),
        (dict(type='Muon', lr=0.1), '2D'),
    ],
    ids=lambda x: x['type'] if isinstance(x, dict) else '',
)
@pytest.mark.parametrize('key', ['optimizer', 'public_optimizer'])
def test_an_optimizer_that_would_fail_at_its_first_step(hrnet, optimizer, reason, key):
    """By then a step is counted."""
    wrapper = {'type': 'DPOptimWrapper', 'max_grad_norm': 1.0, 'optimizer': dict(type='SGD', lr=0.1), key: optimizer}
    model = build(hrnet, private=True).float()
    with pytest.raises(PrivacyError, match=f'optim_wrapper.{key}=.* cannot be used: .*{reason}'):
        DPOptimWrapperConstructor(wrapper)(model)


def test_a_model_that_is_split_over_processes_or_devices(hrnet):
    """Norms would be those of a share of the parameters, and the noise of one share: FSDP's own wrapper needs a GPU to be built."""
    wrapper = dict(type='DPOptimWrapper', max_grad_norm=1.0, optimizer=dict(type='SGD', lr=0.1))
    model = torch.nn.DataParallel(build(hrnet, private=True).float())
    with pytest.raises(PrivacyError, match="type='DataParallel' cannot be used: .*MMDistributedDataParallel"):
        DPOptimWrapperConstructor(wrapper)(model)


def test_synced_batch_norm_in_several_processes_without_gpus(tmp_path):
    """As RTMPose's configs have it: torch's sentence names no key, and private training would keep the statistics anyway."""
    backbone = dict(type='ResNet', depth=18, norm_cfg=dict(type='SyncBN'))
    head = dict(type='HeatmapHead', in_channels=512, out_channels=3)
    cfg = Config(dict(model=dict(type='TopdownPoseEstimator', backbone=backbone, head=head)))
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match='SyncBatchNorm') as error:
            torch.nn.parallel.DistributedDataParallel(torch.nn.SyncBatchNorm(2))
    finally:
        torch.distributed.destroy_process_group()
    assert unbuildable_in_words(cfg, error.value).startswith("model.backbone.norm_cfg.type='SyncBN': several processes")


def test_a_right_model_is_not_named_for_the_fault_of_another_part():
    """mmengine looks at the loops before it knows the scope in which the model's parts are."""
    model = dict(type='TopdownPoseEstimator', data_preprocessor=dict(type='PoseDataPreprocessor'))
    model |= dict(
        backbone=dict(type='ResNet', depth=18), head=dict(type='HeatmapHead', in_channels=512, out_channels=3)
    )
    with DefaultScope.overwrite_default_scope('mmengine'):
        told = unbuildable_in_words(Config(dict(default_scope='mmpose', model=model)), ValueError('no val_cfg'))
    assert told == 'the config cannot be built: ValueError: no val_cfg'
