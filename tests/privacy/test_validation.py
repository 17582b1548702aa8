"""What is printed of an epsilon is never less than it is."""

import math
import random

import pytest

from mmpose_dp.extras.risk import ceiling
from mmpose_dp.privacy.validation import as_given, rounded_up


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        (7.0916, '7.092'),
        (7.09101, '7.092'),
        (0.519519, '0.5196'),
        (0.00045454, '0.0004546'),
        (0.8, '0.8'),
        (8.0, '8'),
        (0.0, '0'),
        (123456.0, '123500'),
        (math.inf, 'not bounded'),
        (math.nan, 'not bounded'),
    ],
)
def test_an_epsilon_is_rounded_up(value, text):
    assert rounded_up(value) == text


def test_no_number_is_printed_too_small():
    numbers = random.Random(0)
    for _ in range(2000):
        value = 10 ** numbers.uniform(-6, 5)
        assert value <= float(rounded_up(value)) <= value * 1.0011
        assert value <= float(f'{ceiling(value):.4f}') <= value + 1.0001e-4
        assert float(as_given(value)) == value
    assert ceiling(math.inf) == math.inf and ceiling(0.8) == 0.8


def test_what_was_set_stands_as_it_was_set():
    assert [as_given(x) for x in (1e-3, 1 / 22000, 1e-15, 0.1)] == ['0.001', repr(1 / 22000), '1e-15', '0.1']
