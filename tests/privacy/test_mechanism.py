"""Which vector is clipped, by projector and clipping; the wrapper's tests hold each choice against single records."""

import pytest
import torch
from torch import nn

from mmpose_dp.extras.clipping_variants import PerParameterClippedSum
from mmpose_dp.gradients.blocks import StackBlock
from mmpose_dp.privacy.clipping import ClippedCoordinates, ClippedSum
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.plan import ROUNDING_MARGIN
from mmpose_dp.privacy.projection import Projector
from mmpose_dp.privacy.records import Samples
from tests.support.core import mechanism, place

C = 0.1
CHOICES = [
    (None, 'flat', ClippedSum),
    (None, 'automatic', ClippedSum),
    (None, 'per-parameter', PerParameterClippedSum),
    (dict(order='noise-then-project'), 'per-parameter', PerParameterClippedSum),
    (dict(), 'automatic', ClippedCoordinates),
    (None, 'adaptive', ClippedSum),
    (dict(), 'adaptive', ClippedCoordinates),
]


def made(settings, clipping, **more):
    params = list(nn.Linear(5, 4).parameters())
    projector = None if settings is None else Projector(rank=3, **settings)
    if projector is not None:
        place(projector, [torch.randn(3, *p.shape) for p in params])
    return mechanism(params, 0.1, projector, clipping, **more)


@pytest.mark.parametrize(('settings', 'clipping', 'kind'), CHOICES)
def test_no_record_gives_the_same_shapes_as_some(settings, clipping, kind):
    one = made(settings, clipping)
    collector = one.collector(Samples.from_keys([0, 1]))
    assert type(getattr(collector, '_collector', collector)) is kind
    total, empty = collector.total(), one.collector(Samples.from_keys([])).total()
    assert [x.shape for x in total] == [x.shape for x in empty]
    assert all(x.dtype == torch.float32 and not x.any() for x in empty)
    assert [x.shape for x in one.map_back(empty)] == [p.shape for p in one.params]


@pytest.mark.parametrize(('settings', 'clipping', 'kind'), CHOICES)
def test_a_step_of_no_record_is_noise_alone(settings, clipping, kind):
    torch.manual_seed(0)
    one = made(settings, clipping, noise_multiplier=0.0, expected_batch_size=7)
    one.add(one.collector(Samples.from_keys([0, 1])))
    assert not any(x.any() for x in one.release())
    one.noise_multiplier = 3.0
    noised = torch.cat([x.flatten() for x in (one.release() for _ in range(300)) for x in x])
    seen = noised if one.projector is None else None
    if seen is not None and clipping != 'adaptive':
        assert float(seen.std()) == pytest.approx(3.0 * 0.1 / 7, rel=0.05)  # 6 deviations: once in 500 million runs
    assert noised.any()


def test_a_fault_is_counted_and_nothing_is_released():
    one, counted = made(None, 'flat', noise_multiplier=1.0, expected_batch_size=2), []
    one.count = lambda: counted.append(1)
    one.add(one.collector(Samples.from_keys([0, 1])))
    with pytest.raises(PrivacyError, match='is not released, and counted: a layer mixes'):
        one.release('a layer mixes')
    assert counted == [1] and one._sum is None


@pytest.mark.parametrize(('settings', 'clipping'), [(None, 'flat'), (None, 'adaptive'), (dict(), 'flat')])
def test_one_record_moves_a_sum_of_thousands_by_no_more_than_itself(settings, clipping):
    """All others move up by one place, and so the rounding of every sum: their gradients all point one way, which is the worst."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(64))]
    projector = None if settings is None else Projector(rank=3, **settings)
    if projector is not None:
        place(projector, [torch.randn(3, 64)])
    gradients = 10 * torch.randn(64) + torch.randn(8192, 64)

    def summed(gradients):
        one, sums = mechanism(params, C, projector, clipping, noise_multiplier=0.0, expected_batch_size=1), []
        one.random.add_gaussian = lambda flat, deviation: sums.append(flat.double())
        for part in gradients.split(8):
            collector = one.collector(Samples.from_keys(range(len(part))))
            collector.add(StackBlock([0], part))
            one.add(collector)
        one.release()
        return sums[0]

    moved = summed(gradients) - summed(gradients[1:])
    own = summed(gradients[:1])
    assert moved.norm() <= C
    assert (moved - own).norm() < 0.1 * ROUNDING_MARGIN * C  # of the room, the rest is for the rounding of forwards


def test_release_needs_noise_and_batch_size():
    with pytest.raises(PrivacyError, match='noise_multiplier or expected_batch_size is not set'):
        made(None, 'flat').release()


@pytest.mark.parametrize(
    ('settings', 'clipping', 'message'),
    [
        (None, 'median', "clipping='median' must be one of"),
        (None, ['flat'], "clipping=\\['flat'\\] must be one of"),
        (dict(), 'per-parameter', 'no meaning with project-then-clip'),
    ],
)
def test_pairs_without_meaning_are_refused(settings, clipping, message):
    with pytest.raises(PrivacyError, match=message):
        made(settings, clipping)
