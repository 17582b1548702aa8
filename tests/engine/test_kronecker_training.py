"""Whole trainings with a Kronecker projector: its basis is of public samples alone, and the update is within it."""

import json

import pytest
import torch
from mmpose.registry import MODELS

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.extras.kronecker import KroneckerProjector
from mmpose_dp.privacy.errors import PrivacyError
from tests.support.runs import train
from tests.support.runs import unvalidated as short

PROJECTOR = dict(_delete_=True, type='KroneckerProjector', rank=50, width=4, refresh_interval=3)


def short_one(synthetic, synthetic_public, work_dir, **options):
    usual = dict(
        public_root=synthetic_public,
        optim_wrapper__projector=PROJECTOR,
        default_hooks__public_data__num_samples=12,
        train_cfg__max_epochs=2,
    )
    return short(synthetic, work_dir, 'projected', **{**usual, **options})


def test_a_training_finds_its_basis_on_public_samples_and_moves_within_it(
    synthetic, synthetic_public, tmp_path, monkeypatch
):
    fits, whole, packed = [], KroneckerProjector.fit, PublicPrivateDataset._packed
    read = []

    def noted(self, part, number, seeds):
        read.append(part is self.public)
        return packed(self, part, number, seeds)

    def watched(self, params, passes):
        start = len(read)
        whole(self, params, passes)
        fits.append(read[start:])

    monkeypatch.setattr(PublicPrivateDataset, '_packed', noted)
    monkeypatch.setattr(KroneckerProjector, 'fit', watched)
    options = dict(optim_wrapper__optimizer=dict(type='SGD', lr=0.1, momentum=0.0), optim_wrapper__debug_seed=1)
    runner = train(short_one(synthetic, synthetic_public, tmp_path, train_cfg__max_epochs=1, **options))
    # 4 steps, a basis before the first and the fourth; 12 public samples each, and no private one
    assert [len(fit) for fit in fits] == [12, 12] and all(map(all, fits))
    projector = runner.optim_wrapper.projector
    assert projector.rank == 50 and len(projector.basis) == len(runner.optim_wrapper.params)
    statement = json.loads((tmp_path / 'privacy_statement.json').read_text())
    assert 'Projected' in statement['method'] and 'mpii_train.json' in statement['public_data']


def test_the_update_is_in_the_span_of_the_columns(synthetic, synthetic_public, tmp_path):
    cfg = short_one(synthetic, synthetic_public, tmp_path, train_cfg__max_epochs=1)
    cfg.optim_wrapper.projector.refresh_interval = 100
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.1, momentum=0.0)
    cfg.load_from = str(tmp_path / 'start.pth')
    model = MODELS.build(cfg.model)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict(), meta={}), cfg.load_from)
    runner = train(cfg)
    wrapper = runner.optim_wrapper
    before = dict(model.named_parameters())
    moved = [before[name].detach() - param.detach() for name, param in wrapper._named.items()]
    columns = torch.stack(
        [torch.cat([b[k].flatten() for b in wrapper.projector.basis]) for k in range(wrapper.projector.rank)], 1
    )
    span, whole = torch.linalg.qr(columns).Q, torch.cat([x.flatten() for x in moved])
    assert whole.norm() > 0 and (whole - span @ (span.T @ whole)).norm() < 1e-2 * whole.norm()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(optim_wrapper__projector=dict(PROJECTOR, rnk=2)), 'rnk'),
        (dict(optim_wrapper__projector=dict(PROJECTOR, order='noise-then-project')), 'order'),
        (dict(optim_wrapper__projector=dict(PROJECTOR, type='Kronecker')), "projector.type='Kronecker' is unknown"),
        (
            dict(default_hooks__public_data__num_samples=None),
            'needs 768 public samples but .* has 40: lower default_hooks.public_data.num_samples',
        ),
    ],
)
def test_wrong_settings_are_refused_before_training(synthetic, synthetic_public, tmp_path, options, message):
    cfg = short_one(synthetic, synthetic_public, tmp_path, **options)
    with pytest.raises(PrivacyError, match=message):
        train(cfg)
