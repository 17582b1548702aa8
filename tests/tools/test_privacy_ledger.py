"""The ledger tool adds up trainings, and a later training is calibrated to the budget that remains."""

import json
import shutil

import privacy_ledger
import publish_model
import pytest
import torch

from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger
from mmpose_dp.privacy.validation import rounded_up
from tests.support.runs import train, unvalidated


@pytest.fixture(scope='module')
def searched(synthetic, tmp_path_factory):
    """Two trainings of a hyper-parameter search, in the folder of a third one."""
    folder = tmp_path_factory.mktemp('search')
    for name in 'ab':
        options = dict(train_cfg__max_epochs=1, default_hooks__privacy_budget__target_epsilon=3.0)
        train(unvalidated(synthetic, folder / name, **options))
    return folder


def test_a_search_counts_towards_the_budget(call, searched, synthetic):
    ledgers = [searched / name / LEDGER_NAME for name in 'ab']
    done = call(privacy_ledger, 'add', *ledgers, '--delta', '1e-3', '--out', searched / 'last' / LEDGER_NAME)
    assert done.returncode == 0, done.stderr
    total = Ledger.read(searched / 'last' / LEDGER_NAME)
    single = Ledger.read(ledgers[0]).epsilon(1e-3)
    assert total.steps == 8 and single < total.epsilon(1e-3) < 2 * single
    assert f'epsilon {rounded_up(total.epsilon(1e-3))} at delta 0.001 ' in done.stdout
    runner = train(unvalidated(synthetic, searched / 'last', train_cfg__max_epochs=1))
    assert 7.9 < runner.optim_wrapper.ledger.epsilon(1e-3) <= 8.0 and runner.optim_wrapper.ledger.steps == 12
    shown = call(privacy_ledger, 'show', searched / 'last' / LEDGER_NAME, '--delta', '1e-3').stdout
    assert shown.count('training ') == 3


def test_an_error_is_one_clear_message(call, searched, tmp_path):
    (tmp_path / 'bad.jsonl').write_text('{}\n')
    for arguments, message in (
        (['show', tmp_path / 'none'], 'no such ledger'),
        (['show', tmp_path / 'bad.jsonl'], 'line 1, is damaged'),
        (['add', searched / 'a' / LEDGER_NAME, '--out', searched / 'b' / LEDGER_NAME], 'never overwritten'),
    ):
        done = call(privacy_ledger, *arguments, '--delta', '1e-3')
        assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr


def test_a_published_checkpoint_holds_nothing_else(searched, tmp_path):
    """No optimizer, message hub, seed, path or configuration."""
    checkpoint = torch.load(searched / 'a/epoch_1.pth', weights_only=False)
    given = publish_model.published(checkpoint)
    assert set(given) == {'state_dict', 'meta', 'privacy_statement'}
    assert set(given['meta']) == {'dataset_meta', 'mmpose_dp_version', 'descent'}
    assert given['privacy_statement']['private'] and given['privacy_statement']['steps'] == 4
    torch.save(given, tmp_path / 'model.pth')
    data = (tmp_path / 'model.pth').read_bytes()
    for secret in (str(searched), 'optimizer', 'log_scalars', 'seed', 'train_dataloader', 'experiment_name'):
        assert secret.encode() not in data


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(privacy=None), "no 'privacy' key.*not made by a private training"),
        (dict(privacy={'marking': 'NOT PRIVATE: a debug seed'}), 'NOT PRIVATE'),
        (dict(privacy={'marking': '', 'statement': None}), 'no privacy statement.*private step'),
        (dict(privacy={'marking': ''}), 'no privacy statement.*older version'),
        (dict(state_dict=None), 'no state_dict'),
    ],
)
def test_what_is_not_private_is_not_published(searched, change, message):
    checkpoint = {**torch.load(searched / 'a/epoch_1.pth', weights_only=False), **change}
    with pytest.raises(PrivacyError, match=message):
        publish_model.published({key: value for key, value in checkpoint.items() if value is not None})


def test_publishing_needs_no_file_beside_the_checkpoint(call, searched, tmp_path):
    shutil.copy(searched / 'a/epoch_1.pth', tmp_path)
    paths = tmp_path / 'epoch_1.pth', tmp_path / 'm.pth'
    done = call(publish_model, *paths)
    statement = torch.load(tmp_path / 'm.pth', weights_only=False)['privacy_statement']
    assert done.returncode == 0 and statement['guarantee'] in done.stdout, done.stderr
    assert statement == json.loads((searched / 'a/privacy_statement.json').read_text())
