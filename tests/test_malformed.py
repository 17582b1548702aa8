"""Whatever is wrong with a config, a file or a ledger: one clear error before training, or a sample that is left out as documented.

Never a traceback from deep inside, and never a step that is not counted.
"""

import json
import random
import re
import shutil
import warnings
from fractions import Fraction
from itertools import product

import cv2
import numpy as np
import pytest
import torch
from mmpose.registry import DATASETS

from mmpose_dp.privacy.accounting import StepEvent
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.ledger import LEDGER_NAME, Ledger
from tests.support.runs import config, tiny, train, train_until

NAN, INF = float('nan'), float('inf')
NO_NUMBER = ['much', NAN, -1]
BUDGET, WRAPPER = 'default_hooks.privacy_budget', 'optim_wrapper'
SAMPLER, DATASET = 'train_dataloader.batch_sampler', 'train_dataloader.dataset'
BAD_SETTINGS = {
    f'{BUDGET}.target_epsilon': [*NO_NUMBER, INF],
    f'{BUDGET}.target_delta': [*NO_NUMBER, 0.5, None],
    f'{BUDGET}.accountant': ['gdp', None],
    f'{BUDGET}.interval': [0, 'often'],
    f'{WRAPPER}.max_grad_norm': [*NO_NUMBER, 0, None],
    f'{WRAPPER}.noise_multiplier': [*NO_NUMBER, [1]],
    f'{WRAPPER}.expected_batch_size': [0, 2.5, 11],
    f'{WRAPPER}.public_weight': [*NO_NUMBER, None],
    f'{WRAPPER}.projector': [dict(rank=0), dict(size=3), 'big'],
    f'{WRAPPER}.schedule': [dict(noise_multiplier=0), dict(sigma=1), 'linear'],
    f'{WRAPPER}.engine': ['fast', 1],
    f'{WRAPPER}.amp_dtype': ['float64', 16],
    f'{WRAPPER}.loss_scale': ['dynamic', 0, 0.5],
    f'{WRAPPER}.debug_seed': ['secret', -1],
    f'{WRAPPER}.clip_grad': [dict(max_norm=1)],
    f'{WRAPPER}.accumulative_counts': [2],
    f'{WRAPPER}.momentum_noise': [1],
    f'{WRAPPER}.public_optimizer': ['AdamW', dict(lr=1e-3)],
    f'{WRAPPER}.norm': ['batch', None],
    f'{WRAPPER}.trainable': ['nothing', 'backbone.stage9.*', 5],
    f'{WRAPPER}.lora_rank': [0, 'two'],
    f'{WRAPPER}.mix_from': ['start', None, 1],
    f'{SAMPLER}.expected_batch_size': [0, 41, 2.5, 'all'],
    f'{SAMPLER}.public_batch_size': [-1, 1.5, 5],
    f'{SAMPLER}.max_rows_per_record': [0, -1, 'few'],
    f'{SAMPLER}.debug_seed': ['secret', -1],
    'train_dataloader.batch_size': [0, 1.5],
    'train_dataloader.in_order': [False],
    f'{DATASET}.privacy_unit': ['person', 3, 'subject'],
    f'{DATASET}.subjects': ['subject_id', 'nowhere.json', 5],
    f'{DATASET}.personal_epsilon': ['wish', 'nowhere.json', 5],
    f'{DATASET}.public_view': [dict(type='PublicView', mode='fog'), dict(type='NoView'), 'blur', dict(mode='blur')],
    f'{DATASET}.private.data_root': ['/nowhere', None],
    f'{DATASET}.private.ann_file': ['nothing.json', ''],
    f'{DATASET}.private.type': ['NoDataset', 'CombinedDataset'],
    'train_cfg.max_epochs': [-1, 'many', 1.5],
    'train_cfg.public_epochs': [99, 0.5, 1],
    'default_hooks.checkpoint.max_keep_ckpts': [1],
    'auto_scale_lr.enable': [True],
    'compile': [True],
    'activation_checkpointing': [['backbone.layer1']],
    'load_from': ['/nowhere.pth'],
}
CASES = [
    pytest.param(
        key, value, marks=[pytest.mark.slow] if number else []
    )  # the first of each key is enough for the everyday run
    for key, values in BAD_SETTINGS.items()
    for number, value in enumerate(values)
]


@pytest.mark.parametrize(('key', 'value'), CASES, ids=lambda x: str(x)[:40])
def test_a_bad_setting_is_named_before_training(synthetic, tmp_path, key, value):
    cfg = tiny(config(synthetic, tmp_path, 'dpsgd', train_cfg__max_epochs=1))
    cfg.merge_from_dict({key: value}) if not isinstance(value, dict) else _put(cfg, key, value)
    with pytest.raises(PrivacyError) as error:
        train(cfg)
    assert len(str(error.value)) > 20 and 'Error:' not in str(error.value).split(':')[0]
    assert not list(tmp_path.glob('*.pth')) and Ledger.read(tmp_path / LEDGER_NAME).steps == 0


def _put(cfg, key, value):
    *folders, name = key.split('.')
    for folder in folders:
        cfg = cfg.setdefault(folder, {})
    cfg[name] = value


# ---- annotations ---------------------------------------------------------------------------------------------------
def _each(change):
    return lambda anns: [change(dict(ann)) for ann in anns]


def _first(change):
    return lambda anns: [change(dict(anns[0])), *anns[1:]]


FIELDS = ('image', 'joints', 'joints_vis', 'center', 'scale')
VALUES = [None, 'text', [], {}, [[1, 2]], NAN, -1e30]
BAD_ANNOTATIONS = {
    **{f'{f} = {str(v)[:12]}': _first(lambda a, f=f, v=v: {**a, f: v}) for f, v in product(FIELDS, VALUES)},
    **{f'no {f}': _each(lambda a, f=f: {k: v for k, v in a.items() if k != f}) for f in FIELDS},
    'empty': lambda anns: [],
    'a number': lambda anns: 5,
    'a dict': lambda anns: {'images': anns},
    'a list of text': lambda anns: ['person'] * 3,
    'a list of lists': lambda anns: [[1, 2], [3]],
    'an image that is not there': _first(lambda a: {**a, 'image': '999999999.jpg'}),
}


@pytest.mark.parametrize('name', BAD_ANNOTATIONS)
def test_bad_annotations(synthetic, tmp_path, name):
    anns = json.loads((synthetic / 'annotations/mpii_train.json').read_text())
    _try_data(synthetic, tmp_path, json.dumps(BAD_ANNOTATIONS[name](anns)))


@pytest.mark.parametrize('text', ['', '[', '{"a": 1', '\x00\x01', 'null', '"x"', '[1, 2', 'nonsense', '[{}]', '[[]]'])
def test_broken_json(synthetic, tmp_path, text):
    _try_data(synthetic, tmp_path, text)


def _try_data(synthetic, folder, annotations, images=None):
    """Either the data set is refused with a clear message, or bad records give no sample and the others give theirs."""
    (folder / 'annotations').mkdir()
    (folder / 'annotations/mpii_train.json').write_text(annotations)
    if images is None:
        (folder / 'images').symlink_to(synthetic / 'images')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            dataset = DATASETS.build(config(folder, folder / 'work', 'dpsgd').train_dataloader.dataset)
        except PrivacyError as error:
            assert 'train_dataloader.dataset' in str(error)
            return None
        records = [dataset[i] for i in range(len(dataset))]
    assert sum(map(len, records)) >= len(records) - 2
    return records


# ---- pictures ------------------------------------------------------------------------------------------------------
def _encoded(image, ending='.jpg'):
    return cv2.imencode(ending, image)[1].tobytes()


PICTURE = _encoded(np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8))
BAD_PICTURES = {
    'empty': b'',
    'text': b'a picture of somebody',
    'zeros': bytes(1000),
    **{f'cut at {n}': PICTURE[:n] for n in (2, 10, 100, 500, 1000, len(PICTURE) - 2)},
    **{f'bytes changed at {n}': PICTURE[:n] + b'\xff\xd8\x00\xff' + PICTURE[n + 4 :] for n in (0, 4, 20, 160, 400)},
    'one pixel': _encoded(np.zeros((1, 1, 3), np.uint8)),
    'grey': _encoded(np.zeros((60, 60), np.uint8)),
    'transparent': _encoded(np.zeros((60, 60, 4), np.uint8), '.png'),
    '16 bit': _encoded(np.zeros((60, 60, 3), np.uint16), '.png'),
    'very long': _encoded(np.zeros((1, 30000, 3), np.uint8)),
}


@pytest.mark.parametrize('name', BAD_PICTURES)
def test_bad_pictures(synthetic, tmp_path, name, capfd):
    shutil.copytree(synthetic / 'images', tmp_path / 'images')
    text = (synthetic / 'annotations/mpii_train.json').read_text()
    (tmp_path / 'images' / json.loads(text)[-1]['image']).write_bytes(BAD_PICTURES[name])
    records = _try_data(synthetic, tmp_path, text, images=True)
    assert records is not None
    if name == 'empty':
        dataset = DATASETS.build(config(tmp_path, tmp_path / 'work', 'dpsgd').train_dataloader.dataset)
        with pytest.warns(UserWarning, match=json.loads(text)[-1]['image'] + ' contributes nothing'):
            dataset[len(dataset) - 1]
    if name in ('empty', 'text', 'zeros', 'cut at 2', 'cut at 10'):
        assert records[-1] == []  # nothing, and no other record in its place
    told = re.findall(r'1 of \d+ picture files are empty or no pictures that OpenCV reads', capfd.readouterr().err)
    assert bool(told) == (name in ('empty', 'text', 'zeros', 'cut at 2', 'bytes changed at 0'))


def test_a_data_set_of_bad_pictures_alone_is_refused_before_training(synthetic, tmp_path):
    shutil.copytree(synthetic / 'images', tmp_path / 'images')
    for path in (tmp_path / 'images').iterdir():
        path.write_bytes(b'')
    text = (synthetic / 'annotations/mpii_train.json').read_text()
    assert _try_data(synthetic, tmp_path, text, images=True) is None


# ---- checkpoints ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def stopped(synthetic, tmp_path_factory):
    """The folder of a training that was interrupted."""
    folder = tmp_path_factory.mktemp('stopped')
    train_until(tiny(config(synthetic, folder, 'dpsgd', train_cfg__val_interval=10)), 6)
    return folder


def _without(*keys):
    return lambda c: {k: v for k, v in c.items() if k not in keys}


def _privacy(**changes):
    return lambda c: {**c, 'privacy': {**c['privacy'], **changes}}


def _ledger(**changes):
    return lambda c: _privacy(ledger={**c['privacy']['ledger'], **changes})(c)


BAD_CHECKPOINTS = {
    **{f'cut to {part}': part for part in (0.0, 0.01, 0.3, 0.9, 0.999)},
    **{f'no {key}': _without(key) for key in ('meta', 'state_dict', 'message_hub', 'privacy')},
    'weights alone': lambda c: c['state_dict'],
    'a list': lambda c: [c],
    'a number': lambda c: 5,
    'privacy is text': lambda c: {**c, 'privacy': 'yes'},
    'privacy is None': lambda c: {**c, 'privacy': None},
    'ledger is None': _privacy(ledger=None),
    'ledger is a list': _privacy(ledger=[1, 2]),
    'ledger of another format': _ledger(format=1),
    'ledger of another training': _ledger(head='0' * 64),
    'ledger with fewer steps': lambda c: _ledger(entries=[[*c['privacy']['ledger']['entries'][0][:2], 1]])(c),
    'ledger with no steps': _ledger(entries=[]),
    'ledger with odd entries': _ledger(entries='none'),
}


@pytest.mark.parametrize('name', BAD_CHECKPOINTS)
def test_bad_checkpoints(synthetic, stopped, tmp_path, name):
    change, path = BAD_CHECKPOINTS[name], tmp_path / 'resumed.pth'
    shutil.copy(stopped / LEDGER_NAME, tmp_path)
    if isinstance(change, float):
        whole = (stopped / 'epoch_1.pth').read_bytes()
        path.write_bytes(whole[: int(change * len(whole))])
    else:
        torch.save(change(torch.load(stopped / 'epoch_1.pth', weights_only=False)), path)
    cfg = tiny(config(synthetic, tmp_path, 'dpsgd', load_from=str(path), resume=True))
    with pytest.raises(PrivacyError):
        train(cfg)
    assert (tmp_path / LEDGER_NAME).read_bytes() == (stopped / LEDGER_NAME).read_bytes()


# ---- ledgers -------------------------------------------------------------------------------------------------------
def test_no_change_of_a_ledger_file_makes_it_count_less(tmp_path):
    """Bytes changed, lines lost, swapped or repeated: refused, unless only the incomplete end of a line is gone."""
    ledger, path, luck = Ledger(), tmp_path / LEDGER_NAME, random.Random(0)
    ledger.keep_at(path)
    ledger.begin_run(privacy_unit='instance', secret_randomness=True)
    for step in range(12):
        ledger.count(StepEvent(1.0 + step // 6, Fraction(1, 7)))
    whole, refused = path.read_bytes(), 0
    for _ in range(300):
        lines = whole.splitlines(True)
        kind, at = luck.choice(['byte', 'drop', 'swap', 'repeat', 'insert']), luck.randrange(len(lines) - 1)
        if kind == 'byte':
            place = luck.randrange(len(whole) - 1)
            data = whole[:place] + bytes([luck.randrange(256)]) + whole[place + 1 :]
        elif kind == 'insert':
            data = b''.join([*lines[:at], luck.choice([b'\n', b'{}\n', b'[]\n', b'null\n', b'7\n']), *lines[at:]])
        else:
            lines[at : at + 2] = {'drop': [lines[at + 1]], 'swap': lines[at : at + 2][::-1], 'repeat': [lines[at]] * 2}[
                kind
            ]
            data = b''.join(lines)
        try:
            assert data == whole or Ledger.parse(data).head == ledger.head
        except PrivacyError:
            refused += 1
    assert refused > 250
