"""C follows the records by their noised votes, and a record with its vote weighs C and no more."""

import math

import pytest
import torch

from mmpose_dp.extras.adaptive_norm import AdaptiveNorm, VotingSum, shares
from mmpose_dp.gradients.blocks import StackBlock
from mmpose_dp.privacy.clipping import ClippedCoordinates
from mmpose_dp.privacy.projection import Projector
from mmpose_dp.privacy.records import Samples
from tests.support.core import place


def total(norms, max_grad_norm):
    """The clipped sum and the votes of records with one coordinate each, of these norms."""
    projector = Projector(rank=1)
    place(projector, [torch.ones(1, 1)])
    inside, vote = shares(max_grad_norm)
    collector = VotingSum(ClippedCoordinates(Samples.from_keys(range(len(norms))), inside, projector), inside, vote)
    collector.add(StackBlock([0], torch.as_tensor(norms, dtype=torch.float32)[:, None]))
    return collector.total()


def test_a_vector_and_its_vote_fill_c():
    inside, vote = shares(0.3)
    assert math.hypot(inside, vote) == pytest.approx(0.3, rel=1e-12) and vote == 0.1 * inside
    assert torch.cat(total([1e6], 0.3)).norm() == pytest.approx(0.3, rel=1e-6)


def test_votes_say_who_is_within_and_are_no_larger_for_who_is_far_out():
    inside, vote = shares(1.0)
    norms = [0.0, inside, 1.01 * inside, 5.0, 1e30, float('inf'), float('nan')]
    assert total(norms, 1.0)[1].tolist() == pytest.approx([(2 - 3) * vote])  # what is not finite has none


@pytest.mark.parametrize('start', [1e-3, 30.0])
def test_c_ends_where_half_of_the_records_are_clipped(start):
    generator, adaptive, found = torch.Generator().manual_seed(0), AdaptiveNorm(start), []
    for _ in range(400):
        norms = 0.7 * torch.randn(60, generator=generator).exp()  # median 0.7
        sampled = norms[torch.rand(60, generator=generator) < 0.5]
        C = adaptive.max_grad_norm
        noised = float(total(sampled, C)[1]) + 1.5 * C * float(torch.randn(1, generator=generator))
        adaptive.follow(noised / 30)
        found.append(C)
    assert torch.tensor(found[200:]).log().mean().exp() == pytest.approx(0.7, rel=0.15)


def test_all_within_lower_c_by_a_tenth_of_its_logarithm():
    adaptive = AdaptiveNorm(2.0)
    adaptive.follow(shares(2.0)[1])
    assert adaptive.max_grad_norm == pytest.approx(2.0 * math.exp(-0.1))


@pytest.mark.parametrize('sign', [-1, 1])
def test_c_stays_where_float32_distinguishes_norms(sign):
    """Records without a gradient, or all far out, for ever; and a vote that overflowed is none."""
    adaptive = AdaptiveNorm(0.1)
    for _ in range(10_000):
        adaptive.follow(sign * shares(adaptive.max_grad_norm)[1])
    assert adaptive.max_grad_norm == pytest.approx(0.1 * 1000.0**-sign)
    before = adaptive.max_grad_norm
    for vote in (float('nan'), float('inf'), -float('inf')):
        adaptive.follow(vote)
    assert adaptive.max_grad_norm == before
    adaptive.follow(-1e30)
    assert 0 < adaptive.max_grad_norm <= 100


def test_a_record_of_several_samples_votes_once_and_the_loss_scale_is_taken_off():
    projector = Projector(rank=1)
    place(projector, [torch.ones(1, 1)])
    inside, vote = shares(1.0)
    collector = VotingSum(
        ClippedCoordinates(Samples.from_keys([7, 7, 8]), inside, projector, scale=1024.0), inside, vote
    )
    collector.add(StackBlock([0], 1024.0 * torch.tensor([[0.6], [0.6], [0.6]])))  # 1.2 and 0.6
    total, votes = collector.total()
    assert votes.tolist() == [0.0] and total.tolist() == pytest.approx([inside + 0.6])


def test_c_stays_where_float32_has_squares():
    adaptive = AdaptiveNorm(1e-11)
    for _ in range(1000):
        adaptive.follow(1e9)
    assert adaptive.max_grad_norm == 1e-12
