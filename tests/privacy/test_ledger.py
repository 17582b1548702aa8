"""A ledger only grows, survives JSON, and is refused where it was damaged."""

import json
from fractions import Fraction

import pytest

from mmpose_dp.privacy import Ledger, PrivacyError, StepEvent

RATE = Fraction(32, 22246)


def ledger_of(*entries):
    ledger = Ledger()
    for event, steps in entries:
        ledger.count(event, steps)
    return ledger


def test_ledger_goes_through_json_and_continues_with_other_settings():
    a, b = StepEvent(1.1, RATE), StepEvent(0.9, Fraction(1, 100))
    ledger = ledger_of((a, 3), (a, 2), (b, 7))
    assert ledger.history == ((a, 5), (b, 7)) and ledger.steps == 12
    taken_over = Ledger()
    taken_over.load_state_dict(json.loads(json.dumps(ledger.state_dict())))
    assert taken_over.history == ledger.history
    taken_over.count(a)
    assert taken_over.epsilon(1e-5) > ledger.epsilon(1e-5) > 0
    for steps in (0, -1, 1.5, True):
        with pytest.raises(PrivacyError, match='only grows'):
            ledger.count(a, steps)


@pytest.mark.parametrize(
    'damage',
    [
        lambda s: None,
        lambda s: {},
        lambda s: {**s, 'format': 2},
        lambda s: {**s, 'checksum': 'x'},
        lambda s: {**s, 'entries': []},
        lambda s: {**s, 'entries': [[1.1, 32, 22246, 1]]},
        lambda s: {**s, 'entries': 'none'},
    ],
)
def test_a_damaged_ledger_is_refused_and_changes_nothing(damage):
    state = ledger_of((StepEvent(1.1, RATE), 5)).state_dict()
    ledger = ledger_of((StepEvent(2.0, RATE), 1))
    with pytest.raises(PrivacyError, match='ledger'):
        ledger.load_state_dict(damage(state))
    assert ledger.steps == 1
