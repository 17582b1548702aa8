"""The shape of the repository: which part may import which, what is pinned, what installing touches."""

import ast
import contextlib
import doctest
import importlib
import re
import subprocess
import sys
from importlib import metadata
from itertools import takewhile
from pathlib import Path

import pytest

from mmpose_dp import compat
from tests.support.paths import REPO, shared

PACKAGE = REPO / 'mmpose_dp'
MODULES = sorted(PACKAGE.rglob('*.py'))
TOOLS = sorted((REPO / 'tools').rglob('*.py'))
OWN_FILES = [*MODULES, *TOOLS, *sorted((REPO / 'tests').rglob('*.py'))]
# tools -> configs -> auditing -> engine -> datasets, models -> extras -> gradients, privacy: what each part may import
CORE = {'privacy', 'gradients', 'tensors', 'processes'}
ALLOWED = {
    'version': set(),
    'compat': set(),  # also runs as a file of its own, without the package
    'tensors': set(),
    'processes': set(),
    'messages': {'processes'},
    'privacy': {'privacy', 'tensors', 'processes'},
    'gradients': CORE,
    'extras': {*CORE, 'extras', 'version'},
    'models': {*CORE, 'messages', 'extras', 'models'},
    'datasets': {*CORE, 'messages', 'datasets'},
    'engine': {*CORE, 'messages', 'extras', 'models', 'datasets', 'engine'},
    'auditing': {*CORE, 'extras', 'models', 'datasets', 'engine', 'auditing'},
    'configs': {*CORE, 'models', 'datasets', 'engine'},
    'verifying': {'privacy', 'extras', 'version', 'verifying'},  # also runs without torch, Opacus and OpenMMLab
    'verify': {'privacy', 'extras', 'verifying'},
    '__main__': set(),  # runs the tools, and verify, as programs
    '__init__': {'version', 'compat', 'models', 'datasets', 'engine'},
}
NEEDED_BY_GRADIENTS = {'records', 'errors'}  # of privacy/, whose other modules need more than torch
STANDS_ON = {'privacy': {'torch', 'opacus', 'numpy', 'scipy', 'dp_accounting'}, 'gradients': {'torch'}}


def name(path: Path) -> str:
    return str(path.relative_to(REPO))


def imports(path: Path) -> set[str]:
    """Absolute dotted names of everything a file imports, in functions too."""
    found = set()
    package = path.relative_to(REPO).with_suffix('').parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = '.'.join([*above, *([node.module] if node.module else [])])
            found |= {f'{module}.{alias.name}' for alias in node.names}
    return found


# ---- who imports whom ----------------------------------------------------------------------------
@pytest.mark.parametrize('part', STANDS_ON)
def test_the_guarantee_imports_nothing_of_openmmlab(part):
    for path in (PACKAGE / part).rglob('*.py'):
        roots = {module.split('.')[0] for module in imports(path)}
        assert roots <= {*STANDS_ON[part], 'mmpose_dp'} | set(sys.stdlib_module_names), name(path)


@pytest.mark.parametrize(
    'part, code',
    [
        (
            'privacy',
            'from mmpose_dp.privacy import *; from mmpose_dp.privacy import Ledger, calibrate_noise_multiplier; '
            'from fractions import Fraction; '
            'assert 0 < calibrate_noise_multiplier(8.0, 1e-4, Fraction(1, 100), 100, "rdp") < 10',
        ),
        (
            'gradients',
            'import torch; from torch import nn; from mmpose_dp.gradients import Engine; '
            'from mmpose_dp.gradients.blocks import PerSampleGradients; '
            'net = nn.Linear(3, 1); engine = Engine(net, [*net.parameters()], kind="rules"); '
            'found = PerSampleGradients(engine.params, torch.arange(2))\n'
            'with engine.capture(): losses = [*net(torch.ones(2, 3)).flatten()]\n'
            'engine.backward(losses, found); assert found.total[0].shape == (2, 1, 3)',
        ),
    ],
)
def test_it_runs_in_an_environment_with_what_it_stands_on_alone(part, code, tmp_path):
    only(STANDS_ON[part], tmp_path)
    (tmp_path / 'mmpose_dp').symlink_to(PACKAGE)
    start = f'import sys; sys.path.append({str(tmp_path)!r})\n'
    missing = [p for p in ('mmengine', 'mmpose', 'mmcv', 'opacus') if p not in STANDS_ON[part]]
    absent = f'\nfrom importlib.util import find_spec; assert not any(map(find_spec, {missing}))'
    done = subprocess.run(
        [sys.executable, '-I', '-S', '-W', 'ignore', '-c', start + code + absent],
        cwd='/',
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def only(packages: set[str], folder: Path) -> None:
    """Fills ``folder`` with links to these packages and to what they require: what a bare environment has installed."""
    wanted, seen = [name.replace('_', '-') for name in packages], set()
    while wanted:
        one = wanted.pop().lower()
        try:
            found = metadata.distribution(one)
        except metadata.PackageNotFoundError:
            continue  # an extra, or another platform's
        if one in seen:
            continue
        seen.add(one)
        wanted += [re.split(r'[^\w.-]', line)[0] for line in found.requires or () if 'extra ==' not in line]
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ('..', '__pycache__')}:
            link = folder / top
            if not link.exists():
                link.symlink_to(found.locate_file(top))


def own_imports(path: Path) -> list[list[str]]:
    """What a file imports of mmpose_dp, split at the dots, without 'mmpose_dp'."""
    return [module.split('.')[1:] for module in imports(path) if module.split('.')[0] == 'mmpose_dp']


@pytest.mark.parametrize('path', MODULES, ids=name)
def test_dependencies_point_one_way(path):
    part = path.relative_to(PACKAGE).with_suffix('').parts[0]
    found = own_imports(path)
    assert {module[0].replace('__version__', 'version') for module in found} <= ALLOWED[part]
    if part == 'gradients':
        assert {module[1] for module in found if module[0] == 'privacy'} <= NEEDED_BY_GRADIENTS
    outside = {module.split('.')[0] for module in imports(path)}
    assert not outside & {'tools', 'tests', *(tool.stem for tool in TOOLS if tool.stem != 'test')}


@pytest.mark.parametrize('path', TOOLS, ids=name)
def test_a_tool_imports_the_package_and_its_own_folder(path):
    siblings = {tool.stem for tool in path.parent.glob('*.py')}
    outside = {module.split('.')[0] for module in imports(path)} - siblings
    assert not outside & {'tools', 'tests', 'configs', *(tool.stem for tool in TOOLS)}


def test_a_config_imports_the_recipes_alone():
    for path in (REPO / 'configs').rglob('*.py'):
        assert {module[0] for module in own_imports(path)} <= {'configs'}, name(path)


def test_every_tool_that_a_text_names_exists():
    texts = [*REPO.glob('*.md'), REPO / 'Makefile', *(REPO / 'docs').glob('*.md'), *(REPO / 'configs').rglob('*.py')]
    for path in [*texts, *MODULES, *TOOLS]:
        named = set(re.findall(r'(?<!/)\btools/[\w/]+\.(?:py|sh)\b', path.read_text()))
        assert not {tool for tool in named if not (REPO / tool).is_file()}, name(path)


# ---- documentation that runs ---------------------------------------------------------------------
@pytest.mark.parametrize('path', [path for path in MODULES if '>>> ' in path.read_text()], ids=name)
def test_the_examples_of_docstrings_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = doctest.testmod(importlib.import_module('.'.join(path.relative_to(REPO).with_suffix('').parts)))
    assert done.attempted and not done.failed


# ---- files ---------------------------------------------------------------------------------------
@pytest.mark.parametrize('path', OWN_FILES, ids=name)
def test_a_module_says_what_it_is_for_in_short_functions(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), 'the module has no docstring'
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            own = node.body[1:] if ast.get_docstring(node) else node.body  # a docstring may be as long as it must
            lines = own[-1].end_lineno - own[0].lineno + 1 if own else 0
            assert lines <= 50, f'{node.name} has {lines} lines: split it'


@pytest.mark.parametrize(('part', 'most'), [('privacy', 1700), ('gradients', 1000)])
def test_what_a_reviewer_reads_stays_short(part, most):
    lines = sum(len(path.read_text().splitlines()) for path in (PACKAGE / part).rglob('*.py'))
    assert lines <= most, f'mmpose_dp/{part} has {lines} lines'


def table_of_the_guarantee(title: str) -> list[list[str]]:
    """The cells of each row of the table in docs/guarantee.md whose first column has this title."""
    lines = (REPO / 'docs/guarantee.md').read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f'| {title} |'))
    rows = takewhile(lambda line: line.startswith('|'), lines[start + 2 :])
    return [[cell.strip() for cell in row.split('|')[1:-1]] for row in rows]


def names_in(path: Path) -> set[str]:
    """The functions and classes of a file, and the methods as Class.method."""
    defined = (ast.ClassDef, ast.FunctionDef)
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, defined)]
    inner = {f'{node.name}.{method.name}' for node in top for method in node.body if isinstance(method, defined)}
    return {node.name for node in top} | inner


@pytest.mark.parametrize('title', ['step', 'order', 'option', 'property'])
def test_the_guarantee_names_what_there_is(title):
    """A step is in files of privacy/ alone; whatever a file's brackets name is in that very file."""
    everywhere = set().union(*(names_in(path) for path in MODULES))
    for _, where, _ in table_of_the_guarantee(title):
        files = re.findall(r'`(\w+/[\w/]+\.py)`(?: \(([^)]*)\))?', where)
        for file, inside in files:
            assert {*re.findall('`([^`]+)`', inside)} <= names_in(PACKAGE / file), f'{file}: {where}'
        assert {name for name in re.findall('`([^`]+)`', where) if '/' not in name} <= everywhere, where
        assert title != 'step' or (files and all(file.startswith('privacy/') for file, _ in files)), where


def test_the_guarantee_says_where_its_classes_are():
    """Those that its tables name without a path."""
    text = (REPO / 'docs/guarantee.md').read_text()
    start = text[: text.index('## The statement')]
    named = re.findall(r'`(\w+)`(?:[^`.]*?) (?:is )?in\s+`([\w/]+\.py)`', start)
    assert len(named) == 6 and all(name in names_in(PACKAGE / file) for name, file in named), named


def test_the_guarantee_says_where_sampling_clipping_counting_and_noise_are():
    rows = table_of_the_guarantee('step')
    for words, file in (
        ('independently with probability', 'sampling'),
        ('is clipped', 'clipping'),
        ('is counted', 'ledger'),
        ('noise N', 'noise'),
        ('divided by B', 'mechanism'),
    ):
        assert any(words in step and f'`privacy/{file}.py`' in where for step, where, _ in rows), words


def test_no_file_names_a_registry_or_a_download_host():
    # the user's pip, conda or mim knows where packages come from; weights are the user's choice
    hosts = r'pypi\.org|pythonhosted|anaconda\.org|(download|files|cdn)[\w-]*\.[\w-]+\.(com|org|io|net)'
    listed = subprocess.run(
        ['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=REPO, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip('not a git checkout')
    found = []
    for file in listed.stdout.split('\0'):
        # a picture is no text; a deleted file may still be listed
        with contextlib.suppress(UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            if file != name(Path(__file__)) and re.search(hosts, (REPO / file).read_text()):
                found.append(file)
    assert not found


# ---- pins and installing -------------------------------------------------------------------------
def pins() -> list[tuple[str, str]]:
    """Every line of requirements/ that is not a comment, as (distribution, version)."""
    found = []
    for path in sorted((REPO / 'requirements').glob('*.txt')):
        for line in path.read_text().splitlines():
            if requirement := line.split('#')[0].strip():
                match = re.fullmatch(r'([\w.-]+)==([\w.+]+)', requirement)
                assert match, f'{name(path)}: {requirement!r} is not pinned as name==version'
                found.append((normal(match[1]), match[2]))
    return found


def normal(distribution: str) -> str:
    return re.sub('[-_.]+', '-', distribution).lower()


def test_every_requirement_is_pinned_once():
    names = [distribution for distribution, _ in pins()]
    assert len(names) == len(set(names)) > 60


def test_the_pins_contain_the_set_that_was_tried():
    tried = (shared('mpii').parents[1] / 'versions.txt').read_text().split()
    assert {(normal(n), v) for n, v in (line.split('==') for line in tried)} <= set(pins())


def test_the_pins_satisfy_what_is_checked_at_import():
    pinned = dict(pins())
    for module, (least, distributions, _) in compat.REQUIRED.items():
        version = next((pinned[d] for d in map(normal, distributions) if d in pinned), None)
        assert version and compat._numbers(version) >= compat._numbers(least), module


def test_a_type_checker_sees_the_names_that_are_imported_late():
    late, stub = importlib.import_module('mmpose_dp.privacy'), ast.parse((PACKAGE / 'privacy/__init__.pyi').read_text())
    seen = {alias.asname: node.module for node in stub.body for alias in node.names}
    assert seen == late._HOME


def test_what_is_installed(tmp_path):
    """Nothing that could replace MMPose or torch is required; types and configs are in the wheel."""
    code = """
import sys
from setuptools.dist import Distribution
from distutils.core import run_setup
dist = run_setup('setup.py', stop_after='init')
dist.get_command_obj('build_py').build_lib = sys.argv.pop()
dist.run_command('build_py')
print(*dist.install_requires)
print(*dist.packages)
"""
    done = subprocess.run([sys.executable, '-c', code, tmp_path], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    required, packages = (line.split() for line in done.stdout.splitlines()[-2:])
    for part in ('torch', 'mm', 'opacus', 'chumpy', 'opencv'):
        assert not [r for r in required if part in re.split('[<>=]', r)[0]], part
    folders = {'.'.join(path.parent.relative_to(REPO).parts) for path in MODULES}
    assert set(packages) == folders, 'a folder has no __init__.py'
    installed = tmp_path / 'mmpose_dp'
    assert (installed / 'py.typed').is_file() and (installed / 'privacy/__init__.pyi').is_file()
    assert (installed / 'statement.schema.json').is_file()
    for file in [REPO / 'model-index.yml', *(REPO / 'configs').rglob('*.py'), *(REPO / 'configs').rglob('*.yml')]:
        assert (installed / '.mim' / name(file)).is_file()
    wanted = {name(path) for path in (*(REPO / 'tools').glob('*.*'), *(REPO / 'tools/html').iterdir())} - {
        'tools/plan_fit.py'
    }
    assert {str(path.relative_to(installed / '.mim')) for path in (installed / '.mim/tools').rglob('*.*')} == wanted


def test_make_lists_its_targets_by_default():
    shown = subprocess.run(['make'], cwd=REPO, capture_output=True, text=True).stdout
    for target in ('install', 'test', 'lint', 'demo', 'bench'):
        assert f'make {target} ' in shown
