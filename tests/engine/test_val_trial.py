"""What a single annotation or picture of the validation set would end training with is refused before the first step."""

import copy
import json

import check_config
import numpy as np
import pytest
import train as train_tool

from mmpose_dp.engine.hooks.preflight import refuse_late_failures
from mmpose_dp.engine.val_trial import ends_of
from mmpose_dp.privacy.errors import PrivacyError
from tests.engine.test_preflight import ready
from tests.support.coco_data import CODEC, PIPELINE, content, write
from tests.support.runs import config, tiny

STEPS = [step for step in PIPELINE if step['type'] not in ('RandomFlip', 'GenerateTarget')]
MIDDLE = 3  # neither the first nor the last of eight


def own(synthetic, folder, metric):
    """A training on eight people of five joints, validated on eight others, whose pictures are others too."""
    cfg = tiny(config(synthetic, folder / 'work', 'dpsgd', train_cfg__max_epochs=1, train_cfg__val_interval=1))
    cfg.model.head = dict(
        type='HeatmapHead', in_channels=32, out_channels=5, deconv_out_channels=(4, 4, 4), decoder=CODEC,
        loss=dict(type='KeypointMSELoss', use_target_weight=True),
    )  # fmt: skip
    cfg.model.test_cfg = dict(flip_test=False)
    private = content()
    for i, ann in enumerate(private['annotations']):
        ann['bbox'][0] += 0.1 * i
    cfg.train_dataloader.dataset.private = write(folder / 'train', private)
    cfg.train_dataloader.batch_sampler.expected_batch_size = 4
    cfg.val_dataloader.dataset = dict(write(folder / 'val'), test_mode=True, pipeline=copy.deepcopy(STEPS))
    for path in (folder / 'val/img').iterdir():
        path.write_bytes(path.read_bytes() + b'another')
    cfg.val_evaluator = dict(type=metric)
    cfg.default_hooks.checkpoint.update(save_best=None, rule=None)
    return cfg


@pytest.fixture(scope='module')
def runner(synthetic, tmp_path_factory):
    return ready(own(synthetic, tmp_path_factory.mktemp('own'), 'CocoMetric'))


def validated_on(runner, cfg, **metric):
    """The runner with a validation loop on another data set."""
    runner._val_dataloader = dict(runner.cfg.val_dataloader, dataset=dict(cfg, test_mode=True))
    runner._val_evaluator, runner._val_loop = metric or dict(type='CocoMetric'), dict()
    return runner


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (
            lambda ann: ann.pop('area'),
            "val_evaluator fails on the annotations .*: KeyError: 'area', in CocoMetric. Probably since annotation 4 has no "
            'area: write it there, or use_area=False in the metric',
        ),
        (
            lambda ann: ann['keypoints'].extend([20, 20, 2]),
            'val_dataloader.dataset: annotation 4 has 6 joints and others have 5',
        ),
    ],
    ids=['no area', 'a joint more'],
)
def test_an_annotation_in_the_middle(runner, tmp_path, spoil, message):
    data = content()
    spoil(data['annotations'][MIDDLE])
    with pytest.raises(PrivacyError, match=message):
        refuse_late_failures(validated_on(runner, dict(write(tmp_path, data), pipeline=STEPS)))


def test_a_picture_in_the_middle_that_is_missing(runner, tmp_path):
    validated_on(runner, dict(write(tmp_path), pipeline=STEPS))
    refuse_late_failures(runner)
    (tmp_path / f'img/{MIDDLE:02d}.png').unlink()
    with pytest.raises(PrivacyError, match=r'val_dataloader.dataset: 1 image files .* for example .*/img/03.png'):
        refuse_late_failures(runner)


@pytest.mark.parametrize(
    ('detection', 'message'),
    [
        (
            dict(image_id=99, category_id=1),
            r'KeyError: 99. Probably since .*found\.json \(bbox_file\) has detections in a picture',
        ),
        (
            dict(image_id=1, category_id=2),
            r'found\.json \(bbox_file\) has no detection of a person .*or bbox_file=None',
        ),
    ],
    ids=['of another set', 'of no person'],
)
def test_detections_that_fit_no_picture(runner, tmp_path, detection, message):
    """Those of all of COCO's pictures beside annotations of a part of them, say."""
    (tmp_path / 'found.json').write_text(json.dumps([dict(detection, bbox=[12, 8, 24, 24], score=0.9)]))
    cfg = dict(write(tmp_path / 'set'), bbox_file=str(tmp_path / 'found.json'), pipeline=copy.deepcopy(STEPS))
    cfg['serialize_data'] = True  # as it is by default
    with pytest.raises(PrivacyError, match=message):
        validated_on(runner, cfg).train_loop._build_validation()


def test_a_key_that_no_annotation_should_have_is_not_missed_there(runner, tmp_path):
    steps = [*STEPS[:-1], dict(STEPS[-1], meta_keys=('img_path',))]
    with pytest.raises(PrivacyError, match="KeyError: '[a-z_]+'$"):
        refuse_late_failures(validated_on(runner, dict(write(tmp_path), pipeline=steps)))


def test_a_metric_of_other_joints_is_named(runner, tmp_path):
    """All that was said is that an index is out of bounds."""
    validated_on(runner, dict(write(tmp_path), pipeline=STEPS), type='PCKAccuracy', norm_item='torso')
    with pytest.raises(PrivacyError, match='index 5 is out of bounds.*, in PCKAccuracy'):
        refuse_late_failures(runner)


def test_metrics_keep_nothing_of_it(runner, tmp_path):
    """CocoMetric kept the two people of the trial as those to score, if it had no file of annotations."""
    metric = validated_on(runner, dict(write(tmp_path), pipeline=STEPS)).val_loop.evaluator.metrics[0]
    metric.coco = None
    refuse_late_failures(runner)
    assert metric.coco is None and metric.results == []


def test_every_set_of_a_joined_one_is_tried(runner, tmp_path):
    """Of three sets with a metric each, the second one's had nothing to score, and a right validation was refused."""
    sets = [dict(write(tmp_path / name), test_mode=True, pipeline=[]) for name in 'abc']
    joined = dict(type='CombinedDataset', metainfo=sets[0]['metainfo'], datasets=sets, pipeline=STEPS)
    refuse_late_failures(validated_on(runner, joined))
    assert ends_of(runner.val_loop.dataloader.dataset) == [0, 7, 8, 15, 16, 23]


def test_a_validation_that_fails_later_says_what_is_kept(call, synthetic, tmp_path):
    """It ended in a traceback."""
    own(synthetic, tmp_path, 'PCKAccuracy').dump(tmp_path / 'own.py')
    (tmp_path / f'val/img/{MIDDLE:02d}.png').write_bytes(np.zeros(9, np.uint8).tobytes())
    done = call(train_tool, tmp_path / 'own.py')
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert (
        'mmpose_dp: validation fails: AssertionError: ' in done.stderr
        and 'is no picture that OpenCV reads' in done.stderr
    )
    assert done.stderr.rstrip().endswith('epoch_1.pth is kept: the same command with --resume goes on from there.')
    assert json.loads((tmp_path / 'work/privacy_statement.json').read_text())['steps'] == 2


def test_who_is_left_out_is_said_before_training(call, synthetic, tmp_path):
    """MMPose leaves people out without a word, and all that was to be seen was a smaller number of records."""
    own(synthetic, tmp_path, 'PCKAccuracy').dump(tmp_path / 'own.py')
    path = tmp_path / 'train/own.json'
    data = json.loads(path.read_text())
    for ann in data['annotations'][:2]:
        ann.update(iscrowd='0')
    path.write_text(json.dumps(data))
    page = call(check_config, tmp_path / 'own.py').stdout
    assert 'Samples: 6 of CocoDataset' in page
    assert 'MMPose leaves out annotations: 2 with an iscrowd that is text, which counts as 1' in page
