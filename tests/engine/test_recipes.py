"""What a user changes beside the method: norms, what is trained, where the weights come from. Whole runs."""

import pytest
import torch
from mmengine.runner import Runner
from mmpose.datasets.datasets.utils import parse_pose_metainfo
from torch import nn

from mmpose_dp.privacy.errors import PrivacyError
from tests.support.runs import config, tiny, train


def epochs(synthetic, work_dir, **options):
    return config(synthetic, work_dir, 'dpsgd', train_cfg__max_epochs=1, **options)


def log_of(work_dir):
    return ''.join(path.read_text() for path in work_dir.glob('*/*.log'))


def test_group_norm_and_a_subset(synthetic, tmp_path):
    cfg = epochs(synthetic, tmp_path, optim_wrapper__norm='group', optim_wrapper__trainable='head+norms')
    model = train(cfg).model
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert 'backbone.bn1.weight' in trained and 'backbone.conv1.weight' not in trained
    assert f'{sum(p.numel() for p in model.parameters()):,} parameters are trained' in log_of(tmp_path)
    # tested with the same config, the checkpoint finds the model it came from
    cfg = epochs(synthetic, tmp_path / 'test', optim_wrapper__norm='group')
    cfg.load_from = str(tmp_path / 'epoch_1.pth')
    runner = Runner.from_cfg(cfg)
    runner.test()
    saved = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)['state_dict']
    assert saved.keys() == runner.model.state_dict().keys()
    assert all(torch.equal(v, saved[k]) for k, v in runner.model.state_dict().items())


def test_a_runner_that_has_trained_tests(synthetic, tmp_path):
    runner = train(tiny(epochs(synthetic, tmp_path)))
    before = {path: path.read_bytes() for path in tmp_path.glob('privacy_*')}
    assert len(before) > 1 and runner.test().keys() == runner.val().keys()
    runner.train()  # nothing is left to do
    assert before == {path: path.read_bytes() for path in before}


def test_low_rank_updates_train_and_resume(synthetic, tmp_path):
    options = dict(optim_wrapper__trainable='lora', optim_wrapper__lora_rank=2, optim_wrapper__noise_multiplier=1.0)
    options.update(default_hooks__privacy_budget__target_epsilon=None)
    first = train(config(synthetic, tmp_path, 'dpsgd', train_cfg__max_epochs=1, **options))
    assert any(p.any() for n, p in first.model.named_parameters() if 'lora_up' in n)
    cfg = config(synthetic, tmp_path, 'dpsgd', train_cfg__max_epochs=2, **options)
    cfg.resume, cfg.load_from = True, str(tmp_path / 'epoch_1.pth')
    assert train(cfg).optim_wrapper.ledger.steps == 8


@pytest.mark.parametrize('named', [True, False])
def test_a_checkpoint_with_other_joints(synthetic, tmp_path, named):
    """What fits is kept; what does not is named."""
    cfg = epochs(synthetic, tmp_path, optim_wrapper__trainable='backbone.stage4.*')
    weights = {k: v + 0.5 if 'final' in k else v + 0.01 for k, v in Runner.from_cfg(cfg).model.state_dict().items()}
    for key in ('head.final_layer.weight', 'head.final_layer.bias'):
        weights[key] = torch.cat([weights[key], weights[key][:1]])
        weights[key] += torch.arange(17.0).view(-1, *[1] * (weights[key].dim() - 1))
    meta = dict(dataset_meta=parse_pose_metainfo(dict(from_file='configs/_base_/datasets/coco.py'))) if named else {}
    torch.save(dict(state_dict=weights, meta=meta), tmp_path / 'coco.pth')
    cfg.load_from = str(tmp_path / 'coco.pth')
    kept = train(cfg).model.state_dict()
    assert torch.equal(kept['backbone.conv1.weight'], weights['backbone.conv1.weight'])
    log = log_of(tmp_path)
    if named:  # MPII's right ankle is COCO's joint 16, its thorax none
        assert torch.equal(kept['head.final_layer.weight'][0], weights['head.final_layer.weight'][16])
        assert (
            'head.final_layer.weight is (17, 16, 1, 1) in the checkpoint and (16, 16, 1, 1) in the model: kept' in log
        )
        assert 'kept for 12 joints, new for pelvis, thorax, upper_neck, head_top' in log
    else:
        assert 'head.final_layer.bias is (17,) in the checkpoint and (16,) in the model: not kept' in log
    assert kept['head.final_layer.weight'][7].abs().max() < 0.4
    assert 'backbone' not in ''.join(line for line in log.splitlines() if 'in the checkpoint' in line)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(optim_wrapper__norm='batch'), "'frozen' or 'group'"),
        (dict(optim_wrapper__trainable='tail'), "'tail' matches no trainable parameter"),
        (dict(model__data_preprocessor__batch_augments=[dict(type='BatchSyncRandomResize', random_size_range=(32, 64))]),
         'batch_augments=None'),
    ],
)  # fmt: skip
def test_refused_before_training(synthetic, tmp_path, options, message):
    with pytest.raises(PrivacyError, match=message):
        train(epochs(synthetic, tmp_path, **options))
