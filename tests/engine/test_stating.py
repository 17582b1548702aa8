"""The hashes of the checkpoints in a statement: of those that training wrote, over a kill and a resume, and of no others."""

import torch

from mmpose_dp.engine.hooks.stating import WrittenCheckpoints
from mmpose_dp.extras.evidence import file_sha256
from mmpose_dp.extras.statement_page import write_statement
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger
from tests.support.statements import statement_of, write_work_dir


def save(path, ledger, content):
    """A checkpoint as far as its ledger goes; None: of a training without one."""
    torch.save(dict(content=content, privacy={} if ledger is None else dict(ledger=ledger.state_dict())), path)
    return file_sha256(path)


def test_a_checkpoint_that_training_wrote_has_its_hash_over_a_resume(tmp_path):
    write_work_dir(tmp_path, expected_batch_size=1000)
    ledger = Ledger.read(tmp_path / LEDGER_NAME)
    save(tmp_path / 'pretrained.pth', None, 'not ours')
    first = WrittenCheckpoints(tmp_path)
    assert first.hashes(ledger) == {}
    written = {name: save(tmp_path / name, ledger, name) for name in ('epoch_1.pth', 'epoch_2.pth')}
    assert first.hashes(ledger) == written
    (tmp_path / 'epoch_1.pth').unlink()
    assert first.hashes(ledger) == {'epoch_2.pth': written['epoch_2.pth']}
    write_statement({**statement_of(tmp_path), 'checkpoints': first.hashes(ledger)}, tmp_path)
    save(tmp_path / 'epoch_3.pth', ledger, 'killed before the next statement')
    save(tmp_path / 'epoch_2.pth', ledger, 'replaced between the two')
    resumed = WrittenCheckpoints(tmp_path)
    # the hash of what was written, not of what is there
    assert resumed.hashes(ledger) == {'epoch_2.pth': written['epoch_2.pth']}
    again = save(tmp_path / 'epoch_2.pth', ledger, 'written again')
    assert resumed.hashes(ledger) == {'epoch_2.pth': again}


def test_what_something_else_puts_there_meanwhile_has_none(tmp_path):
    """A plain training in the same work dir, or somebody who copies weights there."""
    write_work_dir(tmp_path, expected_batch_size=1000)
    ledger, other = Ledger.read(tmp_path / LEDGER_NAME), Ledger()
    other.begin_run(privacy_unit='instance')
    first = WrittenCheckpoints(tmp_path)
    written = save(tmp_path / 'epoch_1.pth', ledger, 'ours')
    assert first.hashes(ledger) == {'epoch_1.pth': written}
    for name in ('epoch_1.pth', 'best.pth'):
        save(tmp_path / name, None, 'of a plain training')
    save(tmp_path / 'other.pth', other, 'of another private training')
    (tmp_path / 'text.pth').write_text('no checkpoint')
    assert first.hashes(ledger) == {'epoch_1.pth': written}


def test_a_damaged_statement_gives_no_hash(tmp_path):
    write_work_dir(tmp_path, expected_batch_size=1000)
    (tmp_path / 'a.pth').write_bytes(b'a')
    write_statement({**statement_of(tmp_path), 'checkpoints': {'a.pth': 'x'}}, tmp_path)
    assert WrittenCheckpoints(tmp_path).hashes(Ledger()) == {'a.pth': 'x'}
    path = tmp_path / 'privacy_statement.json'
    path.write_text(path.read_text().replace('"x"', '"y"'))
    assert WrittenCheckpoints(tmp_path).hashes(Ledger()) == {}
