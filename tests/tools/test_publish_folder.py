"""A published folder: plain MMPose and onnxruntime run it, a third party checks every file, and nothing else is in it."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import publish_model
import published_folder
import pytest
import torch
import yaml
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmpose.registry import MODELS, TRANSFORMS
from safetensors.torch import load_file

from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.verify import verify
from tests.support.models import PREFIX, RTMPOSE, load
from tests.support.paths import REPO
from tests.support.runs import train, unvalidated

BOX = [20, 10, 60, 90]
HEATMAPS = PREFIX + 'topdown_heatmap/mpii/td-hm_res50_8xb64-210e_mpii-256x256.py'
# in an install without mmcv's compiled operators, MMPose needs the stand-ins of compat.py, here as a file of its own
PLAIN = """
import runpy, sys
sys.modules['mmpose_dp'] = None
runpy.run_path(sys.argv[1])['apply']()
import json
from mmpose.apis import MMPoseInferencer, inference_topdown, init_model
config, weights, picture, box = *sys.argv[2:5], json.loads(sys.argv[5])
found = inference_topdown(init_model(config, weights, device='cpu'), picture, [box])[0].pred_instances
inferencer = MMPoseInferencer(pose2d=config, pose2d_weights=weights, det_model='whole_image', device='cpu')
(person,) = next(inferencer(picture))['predictions'][0]
print('FOUND', json.dumps([found.keypoints[0].tolist(), person['keypoints']]))
"""


@pytest.fixture(scope='module')
def source(synthetic, tmp_path_factory):
    """A checkpoint of a private training, in a work dir with a name to look for."""
    folder = tmp_path_factory.mktemp('publish') / 'secret_work_dir'
    # a seed of ten digits, which no file has by chance
    train(unvalidated(synthetic, folder, train_cfg__max_epochs=1, randomness__seed=1928374655))
    return folder / 'epoch_1.pth'


@pytest.fixture(scope='module')
def folder(source, tmp_path_factory):
    """What is published of it."""
    out = tmp_path_factory.mktemp('given') / 'my_model'
    _, lacking = publish_model.publish_folder(source, out)
    assert lacking == []
    return out


@pytest.fixture(scope='module')
def picture(synthetic):
    return str(sorted((synthetic / 'images').iterdir())[0])


def weights_in(folder):
    (path,) = folder.glob('*.pth')
    return path


def crop_of(picture):
    """(1, 3, 64, 64) as rtmlib makes it, for pictures in RGB."""
    crop = cv2.resize(cv2.imread(picture), (64, 64))[..., ::-1]
    return ((crop - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])).transpose(2, 0, 1)[None]


def test_it_has_the_files_and_their_hash_in_the_name(folder):
    names = {path.name for path in folder.iterdir()}
    weights = weights_in(folder)
    assert names == {
        weights.name, 'my_model.safetensors', 'model.onnx', 'config.py', 'README.md', 'privacy_statement.json',
        'privacy_statement.md', 'privacy_report.html',
    }  # fmt: skip
    assert weights.name == f'my_model-{publish_model.file_sha256(weights)[:8]}.pth'
    assert not [*folder.parent.glob('*.partial')]


def test_mmpose_runs_it_without_mmpose_dp(folder, picture):
    """In a process that cannot import mmpose_dp: both of MMPose's ways, and they agree with each other's boxes."""
    command = [
        sys.executable,
        '-W',
        'ignore',
        '-c',
        PLAIN,
        str(REPO / 'mmpose_dp/compat.py'),
        str(folder / 'config.py'),
    ]
    done = subprocess.run(
        [*command, str(weights_in(folder)), picture, json.dumps(BOX)], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-2000:]
    by_box, whole = json.loads(next(line for line in done.stdout.splitlines() if 'FOUND' in line).partition('FOUND')[2])
    assert np.shape(by_box) == np.shape(whole) == (16, 2) and np.isfinite([by_box, whole]).all()


def test_onnxruntime_computes_what_torch_does_in_rtmlibs_form(folder, picture):
    """rtmlib takes one float32 input and two outputs, x first, and divides their best index by 2."""
    session = onnxruntime.InferenceSession(folder / 'model.onnx', providers=['CPUExecutionProvider'])
    (given,), outputs = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ('input', 'tensor(float)', [3, 64, 64])
    assert [(one.name, one.type) for one in outputs] == [('simcc_x', 'tensor(float)'), ('simcc_y', 'tensor(float)')]
    assert all(one.shape[0] == 'batch' and [type(x) for x in one.shape[1:]] == [int, int] for one in outputs)
    cfg = Config.fromfile(folder / 'config.py')
    model = published_folder.built(cfg, torch.load(weights_in(folder), weights_only=True)['state_dict'])
    crops = np.concatenate([crop_of(picture), np.random.default_rng(0).normal(size=(2, 3, 64, 64))]).astype(np.float32)
    with torch.no_grad():
        wanted = published_folder.Network(model)(torch.from_numpy(crops))
    for found, exact in zip(session.run(None, {'input': crops}), wanted):
        assert found.shape == (3, 16, 128)
        np.testing.assert_allclose(found, exact.numpy(), atol=1e-5 * float(exact.abs().max()))
    decoded = [found.argmax(-1) / 2 for found in session.run(None, {'input': crops[:1]})]
    expected = model.head.decoder.decode(*(part[0:1].numpy() for part in wanted))[0]
    assert np.allclose(np.stack(decoded, -1), expected)


def test_all_forms_hold_the_released_weights(folder, source):
    weights = torch.load(source, weights_only=False)['state_dict']
    for given in (
        load_file(folder / 'my_model.safetensors'),
        torch.load(weights_in(folder), weights_only=True)['state_dict'],
    ):
        assert given.keys() == weights.keys() and all(torch.equal(given[name], weights[name]) for name in weights)


def test_nothing_else_is_in_any_byte_of_it(folder, source, synthetic):
    """No path, host, seed, optimizer, ledger, record or private picture's name; the config names nothing of the training."""
    checkpoint = torch.load(source, weights_only=False)
    secrets = [
        *(str(path).lstrip('/') for path in (source.parent, synthetic, REPO, sys.prefix)), str(Path.home()), socket.gethostname(),
        'secret_work_dir', 'optimizer', 'log_scalars', 'train_dataloader', 'experiment_name', 'mpii_train',
        str(checkpoint['meta']['seed']), *(path.name for path in sorted((synthetic / 'images').iterdir())),
    ]  # fmt: skip
    for path in folder.iterdir():
        data = path.read_bytes()
        found = [one for one in secrets if one.encode() in data and len(one) > 5]
        allowed = {'optimizer'} if path.suffix in ('.md', '.json', '.html') else set()  # in sentences
        assert not set(found) - allowed, path.name
    text = (folder / 'config.py').read_text()
    assert 'mmpose_dp' not in text and 'data_root' not in text and 'ann_file' not in text
    model = onnx.load(folder / 'model.onnx')
    assert not model.metadata_props and not any(node.doc_string for node in model.graph.node)


def test_a_third_party_checks_every_file(folder):
    found = verify(folder)
    assert not found.wrong, str(found)
    text = str(found)
    for name in ('model.onnx', 'config.py', 'my_model.safetensors', weights_in(folder).name):
        assert f'checked      {name}' in text
    assert 'NOT CHECKED  the ledger' in text and "NOT CHECKED  the training's config" in text
    assert not verify(weights_in(folder)).wrong


@pytest.mark.skipif(shutil.which('model_signing') is None, reason='model-signing is no requirement (docs/verify.md)')
def test_a_signature_covers_every_byte(folder, tmp_path):
    """By the commands of docs/verify.md."""

    def runs(*command):
        return subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True).returncode == 0

    copy = shutil.copytree(folder, tmp_path / 'my_model')
    commands = [
        line.partition('#')[0].split()
        for line in (REPO / 'docs/verify.md').read_text().splitlines()
        if line.startswith(('openssl', 'model_signing'))
    ]
    assert len(commands) == 4 and all(runs(*command) for command in commands)
    for path in copy.iterdir():
        whole = path.read_bytes()
        path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
        assert not runs(*commands[-1]), path.name
        path.write_bytes(whole)
    assert runs(*commands[-1])


@pytest.mark.parametrize('name', ['model.onnx', 'config.py', 'my_model.safetensors', 'privacy_statement.md'])
def test_one_changed_byte_is_found(folder, name):
    path = folder / name
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
        assert [one for one in verify(folder).wrong if name in one]
        path.unlink()
        assert name.endswith('.md') or f'NOT CHECKED  {name}: it is not here' in str(verify(folder))
    finally:
        path.write_bytes(whole)


def test_the_card_says_how_to_use_it_and_what_it_guarantees(folder):
    card = (folder / 'README.md').read_text()
    _, front, body = card.split('---\n', 2)
    assert yaml.safe_load(front)['library_name'] == 'mmpose' and 'differential-privacy' in yaml.safe_load(front)['tags']
    statement = json.loads((folder / 'privacy_statement.json').read_text())
    for part in (
        statement['guarantee'],
        statement['pretraining'],
        weights_in(folder).name,
        'SimCCHead',
        '16 joints',
        '[..., ::-1]',
    ):
        assert part in body
    named = {line.split('`')[1] for line in body.splitlines() if line.startswith('| `')}
    assert named == {path.name for path in folder.iterdir()} - {'README.md'}


def test_a_folder_is_replaced_only_if_it_was_published(folder, source, call, tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine/keep.txt').write_text('mine')
    work_dir, trained = shutil.copytree(source.parent, tmp_path / 'work_dir'), tmp_path / 'trained.pth'
    for name in ('README.md', 'config.py'):  # as somebody may put them there: its ledger was deleted
        (work_dir / name).write_text('mine')
    shutil.copy(source, trained)
    kept = {path: path.read_bytes() for path in (*work_dir.glob('*.*'), trained)}
    for out in ('mine', 'work_dir', 'trained.pth'):
        done = call(publish_model, source, tmp_path / out, '--overwrite')
        assert done.returncode == 2 and 'exists: give another name' in done.stderr
    assert call(publish_model, source, folder).returncode == 2
    assert (tmp_path / 'mine/keep.txt').read_text() == 'mine'
    assert len(kept) > 4 and all(path.read_bytes() == content for path, content in kept.items())
    before = weights_in(folder).read_bytes()
    done = call(publish_model, source, folder, '--overwrite')
    assert done.returncode == 0 and 'after 4 steps' in done.stdout, done.stderr
    assert weights_in(folder).read_bytes() == before


# ---- other models ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ('name', 'backbone', 'channels', 'outputs'),
    [
        (RTMPOSE, dict(deepen_factor=0.17, widen_factor=0.125), 128, [('simcc_x', 16, 128), ('simcc_y', 16, 128)]),
        (HEATMAPS, dict(depth=18), 512, [('heatmaps', 16, 16, 16)]),
    ],
    ids=['rtmpose', 'heatmaps'],
)
def test_other_heads_are_exported_too(name, backbone, channels, outputs):
    cfg = load(name, 64)
    cfg.model.backbone.update(backbone)
    cfg.model.head.in_channels = channels
    plain = published_folder.inference_config(cfg.pretty_text)
    model = MODELS.build(plain.model).eval()
    assert published_folder.built(plain, model.state_dict()) is not model
    made = published_folder.onnx_of(model, published_folder.input_size(plain))
    session = onnxruntime.InferenceSession(made.data, providers=['CPUExecutionProvider'])
    found = session.run(None, {'input': np.zeros((3, 3, 64, 64), np.float32)})
    assert [(one.name, *value.shape[1:]) for one, value in zip(session.get_outputs(), found)] == outputs
    assert {len(value) for value in found} == {3}
    assert made.difference < 1e-4 and plain.model.backbone.get('init_cfg') is None


def test_a_regression_heads_output_is_named_too():
    assert published_folder.output_names(torch.zeros(2, 16, 4)) == ('coordinates',)
    assert published_folder.output_names([torch.zeros(2, 16, 8, 8)] * 2) == ('heatmaps', 'heatmaps_1')


def test_an_export_that_computes_something_else_is_refused(monkeypatch):
    network = torch.nn.Conv2d(3, 2, 3)
    crops = torch.randn(2, 3, 8, 8)
    monkeypatch.setattr(published_folder.Network, 'forward', lambda self, x: self.model(x))
    made = published_folder.onnx_of(network, (8, 8))
    with pytest.raises(PrivacyError, match='computes something else than torch'):
        published_folder._difference(made.data, crops, network(crops).detach() * 1.01)


def test_a_model_that_cannot_be_exported_is_published_without_onnx(source, monkeypatch, capfd):
    monkeypatch.setattr(published_folder.Network, 'forward', lambda self, crops: torch.fft.fft(crops).real)
    cfg = published_folder.inference_config(torch.load(source, weights_only=False)['meta']['cfg'])
    weights = torch.load(source, weights_only=False)['state_dict']
    files, exported, lacking = publish_model._other_files(cfg, weights, 'a')
    assert set(files) == {'config.py', 'a.safetensors'} and exported is None
    assert len(lacking) == 1 and lacking[0].startswith('no ONNX file: ') and 'fft' in lacking[0]
    seen = capfd.readouterr()
    assert 'graph' not in seen.out + seen.err  # torch prints the whole network
    print('still there')
    assert capfd.readouterr().out == 'still there\n'


def text_of(source, change):
    cfg = Config.fromstring(torch.load(source, weights_only=False)['meta']['cfg'], '.py')
    change(cfg)
    return cfg.pretty_text


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda cfg: cfg.test_dataloader.dataset.pipeline.append(dict(type='PublicView')),
            r'pipeline\[\d+\].type=.* needs mmpose_dp',
        ),
        (
            lambda cfg: cfg.model.backbone.update(norm_file='/home/me/norm.pth'),
            'model.backbone.norm_file is a path on this machine',
        ),
        (
            lambda cfg: cfg.update(test_dataloader=None, val_dataloader=None, val_pipeline=None),
            'no test_dataloader.dataset.pipeline',
        ),
    ],
)
def test_what_plain_mmpose_cannot_run_is_refused(source, change, message):
    with pytest.raises(PrivacyError, match=message):
        published_folder.inference_config(text_of(source, change))


@TRANSFORMS.register_module()
class ReadsJoints(BaseTransform):
    """A transform of annotated joints, as a validation pipeline may have."""

    def transform(self, results):
        return dict(results, highest=results['keypoints'].min())


def test_a_pipeline_that_needs_annotations(source):
    """The model could be published, and MMPose failed on the first picture."""
    converter = dict(type='KeypointConverter', num_keypoints=16, mapping=[(i, i) for i in range(16)])
    for step, fault in ((converter, ''), (dict(type='ReadsJoints'), "KeyError: 'keypoints', in ReadsJoints")):
        text = text_of(source, lambda cfg, step=step: cfg.test_dataloader.dataset.pipeline.insert(1, step))
        cfg = published_folder.inference_config(text)
        joints = torch.load(source, weights_only=False)['meta']['dataset_meta']
        assert published_folder.pipeline_fault(cfg, joints) == fault


def test_heads_get_mmposes_names_and_weights_that_do_not_fit_are_refused(source):
    def private(cfg):
        cfg.model.head.type = 'PrivateSimCCHead'
        cfg.model.init_cfg = dict(type='Pretrained', checkpoint='/home/me/start.pth')
        cfg.custom_imports = dict(imports=['mmpose_dp', 'mmpose.models'])

    cfg = published_folder.inference_config(text_of(source, private))
    assert cfg.model.head.type == 'SimCCHead' and cfg.custom_imports.imports == ['mmpose.models']
    weights = torch.load(source, weights_only=False)['state_dict']
    without = {name: value for name, value in weights.items() if 'running_mean' not in name}
    with pytest.raises(PrivacyError, match="norm='group'"):
        published_folder.built(cfg, without)


OWN_PARTS = """
from mmpose.datasets import CocoDataset
from mmpose.models import ResNet
from mmpose.registry import DATASETS, MODELS


@DATASETS.register_module()
class DatasetOfOnesOwn(CocoDataset):
    pass


@MODELS.register_module()
class BackboneOfOnesOwn(ResNet):
    pass
"""


def test_code_of_ones_own_is_imported_only_if_the_model_needs_it(source, tmp_path, monkeypatch):
    """Whoever got the folder of a model of MMPose's, trained on a data set of one's own, could not load its config."""
    (tmp_path / 'parts_of_ones_own.py').write_text(OWN_PARTS)
    monkeypatch.syspath_prepend(tmp_path)

    def own_data(cfg):
        cfg.custom_imports = dict(imports=['mmpose_dp', 'parts_of_ones_own', 'mmpose.models'])
        cfg.dataset_type = cfg.test_dataloader.dataset.type = 'DatasetOfOnesOwn'

    def own_model(cfg):
        own_data(cfg)
        cfg.model.backbone = dict(type='BackboneOfOnesOwn', depth=18)

    cfg = published_folder.inference_config(text_of(source, own_data))
    assert cfg.custom_imports.imports == ['mmpose.models'] and cfg.dataset_type == 'CocoDataset'
    cfg = published_folder.inference_config(text_of(source, own_model))
    assert published_folder.own_modules(cfg) == ['parts_of_ones_own'] and cfg.dataset_type == 'CocoDataset'
    statement = json.loads((source.parent / 'privacy_statement.json').read_text())
    card = published_folder.model_card('x', cfg, statement, 16, ['x.pth'], None)
    assert '# MMPose and parts_of_ones_own; with mmcv-lite' in card
