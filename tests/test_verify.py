"""A third party checks statement, ledger, checkpoint and published file; every forgery of one of them is found."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict

import fill_in_statement
import publish_model
import pytest
import torch
from audit import attack, audited, refuse_another_config, reported
from mmengine.config import Config

from mmpose_dp.extras import evidence
from mmpose_dp.extras.accountability import DECISIONS, record_audit, with_membership_audit
from mmpose_dp.extras.checkpoint_file import CheckpointFile
from mmpose_dp.extras.evidence import PAGE_NAME, STATEMENT_NAME, file_sha256
from mmpose_dp.extras.statement_page import statement_json, write_statement
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger
from mmpose_dp.verify import SCHEMA, schema_faults, verify
from tests.support.paths import REPO
from tests.support.runs import train, unvalidated
from tests.support.statements import amend, write_work_dir

PUBLISHED = 'published.pth'
DECISION = dict(
    chosen_by='the data protection officer',
    rationale='as small as the task allows',
    controller='a clinic',
    purpose='counting exercises',
    legal_basis='consent',
    statement_date='2026-11-27',
)
OFFICERS = (
    'statement_date',
    'controller',
    'purpose',
    'legal_basis',
    'data_source',
    'retention',
)  # later than the first statements of schema 1.0


@pytest.fixture(scope='module')
def honest(synthetic, tmp_path_factory):
    """A finished work dir with a published file in it."""
    folder = tmp_path_factory.mktemp('verify') / 'work'
    options = dict(train_cfg__max_epochs=2, default_hooks__privacy_budget__decision=DECISION)
    train(unvalidated(synthetic, folder, **options))
    publish_model.publish(folder / 'epoch_2.pth', folder / PUBLISHED)
    for path in folder.iterdir():  # logs are not needed
        if path.is_dir():
            shutil.rmtree(path)
    return folder


@pytest.fixture
def forged(honest, tmp_path):
    """A copy to change."""
    return shutil.copytree(honest, tmp_path / 'copy')


def statement_of(folder):
    return json.loads((folder / STATEMENT_NAME).read_text())


def wrong(path):
    """What is wrong there, in one text; '' if nothing is."""
    try:
        return '; '.join(verify(path).wrong)
    except PrivacyError as error:
        return f'refused: {error}'


# ---- what is right -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', ['', STATEMENT_NAME, PAGE_NAME, LEDGER_NAME, 'epoch_1.pth', 'epoch_2.pth', PUBLISHED])
def test_what_is_whole_passes_however_it_is_given(honest, name):
    found = verify(honest / name)
    assert not found.wrong and len(found.checked) > 10, str(found)
    text = str(found)
    assert 'recomputed' in text and 'NOT CHECKED  whether the training did what the ledger says' in text
    assert ('4 steps that the ledger has after this statement' in text) == (name == 'epoch_1.pth')


def test_a_published_file_alone_is_checked_as_far_as_it_goes(honest, tmp_path):
    shutil.copy(honest / PUBLISHED, tmp_path)
    found = verify(tmp_path / PUBLISHED)
    assert not found.wrong and 'NOT CHECKED  the ledger' in str(found)
    assert {'epsilon', 'weights'} <= set(' '.join(found.checked).split())


def test_a_statement_follows_the_published_schema(honest):
    statement, schema = statement_of(honest), json.loads(SCHEMA.read_text())
    assert (REPO / 'docs/statement.schema.json').read_bytes() == SCHEMA.read_bytes()
    assert set(schema['required']) <= set(statement) and set(schema['properties']) >= {'ledger', 'risk', 'seal'}
    assert list(schema_faults({**statement, 'steps': True}, schema)) == ['steps. is not integer']
    assert 'risk.profile is missing' in schema_faults(
        {**statement, 'risk': {'add_or_remove': {}, 'replace_one': {}}}, schema
    )
    validator = pytest.importorskip('jsonschema', reason='jsonschema is no requirement')
    validator.validate(statement, schema)
    validator.validate({**statement, 'decision': without_the_officers(statement)}, schema)


def without_the_officers(statement):
    return {name: text for name, text in statement['decision'].items() if name not in OFFICERS}


def test_a_statement_from_before_the_officers_answers_verifies(forged):
    without_checkpoints(forged)  # whose own statements are of this version
    amend(forged, decision=without_the_officers(statement_of(forged)))
    assert not wrong(forged)
    amend(forged, decision={**statement_of(forged)['decision'], 'purpose': 3})
    assert 'decision.purpose. is not string' in wrong(forged)


def without_checkpoints(folder):
    for path in folder.glob('*.pth'):
        path.unlink()


def test_it_names_what_it_belongs_to_and_who_decided(honest):
    statement = statement_of(honest)
    assert statement['checkpoint']['file'] == 'epoch_2.pth' and len(statement['config_sha256']) == 64
    lines = (honest / LEDGER_NAME).read_text().splitlines()
    assert statement['ledger']['lines'] == len(lines) == 9
    assert statement['ledger']['head'] == json.loads(lines[-1])['hash'] and len(statement['ledger']['history']) == 1
    assert statement['decision'] == {**dict.fromkeys(DECISIONS, 'not stated'), **DECISION}
    assert 'controller: a clinic, purpose: counting exercises' in (honest / 'privacy_statement.md').read_text()
    assert {'torch', 'dp-accounting', 'mmpose'} <= set(statement['versions'])
    assert statement['project']['version'] and statement['parameters_trained'] > 1000


# ---- forgeries ---------------------------------------------------------------------------------------------------------
def changed(path, at):
    """Changes one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize('name', [STATEMENT_NAME, LEDGER_NAME, 'epoch_2.pth', 'privacy_statement.md', 'config'])
def test_one_changed_byte_is_found(forged, name):
    path = next(forged.glob('*.py')) if name == 'config' else forged / name
    whole = path.read_bytes()
    for part in range(13):
        changed(path, (len(whole) - 1) * part // 12)
        assert wrong(forged), f'{name}: byte {(len(whole) - 1) * part // 12}'
        path.write_bytes(whole)
    assert not wrong(forged)


def test_one_changed_weight_of_a_published_file_is_found(forged):
    with zipfile.ZipFile(forged / PUBLISHED) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    changed(forged / PUBLISHED, largest.header_offset + 200)
    assert 'checksum' in wrong(forged / PUBLISHED) or 'CRC' in wrong(forged / PUBLISHED)
    shutil.copy(forged / 'epoch_1.pth', forged / 'other.pth')
    given = torch.load(forged.parent / 'copy/other.pth', weights_only=False)
    model = publish_model.published(given)
    model['privacy_statement'] = statement_of(forged)  # of epoch_2
    torch.save(model, forged / PUBLISHED)
    assert 'does not have the weights' in wrong(forged / PUBLISHED) and 'does not have the weights' in wrong(forged)


@pytest.mark.parametrize('lines', [1, 3, 8, 9])
def test_a_ledger_that_was_cut_is_found(forged, lines):
    kept = (forged / LEDGER_NAME).read_text().splitlines(keepends=True)[:-lines]
    (forged / LEDGER_NAME).write_text(''.join(kept))
    for name in ('', LEDGER_NAME, STATEMENT_NAME, PUBLISHED):
        assert 'was cut' in wrong(forged / name)


def test_a_ledger_that_ends_within_a_line_is_found_and_the_rest_is_still_checked(forged):
    (forged / LEDGER_NAME).write_bytes((forged / LEDGER_NAME).read_bytes()[:-100])
    found = verify(forged)
    assert 'was cut' in str(found.wrong) and 'cannot be evaluated' not in str(found.wrong)
    assert 'epoch_2.pth: its steps are not among' in str(found.wrong)
    assert 'the statement in epoch_2.pth says the same, every value' in found.checked


def test_what_follows_the_last_line_of_a_ledger_is_named(forged):
    """Such as what a kill leaves: no step was taken by it."""
    with (forged / LEDGER_NAME).open('ab') as file:
        file.write(b'{"noise')
    assert not wrong(forged) and f'the end of {LEDGER_NAME}, 7 bytes that are no line' in unchecked(forged)


def another_ledger(folder, **changes):
    """Puts the ledger of another training with the same steps there, as the program would write it; returns its head."""
    old, new = Ledger.read(folder / LEDGER_NAME), Ledger()
    new.begin_run(**{**old.runs[0], 'training': 'another', **changes})
    for event, steps in old.history:
        for _ in range(steps):
            new.count(event)
    (folder / LEDGER_NAME).unlink()
    new.keep_at(folder / LEDGER_NAME)
    new.close()
    return new.head


def test_a_ledger_of_another_training_is_found(forged):
    head = another_ledger(forged)
    assert 'another ledger' in wrong(forged) and 'another ledger' in wrong(forged / PUBLISHED)
    statement = statement_of(forged)
    statement['ledger']['head'] = head
    write_statement(statement, forged)
    for name in ('epoch_1.pth', 'epoch_2.pth', PUBLISHED):
        assert f'{name}: its steps are not among' in wrong(forged)


def lower_epsilon(statement):
    statement.update(epsilon=1.0, guarantee='(1, 0.001)-DP')
    statement['epsilon_by_accountant']['pld'] = 1.0


def fewer_steps(statement):
    statement['steps'] = 2
    statement['ledger']['history'][0][2] = 2


def more_noise(statement):
    statement['ledger']['history'][0][0] *= 2


def less_risk(statement):
    statement['risk']['add_or_remove']['true_positive_rate_at']['0.01'] /= 2


def another_guarantee(statement):
    statement['guarantee'] = statement['guarantee'].replace('(', '(0.', 1)


def an_own_accountant(statement):
    """By which less was spent than by any that the verifier knows."""
    statement['epsilon_by_accountant']['own'] = 1.0
    statement.update(epsilon=1.0, accountant='own', guarantee=f'(1, 0.001)-{statement["guarantee"].partition(")-")[2]}')


def more_records(statement):
    statement['num_records'] *= 10


@pytest.mark.parametrize(
    'forge',
    [lower_epsilon, fewer_steps, more_noise, less_risk, another_guarantee, an_own_accountant, more_records],
    ids=lambda f: f.__name__,
)
def test_a_forged_figure_is_found_though_the_statement_was_sealed_again(forged, forge):
    statement = statement_of(forged)
    forge(statement)
    write_statement(statement, forged)
    assert wrong(forged) and 'seal' not in wrong(forged)


@pytest.mark.parametrize('said', [None, 'not computed (k times epsilon is above 15)', 'not bounded'])
def test_an_epsilon_for_several_records_cannot_be_left_out(tmp_path, said):
    """Neither by leaving it out nor by words: a statement lacks it only where training does not compute it."""
    write_work_dir(tmp_path, noise_multiplier=20.0)
    several = statement_of(tmp_path)['epsilon_for_a_person_with_k_records']
    assert all(type(value) is float for value in several.values()) and not wrong(tmp_path)
    kept = {k: value for k, value in {**several, '10': said}.items() if value is not None}
    amend(tmp_path, epsilon_for_a_person_with_k_records=kept)
    assert 'epsilon for 10 records is lacking: computed, it is' in wrong(tmp_path)


def test_risk_figures_that_a_statement_does_not_give_are_not_called_recomputed(tmp_path):
    write_work_dir(tmp_path, noise_multiplier=20.0)
    assert 'the risk figures, recomputed' in verify(tmp_path).checked and not verify(tmp_path).warnings
    amend(tmp_path, risk={**statement_of(tmp_path)['risk'], 'replace_one': 'not computed'})
    found = verify(tmp_path)  # an older dp-accounting cannot compute them, so they may be lacking
    assert not found.wrong and 'the risk figures, recomputed' not in found.checked
    assert 'does not give figures that follow from its steps: risk.replace_one.epsilon' in str(found.warnings)


def test_an_own_accountant_that_bounds_the_known_one_is_accepted(forged):
    without_checkpoints(forged)
    statement = statement_of(forged)
    statement['epsilon_by_accountant']['own'] = 9.0
    statement.update(epsilon=9.0, accountant='own', guarantee=f'(9, 0.001)-{statement["guarantee"].partition(")-")[2]}')
    write_statement(statement, forged)
    assert 'guarantee' not in wrong(forged) and 'too low' not in wrong(forged)
    assert any('by own, an accountant that is not known here' in line for line in verify(forged).checked)


def test_an_officer_fills_in_the_statement_after_training(forged, call):
    done = call(fill_in_statement, forged, 'retention=until 2030', 'rationale=a later thought', 'purpose=another')
    assert done.returncode == 0 and 'retention (how long the data and the model are kept): until 2030' in done.stdout
    assert statement_of(forged)['decision'] == {
        **dict.fromkeys(DECISIONS, 'not stated'),
        **DECISION,
        **dict(retention='until 2030', rationale='a later thought', purpose='another'),
    }
    assert 'until 2030' in (forged / 'privacy_statement.md').read_text() and not wrong(forged)
    (changed,) = {line for line in verify(forged).warnings if 'epoch_2.pth' in line}
    assert 'decision.rationale' in changed and 'decision.purpose' in changed and 'retention' not in changed
    before = (forged / STATEMENT_NAME).read_bytes()
    for texts, words in (
        (['epsilon=0'], 'decision.epsilon is unknown'),
        (['purpose'], "'purpose': write each key once"),
        (['purpose=a', 'purpose=b'], "'purpose=b': write each key once"),
        (['purpose= '], "decision.purpose=' ' must be a text"),
    ):
        done = call(fill_in_statement, forged, *texts)
        assert done.returncode == 2 and words in done.stderr and (forged / STATEMENT_NAME).read_bytes() == before
    (forged / STATEMENT_NAME).write_text(before.decode().replace('until 2030', 'until 2031'))
    done = call(fill_in_statement, forged, 'purpose=x')
    assert done.returncode == 2 and 'there is no intact privacy_statement.json' in done.stderr


def test_a_forged_statement_is_found_by_the_one_in_its_checkpoint_without_a_ledger(forged):
    (forged / LEDGER_NAME).unlink()
    assert 'the statement in epoch_2.pth says the same, every value' in verify(forged).checked and not wrong(forged)
    assert 'determines but the statement in a checkpoint, which could' in unchecked(forged)
    statement = statement_of(forged)
    another = dict(statement['ledger'], head='0' * 64)
    for change in (
        dict(max_grad_norm=1e-4),
        dict(pretraining='ImageNet'),
        dict(certified='by all'),
        dict(ledger=another),
    ):
        write_statement({**statement, **change}, forged)
        (name,) = change
        for path in (forged, forged / 'epoch_2.pth'):
            assert (
                f'the statement in epoch_2.pth counts the same steps and has {name} ' in wrong(path) or name == 'ledger'
            )
        assert f'{PUBLISHED} counts the same steps' in wrong(forged) or name == 'ledger'
    for path in (forged, forged / 'epoch_2.pth'):
        assert 'epoch_2.pth has epsilon 7.9' in wrong(path) and 'steps that are not the first ones' in wrong(path)


def test_an_older_checkpoint_says_what_a_later_statement_changed(forged):
    amend(forged, max_grad_norm=1e-4)
    warned = '; '.join(verify(forged).warnings)
    assert 'the statement in epoch_1.pth, of fewer steps, differs in max_grad_norm' in warned


def test_a_statement_without_its_marks_is_not_verified(forged):
    statement = statement_of(forged)
    for key in ('schema_version', 'seal', 'ledger', 'risk', 'epsilon_by_accountant'):
        (forged / STATEMENT_NAME).write_text(statement_json({k: v for k, v in statement.items() if k != key}))
        assert wrong(forged / STATEMENT_NAME), key
    for content in ('[]', '"text"', '{"schema_version": "1.0"}', '{"schema_version": "2.0"}', 'null', '{', '[' * 9999):
        (forged / STATEMENT_NAME).write_text(content)
        assert wrong(forged / STATEMENT_NAME) or verify(forged).unchecked, content


def test_a_debug_seed_cannot_be_hidden(forged):
    """A ledger that says so, sealed as the program would, beside a statement that says private."""
    statement = statement_of(forged)
    statement['ledger']['head'] = another_ledger(forged, secret_randomness=False)
    write_statement(statement, forged)
    assert 'a debug seed was set' in wrong(forged)


# ---- files beside the statement ------------------------------------------------------------------------------------------
def unchecked(path):
    return '; '.join(verify(path).unchecked)


def with_other_weights(path):
    checkpoint = torch.load(path, weights_only=False)
    next(iter(checkpoint['state_dict'].values())).add_(1)
    torch.save(checkpoint, path)


@pytest.mark.parametrize('name', ['epoch_1.pth', 'epoch_2.pth'])
def test_replaced_weights_of_any_checkpoint_are_found(forged, tmp_path, name):
    """In the folder and opened directly; and they cannot be published."""
    with_other_weights(forged / name)
    assert f'{name} is not the checkpoint of this statement' in wrong(forged)
    assert f'{name} is not the checkpoint of {STATEMENT_NAME}' in wrong(forged / name)
    for publish in (publish_model.publish, publish_model.publish_folder):
        with pytest.raises(PrivacyError, match='not the file that training wrote'):
            publish(forged / name, tmp_path / 'new.pth')
    assert not (tmp_path / 'new.pth').exists()


def test_the_digest_of_the_weights_is_that_of_the_last_checkpoint(forged):
    amend(forged, weights_sha256='0' * 64)
    for path in (forged, forged / 'epoch_2.pth'):
        assert 'weights_sha256 is not that of the weights in epoch_2.pth' in wrong(path)


def test_a_checkpoint_whose_hash_nobody_has_is_named(forged):
    assert 'its weights' not in unchecked(forged) + unchecked(forged / 'epoch_1.pth')
    with_other_weights(forged / 'epoch_1.pth')
    (forged / 'epoch_1.pth').rename(forged / 'final.pth')
    words = 'final.pth: its weights. No statement here has its hash'
    assert words in unchecked(forged) and words in unchecked(forged / 'final.pth')
    assert 'epoch_1.pth: it is not here' in unchecked(forged)
    assert 'whether it was changed' in publish_model.origin_of(forged / 'final.pth')
    assert 'published' not in unchecked(forged / 'final.pth')
    (forged / STATEMENT_NAME).unlink()
    assert 'epoch_2.pth: its weights' in unchecked(forged / 'epoch_2.pth') and not wrong(forged / 'epoch_2.pth')


def test_a_checkpoint_without_a_ledger_is_none_of_the_statement(forged):
    """Weights that a plain training left in the work dir, and whose hash the statement has."""
    torch.save(
        dict(state_dict=torch.load(forged / 'epoch_1.pth', weights_only=False)['state_dict']), forged / 'plain.pth'
    )
    assert 'plain.pth: where it is from' in unchecked(forged) and not wrong(forged)
    known = statement_of(forged)['checkpoints']
    amend(forged, checkpoints={**known, 'plain.pth': evidence.file_sha256(forged / 'plain.pth')})
    assert 'plain.pth: this statement names it as a checkpoint, and no private training wrote it' in wrong(forged)


def test_publishing_reads_a_checkpoint_once_for_its_hash(forged, monkeypatch):
    hashed, plain = [], evidence.file_sha256
    for module in (evidence, publish_model):
        monkeypatch.setattr(module, 'file_sha256', lambda path: hashed.append(path) or plain(path))
    monkeypatch.setattr(sys, 'argv', ['publish_model.py', str(forged / 'epoch_2.pth'), str(forged / 'again.pth')])
    publish_model.main()
    assert hashed == [forged / 'epoch_2.pth'] and not wrong(forged)


def test_an_unfinished_statement_cannot_accuse_the_checkpoint_that_follows_it(forged):
    """A resume writes the statement first, and then replaces a checkpoint that it names; a kill may come next."""
    amended = {**statement_of(forged), 'checkpoint': None, 'weights_sha256': None}
    write_statement(amended, forged)
    with_other_weights(forged / 'epoch_1.pth')
    assert not wrong(forged) and 'epoch_1.pth: its weights' in unchecked(forged)
    assert 'whether it was changed' in publish_model.origin_of(forged / 'epoch_1.pth')


def test_a_published_file_has_one_form_and_its_own_meta(forged):
    """Every kind is tried in verifying/test_published.py."""
    published, name = torch.load(forged / PUBLISHED, weights_only=True), PUBLISHED
    torch.save({**published, 'pictures': torch.rand(3)}, forged / name)
    assert f'{name} is not as tools/publish_model.py writes it' in wrong(forged) and wrong(forged / name)
    torch.save({**published, 'meta': {**published['meta'], 'mmpose_dp_version': '9'}}, forged / name)
    assert f'{name}: its meta was changed' in wrong(forged) and wrong(forged / name)


def safetensors_of(weights):
    """As the library writes them."""
    header, data = {}, b''
    for name, value in weights.items():
        raw, kind = value.numpy().tobytes(), {torch.float32: 'F32', torch.int64: 'I64'}[value.dtype]
        header[name] = dict(dtype=kind, shape=list(value.shape), data_offsets=[len(data), len(data) + len(raw)])
        data += raw
    text = json.dumps(header, separators=(',', ':')).encode()
    return struct.pack('<Q', len(text)) + text + data


def test_safetensors_have_the_weights_of_the_statement(forged):
    """Also if the statement has the hash of the file."""
    weights = torch.load(forged / PUBLISHED, weights_only=True)['state_dict']
    (forged / PUBLISHED).unlink()
    for change, fault in (
        ('', ''),
        ('another', 'does not have the weights'),
        ('more', 'is not as safetensors writes it'),
    ):
        data = safetensors_of({**weights, **({'one': torch.ones(3)} if change == 'another' else {})})
        (forged / 'm.safetensors').write_bytes(data + (b'x' if change == 'more' else b''))
        hashes = {'m.safetensors': file_sha256(forged / 'm.safetensors'), 'm.onnx': '0', '../m': '0'}
        write_statement({**statement_of(forged), 'published_files': hashes}, forged)
        found = verify(forged)
        assert 'm.safetensors was published with this statement' in found.checked
        assert fault in wrong(forged) and bool(fault) == bool(found.wrong)
        assert 'm.onnx: it is not here' in found.unchecked and '../m: it is not here' in found.unchecked


def copies_of_the_config(forged, runs=1):
    """The config, and the copies that mmengine's visualizer makes in a folder for each run."""
    (config,) = forged.glob('*.py')
    for run in range(runs):
        (forged / f'2026112{run}_000000/vis_data').mkdir(parents=True)
        shutil.copy(config, forged / f'2026112{run}_000000/vis_data/config.py')
    return config, [*forged.glob('*/vis_data/config.py')]


def test_every_copy_of_the_config_is_compared(forged):
    config, (copy,) = copies_of_the_config(forged)
    assert not wrong(forged) and f'{config.name} and {copy.relative_to(forged)} are the config' in str(verify(forged))
    for one in (config, copy):
        changed(one, 100)
        assert f'{one.relative_to(forged)} is not the config of this statement' in wrong(forged)
        changed(one, 100)
    shutil.copy(config, forged / 'other.py')
    assert not wrong(forged) and 'other.py' in str(verify(forged))
    changed(forged / 'other.py', 100)
    assert 'other.py is not the config' in wrong(forged)
    for one in (config, copy):
        one.unlink()
    assert 'no config here is that' in wrong(forged)


def test_the_config_of_another_run_in_the_work_dir_is_a_warning(forged):
    """A test or a resume leaves its config in its own folder, and above."""
    config, copies = copies_of_the_config(forged, 2)
    changed(copies[0], 100)
    shutil.copy(copies[0], config)
    found = verify(forged)
    assert not found.wrong and len(found.warnings) == 2 and 'is another config' in str(found)
    changed(config, 200)
    assert f'{config.name} is not the config' in wrong(forged)


def test_a_config_that_differs_by_resume_alone_is_the_same_run(forged):
    config, copies = copies_of_the_config(forged, 2)
    text = copies[0].read_text()
    assert 'resume = False' in text
    copies[0].write_text(
        text.replace('resume = False', 'resume = True').replace('load_from = None', "load_from = 'a.pth'")
    )
    shutil.copy(copies[0], config)
    found = verify(forged)
    assert not found.wrong and not found.warnings
    assert f'{config.name}: what it resumes from' in str(found.unchecked)  # a path that nobody compared
    copies[0].write_text(copies[0].read_text() + 'max_grad_norm = 3.0\n')
    assert 'is another config' in str(verify(forged).warnings)


def test_what_was_not_looked_at_is_named(forged):
    (forged / 'privacy_statement.md').rename(forged / 'PRIVACY_STATEMENT.md')
    (forged / 'logs').mkdir()
    for name in ('privacy_report.html', 'epoch_9.pt', 'logs/a.json'):
        (forged / name).write_text('epsilon 0.1')
    text = str(verify(forged))
    assert 'privacy_statement.md is not here, and no other page was compared' in text and not wrong(forged)
    for name in ('PRIVACY_STATEMENT.md', 'privacy_report.html', 'epoch_9.pt', 'logs/a.json'):
        assert name in text.partition('not looked at, ')[2]


def test_the_end_does_not_promise_more_than_was_checked(honest, forged):
    assert str(verify(honest)).endswith('Nothing that was checked is wrong.')
    ledger = Ledger.read(forged / LEDGER_NAME)
    ledger.keep_at(forged / LEDGER_NAME)
    ledger.count(ledger.history[-1][0], 50)
    ledger.close()
    text = str(verify(forged))
    assert 'WARNING      50 steps that the ledger has after this statement' in text and 'Read the warnings' in text


def test_an_audit_may_be_added_and_the_statement_still_holds(forged):
    result = dict(date='2026-11-27', refuted=False, epsilon_lower_bound=0.3, epsilon_claimed=8.0, canaries=40)
    assert record_audit(forged, dict(result, confidence=0.95, attack='likelihood')) and not wrong(forged)
    assert '2026-11-27: not refuted' in statement_of(forged)['audit']
    assert '2026-11-27: not refuted' in (forged / 'privacy_statement.md').read_text()


def test_an_audit_of_another_training_is_refused_before_it_trains(honest, synthetic, tmp_path):
    # the copy of the config in the work dir is that of its training
    own = Config.fromfile(next(honest.glob('*.py')))
    refuse_another_config(own, honest)
    own.optim_wrapper.max_grad_norm = 7.0
    with pytest.raises(PrivacyError, match='its training had another optim_wrapper than this config'):
        refuse_another_config(own, honest)
    (hidden := tmp_path / 'hidden').mkdir()
    for name in (STATEMENT_NAME, 'privacy_statement.md'):  # no config here: what the statement says is compared
        shutil.copy(honest / name, hidden)
    quick = dict(default_hooks__privacy_budget__accountant='rdp')
    cfg = unvalidated(synthetic, tmp_path / 'audit', 'feature', **quick)
    with pytest.raises(
        PrivacyError, match="another training .* has method 'Feature DP.* and not 'DP-SGD'.*noise_multiplier"
    ):
        attack(audited(cfg, None, 0.95, hidden))
    assert not Ledger.read(tmp_path / 'audit' / LEDGER_NAME).steps


def test_an_audit_keeps_the_configs_own_hooks_and_says_what_it_was_of(honest, forged, synthetic, tmp_path):
    cfg = unvalidated(synthetic, tmp_path / 'audit', train_cfg__max_epochs=2)
    cfg.custom_hooks = [dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.1)]
    hook = attack(audited(cfg, None, 0.95, honest))
    assert [one['type'] for one in cfg.custom_hooks] == ['EMAHook', 'AuditHook']
    record_audit(forged, reported(hook, 0.95))
    words = statement_of(forged)['audit']
    assert 'without assumptions on the mechanism, and' in words and 'if canaries are independent trials' in words
    assert not wrong(forged)
    amend(forged, num_records=39)  # as if the next training in this work dir had other records
    assert 'not of this training' in with_membership_audit(statement_of(forged), forged)['audit']


# ---- without torch, and without running anything of the file ---------------------------------------------------------------
def test_nothing_in_a_checkpoint_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path}/ran',)

    with zipfile.ZipFile(tmp_path / 'evil.pth', 'w') as archive:
        archive.writestr('evil/data.pkl', pickle.dumps({'state_dict': OrderedDict(), 'x': Evil(), 'y': [Evil()]}))
    CheckpointFile.read(tmp_path / 'evil.pth')
    assert 'holds no privacy statement' in wrong(tmp_path / 'evil.pth') and not (tmp_path / 'ran').exists()


def test_the_digest_is_of_the_numbers_not_of_how_they_are_stored(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    views = dict(a=base[1:3], b=base.T, c=torch.nn.Parameter(base[0]), d=torch.tensor(3), e=torch.zeros(0, 3))
    copies = {name: value.detach().clone().contiguous() for name, value in views.items()}
    digests = []
    for number, state in enumerate((views, copies, {**copies, 'd': torch.tensor(4)})):
        torch.save({'state_dict': state}, tmp_path / f'{number}.pth')
        digests.append(CheckpointFile.read(tmp_path / f'{number}.pth').weights_sha256)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize('content', [b'', b'PK', b'x' * 100, b'\x80\x02}q\x00.'])
def test_what_is_no_checkpoint_is_one_message(tmp_path, content):
    (tmp_path / 'a.pth').write_bytes(content)
    assert 'a.pth cannot be read' in wrong(tmp_path / 'a.pth')
    assert 'neither' in wrong(tmp_path) and 'no such' in wrong(tmp_path / 'missing')


def test_what_is_no_statement_is_not_called_damaged(tmp_path):
    (tmp_path / 'config.py').write_text('model = dict()')
    assert 'is no privacy statement' in wrong(tmp_path / 'config.py')


def test_it_runs_without_torch_and_opacus_and_mmpose(honest, forged):
    """As a command, in an environment that lacks them; 1 for a forgery."""
    missing = ('torch', 'torchvision', 'opacus', 'mmengine', 'mmcv', 'mmdet', 'mmpose', 'cv2')
    code = (
        f'import sys, runpy; sys.modules.update(dict.fromkeys({missing})); '
        'runpy.run_module("mmpose_dp.privacy.verify", run_name="__main__", alter_sys=True)'
    )
    changed(forged / STATEMENT_NAME, 300)
    for folder, status in ((honest, 0), (forged, 1)):
        command = [sys.executable, '-W', 'ignore', '-c', code, str(folder)]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        assert done.returncode == status, done.stderr + done.stdout
    assert 'WRONG' in done.stdout and 'Traceback' not in done.stderr
