"""What an error of other code says."""

import pytest
from torch.utils.data import DataLoader

from mmpose_dp.messages import failure, reason


@pytest.mark.parametrize(
    ('fails', 'words'),
    [
        (lambda: int('x'), "invalid literal for int() with base 10: 'x'"),
        (lambda: [][1], 'list index out of range'),
        (lambda: exec('raise ValueError("two\\n  lines")'), 'two lines'),
    ],
)
def test_its_own_words_come_first(fails, words):
    with pytest.raises(Exception) as error:  # noqa: PT011
        fails()
    assert reason(error.value) == words


class Failing:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise ValueError('a picture\n  is damaged')


@pytest.mark.parametrize('workers', [0, 1])
def test_an_error_in_a_worker_process_is_its_own_words(workers):
    """torch puts the worker's traceback, of a thousand characters, into the error's text."""
    words = ''
    try:
        list(DataLoader(Failing(), num_workers=workers))
    except ValueError as error:  # pytest.raises would keep the worker
        words = failure(error)
    assert words == 'ValueError: a picture is damaged'


def test_an_error_without_words_is_the_line_that_raised_it():
    with pytest.raises(AssertionError) as error:
        raise AssertionError from None
    assert reason(error.value).startswith('test_messages.py, line ')
    try:
        exec(compile('assert 1 == 2', 'nowhere.py', 'exec'))
    except AssertionError as without_source:
        assert reason(without_source) == 'nowhere.py, line 1: '
    assert reason(AssertionError()) == ''
