"""The audit refutes broken trainings and does not refute sound ones."""

import pytest
import torch
from audit import attack, audited

from mmpose_dp.datasets import PoissonBatchSampler
from mmpose_dp.datasets.synthetic import make_synthetic_mpii
from mmpose_dp.engine import ProjectorRefreshHook
from mmpose_dp.engine.basis import table_of
from mmpose_dp.privacy.clipping import ClippedSum
from mmpose_dp.privacy.noise import RandomSource
from tests.support.runs import config, tiny


@pytest.fixture(scope='module')
def people(tmp_path_factory):
    """(private, public) data sets; every private person becomes a canary."""
    folder = tmp_path_factory.mktemp('people')
    sizes = dict(image_size=64, workers=1)
    return (
        make_synthetic_mpii(folder / 'private', 'private', 1000, 2, **sizes),
        make_synthetic_mpii(folder / 'public', 'public', 20, 2, **sizes),
    )


def audit_of(people, tmp_path, method, **options):
    """Audits a training of few steps on small batches with little noise: there subsampling matters, and one run reveals most."""
    settings = dict(
        train_dataloader__batch_sampler__expected_batch_size=10,
        train_cfg__max_epochs=3,
        default_hooks__privacy_budget__target_epsilon=None,
        default_hooks__privacy_budget__interval=1000,
        default_hooks__logger__interval=1000,
        default_hooks__privacy_budget__target_delta=1e-4,
        optim_wrapper__noise_multiplier=0.8,
        optim_wrapper__debug_seed=1,  # of noise and canaries: a bound that holds with 95 percent may fail in a test
        train_dataloader__batch_sampler__debug_seed=2,
    )
    if method in ('feature', 'hybrid'):
        settings.update(train_dataloader__batch_sampler__public_batch_size=1)
    if method in ('projected', 'hybrid'):
        settings.update(optim_wrapper__projector__rank=16)
        options.setdefault('optim_wrapper__projector__refresh_interval', 100)
    if method == 'kronecker':
        method, options['default_hooks__public_data__num_samples'] = 'projected', 18
        projector = dict(_delete_=True, type='KroneckerProjector', rank=2000, refresh_interval=100)
        settings['optim_wrapper__projector'], options['public_root'] = projector, people[1]
    elif method == 'hybrid':
        settings.update(train_cfg__public_epochs=0)
    elif method == 'projected':
        options['public_root'] = people[1]
    cfg = tiny(config(people[0], tmp_path, method, **{**settings, **options}))
    cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
    hook = attack(audited(cfg, None, 0.95))
    print(method, hook.claim, hook.result)
    return hook


@pytest.mark.parametrize(
    'method',
    ['dpsgd', *(pytest.param(m, marks=pytest.mark.slow) for m in ('projected', 'kronecker', 'feature', 'hybrid'))],
)
def test_a_sound_training_is_not_refuted(people, tmp_path, method):
    hook = audit_of(people, tmp_path, method)
    assert 0 <= hook.result.epsilon_lower_bound < hook.claim < 4 and 0 <= hook.result.mu < hook.claimed_mu < 4
    assert not hook.refuted
    assert (hook.dimensions is None) == (method in ('dpsgd', 'feature'))


def no_noise(monkeypatch):
    monkeypatch.setattr(RandomSource, 'add_gaussian', lambda self, flat, deviation: None)


def half_the_noise(monkeypatch):
    whole = RandomSource.add_gaussian
    monkeypatch.setattr(RandomSource, 'add_gaussian', lambda self, flat, deviation: whole(self, flat, deviation / 2))


def no_clipping(monkeypatch):
    monkeypatch.setattr(ClippedSum, 'factors', staticmethod(lambda norms, max_grad_norm: torch.ones_like(norms)))


def public_samples_of_the_private_batch(monkeypatch):
    """The paper's release: a record is sampled together with its view, which enters the update without noise."""

    def sample(self):
        sampled = self.sampling.random.bernoulli(self.num_records, self.sampling.sample_rate)
        staying = {record for group in self.sampling._groups.values() for record in group}
        return [[int(r)] for r in sampled if r in staying] + [[self._public[int(r)]] for r in sampled]

    monkeypatch.setattr(PoissonBatchSampler, 'sample', sample)


def basis_from_private_gradients(monkeypatch):
    """The paper's release: the subspace is that of private images."""

    def gradients(self, runner, wrapper, chosen):
        staying = [record for group in runner.train_loop.sampler.sampling._groups.values() for record in group]
        chosen = runner.train_loop.sampler.sampling.random.choice(len(staying), 16)
        found = ([g[None] for g in wrapper.canary_gradient(staying[int(i)])] for i in chosen)
        return table_of(found, 16, wrapper.projector.dtype)

    monkeypatch.setattr(ProjectorRefreshHook, '_table', gradients)


@pytest.mark.parametrize(
    ('method', 'fault', 'options'),
    [
        pytest.param('dpsgd', no_noise, {}, marks=pytest.mark.slow),
        ('dpsgd', half_the_noise, {}),
        pytest.param('kronecker', no_noise, {}, marks=pytest.mark.slow),
        pytest.param('dpsgd', no_clipping, {}, marks=pytest.mark.slow),
        pytest.param('feature', public_samples_of_the_private_batch, {}, marks=pytest.mark.slow),
        ('hybrid', basis_from_private_gradients, dict(optim_wrapper__projector__refresh_interval=10)),
    ],
)
def test_a_broken_training_is_refuted(people, tmp_path, monkeypatch, method, fault, options):
    fault(monkeypatch)
    hook = audit_of(people, tmp_path, method, **options)
    assert hook.result.epsilon_lower_bound > hook.claim and hook.result.mu > hook.claimed_mu and hook.refuted
