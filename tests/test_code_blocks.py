"""Every code block of the texts is run by a test, or is marked with why not; commands between the words name what exists.

The mark is an HTML comment in the line above a block: ``run: tests/...`` names the files of tests that run what it shows, and
``not run:`` and ``not code:`` say why nothing does. What is between ``<!-- name -->`` and ``<!-- /name -->`` is written by a tool.
"""

import json
import re
from importlib.util import find_spec
from typing import NamedTuple

import cv2
import markdown
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.visualization import Visualizer
from mmpose.registry import MODELS

from mmpose_dp.configs import private
from mmpose_dp.datasets import PublicPrivateDataset
from tests.support import coco_data
from tests.support.models import FOLDER, HRNET
from tests.support.paths import REPO
from tests.support.runs import tiny

TEXTS = sorted(
    [
        *REPO.glob('*.md'),
        *(path for name in ('docs', '.github', 'configs', 'projects') for path in (REPO / name).rglob('*.md')),
    ]
)
MARK = re.compile(r'<!-- (run|not run|not code): (.+) -->')
WRITTEN = re.compile(r'^<!-- (\w+) -->\n.*?^<!-- /\1 -->$', re.MULTILINE | re.DOTALL)
FENCE = re.compile(
    r'^(?P<above>.*)\n(?P<fence>```+|~~~+)(?P<language>.*)\n(?P<code>(?:.*\n)*?)(?P=fence) *$', re.MULTILINE
)
COMMAND = re.compile(r'(?:\S*/)?(?:python[\d.]*|make|pip|bash|mim|source|export) |\$ |\.ci/|tools/')


class Block(NamedTuple):
    mark: str  # 'run', 'not run' or 'not code'; empty without a mark
    why: str
    language: str
    code: str


def blocks(text):
    """The blocks of a text that no tool writes."""
    found = []
    for one in FENCE.finditer('\n' + WRITTEN.sub('', text)):
        mark = MARK.fullmatch(one['above'])
        found.append(Block(*(mark.groups() if mark else ('', '')), one['language'], one['code']))
    return found


def wrong(block):
    """What a block lacks, in words; empty if nothing."""
    if not block.mark:
        return 'has no mark: <!-- run: tests/test_x.py -->, <!-- not run: why --> or <!-- not code: what it is -->'
    if block.mark == 'not code':
        lines = [line for line in block.code.splitlines() if COMMAND.match(line)]
        return f'is code: {lines}' if lines or block.language not in ('', 'text') else ''
    if block.mark == 'not run':
        return '' if len(block.why.split()) > 2 else 'does not say why it is not run'
    tests = [REPO / name for name in block.why.split(', ')]
    if not all(path.is_file() and path.name.startswith('test_') for path in tests):
        return f'names a test that is not there: {block.why}'
    named = set(re.findall(r'\btools/(?:\w+/)*(\w+)\.(?:py|sh)', block.code)) | set(
        re.findall(r'-m (mmpose_dp\.\w+)', block.code)
    )
    texts = '\n'.join(path.read_text() for path in tests)
    missing = sorted(name for name in named if name not in texts)
    return f'is run by tests that do not know {missing}' if missing else ''


def ids(path):
    return str(path.relative_to(REPO))


@pytest.mark.parametrize('path', TEXTS, ids=ids)
def test_every_block_is_run_or_marked(path):
    text = path.read_text()
    for block in blocks(text):
        assert not wrong(block), f'{block.code}{wrong(block)}'
    rest = FENCE.sub(r'\g<above>', '\n' + WRITTEN.sub('', text))
    assert '```' not in rest and '~~~' not in rest, 'a block is indented, or not closed'
    assert '<pre' not in markdown.markdown(rest, extensions=['tables']), 'a block is indented: write ``` and a mark'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('```\npython tools/train.py C\n```', 'no mark'),
        ('words\n~~~python\na = 1\n~~~', 'no mark'),
        ('<!-- not code: output -->\n```\n$ python a.py\n```', 'is code'),
        ('<!-- not code: output -->\n```console\nhello\n```', 'is code'),
        ('<!-- not run: slow -->\n```\nmake demo\n```', 'does not say why'),
        ('<!-- run: tests/test_nothing.py -->\n```\nmake demo\n```', 'not there'),
        ('<!-- run: tests/test_configs.py -->\n```\npython tools/plan_fit.py\n```', r"do not know \['plan_fit'\]"),
    ],
)
def test_what_escapes_is_found(text, message):
    (block,) = blocks(text)
    assert re.search(message, wrong(block))
    assert not blocks(f'<!-- demo -->\n{text}\n<!-- /demo -->')


# ---- commands of other programs ------------------------------------------------------------------------------------
def code_of(text):
    """Every line of a block, and every piece of inline code."""
    inline = re.findall(r'`([^`]+)`', FENCE.sub('', '\n' + text))
    return [
        *(line for block in blocks(text) for line in block.code.splitlines()),
        *(x.replace('\n', ' ') for x in inline),
    ]


@pytest.mark.parametrize('path', TEXTS, ids=ids)
def test_targets_modules_and_tests_exist(path):
    targets = re.findall(r'^([\w-]+):', (REPO / 'Makefile').read_text(), re.MULTILINE)
    for line in code_of(path.read_text()):
        for target in re.findall(r'^make (\w+)', line):
            assert target in targets, line
        for module in re.findall(r'python -m ([\w.]+)', line):
            assert find_spec(module), line
        for name in re.findall(r'pytest ((?:tests/\S+ ?)+)', line):
            assert all('/test_my_' in one or (REPO / one).exists() for one in name.split()), line


@pytest.fixture(scope='module')
def base():
    return Config.fromfile(FOLDER / HRNET.removeprefix('mmpose::'))._cfg_dict


@pytest.mark.parametrize('path', TEXTS, ids=ids)
def test_configs_in_the_words_can_be_written_so(path, base):
    """``private(_base_, ...)`` is evaluated, and the file of ``_base_ = 'mmpose_dp::...'`` exists."""
    for line in code_of(path.read_text()):
        if re.fullmatch(r'private\(_base_, .*\)', line):
            assert eval(line, dict(private=private, _base_=base))['optim_wrapper']['type'] == 'DPOptimWrapper', line
        for name in re.findall(r"'mmpose_dp::([\w./-]+\.py)'", line):
            assert (REPO / 'configs' / name).is_file(), line


# ---- blocks of settings and of Python, run as they stand -------------------------------------------------------------
def python_blocks(page):
    return [block.code for block in blocks((REPO / 'docs' / page).read_text()) if block.language == 'python']


def settings(code):
    names = {}
    exec(code, names)
    return {name: value for name, value in names.items() if name != '__builtins__'}


@pytest.mark.parametrize('number', [0, 1])
def test_subjects_are_named_as_the_page_says(number, tmp_path, monkeypatch):
    """By a field or by the file that the page shows: three pictures of two people."""
    (listed,) = (block.code for block in blocks((REPO / 'docs/subjects.md').read_text()) if block.language == 'json')
    data, subjects = coco_data.content(3), json.loads(listed)
    for image, annotation, (file, subject) in zip(data['images'], data['annotations'], subjects.items()):
        image['file_name'], annotation['subject_id'] = file, subject
        (tmp_path / 'img' / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/subjects.json').write_text(listed)
    monkeypatch.chdir(tmp_path)
    chosen = settings(python_blocks('subjects.md')[number])['train_dataloader']['dataset']
    assert PublicPrivateDataset(coco_data.write(tmp_path, data), **chosen).num_records == 2


def test_the_backends_of_the_page_are_built(tmp_path):
    (code,) = python_blocks('watch.md')
    shown = Visualizer('page', save_dir=str(tmp_path), **settings(code)['visualizer'])
    assert list(shown._vis_backends) == ['LocalVisBackend', 'TensorboardVisBackend']


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """A folder with the files that docs/use.md names: those of my_model, and picture.jpg."""
    folder = tmp_path_factory.mktemp('use')
    (folder / 'my_model').mkdir()
    cfg = tiny(Config.fromfile(REPO / 'configs/dp/hrnet_synthetic_nonprivate.py'))
    cfg.merge_from_dict(dict(data_mode='topdown', dataset_type='MpiiDataset'))
    cfg.dump(folder / 'my_model/config.py')
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), folder / 'my_model/my_model-1a2b3c4d.pth')
    cv2.imwrite(str(folder / 'picture.jpg'), np.full((310, 210, 3), 99, np.uint8))
    return folder


@pytest.mark.parametrize('number', [0, 1], ids=['inferencer', 'topdown'])
def test_what_the_page_says_of_use_runs(number, published, monkeypatch, capsys):
    monkeypatch.chdir(published)
    names = settings(python_blocks('use.md')[number])
    if 'inferencer' in names:
        assert len(names['result']['predictions'][0][0]['keypoints']) == 16
        assert (published / 'out/picture.json').is_file()
    else:
        assert '(1, 16, 2)' in capsys.readouterr().out
