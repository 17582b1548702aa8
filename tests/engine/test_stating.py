"""The hashes of the checkpoints in a statement: of those that training wrote, over a kill and a resume, and of no others."""

from mmpose_dp.engine.hooks.stating import WrittenCheckpoints
from mmpose_dp.extras.evidence import file_sha256
from mmpose_dp.extras.statement_page import write_statement
from tests.support.statements import statement_of, write_work_dir


def test_a_checkpoint_that_training_wrote_has_its_hash_over_a_resume(tmp_path):
    write_work_dir(tmp_path, expected_batch_size=1000)
    (tmp_path / 'pretrained.pth').write_bytes(b'not ours')
    first = WrittenCheckpoints(tmp_path)
    assert first.hashes() == {}
    for name in ('epoch_1.pth', 'epoch_2.pth'):
        (tmp_path / name).write_bytes(name.encode())
    written = {name: file_sha256(tmp_path / name) for name in ('epoch_1.pth', 'epoch_2.pth')}
    assert first.hashes() == written
    (tmp_path / 'epoch_1.pth').unlink()
    assert first.hashes() == {'epoch_2.pth': written['epoch_2.pth']}
    write_statement({**statement_of(tmp_path), 'checkpoints': first.hashes()}, tmp_path)
    (tmp_path / 'epoch_3.pth').write_bytes(b'killed before the next statement')
    changed = (tmp_path / 'epoch_2.pth').read_bytes()
    (tmp_path / 'epoch_2.pth').write_bytes(b'replaced between the two')
    resumed = WrittenCheckpoints(tmp_path)
    assert resumed.hashes() == {
        'epoch_2.pth': written['epoch_2.pth']
    }  # the hash of what was written, not of what is there
    (tmp_path / 'epoch_2.pth').write_bytes(changed + b', again')
    assert resumed.hashes() == {'epoch_2.pth': file_sha256(tmp_path / 'epoch_2.pth')}


def test_a_damaged_statement_gives_no_hash(tmp_path):
    write_work_dir(tmp_path, expected_batch_size=1000)
    (tmp_path / 'a.pth').write_bytes(b'a')
    write_statement({**statement_of(tmp_path), 'checkpoints': {'a.pth': 'x'}}, tmp_path)
    assert WrittenCheckpoints(tmp_path).hashes() == {'a.pth': 'x'}
    path = tmp_path / 'privacy_statement.json'
    path.write_text(path.read_text().replace('"x"', '"y"'))
    assert WrittenCheckpoints(tmp_path).hashes() == {}
