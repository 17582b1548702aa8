"""What a user does wrong, or stops, is one sentence that says how to go on, in every tool."""

import argparse
import json
import os
import pickle
import shutil
import signal
import sys
import zipfile
from types import ModuleType, SimpleNamespace

import audit
import audit_view
import check_config
import publish_model
import pytest
import test as test_tool
import torch
import train as train_tool
from cli import CfgOptions, fraction, merge_options, merged, positive, refuse_no_checkpoint, run, start_ranks_on_cpu
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmpose.registry import TRANSFORMS

from mmpose_dp.datasets.resolving import resolved
from mmpose_dp.engine.hooks.resuming import find_start
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.validation import rounded_up
from mmpose_dp.verify import verify
from tests.support.paths import REPO
from tests.support.runs import unvalidated

OPTIONS = {
    'epoch_{}.pth': 'epoch_{}.pth',
    '{}.pth': '{}.pth',
    '[1,(2,3)]': [1, (2, 3)],
    'a,b': ['a', 'b'],
    '1e-3': 1e-3,
    '[1, ( 2, 3 )]': [1, (2, 3)],
    "['a', 'b']": ['a', 'b'],
}
SPACES = {  # mmengine leaves them out
    'my data/a.pth': 'my data/a.pth',
    ' my data/a (1).pth ': 'my data/a (1).pth',
    '"my data/a.pth"': 'my data/a.pth',
    '[my data/a.pth, my data/b.pth]': ['my data/a.pth', 'my data/b.pth'],
    '[(a b,1), c]': [('a b', 1), 'c'],
}
NO_PAIRS = {
    'my_config.py': 'this is no KEY=VALUE. Give config and checkpoint before --cfg-options',
    'train_cfg.max_epochs': 'write KEY=VALUE, without spaces around =',
    '=': 'write KEY=VALUE',
    'a=[1,2': 'close each bracket',
}
DICTS = "[dict(type='X', b={'c': [1, 2]})]", "{'_delete_': True}", '[{type:X}]', 'dict()', '{}', "[dict(type='X')"
PRIVATE = REPO / 'configs/dp/hrnet_synthetic_dpsgd_eps08.py'
PLAIN = REPO / 'configs/dp/hrnet_synthetic_nonprivate.py'
TOOLS = (train_tool, test_tool, check_config, audit, audit_view)
WRONG = {
    'nowhere.py': (None, 'nowhere.py: there is no such config file'),
    'a_folder.py': ('', 'a_folder.py is a folder: give a config file in it'),
    'base.py': ("_base_ = './nowhere.py'", 'base.py cannot be read: FileNotFoundError'),
    'private_base.py': (
        "_base_ = 'mmpose_dp::dp/hrnet_mpii_hybrid_esp08.py'",
        'hrnet_mpii_hybrid_esp08.py" does not exist, did you mean hrnet_mpii_hybrid_eps08.py?',
    ),
    'scheduler.py': (
        f"_base_ = '{PLAIN}'\nparam_scheduler = dict(type='StepLR')",
        'scheduler.py cannot be read: param_scheduler is a list in a config that it inherits from: write param_scheduler = [dict',
    ),
    'start.py': (
        f"_base_ = '{PLAIN}'\nload_from = dict(type='x')",
        'load_from is no dict in a config that it inherits from: write load_from = dict(_delete_=True, ...)',
    ),
    'imports_as_text.py': (
        "custom_imports = 'own'\nmodel = dict()",
        "write custom_imports = dict(imports=['my_module'],",
    ),
    'lazy.py': (
        'from nowhere_at_all import Own\nmodel = dict(type=Own)\n',
        'lazy.py cannot be read: ModuleNotFoundError: Failed to import nowhere_at_all',
    ),
    'mmpose_base.py': ("_base_ = 'mmpose::nowhere.py'", 'mmpose_base.py cannot be read: ValueError'),
    'after.py': (
        f"from mmpose_dp.configs import private\n_base_ = '{PLAIN}'\nglobals().update(private(_base_, 'dpsgd'))",
        "after.py cannot be read: a text config has _base_ = '...' above every import",
    ),
    'no_base.py': (
        "from mmpose_dp.configs import private\nglobals().update(private(globals(), 'dpsgd'))",
        "no_base.py cannot be read: without _base_ = '...' above every import it is a new-style config",
    ),
    'imports.py': (
        "_base_ = []\ncustom_imports = dict(imports=['nowhere_at_all'], allow_failed_imports=False)",
        "imports.py cannot be read: custom_imports fail: ModuleNotFoundError: No module named 'nowhere_at_all'. Correct",
    ),
    'open.py': ('a = (', 'open.py cannot be read: SyntaxError'),
    'bom.py': ('\ufeff_base_ = []', 'bom.py cannot be read: SyntaxError: invalid non-printable character'),
    'gbk.py': ('# 训练'.encode('gbk'), 'without a byte order mark (BOM)'),
    'error.py': ('a = 1 / 0', 'error.py cannot be read: ZeroDivisionError'),
    'epoch_3.pth': ('weights', 'epoch_3.pth is a checkpoint, and a config is wanted in its place'),
    'else.py': ('a = 1', 'else.py has no '),
}


def one_line(done, message):
    """Whether a tool ended with one sentence and exit status 2."""
    assert done.returncode == 2 and message in done.stderr
    (said,) = [line for line in done.stderr.splitlines() if line.startswith('mmpose_dp: ')]
    assert 'Traceback' not in done.stderr and len(said) < 500


@pytest.mark.parametrize('tool', TOOLS, ids=lambda tool: tool.__name__)
@pytest.mark.parametrize('name', WRONG)
def test_a_config_that_cannot_be_read(call, tmp_path, tool, name):
    content, message = WRONG[name]
    if content == '':
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    checkpoint = ['some.pth'] if tool is test_tool else []
    one_line(call(tool, tmp_path / name, *checkpoint), message)


@pytest.mark.parametrize('config', [PRIVATE, PLAIN], ids=lambda path: path.stem)
@pytest.mark.parametrize('content', [None, b'no checkpoint'], ids=['missing', 'damaged'])
def test_a_checkpoint_that_cannot_be_read(call, tmp_path, config, content):
    path, where = tmp_path / 'some.pth', ['--work-dir', tmp_path / 'work']
    if content is not None:
        path.write_bytes(content)
    message = f'{path}: there is no such checkpoint' if content is None else f'{path} is damaged or not a checkpoint'
    one_line(call(train_tool, config, '--resume', path, *where), message)
    one_line(call(train_tool, config, *where, '--cfg-options', f'load_from={path}'), message)
    one_line(call(test_tool, config, path, *where), message)
    one_line(call(publish_model, path, tmp_path / 'out.pth'), message)


def test_safetensors_are_no_checkpoint(call, tmp_path):
    """publish_model.py writes them beside a checkpoint of the same weights."""
    path = tmp_path / 'my.safetensors'
    path.write_bytes(b'@' + bytes(7) + b'{"__metadata__":{}}'.ljust(64))
    message = 'my.safetensors is a safetensors file, and a checkpoint of torch is wanted'
    where = ['--work-dir', tmp_path / 'work']
    one_line(call(train_tool, PRIVATE, *where, '--cfg-options', f'load_from={path}'), message)
    one_line(call(test_tool, PLAIN, path, *where), message)
    one_line(call(publish_model, path, tmp_path / 'out.pth'), message)


def test_what_looks_like_a_checkpoint_and_is_none(call, tmp_path):
    """A zip archive and a pickle of other code, TorchScript, and a checkpoint that needs a package that is not installed."""
    with zipfile.ZipFile(tmp_path / 'zip.pth', 'w') as archive:
        archive.writestr('a/b', 'c')
    (tmp_path / 'pickle.pth').write_bytes(pickle.dumps(dict(state_dict={})))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / 'script.pth')
    torch.save(dict(state_dict={}, meta=of_a_missing_module()), tmp_path / 'other.pth')
    damaged = 'is damaged or not a checkpoint: give an intact one'
    for name, message in (
        ('zip', damaged),
        ('pickle', damaged),
        ('script', 'script.pth is a TorchScript archive: save its'),
    ):
        one_line(call(test_tool, PLAIN, tmp_path / f'{name}.pth'), message)
        with pytest.raises(PrivacyError, match=message):
            find_start(start_at(tmp_path / f'{name}.pth'))
    sys.modules.pop('gone')
    with pytest.raises(PrivacyError, match="other.pth cannot be read: ModuleNotFoundError: No module named 'gone'"):
        find_start(start_at(tmp_path / 'other.pth'))
    for wrong in (True, 3, ['a.pth']):
        with pytest.raises(PrivacyError, match='must be the path of one checkpoint'):
            find_start(start_at(wrong))
    torch.save(dict(state_dict={}), tmp_path / 'older.pth', _use_new_zipfile_serialization=False)
    find_start(start_at(tmp_path / 'older.pth'))


def start_at(load_from):
    """As much of a runner as is asked where it starts."""
    return SimpleNamespace(_load_from=load_from, _resume=False, hooks=[], work_dir='')


def of_a_missing_module():
    """An object of a class whose module no other process finds."""
    module = ModuleType('gone')
    module.Gone = type('Gone', (), dict(__module__='gone'))
    sys.modules['gone'] = module
    return module.Gone()


@pytest.mark.parametrize('value', ['', False, 0])
def test_a_start_that_is_neither_a_path_nor_none(value):
    with pytest.raises(PrivacyError, match='must be the path of one checkpoint, as text, or None'):
        refuse_no_checkpoint(value)


def test_a_folder_is_no_checkpoint(call, tmp_path):
    """The message names what a user means by a work dir."""
    message = f'{tmp_path} is a folder: give a checkpoint'
    one_line(call(publish_model, tmp_path, tmp_path / 'out'), f'{message}, there is none in it')
    torch.save(dict(state_dict={}, meta=dict(iter=1)), tmp_path / 'epoch_1.pth')
    one_line(call(publish_model, tmp_path, tmp_path / 'out'), f'{message} in it, such as {tmp_path}/epoch_1.pth')
    one_line(call(test_tool, PLAIN, tmp_path), message)
    for ending in ('.pt', '.safetensors', '.onnx'):
        out = call(publish_model, tmp_path / 'epoch_1.pth', tmp_path / f'my{ending}')
        one_line(out, f'my{ending}: give the name of a folder')


@pytest.mark.parametrize('kind', [PermissionError, IsADirectoryError, NotADirectoryError, OSError])
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, capsys, kind):
    def fails(*name):
        raise kind(28, 'No space left on device', *name)

    with pytest.raises(SystemExit, match='2'):
        run(lambda: fails('report.html'))
    assert capsys.readouterr().err == "mmpose_dp: [Errno 28] No space left on device: 'report.html'\n"
    with pytest.raises(kind):  # whose file is not known
        run(fails)


def test_a_missing_file_of_pretrained_weights(call, synthetic, tmp_path):
    cfg = unvalidated(synthetic, tmp_path / 'work')
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=f'{tmp_path}/nowhere.pth')
    cfg.dump(tmp_path / 'own.py')
    one_line(call(train_tool, tmp_path / 'own.py'), 'nowhere.pth')


@pytest.mark.parametrize(
    ('settings', 'words'),
    [
        (
            dict(momentun=0.1),
            "TypeError: ExponentialMovingAverage.__init__() got an unexpected keyword argument 'momentun'",
        ),
        (dict(momentum=2.0), 'AssertionError: momentum must be in range'),
    ],
)
def test_a_hook_that_fails_before_training(call, synthetic, tmp_path, settings, words):
    cfg = unvalidated(synthetic, tmp_path / 'work')
    cfg.custom_hooks = [dict(type='EMAHook', **settings)]
    cfg.dump(tmp_path / 'own.py')
    one_line(call(train_tool, tmp_path / 'own.py'), f'the hook EMAHook fails before training: {words}')


@HOOKS.register_module()
class CtrlC(Hook):
    """What Ctrl-C raises after some steps."""

    priority = 'LOWEST'

    def __init__(self, after):
        self.after = after

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.after:
            CtrlC.plan = runner.optim_wrapper.plan
            runner.optim_wrapper.ledger.close()
            raise KeyboardInterrupt


def logs(folder):
    return ''.join(path.read_text() for path in folder.glob('*/*.log'))


def test_ctrl_c_says_what_is_kept_and_a_resume_what_is_left(call, synthetic, tmp_path):
    work = tmp_path / 'work'
    cfg = unvalidated(synthetic, work, train_cfg__max_epochs=2, optim_wrapper__noise_multiplier=1.5)
    cfg.custom_hooks = [dict(type='CtrlC', after=6)]  # epochs of 4 steps: 2 are lost
    cfg.dump(tmp_path / 'own.py')
    done = call(train_tool, tmp_path / 'own.py')
    assert done.returncode == 130 and 'Traceback' not in done.stderr
    assert 'interrupted. 6 of 8 private steps are spent' in done.stderr
    assert done.stderr.rstrip().endswith(
        f'{work}/epoch_1.pth is kept: the same command with --resume goes on from there.'
    )
    spent = rounded_up(CtrlC.plan.epsilon_after(6))
    assert f'(epsilon {spent} of 8 at delta 0.001)' in done.stderr
    found = verify(work)  # the checkpoint that is kept can be published: the statement has its hash, and all 6 steps
    assert not found.wrong and any(text.startswith('epoch_1.pth is a checkpoint of') for text in found.checked)
    assert json.loads((work / 'privacy_statement.json').read_text())['steps'] == 6

    start = shutil.copy(
        work / 'epoch_1.pth', tmp_path / 'start.pth'
    )  # "the same command", with the start that it named
    done = call(train_tool, tmp_path / 'own.py', '--resume', '--cfg-options', 'custom_hooks=[]', f'load_from={start}')
    assert done.returncode == 0, done.stderr[-500:]
    assert f'Resumed: 6 private steps are spent (epsilon {spent} of 8 at delta 0.001), 2 are left. 2 of the' in logs(
        work
    )
    assert 'Spent in 8 private steps' in logs(work)


class EndsWorkers(BaseTransform):
    """Ends the process that it runs in, if that is a worker, as a machine without memory does."""

    def transform(self, results):
        if torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return results


def test_a_worker_that_is_ended(call, synthetic, tmp_path, monkeypatch):
    """It was a traceback of torch's data loader."""
    monkeypatch.setitem(TRANSFORMS._module_dict, 'EndsWorkers', EndsWorkers)
    cfg = unvalidated(synthetic, tmp_path / 'work', train_dataloader__num_workers=1)
    cfg.train_dataloader.dataset.private.pipeline.insert(-1, dict(type='EndsWorkers'))
    cfg.dump(tmp_path / 'own.py')
    done = call(train_tool, tmp_path / 'own.py')
    one_line(done, 'exited unexpectedly), often for lack of memory, or of shared memory')
    assert done.stderr.rstrip().endswith('No checkpoint is written yet: --resume starts again from the beginning.')


@pytest.fixture(scope='module')
def parser():
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptions, default={})
    return parser


@pytest.mark.parametrize('text', OPTIONS)
def test_cfg_options_are_mmengines(parser, text):
    given = parser.parse_args(['--cfg-options', 'other=1', f'a.b={text}']).cfg_options
    assert given == {'other': 1, 'a.b': OPTIONS[text]}


@pytest.mark.parametrize('text', SPACES)
def test_texts_in_cfg_options_keep_their_spaces(parser, text):
    assert parser.parse_args(['--cfg-options', f'a={text}']).cfg_options == {'a': SPACES[text]}


@pytest.mark.parametrize('text', NO_PAIRS)
def test_an_option_that_is_no_pair(parser, text, capsys):
    """Each was a traceback: "not enough values to unpack", or an AssertionError."""
    with pytest.raises(SystemExit, match='2'):
        parser.parse_args(['--cfg-options', 'b=1', text])
    assert NO_PAIRS[text] in capsys.readouterr().err


@pytest.mark.parametrize('text', DICTS)
def test_a_dict_is_refused_and_not_cut_to_pieces(parser, text, capsys):
    with pytest.raises(SystemExit, match='2'):
        parser.parse_args(['--cfg-options', f'a={text}'])
    assert 'error: --cfg-options a=...: a dict cannot be written here' in capsys.readouterr().err


@pytest.mark.parametrize('key', ['param_scheduler.0.begin', 'name.x', 'listed.x'])
def test_an_option_that_leads_nowhere(key):
    cfg = Config(dict(param_scheduler=[], name=1, listed=[dict(x=1)]))
    with pytest.raises(PrivacyError, match=f'--cfg-options {key}=3 cannot be merged into the config: '):
        merged(cfg, {key: 3})
    assert merged(cfg, {'listed.0.x': 3}).listed == [dict(x=3)]


def test_a_download_that_fails_is_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit, match='2'):
        run(lambda: torch.hub.load_state_dict_from_url('http://nowhere.invalid/x.pth', tmp_path))
    assert capsys.readouterr().err.startswith('mmpose_dp: a download failed (<urlopen error ')


@pytest.mark.parametrize(('launcher', 'rank'), [('pytorch', 'RANK'), ('slurm', 'SLURM_PROCID')])
def test_a_launcher_that_did_not_start_this_process(monkeypatch, launcher, rank):
    monkeypatch.delenv(rank, raising=False)
    with pytest.raises(PrivacyError, match=f'did not start this process, since the environment has no {rank}'):
        start_ranks_on_cpu(Config(dict(launcher=launcher, env_cfg=dict(dist_cfg=dict(backend='gloo')))))


@pytest.mark.parametrize('text', ['0', '-3', '1e4', 'many', ''])
def test_a_number_of_records_is_a_whole_number_above_0(call, text, tmp_path):
    """-3 was taken for the size of the data set, and 0 for no option."""
    with pytest.raises(argparse.ArgumentTypeError, match='must be a whole number above 0'):
        positive(text)
    with pytest.raises(argparse.ArgumentTypeError, match='must be a number above 0 and below 1'):
        fraction(text.replace('1e4', '1'))
    assert positive('22246') == 22246 and fraction('0.95') == 0.95
    done = call(check_config, PRIVATE, f'--num-records={text}')
    assert done.returncode == 2 and f'argument --num-records: {text!r} must be a whole number above 0' in done.stderr


def test_a_pipe_that_is_closed_early_ends_a_tool_as_it_ends_other_commands(capsys):
    """check_config.py | head -1 said that train_cfg is of plain training: the registry's own print had failed."""
    before, inside = signal.getsignal(signal.SIGPIPE), []
    for keeps in (False, True):
        run(lambda: inside.append(signal.getsignal(signal.SIGPIPE)), may_lose_its_output=keeps)
    assert inside == [signal.SIG_DFL, before] and signal.getsignal(signal.SIGPIPE) == before

    def fails(*_):
        raise BrokenPipeError(32, 'Broken pipe')

    with pytest.raises(SystemExit, match='2'):
        run(lambda: resolved(SimpleNamespace(get=fails), 'PrivateTrainLoop'), may_lose_its_output=True)
    assert capsys.readouterr().err.startswith('mmpose_dp: nobody reads what is printed any more')


def test_an_option_for_a_variable_is_said_to_change_nothing(capfd):
    """A data_root is what everybody gives first, and the files were then said to be missing in the old one."""
    for config, told in ((PRIVATE, True), (PLAIN, False)):
        merge_options(Config.fromfile(config), {'data_root': '/data/', 'codec.sigma': 3, 'load_from': None})
        said = capfd.readouterr().err
        assert (
            ('--cfg-options data_root changes nothing' in said) == ('--cfg-options codec.sigma changes' in said) == told
        )
        assert 'load_from' not in said and told == (
            'keys themselves, train_dataloader.dataset.private.data_root' in said
        )


def test_a_checkpoint_of_another_epoch_is_named(tmp_path):
    (tmp_path / 'epoch_5.pth').touch()
    with pytest.raises(PrivacyError, match='epoch_4.pth: there is no such checkpoint, did you mean epoch_5.pth?'):
        refuse_no_checkpoint(tmp_path / 'epoch_4.pth')
