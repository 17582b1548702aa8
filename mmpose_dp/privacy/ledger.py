"""What training has spent: the noisy steps taken, in memory, in every checkpoint, and in an append-only file.

A resume relies on the file: each step is on the disk before its noise is made, so a kill at any moment over-counts. Must not
forget a step, must not rewrite a line, and must not read a damaged or shortened record.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
from fractions import Fraction
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from .accounting import History, StepEvent, epsilon
from .errors import LedgerError

LEDGER_NAME = 'privacy_ledger.jsonl'
_FORMAT = 2
NOISE = 'float64, rounded to a grid'  # how noise.py adds it; runs of earlier versions say nothing of it, or secure_mode
# what the statement says of a whole training: a resume must not change it; the noise and the rate may change
_KEPT = 'privacy_unit subjects personal_budgets personal_assignment method public_view public_data num_records'.split()
# if a part of a run had another value than these, the statement names that value for the whole run
_HARMLESS = dict(secret_randomness=True, noise=NOISE, expose_private_metrics=False)
_OLD_DIGEST = re.compile(r' \(sha256 ([0-9a-f]{12})\)\Z')  # of subjects, as it was before it had a key
_START = hashlib.sha256(b'mmpose_dp privacy ledger').hexdigest()


class Ledger:
    """Runs and the noisy steps they took, oldest first, each line sealed with a hash over all before it.

    A run is a training with its resumes. A line is ``{"run": metadata}``, which opens one and names it, ``{"resumed": metadata}``,
    or a step: noise_multiplier, sample_rate as a fraction, steps. A resume has a random name too, so that resumed copies differ.
    The hashes detect damage and careless editing. They do not protect against somebody who forges a whole file.
    """

    def __init__(self) -> None:
        self.runs: tuple[dict[str, Any], ...] = ()  # what each run said of itself when it began
        self.history: tuple[tuple[StepEvent, int], ...] = ()  # (event, steps) pairs of all runs, oldest first
        self.earlier_history: tuple[tuple[StepEvent, int], ...] = ()  # those of the runs before the current one
        self.budgets: tuple[float | None, ...] = ()  # target_epsilon of this run and its resumes; None: not known
        self.head = _START  # the hash of the last line
        self.lines: list[dict[str, Any]] = []  # as in the file
        self._file: int | None = None
        self._size = 0  # bytes of the file that are ours

    @property
    def run_history(self) -> History:
        """The history of the current run."""
        return self.history[len(self.earlier_history) :]

    @property
    def steps(self) -> int:
        """All steps counted."""
        return sum(steps for _, steps in self.history)

    @property
    def run_steps(self) -> int:
        """Steps of the current run."""
        return sum(steps for _, steps in self.run_history)

    @property
    def is_secret(self) -> bool:
        """False if a run, or a part of one, used a debug seed."""
        return all(run.get('secret_randomness', True) for run in self.runs)

    @property
    def exposes_private_metrics(self) -> bool:
        """True if a run, or a part of one, logged losses of private batches."""
        return any(run.get('expose_private_metrics', False) for run in self.runs)

    def epsilon(self, delta: float, accountant: str = 'pld') -> float:
        """Epsilon spent so far, by all runs."""
        return epsilon(self.history, delta, accountant)

    def begin_run(self, **metadata: Any) -> None:
        """Opens a training. ``metadata`` are plain JSON values, those of ``PrivacyPlan.run_metadata``.

        Raises LedgerError if an earlier run had another privacy unit, or other subjects, since their steps do not add up, or a
        public view that this run does not have: together they guarantee Feature DP for that view. Plain DP may come first.
        Only a keyed digest of ``subjects_digest`` is kept.
        """
        apart = 'their steps do not add up'
        shown = 'what the first view showed is not protected, and the statement of this training could not say so'
        for run, (name, why) in product(self.runs, dict(privacy_unit=apart, subjects=apart, public_view=shown).items()):
            other = _difference(run, metadata, name)
            if other and not (name == 'public_view' and run.get(name) is None):
                raise LedgerError(
                    f'the ledger holds a training with {name}={run.get(name)!r} and this one has {other}: {why}. Give another '
                    'work_dir'
                )
        self._append({'run': {'training': secrets.token_hex(8), **_sealed(metadata)}})

    def check_resumes(self, **metadata: Any) -> None:
        """Raises LedgerError if the last training guaranteed something else than one with ``metadata``."""
        if not self.runs:
            raise LedgerError('the privacy ledger holds no training to resume')
        for name in _KEPT:
            if other := _difference(self.runs[-1], metadata, name):
                raise LedgerError(
                    f'the training to resume had {name}={self.runs[-1].get(name)!r} and the config says {other}: one statement '
                    'could not hold for both. Put the old value back, or start anew in another work_dir'
                )

    def resume_run(self, **metadata: Any) -> None:
        """Goes on with the last training. Raises LedgerError if that one guaranteed something else."""
        self.check_resumes(**metadata)
        self._append({'resumed': {'part': secrets.token_hex(8), **_sealed(metadata)}})

    def count(self, event: StepEvent, steps: int = 1) -> None:
        """Adds steps, on the disk first. A step cannot be removed."""
        if type(steps) is not int or steps < 1:
            raise LedgerError(f'a ledger only grows by whole steps, got {steps!r}')
        line = dict(noise_multiplier=event.noise_multiplier, sample_rate=str(event.sample_rate), steps=steps)
        if event.personal_rates:
            line['personal_rates'] = [str(rate) for rate in event.personal_rates]
        self._append(line)

    def _append(self, content: dict[str, Any]) -> None:
        line = {**content, 'hash': _seal(self.head, content)}
        if self._file is not None:
            if os.fstat(self._file).st_size != self._size:
                raise LedgerError('somebody else writes to the privacy ledger: run one training per work_dir at a time')
            self._write(self._file, _dump(line))
        self._take(line)

    def _write(self, file: int, data: bytes) -> None:
        written = os.write(file, data)
        if written < len(data):
            raise LedgerError(
                f'{LEDGER_NAME}: only {written} of {len(data)} bytes could be written, so no step is taken: is the disk full? '
                'Make room and resume'
            )
        os.fsync(file)
        self._size += written

    def _take(self, line: dict[str, Any]) -> None:
        if 'run' in line:
            self.runs += (dict(line['run']),)
            self.earlier_history, self.budgets = self.history, (line['run'].get('target_epsilon'),)
        elif 'resumed' in line:
            self.budgets += (line['resumed'].get('target_epsilon', self.budgets[-1]),)
            for name, harmless in _HARMLESS.items():
                if line['resumed'].get(name, harmless) != harmless:
                    self.runs[-1][name] = line['resumed'][name]
            if ran := line['resumed'].get('arithmetic'):
                known = self.runs[-1].get('arithmetic', 'not known').split(' and ')
                self.runs[-1]['arithmetic'] = ' and '.join(dict.fromkeys([*known, ran]))
        else:
            rates, steps = tuple(line.get('personal_rates', ())), line['steps']
            event = _event_of(line['noise_multiplier'], line['sample_rate'], rates)
            if type(line['noise_multiplier']) is not float or type(steps) is not int or steps < 1:
                raise TypeError('a step is not (float, fraction, whole number)')
            before = self.history[-1][1] if self.run_history and self.history[-1][0] == event else 0
            self.history = (*(self.history[:-1] if before else self.history), (event, before + steps))
        self.lines.append(line)
        self.head = line['hash']

    def keep_at(self, path: str | os.PathLike[str]) -> None:
        """Writes the lines so far, and each new one before ``count`` returns. Raises LedgerError if the file is another's."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.close()
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        found = path.read_bytes()
        whole = b''.join(_dump(line) for line in self.lines)
        kept = found[: found.rfind(b'\n') + 1]  # a torn last line was never counted: its step made no noise
        if not whole.startswith(kept):
            raise LedgerError(f'{path} has lines of another training, or was edited: give a new work_dir or restore it')
        if len(kept) < len(found):
            os.ftruncate(self._file, len(kept))
        self._size = len(kept)
        self._write(self._file, whole[len(kept) :])
        folder = os.open(path.parent, os.O_RDONLY)  # or a new file's name is not on the disk yet
        os.fsync(folder)
        os.close(folder)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        self.close()

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> 'Ledger':
        """The ledger in a file; empty if there is none. Raises LedgerError if it was damaged or changed."""
        return cls.parse(Path(path).read_bytes(), str(path)) if os.path.exists(path) else cls()

    @classmethod
    def parse(cls, data: bytes, name: str = 'the privacy ledger') -> 'Ledger':
        """The ledger in a file's bytes. Raises LedgerError."""
        ledger = cls()
        *lines, rest = data.split(b'\n')  # of the rest: what a kill cut off, or a line that an editor took the end of
        lines += [rest] if re.search(rb'"hash": "[0-9a-f]{64}"}\s*\Z', rest) else []
        for number, raw in enumerate(lines, 1):
            try:
                line = json.loads(raw)
                if line['hash'] != _seal(ledger.head, line):
                    raise ValueError('its hash does not match: a line was changed or taken out')
                ledger._take(line)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
                raise LedgerError(
                    f'{name}, line {number}, is damaged ({error}), so what has been spent on the data is not known. Put an '
                    'intact copy back; a new training from the weights alone (load_from) needs another work_dir'
                ) from error
        return ledger

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, plain numbers and strings: the steps so far, and the hash that finds them in the file."""
        entries = [[float(e.noise_multiplier), str(e.sample_rate), steps] for e, steps in self.history]
        lines, is_secret = len(self.lines), self.is_secret
        return dict(format=_FORMAT, head=self.head, lines=lines, entries=entries, secret_randomness=is_secret)

    def check_covers(self, state: Any) -> None:
        """Raises LedgerError unless every step of a checkpoint's ``state_dict`` is in this ledger."""
        source = "the checkpoint's privacy ledger"
        if missing := {'format', 'head', 'entries'} - set(state if isinstance(state, dict) else ()):
            raise LedgerError(f'{source} lacks {", ".join(sorted(missing))}: resume from an intact checkpoint')
        if state['format'] != _FORMAT:
            wrote = f'{source} has format {state["format"]!r} and this version reads {_FORMAT}'
            raise LedgerError(f'{wrote}: resume with the mmpose_dp version that wrote it')
        then = Ledger()
        for line in self.lines:
            if then.head == state['head']:
                break
            then._take(line)
        if then.head != state['head'] or then.state_dict()['entries'] != state['entries']:
            raise LedgerError(
                f'{source} is not the beginning of {LEDGER_NAME} beside it: one of them was changed, shortened or replaced by '
                'another. Put the file back that was written with this checkpoint'
            )


@lru_cache(maxsize=4096)  # most steps of a training are alike
def _event_of(noise_multiplier: float, sample_rate: str, personal_rates: tuple[str, ...]) -> StepEvent:
    return StepEvent(noise_multiplier, Fraction(sample_rate), tuple(Fraction(rate) for rate in personal_rates))


def _dump(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b'\n'


def _seal(head: str, line: dict[str, Any]) -> str:
    content = json.dumps({key: value for key, value in line.items() if key != 'hash'}, sort_keys=True)
    return hashlib.sha256((head + content).encode()).hexdigest()


def _difference(run: dict[str, Any], metadata: dict[str, Any], name: str) -> str:
    """The value of the next training, for a message, if one in the ledger had another; empty if they are the same.

    Subjects are the same if their names and, if the ledger and ``subjects_digest`` hold them, their digests are.
    """
    old, new = run.get(name), metadata.get(name)
    if name != 'subjects' or old is None or new is None:
        return '' if old == new else repr(new)
    if _OLD_DIGEST.sub('', old) != _OLD_DIGEST.sub('', new):
        return repr(new)
    olds, news = _OLD_DIGEST.findall(old), _OLD_DIGEST.findall(new)
    digest, seal = metadata.get('subjects_digest'), run.get('subjects_seal')
    if digest is None:  # of a ledger that is added: digests under two keys cannot be compared
        same = not olds or not news or olds == news
    elif olds:
        same = digest.startswith(olds[0])
    else:
        same = seal is None or hmac.compare_digest(seal, _keyed(digest, seal.partition(':')[0]))
    return '' if same else 'other subjects under that name'


def _sealed(metadata: dict[str, Any]) -> dict[str, Any]:
    """What a line keeps of the metadata. The digest of the subjects is kept under a random key, which the line holds as well.

    The chain of hashes, whose end is in every checkpoint, then reveals nothing of the subjects to somebody without the file.
    """
    kept = {name: value for name, value in metadata.items() if name != 'subjects_digest'}
    if metadata.get('subjects_digest') is not None:
        kept['subjects_seal'] = _keyed(metadata['subjects_digest'], secrets.token_hex(32))
    return kept


def _keyed(digest: str, key: str) -> str:
    return f'{key}:{hmac.new(key.encode(), digest.encode(), hashlib.sha256).hexdigest()}'
