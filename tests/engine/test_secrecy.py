"""Nothing beside the noised weights leaves a private batch, unless it is asked for, and then the statement says so."""

import json
import struct

import numpy as np
import pytest
import torch
from mmengine.runner import Runner

from mmpose_dp.datasets import PublicPrivateDataset
from mmpose_dp.engine import DPOptimWrapper
from mmpose_dp.models import FeatureMaskingHead
from mmpose_dp.privacy.noise import RandomSource
from tests.support.runs import config, logged, tiny, train, unvalidated

MARK = 7919.0  # added to private losses, and to no gradient: public losses and other numbers of a training are near none of them


def everything(folder):
    """Every byte of every file, and of the tensors inside checkpoints, which torch stores as they are."""
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def run(synthetic, tmp_path_factory):
    """A finished hybrid training, and what it must keep to itself."""
    secret = dict(losses=[], noise=[], pictures=[])
    taken, bits, packed = DPOptimWrapper._taken, RandomSource.uint64, PublicPrivateDataset._packed
    alone = FeatureMaskingHead._loss_of_sample

    def marked(self, feats, sample, config):
        found = alone(self, feats, sample, config)
        private = sample.metainfo.get('dp_record', 0) is not None
        return {name: x + MARK if private and 'loss' in name else x for name, x in found.items()}

    def losses(self):
        last = taken(self)
        secret['losses'].append(torch.stack(last.losses).detach()[last.samples.private].double())
        return last

    def noise(self, *args):
        sampled = bits(self, *args)
        secret['noise'].append(sampled.tobytes()[:32])
        return sampled

    def picture(self, part, number, seeds):
        found = packed(self, part, number, seeds)
        if found is not None and part is self.private:
            secret['pictures'].append(found['inputs'].numpy())
        return found

    folder = tmp_path_factory.mktemp('secrecy')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureMaskingHead, '_loss_of_sample', marked)
        patch.setattr(DPOptimWrapper, '_taken', losses)
        patch.setattr(RandomSource, 'uint64', noise)
        patch.setattr(PublicPrivateDataset, '_packed', picture)
        train(tiny(config(synthetic, folder)))
    return folder, secret


def test_no_private_loss_is_in_any_byte(run):
    folder, secret = run
    files, found = everything(folder), 0
    losses = torch.cat(secret['losses'])
    batches = [x.mean() for x in secret['losses'] if len(x)] + [x.sum() for x in secret['losses'] if len(x)]
    # a blank sample's loss can be 0, and marked
    for value in [x for x in map(float, [*losses, *batches]) if x not in (0.0, MARK)]:
        assert value > MARK
        text = np.format_float_positional(value, unique=True)
        # 8 characters are 3 decimals: none of a million bytes is there by chance, and a log line has 4
        shapes = [struct.pack('<d', value), struct.pack('>d', value), text[:8].encode()]
        for path, data in files.items():
            assert not any(shape in data for shape in shapes), (path, value)
        found += 1
    assert found > 50
    for x in secret['losses']:  # several together, as in a tensor
        if len(x) > 1 and x.any():  # a blank sample's loss can be 0
            assert not any(x.float().numpy().tobytes() in data for data in files.values())


def test_no_noise_and_no_seeds_are_in_any_byte(run):
    folder, secret = run
    files = everything(folder)
    long = [sampled for sampled in secret['noise'] if len(sampled) == 32]
    assert len(long) > 20
    for sampled in long:
        assert not any(sampled in data for data in files.values())


def test_no_private_picture_is_in_any_byte(run, synthetic):
    folder, secret = run
    files = everything(folder)
    assert len(secret['pictures']) > 20
    for image in secret['pictures']:
        middle = image[:, image.shape[1] // 2, 16:48]
        if len(np.unique(middle[0])) < 8:
            continue  # plain background is everywhere
        for line in (middle[0], middle.T):
            for kind in (np.uint8, np.float32):
                assert not any(np.ascontiguousarray(line, kind).tobytes() in data for data in files.values())
    for path in (synthetic / 'images').iterdir():
        head = path.read_bytes()[-200:]
        assert not any(head in data for data in files.values())


def test_the_search_finds_what_is_there(run):
    """Of the searcher: a public loss, which may be logged, is found by it."""
    folder, _ = run
    value = logged(folder)['loss_public'][0]
    assert any(
        struct.pack('<d', value) in data or f'{value:.6f}'[:7].encode() in data for data in everything(folder).values()
    )


def test_private_metrics_on_request_and_said_so(synthetic, tmp_path):
    options = dict(default_hooks__privacy_budget__expose_private_metrics=True, train_cfg__max_epochs=1)
    train(tiny(config(synthetic, tmp_path, 'dpsgd', **options)))
    assert {'loss_private', 'acc_pose_private'} <= set(logged(tmp_path))
    statement = json.loads((tmp_path / 'privacy_statement.json').read_text())
    assert 'message hub' in statement['released'] and any(
        'expose_private_metrics' in x for x in statement['not_covered']
    )


def test_losses_of_an_earlier_training_in_the_process_stay_out(synthetic, tmp_path):
    """Two runners made in the same second under one name share a message hub, and checkpoints hold it."""
    first, second = (Runner.from_cfg(unvalidated(synthetic, tmp_path, train_cfg__max_epochs=1)) for _ in range(2))
    second.message_hub = first.message_hub
    first.message_hub.update_scalar('train/loss', 0.123)
    second.train()
    kept = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)['message_hub']['log_scalars']
    assert 'train/loss' not in kept and 'train/lr' in kept
