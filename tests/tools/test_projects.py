"""Projects outside the package: the commands of a project's README as they stand there, in another place and on a few people."""

import importlib
import json
import re
import runpy
import shlex
import shutil
import sys

import pytest
from mmpose.registry import DATASETS, MODELS

from tests.support.paths import REPO

PROJECT = REPO / 'projects/example_project'
COMMAND = re.compile(r'^python (\S+) ?(.*)$', re.MULTILINE)
ALONE = [
    f'{part}_dataloader.{key}' for part in ('train', 'val') for key in ('num_workers=0', 'persistent_workers=False')
]
FEW = [
    'train_dataloader.batch_sampler.expected_batch_size=10',
    'optim_wrapper.projector.rank=6',
    'default_hooks.public_data.num_samples=12',
]
SMALL = {  # what makes each command quick
    'make_people.py': ['--train', '40', '--val', '8'],
    'train.py configs/five-joints_plain.py': ['--cfg-options', *ALONE, 'train_cfg.max_epochs=1'],
    'train.py configs/five-joints_hybrid_eps8.py': ['--cfg-options', *ALONE, *FEW, 'train_dataloader.batch_size=16'],
    'check_config.py': ['--cfg-options', *ALONE, *FEW],
    'test.py': [
        '--out',
        'scores.json',
        '--cfg-options',
        'test_dataloader.num_workers=0',
        'test_dataloader.persistent_workers=False',
    ],
}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A copy of the project outside the clone, as the working folder and on Python's path; what it registers is taken back."""
    folder = shutil.copytree(PROJECT, tmp_path / 'project')
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    before = [(registry._module_dict, dict(registry._module_dict)) for registry in (DATASETS, MODELS)]
    yield folder
    for table, content in before:
        table.clear()
        table.update(content)
    for name in [name for name in sys.modules if name.split('.')[0] in ('datasets', 'models')]:
        del sys.modules[name]


def small(command):
    return next((more for start, more in SMALL.items() if command.startswith(start)), [])


def test_every_command_of_the_readme_runs(elsewhere, call, monkeypatch):
    commands = COMMAND.findall((elsewhere / 'README.md').read_text())
    assert len(commands) == 5
    for script, arguments in commands:
        name, arguments = script.removeprefix('$TOOLS/'), shlex.split(arguments)
        arguments += small(' '.join([name, *arguments]))
        if name == script:
            monkeypatch.setattr(sys, 'argv', [script, *arguments])
            runpy.run_path(script, run_name='__main__')
            continue
        done = call(importlib.import_module(name.removesuffix('.py')), *arguments)
        assert done.returncode == 0, (name, done.stderr[-3000:])
        if name == 'check_config.py':
            assert 'rule' in done.stdout
    private = elsewhere / 'work_dirs/five-joints_hybrid_eps8'
    statement = json.loads((private / 'privacy_statement.json').read_text())
    assert statement['private'] and statement['num_records'] == 40 and 7 < statement['epsilon'] <= 8
    assert set(json.loads((elsewhere / 'scores.json').read_text())) >= {'PCK'}


def test_it_has_the_form_of_mmposes_projects():
    assert {path.name for path in PROJECT.iterdir() if path.is_dir() and path.name[0] != '_'} == {
        'configs',
        'datasets',
        'models',
    }
    headings = re.findall(r'^##+ (.*)$', (PROJECT / 'README.md').read_text(), re.MULTILINE)
    wanted = (
        'Description, Usage, Prerequisites, Data preparation, Training commands, Testing commands, Results, Checklist'
    )
    assert headings == wanted.split(', ')
    assert PROJECT.name in (REPO / 'projects/README.md').read_text()
