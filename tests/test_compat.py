"""compat: a broken install is repaired or explained, a sound one is left alone."""

import os
import subprocess
import sys
import types
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.runner import CheckpointLoader

from mmpose_dp import compat
from tests.support.processes import run


def fresh(code: str) -> subprocess.CompletedProcess:
    """Runs ``code`` in an interpreter that has imported nothing yet."""
    return run(sys.executable, '-W', 'ignore', '-c', code, timeout=120)


# ---- versions ------------------------------------------------------------------------------------
def test_one_message_names_every_package_its_version_and_the_remedy(monkeypatch):
    required = {
        'torch': ('99.0', ('torch',), 'pip install torch'),
        'no_such_package': ('1.2', ('no-such',), 'pip install no-such'),
        'numpy': ('1.0', ('numpy',), 'pip install numpy'),
    }
    monkeypatch.setattr(compat, 'REQUIRED', required)
    with pytest.raises(ImportError) as raised:
        compat.check_versions()
    text = str(raised.value)
    assert f'torch >= 99.0 is needed, but {metadata.version("torch")} is installed' in text
    assert 'pip install -U torch' in text
    assert 'no_such_package >= 1.2 is needed, but it is not installed: pip install no-such' in text
    assert 'make install' in text and 'numpy' not in text


def test_a_missing_package_is_named_before_anything_is_imported():
    done = fresh("""
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == 'opacus' else find(name, *rest)
import mmpose_dp
""")
    assert done.returncode == 1
    assert 'ImportError: mmpose_dp cannot run' in done.stderr and 'opacus >= ' in done.stderr


def test_a_fork_under_another_distribution_name_counts_by_its_module(monkeypatch):
    import mmengine

    monkeypatch.setattr(compat, 'REQUIRED', {'mmengine': ('0.10.0', ('not-this-name',), '')})
    compat.check_versions()
    assert compat._version('mmengine', ('not-this-name',)) == mmengine.__version__


@pytest.mark.parametrize(
    ('version', 'numbers'),
    [('1.5', (1, 5, 0)), ('2.13.0+cpu', (2, 13, 0)), ('2.0.0rc4', (2, 0, 0)), ('dev', (0, 0, 0))],
)
def test_versions_compare_by_three_numbers(version, numbers):
    assert compat._numbers(version) == numbers


# ---- the whole -----------------------------------------------------------------------------------
def test_importing_the_package_makes_mmpose_importable():
    done = fresh("""
import importlib.util
import mmpose_dp
import torchvision, mmpose.models, mmpose.datasets
from mmpose.registry import OPTIM_WRAPPERS
assert OPTIM_WRAPPERS.get('DPOptimWrapper') is mmpose_dp.engine.DPOptimWrapper
assert importlib.util.find_spec('mmcv._ext') is not None
""")
    assert done.returncode == 0, done.stderr


def test_applying_it_again_changes_nothing():
    before = dict(sys.modules), len(compat._declared)
    compat.apply()
    assert before == (dict(sys.modules), len(compat._declared))


# ---- mmcv ----------------------------------------------------------------------------------------
def test_compiled_operators_that_load_are_left_alone(monkeypatch):
    compiled = types.ModuleType('mmcv._ext')
    monkeypatch.setitem(sys.modules, 'mmcv._ext', compiled)
    compat.provide_mmcv_ops()
    assert sys.modules['mmcv._ext'] is compiled


def test_operators_compiled_for_another_torch_are_replaced_and_say_why_when_called(tmp_path):
    (tmp_path / f'_ext{EXTENSION_SUFFIXES[0]}').write_bytes(b'not a library')
    done = fresh(f"""
import sys, mmcv
mmcv.__path__.insert(0, {str(tmp_path)!r})
import mmpose_dp, torch
from mmcv.ops import nms
try:
    nms(torch.rand(3, 4), torch.rand(3), 0.5)
except NotImplementedError as error:
    print(error)
""")
    assert done.returncode == 0, done.stderr
    assert 'needs the compiled operator nms' in done.stdout and '_ext' in done.stdout


# ---- mmengine ------------------------------------------------------------------------------------
@pytest.fixture
def checkpoint(tmp_path):
    """A file with what mmengine saves beside the weights, from its own message hub."""
    hub = MessageHub('compat')
    hub.update_scalar('train/loss', torch.tensor(2.0))
    hub.update_scalar('train/lr', np.float32(0.5))
    hub.update_info('best', np.float64(0.25))
    path = tmp_path / 'checkpoint.pth'
    torch.save(dict(message_hub=hub.state_dict(), meta=dict(epoch=3)), path)
    return path


def test_the_allowed_types_are_enough_for_what_mmengine_saves(checkpoint):
    with pytest.raises(Exception, match='Weights only load failed'):
        torch.load(checkpoint, weights_only=True)
    with torch.serialization.safe_globals(compat.checkpoint_types()):
        loaded = torch.load(checkpoint, weights_only=True)
    hub = MessageHub('compat_loaded')
    hub.load_state_dict(loaded['message_hub'])
    assert hub.get_scalar('train/loss').mean() == 2.0 and hub.get_info('best') == 0.25


@pytest.mark.parametrize('count', [3, 0])  # faces have no skeleton, and so no colours of links
def test_a_checkpoint_with_any_of_numpys_numbers_is_loaded_without_a_fallback(tmp_path, capfd, count):
    compat.allow_mmengine_checkpoints()  # the contexts above have taken it back
    torch.save(dict(meta=dict(colors=np.zeros(count, np.uint8))), tmp_path / 'colors.pth')
    colors = CheckpointLoader.load_checkpoint(str(tmp_path / 'colors.pth'), 'cpu')['meta']['colors']
    assert colors.dtype == np.uint8 and colors.shape == (count,)
    assert 'Could not safely load' not in ''.join(capfd.readouterr())


class _Reads:
    """Pickles to a call of ``function(*args)`` at loading."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('attack', [_Reads(os.getcwd), _Reads(getattr, np.ndarray, 'tofile')])
def test_nothing_else_in_a_checkpoint_is_run(tmp_path, attack):
    torch.save(dict(meta=attack), tmp_path / 'attack.pth')
    with torch.serialization.safe_globals(compat.checkpoint_types()):
        with pytest.raises(Exception, match='unsupported GLOBAL|asks for'):
            torch.load(tmp_path / 'attack.pth', weights_only=True)
