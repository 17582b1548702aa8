"""model-index.yml and the metafiles say what the configs say, and MMPose's readers understand them."""

import importlib.util

import pytest
import yaml
from mmengine.config import Config
from modelindex.load_model_index import load

from tests.support.paths import REPO

SPEC = importlib.util.spec_from_file_location('metafiles', REPO / 'tools/docs/metafiles.py')
metafiles = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(metafiles)
CONFIGS = sorted((REPO / 'configs/dp').glob('*.py'))
SOME = [
    'hrnet_mpii_hybrid_coco_eps08',
    'hrnet_synthetic_publiconly',
    'hrnet_mpii_nonprivate',
    'hrnet_mpii_projected_eps02',
]


def listed(family):
    return {model['Name']: model for model in yaml.safe_load((REPO / f'configs/dp/{family}.yml').read_text())['Models']}


def test_every_config_is_in_the_metafile_and_table_of_its_family():
    table = (REPO / 'configs/dp/README.md').read_text()
    for family in metafiles.FAMILIES:
        assert set(listed(family)) == {path.stem for path in CONFIGS if metafiles.family_of(path) == family}
        assert all(f'({name}.py)' in table for name in listed(family))


@pytest.mark.parametrize('name', SOME)
def test_an_entry_is_what_the_config_says(name):
    path = REPO / f'configs/dp/{name}.py'
    assert listed(metafiles.family_of(path))[name] == metafiles.entry(path)


@pytest.mark.slow
def test_all_files_are_as_the_tool_writes_them():
    for path, text in metafiles.written().items():
        assert (REPO / path).read_text() == text, f'{path}: run python tools/docs/metafiles.py'


def test_mmposes_readers_understand_them(monkeypatch):
    monkeypatch.chdir(REPO)
    index = load('model-index.yml')
    index.build_models_with_collections()
    assert len(index.models) == len(CONFIGS) and not index.check(silent=True)
    found, _ = Config._get_cfg_path('mmpose_dp::dp/hrnet_mpii_hybrid_eps08.py', 'mine.py')
    assert found.endswith('mmpose_dp/.mim/configs/dp/hrnet_mpii_hybrid_eps08.py')


def test_no_result_without_a_source():
    for family in metafiles.FAMILIES:
        assert not any('Results' in model or 'Weights' in model for model in listed(family).values())
