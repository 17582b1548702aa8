"""The recipes of CONTRIBUTING.md: each one's code, test and line of a config, put where the page says and run."""

import importlib
import inspect
import re
import shutil
import sys

import pytest
import torch
from mmengine.config import Config
from mmpose.registry import MODELS, TRANSFORMS

from mmpose_dp.datasets.transforms.view import check_view
from mmpose_dp.gradients import layer_rules
from mmpose_dp.privacy.accounting import ACCOUNTANTS
from tests.support.paths import REPO
from tests.support.processes import run

TEXT = (REPO / 'CONTRIBUTING.md').read_text()
RECIPES = dict(re.findall(r'^### (.+?) \(\d+ minutes\)\n(.*?)(?=^### |\Z)', TEXT, re.M | re.S))
BLOCK = re.compile(r'^```python\n(.*?)^```', re.M | re.S)


def blocks(name):
    """The recipe's code and test, as (file, content) pairs."""
    return [(re.match(r'# (\S+\.py)\n', block)[1], block) for block in BLOCK.findall(RECIPES[name])]


def row(name, title):
    """A row of the recipe's table."""
    return re.search(rf'^\| {title} \| (.*) \|$', RECIPES[name], re.M)[1]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with configs/ in it, on Python's path. What a recipe registers is taken back, and its modules are forgotten."""
    (tmp_path / 'configs').symlink_to(REPO / 'configs')
    monkeypatch.syspath_prepend(str(tmp_path))
    tables = [ACCOUNTANTS, layer_rules._RULES, *(registry._module_dict for registry in (MODELS, TRANSFORMS))]
    before = [dict(table) for table in tables]
    yield tmp_path
    for table, content in zip(tables, before):
        table.clear()
        table.update(content)
    for module in [module for module in sys.modules if module.startswith('my_')]:
        del sys.modules[module]


def put(name, folder):
    """Writes the recipe's code; returns its module's name and the test's file and content."""
    (file, code), test = blocks(name)
    (folder / file).write_text(code)
    importlib.invalidate_caches()
    return file.removesuffix('.py'), test


@pytest.mark.parametrize('name', RECIPES)
def test_a_recipe_works_as_written(name, clone, request):
    _, (file, test) = put(name, clone)
    assert (REPO / file).parent.is_dir() and row(name, 'command') == f'`python -m pytest {file}`'
    names = {'__name__': 'recipe'}
    exec(test, names)
    (own,) = (value for key, value in names.items() if key.startswith('test_'))
    own(**{fixture: request.getfixturevalue(fixture) for fixture in inspect.signature(own).parameters})


@pytest.mark.parametrize('name', RECIPES)
def test_its_line_makes_a_config_that_uses_it(name, clone):
    module, _ = put(name, clone)
    text, line = BLOCK.search(TEXT)[1], row(name, 'in the config')
    assert module in text  # among those that the block names
    base = re.search(r'`(configs/dp/\S+\.py)`', line)
    text = re.sub(r'configs/dp/\S+\.py', base[1], text) if base else text
    written = re.findall(r'`(\w+ = [^`]+)`', line)
    (clone / 'my_config.py').write_text('\n'.join([text.replace("'my_head'", f"'{module}'"), *written]))
    cfg = Config.fromfile(clone / 'my_config.py')
    assert module in sys.modules
    if 'model' in line:
        head = MODELS.build(cfg.model.head)
        assert head.predict([torch.rand(2, 32, 64, 64)], [])[1].keypoints.shape == (1, 16, 2)  # what validation calls
    elif 'public_view' in line:
        check_view(TRANSFORMS.build(cfg.train_dataloader.dataset.public_view))
    else:
        assert name == 'A layer rule' or cfg.default_hooks.privacy_budget.accountant in ACCOUNTANTS


def test_the_recipes_are_lint_clean(tmp_path):
    """Where they are put, ruff neither complains nor takes out the import that registers."""
    pytest.importorskip('ruff')
    (tmp_path / 'tests').mkdir()
    for name in ('ruff.toml', 'mmpose_dp', 'tests/support'):
        (tmp_path / name).symlink_to(REPO / name)
    for name in RECIPES:
        for file, code in blocks(name):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(code)
    done = run(sys.executable, '-m', 'ruff', 'check', '--no-cache', '--exclude', 'mmpose_dp,support', '.', cwd=tmp_path)
    assert done.returncode == 0 and 'All checks passed' in done.stdout, done.stdout


def test_the_rules_test_fails_without_the_rule(clone):
    """Where a layer has no rule, its gradients are found in another way, and are right too."""
    (_, code), (_, test) = blocks('A layer rule')
    (clone / 'my_rule.py').write_text(code.replace('register_rule(Scale', '(lambda *_: None)(Scale'))
    importlib.invalidate_caches()
    names = {'__name__': 'recipe'}
    exec(test, names)
    with pytest.raises(AssertionError):
        names['test_the_rule_is_autograd']()


def test_a_rule_for_a_layer_of_torch_passes_in_its_place(monkeypatch):
    ((table, path),) = re.findall(r'`([A-Z]+)` of `(tests/[\w/]+)\.py`', row('A layer rule', 'its place'))
    module = importlib.import_module(path.replace('/', '.'))
    rule = lambda module, x, grad: {'weight': (x.clamp(max=0) * grad).flatten(2).sum(2)}  # noqa: E731
    monkeypatch.setitem(layer_rules._RULES, torch.nn.PReLU, rule)
    monkeypatch.setitem(getattr(module, table), 'mine', torch.nn.PReLU(4))
    module.test_every_rule_agrees_with_the_loop('mine')


def test_a_view_can_be_imported_in_its_place(tmp_path):
    shutil.copytree(REPO / 'mmpose_dp', tmp_path / 'mmpose_dp', ignore=shutil.ignore_patterns('.mim', '__pycache__'))
    place = row('A public view', 'its place')
    folder, listed = (tmp_path / path for path in re.findall(r'`(mmpose_dp/\S+)`', place))
    code, line = blocks('A public view')[0][1], re.search(r'`(from .+? import View)`', place)
    (folder / 'my_view.py').write_text(re.sub('^from .+ import View$', line[1] if line else r'\g<0>', code, flags=re.M))
    listed.write_text('from .my_view import MeanColour\n' + listed.read_text())
    done = run(
        sys.executable, '-c', 'from mmpose_dp.datasets.transforms import MeanColour as V; print(V)', cwd=tmp_path
    )
    assert done.returncode == 0 and 'my_view.MeanColour' in done.stdout, done.stdout


def test_there_are_four_recipes():
    assert [*RECIPES] == ['A head', 'A layer rule', 'A public view', 'An accountant']


# ---- names -----------------------------------------------------------------------------------------------------------
def test_every_file_exists():
    for path in re.findall(r'\b(?:mmpose_dp|tests|tools|configs|projects)/[\w/.-]*\w', TEXT):
        assert '/test_my_' in path or (REPO / path).exists(), path


def test_every_name_is_in_its_file():
    found = re.findall(r'`(\w+)`(?: in the docstring)? of `([\w/]+\.py)`', TEXT)
    assert len(found) >= 5
    for name, path in found:
        assert re.search(rf'^(?:def |class )?{name}\b', (REPO / path).read_text(), re.M), f'{name} of {path}'


def test_every_function_that_the_words_name_exists():
    for name in re.findall(r'`(mmpose_dp(?:\.\w+)+)`', TEXT):
        module, _, attribute = name.rpartition('.')
        assert hasattr(importlib.import_module(module), attribute), name
