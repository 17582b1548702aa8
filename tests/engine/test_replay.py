"""The same seeds, one record changed: the released sums move by the stated sensitivity at most, and nothing else moves."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch

from mmpose_dp.engine import DPOptimWrapper
from tests.support.runs import train, unvalidated

C = 0.01


@pytest.fixture(scope='module')
def lossless(synthetic, tmp_path_factory):
    """The synthetic set with its pictures as PNG under their old names, so that one pixel can be changed alone."""
    folder = tmp_path_factory.mktemp('lossless')
    shutil.copytree(synthetic, folder, dirs_exist_ok=True)
    for path in (folder / 'images').iterdir():
        path.write_bytes(cv2.imencode('.png', cv2.imread(str(path)))[1].tobytes())
    return folder


def lonely(folder):
    """The number of somebody who is alone in the picture and shows the head."""
    people = json.loads((folder / 'annotations/mpii_train.json').read_text())
    names = [person['image'] for person in people]
    return next(
        i for i, p in enumerate(people) if names.count(p['image']) == 1 and p['joints_vis'][9] and p['joints_vis'][8]
    )


def replayed(folder, work_dir, monkeypatch, method):
    """Everything that a training with fixed seeds and weights that stand still releases, and its batches."""
    sums, batches, views, taken = [], [], [], set()
    whole, added = DPOptimWrapper.finish_step, DPOptimWrapper._add

    def recorded(self, *args):
        assert not self.public_only and self.mechanism.noise_and_norm()[1] == C
        sums.append(torch.zeros(1) if self.mechanism._sum is None else self.mechanism._sum.clone())
        views.append(torch.cat([x.flatten().clone() for x in self._public_sum or [torch.zeros(1)]]))
        batches.append({*taken})
        taken.clear()
        return whole(self, *args)

    def noted(self, last):
        taken.update(last.samples.keys)
        added(self, last)

    monkeypatch.setattr(DPOptimWrapper, 'finish_step', recorded)
    monkeypatch.setattr(DPOptimWrapper, '_add', noted)
    options = dict(
        train_dataloader__batch_size=64,
        train_dataloader__dataset__debug_seed=3,
        optim_wrapper__debug_seed=1,
        optim_wrapper__max_grad_norm=C,
    )
    if method == 'hybrid':
        options.update(
            train_cfg__public_epochs=0,
            train_dataloader__dataset__public_view__mode='face',
            optim_wrapper__projector__dtype='float32',
        )
    cfg = unvalidated(folder, work_dir, method, train_dataloader__batch_sampler__debug_seed=2, **options)
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.0)
    cfg.randomness, cfg.param_scheduler = dict(seed=0), []
    runner = train(cfg)
    monkeypatch.undo()
    kept = {name: value.clone() for name, value in runner.model.state_dict().items()}
    hub = {name: value.data for name, value in runner.message_hub.log_scalars.items() if 'time' not in name}
    return sums, batches, views, kept, hub


def changed(folder, target, change):
    shutil.copytree(folder, target)
    path = target / 'annotations/mpii_train.json'
    people, number = json.loads(path.read_text()), lonely(folder)
    picture = target / 'images' / people[number]['image']
    image = change(people[number], cv2.imread(str(picture)))
    picture.write_bytes(b'' if image is None else cv2.imencode('.png', image)[1].tobytes())
    path.write_text(json.dumps(people))
    return number


def another_person(person, image):
    rng = np.random.default_rng(0)
    person['joints'] = rng.uniform(10, 80, (16, 2)).tolist()
    return rng.integers(0, 255, image.shape, np.uint8)


def nobody(person, image):
    return None


def another_face(person, image):
    x, y = np.mean([person['joints'][8], person['joints'][9]], axis=0).astype(int)
    image[y - 1 : y + 2, x - 1 : x + 2] = 255 - image[y - 1 : y + 2, x - 1 : x + 2]
    return image


@pytest.mark.parametrize(
    ('method', 'change', 'at_most'),
    [('dpsgd', nobody, C), ('dpsgd', another_person, 2 * C), ('hybrid', another_face, 2 * C)],
)
def test_one_record_changed(lossless, tmp_path, monkeypatch, method, change, at_most):
    number = changed(lossless, tmp_path / 'data', change)
    before = replayed(lossless, tmp_path / 'before', monkeypatch, method)
    after = replayed(tmp_path / 'data', tmp_path / 'after', monkeypatch, method)
    moved = 0
    for there, here, batch, _ in zip(before[0], after[0], before[1], after[1], strict=True):
        distance = float((there - here).double().norm())
        if number in batch:
            assert distance <= at_most * (1 + 1e-5)
            moved += distance > 0
        else:
            assert distance == 0  # not one bit
    assert any(number in batch for batch in before[1]), 'choose other seeds'
    assert moved and any(number not in batch for batch in before[1])
    for name, value in before[3].items():  # weights, with lr 0, and buffers
        assert torch.equal(value, after[3][name]), name
    assert len(before[2]) == len(after[2])
    assert all(torch.equal(a, b) for a, b in zip(before[2], after[2]))  # public gradients
    assert before[4].keys() == after[4].keys()
    for name, values in before[4].items():  # whatever was logged
        assert np.array_equal(values, after[4][name]), name
