"""Which vector is clipped, by projector and clipping; the wrapper's tests hold each choice against single records."""

import pytest
import torch
from torch import nn

from mmpose_dp.privacy.clipping import ClippedCoordinates, ClippedParts, ClippedSum, LayerwiseClippedSum
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.mechanism import check_clipping, collector_for, empty_sum, gradient_of
from mmpose_dp.privacy.projection import Projector
from mmpose_dp.privacy.records import Rows

CHOICES = [
    (None, 'flat', ClippedSum),
    (None, 'automatic', ClippedSum),
    (None, 'per-layer', LayerwiseClippedSum),
    (dict(order='noise-then-project'), 'per-layer', LayerwiseClippedSum),
    (dict(), 'automatic', ClippedCoordinates),
    (None, 'adaptive', ClippedSum),
    (dict(), 'adaptive', ClippedCoordinates),
    (dict(outside=0.5), 'flat', ClippedParts),
]


@pytest.mark.parametrize(('settings', 'clipping', 'kind'), CHOICES)
def test_no_record_gives_the_same_shapes_as_some(settings, clipping, kind):
    params = list(nn.Linear(5, 4).parameters())
    projector = None if settings is None else Projector(rank=3, **settings)
    if projector is not None:
        projector.basis = [torch.randn(3, *p.shape) for p in params]
    check_clipping(clipping, projector)
    collector = collector_for(params, Rows.from_keys([0, 1]), 0.1, projector, clipping)
    assert type(collector) is kind
    total, empty = collector.total(), empty_sum(params, projector, clipping)
    assert [x.shape for x in total] == [x.shape for x in empty]
    assert all(x.dtype == torch.float32 and not x.any() for x in empty)
    if clipping == 'adaptive':
        empty.pop()  # the votes
    assert [x.shape for x in gradient_of(empty, projector)] == [p.shape for p in params]


@pytest.mark.parametrize(
    ('settings', 'clipping', 'message'),
    [
        (None, 'median', "clipping='median' must be one of"),
        (dict(), 'per-layer', 'no meaning with project-then-clip'),
        (dict(outside=1.0), 'automatic', 'not offered with projector.outside'),
        (dict(outside=1.0), 'adaptive', 'not offered with projector.outside'),
    ],
)
def test_pairs_without_meaning_are_refused(settings, clipping, message):
    with pytest.raises(PrivacyError, match=message):
        check_clipping(clipping, None if settings is None else Projector(rank=3, **settings))


def test_outside_needs_project_then_clip():
    for settings in (dict(order='noise-then-project', outside=0.1), dict(outside=-1.0), dict(outside=float('nan'))):
        with pytest.raises(PrivacyError, match='projector.outside='):
            Projector(rank=3, **settings)
