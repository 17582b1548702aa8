"""The notebook of docs/, run from top to bottom in a kernel of its own, as a reader runs it."""

import json
import os
import re

import pytest

from tests.support.paths import REPO
from tests.support.processes import free_port

NOTEBOOK = REPO / 'docs/tour.ipynb'


def test_it_is_kept_without_outputs():
    """An output that is kept may be of another version."""
    cells = json.loads(NOTEBOOK.read_text())['cells']
    code = [cell for cell in cells if cell['cell_type'] == 'code']
    assert len(code) > 10 and not any(cell['outputs'] or cell['execution_count'] for cell in code)


def test_its_links_lead_somewhere():
    words = ''.join(line for cell in json.loads(NOTEBOOK.read_text())['cells'] for line in cell['source'])
    pages = re.findall(r'\]\((\w+\.md)\)', words)
    assert len(pages) > 5 and all((NOTEBOOK.parent / page).is_file() for page in pages)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """(cells, the folder that the notebook made) after a run."""
    why = 'is not installed (requirements/tests.txt)'
    nbformat, nbclient = (pytest.importorskip(name, reason=f'{name} {why}') for name in ('nbformat', 'nbclient'))
    pytest.importorskip('ipykernel', reason=f'ipykernel {why}')
    Config = pytest.importorskip('traitlets.config').Config
    folder = tmp_path_factory.mktemp('notebook')
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    with pytest.MonkeyPatch.context() as patch:  # for the kernel
        for key, value in dict(TMPDIR=folder, IPYTHONDIR=folder / 'ipython', OMP_NUM_THREADS=1).items():
            patch.setenv(key, str(value))
        patch.setenv('PYTHONPATH', str(REPO), prepend=os.pathsep)
        # reserved: what it finds free by itself may be taken before the kernel listens
        ports = {f'{channel}_port': int(free_port()) for channel in ('shell', 'iopub', 'stdin', 'hb', 'control')}
        settings = Config(KernelManager=dict(ports, cache_ports=False))
        resources = dict(metadata=dict(path=str(folder)))
        client = nbclient.NotebookClient(notebook, timeout=300, resources=resources, config=settings)
        client.execute()
    (made,) = folder.glob('mmpose_dp_tour_*')
    return notebook.cells, made


def shown(cells, words):
    """What the first cell with these words in its code shows: its texts joined, and the number of pictures."""
    outputs = next(cell.outputs for cell in cells if cell.cell_type == 'code' and words in cell.source)
    texts = [o.get('text', '') + str(o.get('data', {}).get('text/markdown', '')) for o in outputs]
    return ''.join(texts), sum('image/png' in o.get('data', {}) for o in outputs)


def test_every_step_shows_what_it_says(run):
    cells, _ = run
    assert [shown(cells, words)[1] for words in ('invert_by_tv', 'axhline', 'add_datasample')] == [1, 1, 1]
    assert 'blur' in shown(cells, 'invert_by_tv')[0]
    assert {'cannot learn', 'can learn'} <= {
        line.split('  ')[-1] for line in shown(cells, 'forecast.ratio')[0].splitlines()
    }
    assert 'another work_dir' in shown(cells, 'except PrivacyError')[0]
    assert 'feature DP' in shown(cells, 'Markdown(')[0]
    assert 'Nothing that was checked is wrong.' in shown(cells, 'import verify')[0]


def test_each_training_keeps_what_is_its_own(run):
    """Two trainings in one process: the private one's lines and statement are in its work dir, and in no other."""
    _, folder = run
    private, start = folder / 'work_dirs/private', folder / 'work_dirs/start'
    statement = json.loads((private / 'privacy_statement.json').read_text())
    assert statement['private'] and 3.9 < statement['epsilon'] <= 4
    assert 'trained on MpiiDataset' in statement['pretraining']  # what the start was trained on
    lines = [json.loads(line) for line in next(private.glob('*/vis_data/scalars.json')).read_text().splitlines()]
    spent = [line['epsilon'] for line in lines if 'epsilon' in line]
    assert len(spent) == 8 + statement['steps'] and spent[7] == 0 < spent[8] and spent[-1] <= 4
    assert not [*start.glob('privacy_*')] and 'epsilon' not in next(start.glob('*/vis_data/scalars.json')).read_text()
