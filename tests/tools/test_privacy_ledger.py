"""The ledger tool adds up trainings, and a later training is calibrated to the budget that remains."""

import json
import shutil

import numpy as np
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
    assert sum(line.startswith('training ') for line in shown.splitlines()) == 3


def test_an_error_is_one_clear_message(call, searched, tmp_path):
    (tmp_path / 'bad.jsonl').write_text('{}\n')
    (tmp_path / 'empty.jsonl').touch()
    (tmp_path / 'annotations.json').write_text('{"images": [], "annotations": []}')  # epsilon 0, it said of these two
    for arguments, message in (
        (['show', tmp_path / 'empty.jsonl'], 'has no whole line of a ledger, so it does not say what was spent'),
        (['show', tmp_path / 'annotations.json'], 'has no whole line of a ledger'),
        (['add', searched / 'a', tmp_path / 'empty.jsonl'], 'has no whole line of a ledger'),
        (['show', tmp_path / 'none'], 'no such ledger'),
        (['show', tmp_path / 'bad.jsonl'], 'line 1, is damaged'),
        (['add', searched / 'a' / LEDGER_NAME, '--out', searched / 'b' / LEDGER_NAME], 'never overwritten'),
    ):
        done = call(privacy_ledger, *arguments, '--delta', '1e-3')
        assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr


def test_a_published_checkpoint_holds_nothing_else(searched, tmp_path):
    """No optimizer, message hub, seed, path or configuration."""
    checkpoint = torch.load(searched / 'a/epoch_1.pth', weights_only=False)
    joints = {**checkpoint['meta']['dataset_meta']}
    checkpoint['meta']['dataset_meta']['CLASSES'] = [dict(name='patient 17')]  # COCO's, of the annotation file
    given = publish_model.published(checkpoint)
    assert given['meta']['dataset_meta'].keys() == joints.keys()
    assert set(given) == {'state_dict', 'meta', 'privacy_statement'}
    assert set(given['meta']) == {'dataset_meta', 'mmpose_dp_version', 'lineage'}
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
    own = {'checkpoints', 'meta_sha256', 'page_sha256', 'seal'}
    written = json.loads((searched / 'a/privacy_statement.json').read_text())
    assert {key for key in {*statement, *written} if statement.get(key) != written.get(key)} == own
    assert 'whether it was changed after training is not known' in done.stdout


def test_a_published_file_loads_safely_and_nothing_is_overwritten(call, searched, tmp_path):
    source, out = searched / 'a/epoch_1.pth', tmp_path / 'm.pth'
    assert call(publish_model, source, out).returncode == 0
    meta = torch.load(out, weights_only=True)['meta']['dataset_meta']
    assert (
        isinstance(meta['sigmas'], list) and isinstance(meta['keypoint_colors'], list) and meta['num_keypoints'] == 16
    )
    written = out.read_bytes()
    for arguments, message in (
        ([source, out], 'exists: give another name'),
        ([source, source, '--overwrite'], 'exists'),
        ([source, tmp_path, '--overwrite'], 'exists'),
        ([source, tmp_path / 'none/m.pth'], 'there is no folder'),
    ):
        done = call(publish_model, *arguments)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    assert out.read_bytes() == written and {path.name for path in tmp_path.iterdir()} == {'m.pth'}
    assert call(publish_model, source, out, '--overwrite').returncode == 0


def test_plain_mmpose_runs_a_published_file(searched, call, tmp_path):
    """Lists in place of arrays in the joints' names and colours change nothing."""
    from mmpose.apis import inference_topdown, init_model

    call(publish_model, searched / 'a/epoch_1.pth', tmp_path / 'm.pth')
    config = next((searched / 'a').glob('hrnet*.py'))
    model = init_model(str(config), str(tmp_path / 'm.pth'), device='cpu')
    found = inference_topdown(model, np.zeros((64, 64, 3), np.uint8))
    assert found[0].pred_instances.keypoints.shape == (1, 16, 2)


def test_a_ledger_is_given_as_folder_or_checkpoint_with_the_statements_delta(call, searched, tmp_path):
    call(publish_model, searched / 'a/epoch_1.pth', tmp_path / 'm.pth')
    shown = {}
    names = '', LEDGER_NAME, 'privacy_statement.json', 'privacy_statement.md', 'epoch_1.pth'
    for path in (*(searched / 'a' / name for name in names), tmp_path / 'm.pth'):
        done = call(privacy_ledger, 'show', path)
        assert done.returncode == 0 and 'at delta 0.001 (pld)' in done.stdout, done.stderr
        shown[path.name] = [line for line in done.stdout.splitlines() if line.startswith(('epsilon', 'A 50:50'))]
    assert len(set(map(tuple, shown.values()))) == 1 and len(next(iter(shown.values()))) == 4
    assert call(privacy_ledger, 'add', searched / 'a', searched / 'b').returncode == 0
    again = call(privacy_ledger, 'add', searched / 'a', searched / 'a').stdout
    assert '4 steps are in two ledgers and count once' in again and set(shown['a']) <= set(again.splitlines())
    for arguments, message in (
        (['add', searched / 'a', tmp_path / 'm.pth'], 'add needs ledgers'),
        (['show', tmp_path], 'no such ledger'),
    ):
        done = call(privacy_ledger, *arguments)
        assert done.returncode == 2 and message in done.stderr


def test_a_cut_ledger_is_not_shown_beside_its_statement_or_a_checkpoint(call, searched, tmp_path):
    for name in (LEDGER_NAME, 'privacy_statement.json'):
        shutil.copy(searched / 'a' / name, tmp_path)
    lines = (tmp_path / LEDGER_NAME).read_text().splitlines(keepends=True)
    (tmp_path / LEDGER_NAME).write_text(''.join(lines[:-2]))
    done = call(privacy_ledger, 'show', tmp_path)
    assert done.returncode == 2 and 'was cut' in done.stderr
    (tmp_path / 'privacy_statement.json').unlink()
    done = call(privacy_ledger, 'show', tmp_path)
    assert done.returncode == 2 and 'write --delta' in done.stderr
    shutil.copy(searched / 'a/epoch_1.pth', tmp_path)  # which knows more steps
    for command in ('show', 'add'):
        done = call(privacy_ledger, command, tmp_path, '--delta', '1e-3')
        assert done.returncode == 2 and 'epoch_1.pth in' in done.stderr and 'does not have' in done.stderr
