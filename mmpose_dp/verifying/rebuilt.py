"""Writes the statement again, by the functions that wrote it, from what the ledger says; and compares every value.

Without a ledger the words of the statement are compared with each other: its method, unit and public data determine the rest of
them. Must name what nothing here determines, and must not take a value from the statement that the ledger has.
"""

from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from itertools import accumulate
from typing import Any

from mmpose_dp.extras.accountability import answers, with_private_figures
from mmpose_dp.extras.evidence import history_of
from mmpose_dp.privacy.accounting import ACCOUNTANTS
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.ledger import Ledger
from mmpose_dp.privacy.plan import METHODS, PrivacyPlan
from mmpose_dp.privacy.statement import build_statement
from mmpose_dp.privacy.validation import as_given

from .figures import number
from .findings import Findings, named
from .statement import other_version

# what the ledger does not have: it is taken as the statement says, and the guarantee is computed with it
_ASSUMED = ('epsilon', 'delta', 'target_epsilon', 'accountant', 'expected_batch_size', 'max_grad_norm', 'pretraining')
_CHECKED_ELSEWHERE = {
    'schema_version', 'epsilon', 'accountant', 'epsilon_by_accountant', 'personal_epsilon', 'risk', 'ledger', 'checkpoint',
    'checkpoints', 'weights_sha256', 'meta_sha256', 'config_sha256', 'page_sha256', 'seal', 'published_files',
}  # fmt: skip
_OF_THE_STEPS = ('sample_rate', 'steps', 'steps_of_earlier_trainings', 'epochs', 'noise_multiplier', 'cost_of_tuning')
_SOURCES = ('sampling_used', 'noise_source')


@dataclass(frozen=True)
class _RecordedPlan(PrivacyPlan):
    """The plan of a training, as far as its ledger and its statement know it."""

    recorded: dict[str, Any] = field(default_factory=dict)  # the ledger's line that opened the training

    @property
    def run_metadata(self) -> dict[str, Any]:
        return {**super().run_metadata, **self.recorded}


def check_words(statement: dict[str, Any], ledger: Ledger | None, opening: dict[str, Any], found: Findings) -> None:
    """Every value of the statement is compared with what it must be, or named as not checked.

    ``opening``: the ledger's line that began or resumed the training for the last time.
    """
    known = bool(ledger is not None and ledger.runs and opening)
    whose = ledger if known and ledger is not None else _from_words(statement)
    again, skipped = {}, set(_ASSUMED)
    try:
        plan = _plan(statement, opening if known else whose.runs[-1], whose)
        again = build_statement(plan, whose, pretraining='', spent=number(statement['epsilon']))
        if 'target_epsilon' in opening:
            again['target_epsilon'], skipped = opening['target_epsilon'], skipped - {'target_epsilon'}
        again['not_covered'] = with_private_figures(again['not_covered'], statement)
        again |= answers(statement, statement['decision'], statement['parameters_trained'])
    except PrivacyError as error:
        found.wrong.append(f'no training of this project could write this statement: {error}')
        return
    skipped |= {'decision', 'parameters_trained'}
    if not known:
        skipped |= {*_SOURCES, *(() if whose.history else _OF_THE_STEPS)}
        found.unchecked.append(
            'what was trained, with which noise, unit and public data: without a ledger, the words of the statement were compared '
            'with each other only'
        )
    compared = [name for name in again if name not in skipped]
    wrong = [
        _difference(name, statement.get(name), again[name]) for name in compared if statement.get(name) != again[name]
    ]
    source = 'by the ledger' if known else 'by the rest of the statement'
    found.wrong += [f'{fault} {source} ({other_version(statement)})' for fault in wrong]
    if not wrong:
        found.checked.append(f'{len(compared)} values, written again {source}: {", ".join(compared)}')
    _check_batch(statement, whose, found)
    _name_the_rest(statement, {*compared, *(['expected_batch_size'] if whose.run_history else [])}, found)


def _plan(statement: dict[str, Any], opening: dict[str, Any], ledger: Ledger) -> PrivacyPlan:
    """The plan behind a statement. Raises PrivacyError if there can be none."""
    steps = ledger.run_history
    noise = steps[0][0].noise_multiplier if steps else statement['noise_multiplier']
    settings = {one.name: opening[one.name] for one in fields(PrivacyPlan) if one.name in opening}
    settings.pop('target_epsilon', None)  # a resume may have changed it, below what was spent
    settings.setdefault('arithmetic', statement['rounding'].removeprefix('forwards in ').partition(';')[0])
    stated = dict(privacy_unit=statement['privacy_unit'].partition(':')[0], num_records=statement['num_records'])
    if 'method' not in settings:  # of an older ledger
        stated['method'] = next(name for name, words in METHODS.items() if words == statement['method'])
    return _RecordedPlan(
        **{**stated, **settings},
        expected_batch_size=statement['expected_batch_size'],
        steps=max(ledger.run_steps, 1),
        max_grad_norm=1.0,  # in no word that is compared
        adaptive_norm='votes of the records' in str(statement['max_grad_norm']),
        noise_multiplier=noise,
        target_delta=statement['delta'],
        accountant=statement['accountant']
        if statement['accountant'] in ACCOUNTANTS
        else 'pld',  # epsilon is checked elsewhere
        recorded=opening,
    )


def _from_words(statement: dict[str, Any]) -> Ledger:
    """A ledger with what a statement says of its trainings: of the last one everything, of those before it what they add."""
    names = {words: name for name, words in METHODS.items()}
    methods = [names.get(words, words) for words in _split_methods(statement['method'], list(names))]
    views, sets = statement['public_views'], statement['public_data_sets']
    feature = methods[-1] in ('feature', 'hybrid')
    unit, _, subjects = statement['privacy_unit'].partition(', by ')
    # of this training, or of one before it
    personal, ever = 'personal_epsilon' in statement, 'which personal budget a record has' in statement['not_protected']
    last = {
        'method': methods[-1],
        'privacy_unit': unit.partition(':')[0],
        'subjects': subjects or None,
        'num_records': statement['num_records'],
        'public_view': views[-1] if feature and views else None,
        'public_data': sets[-1] if methods[-1] == 'projected' and sets else None,
        'secret_randomness': 'debug seed' not in statement['noise_source'],
        'expose_private_metrics': statement['released'].endswith('without the message hub in them'),
        'personal_budgets': [[0.0, 0]] if personal else [],
    }
    ledger = Ledger()
    runs = [{'method': name} for name in methods[:-1]] + [{'personal_budgets': [[0.0, 0]]}] * ever
    runs += [{'public_view': view} for view in views] + [{'public_data': data} for data in sets]
    ledger.runs = (*runs, last)
    steps = history_of(statement['ledger']['history'] or ())
    ledger.history = tuple(
        (replace(one, personal_rates=(one.sample_rate,)) if personal else one, n) for one, n in steps
    )
    ends = [0, *accumulate(steps for _, steps in ledger.history)]
    earlier = statement['steps_of_earlier_trainings']
    if earlier in ends:
        ledger.earlier_history = ledger.history[: ends.index(earlier)]
    return ledger


def _split_methods(words: str, known: list[str]) -> list[str]:
    """The methods in 'A and B'; no method has ' and ' in its name."""
    found = words.split(' and ')
    unknown = [one for one in found if one not in known]
    if unknown:
        raise ValueError(f'the method {unknown[0]!r} is unknown')
    return found


def _difference(name: str, stated: Any, again: Any) -> str:
    """What differs, in words."""
    if isinstance(stated, list) and isinstance(again, list):
        lacking = [one for one in again if one not in stated]
        more = [one for one in stated if one not in again]
        parts = [
            f'{word} {str(one)!r:.150}' for word, these in (('lacks', lacking), ('must not say', more)) for one in these
        ]
        return f'{name} {"; ".join(parts) or "has another order"}'
    return f'{name} is {str(stated)!r:.150} in the statement and {str(again)!r:.150}'


def _check_batch(statement: dict[str, Any], ledger: Ledger, found: Findings) -> None:
    """The expected batch is the steps' rate times the records; personal budgets only come near it."""
    if not ledger.run_history:
        return
    event, size = ledger.run_history[-1][0], statement['expected_batch_size']
    if event.personal_rates:
        found.unchecked.append(f'expected_batch_size {size}: personal budgets have rates of their own')
        return
    rate = Fraction(size, statement['num_records'])
    wrong = f'expected_batch_size is {size} of {statement["num_records"]} records, and the rate of the steps is {event.sample_rate}'
    found.expect(rate == event.sample_rate, f'expected_batch_size {size}, by the rate of the steps', wrong)


def _name_the_rest(statement: dict[str, Any], compared: set[str], found: Findings) -> None:
    """Names every value that neither the ledger nor another check determines."""
    rest = [
        name for name in statement if name not in compared | _CHECKED_ELSEWHERE and not name.startswith('epsilon_for_')
    ]
    words = [f'{name} {_short(statement[name])}'.rstrip() for name in rest]
    kept = ' but the statement in a checkpoint, which could be changed with it' if found.confirmed else ''
    found.unchecked.append(f'what nothing here determines{kept}, so that it could be anything: {named(words, 40)}')


def _short(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f'= {as_given(value)}'
    return f'= {value!r}' if isinstance(value, str) and len(value) < 60 else ''
