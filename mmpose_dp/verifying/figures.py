"""Epsilon, delta and the risk figures of a statement, recomputed from the steps.

Must not accept a figure that is more than TOLERANCE below what the steps have spent.
"""

import math
from collections.abc import Iterator
from typing import Any

from mmpose_dp.extras.personal_budgets import budget_in_words, epsilon_by_group
from mmpose_dp.extras.risk import risk_of
from mmpose_dp.privacy.accounting import ACCOUNTANTS, History, epsilon, group_epsilon
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.ledger import Ledger
from mmpose_dp.privacy.statement import GROUPS, epsilon_of_group
from mmpose_dp.privacy.validation import as_given, rounded_up

from .findings import Findings, named
from .statement import other_version

TOLERANCE = 0.01  # relative: another version of a library may compute a slightly larger figure
_LARGE_DELTA = 0.01


def check_figures(statement: dict[str, Any], history: History, found: Findings, *, went_on: bool) -> None:
    """Every figure that follows from the steps and from delta. ``went_on``: whether trainings came before, or it was resumed."""
    delta, main = statement['delta'], statement['accountant']
    for name in ACCOUNTANTS:
        stated = number(statement['epsilon_by_accountant'][name])
        try:
            again = epsilon(history, delta, name)
        except PrivacyError as error:
            if math.isfinite(stated):
                found.unchecked.append(f'epsilon by {name}: {error.__cause__ or error}')
            continue
        _compare(f'epsilon {rounded_up(stated)} by {name}', stated, again, found)
    spent = statement['epsilon']
    for name in [name for name in statement['epsilon_by_accountant'] if name not in ACCOUNTANTS]:
        _check_unknown(name, number(statement['epsilon_by_accountant'][name]), epsilon(history, delta, 'pld'), found)
    words = f'({rounded_up(number(spent))}, {as_given(delta)})-'
    same = spent == statement['epsilon_by_accountant'].get(main) and statement['guarantee'].startswith(words)
    found.expect(same, 'the guarantee names this epsilon', 'the guarantee, epsilon and epsilon_by_accountant differ')
    _check_budget(statement, went_on, found)
    _check_groups(statement, history, found)
    _check_risk(statement, history, found)


def _check_unknown(name: str, stated: float, by_pld: float, found: Findings) -> None:
    """An accountant of the trainer's own: what it says must hold by one that is known here."""
    what = f'epsilon {rounded_up(stated)} by {name}, an accountant that is not known here and was compared with pld'
    _compare(what, stated, by_pld, found)
    found.unchecked.append(
        f"epsilon by {name}: this accountant is not known here, since it is registered in a file of the trainer's own, so that "
        'its own value was not computed again'
    )


def check_personal(statement: dict[str, Any], ledger: Ledger | None, found: Findings) -> None:
    """Epsilon of each group of records that has a budget of its own, from the rates in the ledger; there must be no other."""
    stated, delta = statement.get('personal_epsilon', {}), statement['delta']
    if ledger is None or not ledger.runs:
        if stated:
            found.unchecked.append('personal_epsilon: which records are sampled how often is in the ledger alone')
        return
    budgets = ledger.runs[-1].get('personal_budgets') or []
    accountant = statement['accountant'] if statement['accountant'] in ACCOUNTANTS else 'pld'
    spent = epsilon_by_group(ledger.earlier_history, ledger.run_history, len(budgets), delta, accountant)
    again = {budget_in_words(target, count): value for (target, count), value in zip(budgets, spent)}
    if stated.keys() != again.keys():
        wanted = f'{", ".join(again) or "none"}, and the statement has {", ".join(stated) or "none"}'
        found.wrong.append(f'personal_epsilon: the budgets in the ledger are {wanted}')
        return
    for name, value in again.items():
        _compare(f'epsilon {rounded_up(number(stated[name]))} of the {name}', number(stated[name]), value, found)


def check_delta(statement: dict[str, Any], found: Findings) -> None:
    """A large delta must not be overlooked: the guarantee may fail for so many, whatever epsilon is."""
    delta, total = statement['delta'], statement['num_records']
    if delta > 1 / max(total, 1) or delta > _LARGE_DELTA:
        found.warnings.append(
            f'delta is {as_given(delta)}, and there are {total} records: with this probability nothing may be protected. It should '
            f'be far below 1 / {total} = {1 / max(total, 1):.2g}'
        )


def number(value: Any) -> float:
    """A figure of a statement."""
    return math.inf if value == 'not bounded' or str(value).startswith('not computed') else float(value)


def _check_budget(statement: dict[str, Any], went_on: bool, found: Findings) -> None:
    """A training ends within its budget. Only one that is resumed with a smaller budget may have spent more before."""
    target, spent = statement['target_epsilon'], number(statement['epsilon'])
    if target is None:
        return
    over = f'epsilon is above target_epsilon={as_given(target)}'
    if spent <= target * (1 + TOLERANCE):
        found.checked.append('epsilon is within target_epsilon')
    elif went_on:
        found.warnings.append(f'{over}: a training was resumed with a smaller one, or it was changed')
    else:
        found.wrong.append(f'{over}, and no training goes on beyond its budget')


def _check_groups(statement: dict[str, Any], history: History, found: Findings) -> None:
    """Every figure for several records that training computes must be there, and not below what it is."""
    delta, spent, given = statement['delta'], number(statement['epsilon']), set()
    for key, several in statement.items():
        for k, value in several.items() if key.startswith('epsilon_for_') else ():
            stated = number(value)
            if math.isfinite(stated):
                given.add(int(k))
                _compare(
                    f'epsilon {rounded_up(stated)} for {k} records',
                    stated,
                    group_epsilon(history, delta, int(k)),
                    found,
                )
    for records in sorted({*GROUPS} - given):
        again = epsilon_of_group(history, delta, records, spent)
        if math.isfinite(again):
            found.wrong.append(f'epsilon for {records} records is lacking: computed, it is {rounded_up(again)}')


def _compare(what: str, stated: float, again: float, found: Findings) -> None:
    holds = again <= stated * (1 + TOLERANCE) + 1e-9
    found.expect(holds, f'{what}, recomputed', f'{what} is too low: recomputed, it is {rounded_up(again)}')


def _check_risk(statement: dict[str, Any], history: History, found: Findings) -> None:
    """Every figure that can be recomputed must be there, and not below what it is."""
    stated = statement['risk']
    if not statement['private']:
        found.expect(
            stated is None,
            'no risk figures, since nothing is private',
            'risk figures of a training that is not private',
        )
        return
    again = risk_of(history, statement['delta'])
    if stated is None or again is None:
        found.expect(
            stated is again,
            'there are no risk figures of these steps',
            'risk figures are lacking, or the steps have none',
        )
        return
    pairs = [*_leaves(stated, again, 'risk')]
    low = [name for name, one, other in pairs if not other <= one * (1 + TOLERANCE) + 1e-6]  # NaN is not above anything
    hidden = [f'{name} ({other:g})' for name, one, other in pairs if one == math.inf > other]
    kept = f', but for {len(hidden)} that it does not give' if hidden else ''
    found.expect(not low, f'the risk figures, recomputed{kept}', f'too low: {", ".join(low)}')
    if hidden:  # a trainer with an older dp-accounting cannot compute those of replace_one
        found.warnings.append(f'the statement does not give figures that follow from its steps: {named(hidden)}')
    if more := [*_added(stated, again, 'risk')]:
        found.wrong.append(
            f'figures that no training writes, so that they could be anything: {named(more)} ({other_version(statement)})'
        )
    if again['replace_one'] == 'not computed' != stated['replace_one']:
        found.unchecked.append('risk.replace_one: the dp-accounting that is installed here cannot compute it')


def _leaves(stated: Any, again: Any, name: str) -> Iterator[tuple[str, float, float]]:
    if isinstance(again, dict):
        for key, value in again.items():
            yield from _leaves(stated[key] if isinstance(stated, dict) else stated, value, f'{name}.{key}')
    elif again != 'not computed':
        yield name, number(stated), number(again)


def _added(stated: Any, again: Any, name: str) -> Iterator[str]:
    """The figures that are not among those that are computed."""
    for key, value in stated.items() if isinstance(stated, dict) and isinstance(again, dict) else ():
        if key in again:
            yield from _added(value, again[key], f'{name}.{key}')
        else:
            yield f'{name}.{key}'
