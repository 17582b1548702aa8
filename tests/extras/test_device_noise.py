"""ChaCha20 against RFC 8439, and the noise made from it, on the CPU."""

import os

import numpy as np
import pytest
import torch
from scipy import stats

from mmpose_dp.extras import device_noise
from mmpose_dp.extras.device_noise import ChaCha20, DeviceRandomSource
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.noise import RandomSource

CPU = torch.device('cpu')


def stream(key, nonce=bytes(12), counter=0, count=1):
    return ChaCha20(key, CPU, nonce, counter).blocks(count).T.contiguous().numpy().tobytes()


def test_the_quarter_round_of_the_rfc():
    """Section 2.1.1."""
    words = [0x11111111, 0x01020304, 0x9B8D6F43, 0x01234567]
    rows = [torch.from_numpy(np.full((4, 1), word, np.uint32).view(np.int32)) for word in words]
    device_noise._quarter_rounds(*rows)
    want = [0xEA2A92F4, 0xCB1CF8CE, 0x4581472E, 0x5881C4BB]
    assert [set(row.numpy().view(np.uint32).ravel().tolist()) for row in rows] == [{word} for word in want]


def test_the_blocks_of_the_rfc():
    """Section 2.3.2; appendix A.1, vectors 1 and 2."""
    nonce = bytes.fromhex('000000090000004a00000000')
    assert stream(bytes(range(32)), nonce, 1) == bytes.fromhex(
        '10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e'
        'd2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e'
    )
    assert stream(bytes(32), count=2) == bytes.fromhex(
        '76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7'
        'da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586'
        '9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed'
        '29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f'
    )


def test_a_counter_is_used_once_under_a_key():
    one, key = ChaCha20(bytes(range(32)), CPU), bytes(range(32))
    parts = torch.cat([one.blocks(count) for count in (1, 5, 3, 7)], 1)
    assert torch.equal(parts, ChaCha20(key, CPU).blocks(16))
    assert len({tuple(block) for block in parts.T.tolist()}) == 16
    last = ChaCha20(key, CPU, counter=2**32 - 2)
    assert len({tuple(block) for block in (*last.blocks(2).T.tolist(), *parts.T.tolist())}) == 18
    with pytest.raises(OverflowError, match='another key'):
        last.blocks(1)


@pytest.mark.parametrize('secure_mode', [False, True])
def test_noise_of_a_device_is_standard_normal(secure_mode, monkeypatch):
    monkeypatch.setattr(device_noise, '_BLOCKS', 1000)  # several parts
    monkeypatch.setattr(os, 'urandom', lambda count: bytes(range(count)))
    sample = DeviceRandomSource(secure_mode=secure_mode).gaussian_on(CPU, 300_001).numpy()
    assert sample.shape == (300_001,) and sample.dtype == np.float32
    assert stats.kstest(sample, 'norm').pvalue > 1e-3
    for wrong in (0.98, 1.02):
        assert stats.kstest(sample * wrong, 'norm').pvalue < 1e-3
    if not secure_mode:  # what is made of several numbers has as many values
        assert len(np.unique(sample)) > 0.9 * len(sample)
    for lag in (1, 2666, 5333):
        assert abs(np.corrcoef(sample[:-lag], sample[lag:])[0, 1]) < 0.01
        assert abs(np.corrcoef(sample[:-lag] ** 2, sample[lag:] ** 2)[0, 1]) < 0.01


def test_secure_mode_makes_each_number_from_four_of_their_own(monkeypatch):
    made, four = [], device_noise._normals
    monkeypatch.setattr(device_noise, '_normals', lambda *a: made.extend(four(*a)) or iter(made))
    got = DeviceRandomSource(secure_mode=True).gaussian_on(CPU, 10)
    assert len(made) == 4
    assert torch.equal(got, torch.stack(made).sum(0).div(2)[:10])
    assert abs(np.corrcoef(torch.stack(made).numpy()) - np.eye(4)).max() < 1  # none of them twice


def test_the_radius_is_as_fine_as_on_the_cpu():
    """From 8.57 down to nearly 0, nowhere infinite: words are high, low, angle."""
    words = torch.tensor([-(2**31), 2**31 - 1, 0, -(2**31), 2**31 - 1, 0, 0, 0, 0], dtype=torch.int32)
    cosine, sine = next(device_noise._normals(words, 3, 1)).view(2, 3)
    want = [(-2 * np.log(u)) ** 0.5 for u in (2.0**-54, 1 - 2.0**-54, 0.5 + (2**20 + 0.5) * 2.0**-53)]
    np.testing.assert_allclose(cosine.numpy(), want, rtol=1e-6)
    assert cosine[0] > 8.6 and sine.abs().max() == 0


def test_each_call_has_a_key_of_its_own():
    keys, urandom = [], os.urandom
    source, tensors = DeviceRandomSource(), [torch.zeros(3), torch.zeros(2, 2)]
    assert not torch.equal(source.gaussian_on(CPU, 8), source.gaussian_on(CPU, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'urandom', lambda count: keys.append(urandom(count)) or keys[-1])
        source.gaussian_on(CPU, 8), source.gaussian_on(CPU, 8)
    assert len({*keys}) == 2 and {len(key) for key in keys} == {32}
    source.add_gaussian(tensors, 1.0)
    assert all(x.all() for x in tensors)


def test_on_the_cpu_and_with_a_debug_seed_the_stream_is_as_it_was():
    ours, plain = [torch.zeros(5)], [torch.zeros(5)]
    DeviceRandomSource(3).add_gaussian(ours, 2.0)
    RandomSource(3).add_gaussian(plain, 2.0)
    assert torch.equal(ours[0], plain[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('secure_mode', [False, True])
def test_noise_on_a_gpu(secure_mode):
    device = torch.device('cuda')
    key = bytes(range(32))
    assert torch.equal(ChaCha20(key, device).blocks(9).cpu(), ChaCha20(key, CPU).blocks(9))
    tensors = [torch.zeros(100_000, device=device), torch.zeros(3, 100_001, device=device)]
    DeviceRandomSource(secure_mode=secure_mode).add_gaussian(tensors, 2.0)
    sample = torch.cat([x.flatten() for x in tensors]).cpu().numpy() / 2
    assert stats.kstest(sample, 'norm').pvalue > 1e-6


def test_a_device_that_computes_something_else_is_refused(monkeypatch):
    device_noise.check_device.cache_clear()
    device_noise.check_device(torch.device('cpu'))
    whole = device_noise.ChaCha20.blocks
    calls = []

    def wrong(self, count):
        calls.append(count)
        return whole(self, count) + (len(calls) > 1)

    monkeypatch.setattr(device_noise.ChaCha20, 'blocks', wrong)
    device_noise.check_device.cache_clear()
    with pytest.raises(PrivacyError, match='does not compute ChaCha20'):
        device_noise.check_device(torch.device('cpu'))
    device_noise.check_device.cache_clear()
