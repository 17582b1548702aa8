"""A name at the top of a config file that nothing reads: refused if it looks like a setting, never if it is a variable."""

import copy
import json
from pathlib import Path

import mmpose
import pytest
from cli import merge_options
from mmengine.config import Config

from mmpose_dp.configs import private
from mmpose_dp.engine.unread import refuse_unread, unread_in_words
from mmpose_dp.privacy.errors import ConfigError
from tests.support.paths import REPO

HYBRID = REPO / 'configs/dp/hrnet_synthetic_hybrid_eps08.py'
PLAIN = REPO / 'configs/_base_/hrnet_synthetic.py'
LEAF = f"_base_ = r'{HYBRID}'\n"
MADE = f"_base_ = r'{PLAIN}'\nfrom mmpose_dp.configs import private\n"
CALL = "globals().update(private(_base_, 'hybrid'))\n"
TARGET = 'default_hooks=dict(privacy_budget=dict(target_epsilon=...))'


@pytest.fixture(scope='module')
def hybrid():
    return Config.fromfile(HYBRID)


@pytest.fixture
def config(tmp_path, hybrid):
    """config(text, name): a private config, as if it were that of a file with this text."""

    def written(text, name='own.py'):
        (tmp_path / name).write_text(text)
        return Config(hybrid._cfg_dict, filename=str(tmp_path / name))

    return written


@pytest.mark.parametrize(
    ('line', 'meant'),
    [
        ('target_epsilom = 8', TARGET),
        ('target_epsilon: float = 8', TARGET),
        ('epsilon = eps = 8', TARGET),
        ('if True:\n    delta, mine = 1e-5, mine', 'default_hooks=dict(privacy_budget=dict(target_delta=...))'),
        ('max_epoch = 3', 'train_cfg=dict(max_epochs=...)'),
        ('num_epochs = 3', 'train_cfg=dict(max_epochs=...)'),
        ('total_epochs = 3', 'train_cfg=dict(max_epochs=...)'),
        ("resume_from = 'x.pth'", 'load_from=...'),
        ("lr_config = dict(policy='step', step=[3])", 'param_scheduler=...'),
        ('max_grad_nrom = 3', 'optim_wrapper=dict(max_grad_norm=...)'),
        ('expected_batchsize = 64', 'train_dataloader=dict(batch_sampler=dict(expected_batch_size=...))'),
        ('defualt_hooks = dict(privacy_budget=dict(target_epsilon=8))', 'default_hooks=...'),
        ("load_form = 'x.pth'", 'load_from=...'),
        ('train_cgf = dict(max_epochs=3)', 'train_cfg=...'),
    ],
)
def test_what_looks_like_a_setting_is_refused(config, line, meant):
    name = line.removeprefix('if True:\n    ').split()[0].strip(':,')
    with pytest.raises(ConfigError, match=f'own.py, line [34]: {name} is read by nothing') as error:
        refuse_unread(config(f'{LEAF}mine = 1\n{line}\n'))
    assert f'did you mean {meant}? ' in str(error.value)


def test_in_every_file_between_and_in_every_form(config):
    config(f'{LEAF}target_epsilom = 8\n', 'between.py')
    with pytest.raises(ConfigError, match='between.py, line 2: target_epsilom'):
        refuse_unread(config("_base_ = ['./between.py']\n"))
    refuse_unread(config("_base_ = ['./between.py']\nwork_dir = f'at_{_base_.target_epsilom}'\n"))
    with pytest.raises(ConfigError, match='own.json: max_epoch is read by nothing'):
        refuse_unread(config(json.dumps(dict(_base_=str(HYBRID), max_epoch=3)), 'own.json'))
    new = """from mmengine.config import read_base
with read_base():
    from .plain import *
from importlib import import_module
globals().update(import_module('mmpose_dp.configs').private(globals(), 'hybrid'))
"""
    plain = "model = dict(type='TopdownPoseEstimator')\nbase_lr = 1e-3\n"
    config(f'{plain}max_epoch = 3\n', 'plain.py')
    with pytest.raises(ConfigError, match='plain.py, line .*: max_epoch'):
        refuse_unread(config(new))
    config(plain, 'plain.py')
    refuse_unread(config(new))
    with pytest.raises(ConfigError, match='own.py, line 6: max_epoch'):
        refuse_unread(config(f'{new}max_epoch = 3\n'))


@pytest.mark.parametrize(
    'text',
    [
        f"{LEAF}max_epochs = 3\ntrain_cfg = dict(max_epochs=max_epochs)\nload_from = '{{{{_base_.work_dir_name}}}}'\n",
        f"{LEAF}data_root, codec, dataset_type, data_mode = 'x', dict(), 'MpiiDataset', 'topdown'\nmetainfo = None\n",
        f"{LEAF}author, version, note, tags = 'me', 3, 'for the officer', []\nlaunch_time = 0\n",
        f'{LEAF}train_pipeline = val_pipeline = test_pipeline = []\nval_batch_size = norm_cfg = fp16 = input_size = 1\n',
        f'{MADE}epsilon = 4\nglobals().update(private(_base_, "hybrid", epsilon=epsilon))\n',
        f'{MADE}train_cfg = dict(max_epochs=20)\nglobals().update(private(_base_, "hybrid", train_cfg=train_cfg))\n',
        f"{MADE}{CALL}param_scheduler = []\nload_from = 'x.pth'\n",
    ],
)
def test_a_variable_is_not(config, text):
    refuse_unread(config(text))


def test_the_configs_of_mmpose_and_ours_are_not(hybrid):
    """As they would be if private training read them: every name in them is a variable, or one that something reads."""
    seen = 0
    for folder in (Path(mmpose.__file__).parent / '.mim/configs/body_2d_keypoint', REPO / 'configs', REPO / 'projects'):
        for path in sorted(folder.rglob('*.py')):
            refuse_unread(Config(hybrid._cfg_dict, filename=str(path)))
            seen += 1
    assert seen > 250


def test_a_file_that_mmengine_wrote_and_a_plain_config_are_not(config):
    written = "model = dict()\nlauncher = 'none'\nmax_epochs = 420\ntarget_epsilon = 3\n"
    refuse_unread(config(written))
    with pytest.raises(ConfigError, match='max_epochs is read by nothing'):
        refuse_unread(config(written.replace('launcher', 'work_dir')))
    config(f'{LEAF}max_epoch = 3\n')
    refuse_unread(Config(dict(optim_wrapper=dict(type='OptimWrapper')), filename=config('max_epoch = 3').filename))


@pytest.mark.parametrize('call', ["private(_base_, 'hybrid')", "mine = private(_base_, 'hybrid')"])
def test_a_private_config_whose_result_is_lost_is_not_taken_for_a_plain_one(config, call):
    """It would train without privacy."""
    for text in (f'{MADE}{call}\n', "_base_ = 'base.py'\n"):
        config(f'{MADE}{call}\n', 'base.py')
        cfg = Config.fromfile(config(text).filename)
        with pytest.raises(
            ConfigError, match=r'line 3: what private\(\) gives is lost.* globals\(\).update\(private\('
        ):
            merge_options(cfg, {})
    plain = (
        f"_base_ = r'{PLAIN}'\n# from mmpose_dp.configs import private\nprivate = str\nlog_level = private('INFO')\n"
    )
    merge_options(Config.fromfile(config(plain).filename), {})


def test_what_a_config_imports_by_a_star(config):
    cfg = Config.fromfile(config(f'{MADE.replace("import private", "import *")}{CALL}').filename)
    assert not {'FOLDER', 'METHODS', 'Path'} & {*cfg}


def test_the_tools_ask(config):
    cfg = Config.fromfile(config(f'{LEAF}target_epsilom = 8\n').filename)
    with pytest.raises(ConfigError, match='own.py, line 2: target_epsilom'):
        merge_options(cfg, {})


@pytest.mark.parametrize(
    'key', ['train_dataloader', 'custom_imports', 'optim_wrapper', 'param_scheduler', 'model', 'val_cfg']
)
def test_what_is_assigned_above_private_would_be_lost(config, key):
    """Whatever private() writes for this base (the backbone's weights, and so the model) and with these arguments."""
    config(
        f"_base_ = r'{PLAIN}'\nmodel = dict(backbone=dict(init_cfg=dict(_delete_=True, type='Pretrained')))\n",
        'base.py',
    )
    call = CALL.replace("'hybrid'", "'hybrid', val_cfg=dict(fp16=True)")
    file = config(f'{MADE.replace(str(PLAIN), "base.py")}{key} = dict()\n{call}').filename
    with pytest.raises(ConfigError, match=rf'own.py, line 3: {key} is assigned above .*: pass it to .*{key}=...\)'):
        refuse_unread(Config.fromfile(file))


def test_a_lost_import_is_named_before_what_it_would_have_registered(config):
    call = CALL.replace("'hybrid'", "'hybrid', model=dict(head=dict(type='OwnHead'))")
    file = config(f"{MADE}custom_imports = dict(imports=['own_head'])\n{call}").filename
    with pytest.raises(ConfigError, match='own.py, line 3: custom_imports is assigned above'):
        merge_options(Config.fromfile(file), {})


def test_what_private_does_not_write_may_stand_above_it(config):
    cfg = Config.fromfile(
        config(f'{MADE}model = dict(head=dict(final_layer=None))\nval_cfg = dict(fp16=True)\n{CALL}').filename
    )
    refuse_unread(cfg)
    assert cfg.model.head.final_layer is None and cfg.val_cfg.fp16 and cfg.model.backbone.type == 'HRNet'


def test_a_variable_without_effect_is_warned_of(config, hybrid):
    cfg = config(f"{LEAF}data_root = 'mine/'\ndata_mode = 'topdown'\n")
    (words,) = unread_in_words(cfg)
    assert words.startswith('own.py, line 2: data_root is read by nothing and changes nothing')
    assert not unread_in_words(hybrid)


def test_a_variable_of_the_base_is_no_argument_of_private():
    base = dict(Config.fromfile(PLAIN)._cfg_dict, max_epochs=420)
    with pytest.raises(
        ConfigError, match=r'max_epochs=...\) is a variable.*: did you mean train_cfg=dict\(max_epochs='
    ):
        private(base, 'hybrid', max_epochs=3)
    private(base, 'hybrid', data_root='mine/')


def test_a_config_that_mmengine_wrote_out_has_the_variables_of_its_bases(hybrid, tmp_path):
    """Also one whose setting was changed since: the variable behind it says something else, and nothing reads it."""
    cfg = copy.deepcopy(hybrid)
    assert 'public_view' in cfg
    cfg.train_dataloader.dataset.public_view = dict(type='PublicView', mode='person')
    cfg.dump(tmp_path / 'own.py')
    refuse_unread(Config.fromfile(tmp_path / 'own.py'))
