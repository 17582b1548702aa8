"""ChaCha20 against RFC 8439, and the noise made from it, on the CPU."""

import os

import numpy as np
import pytest
import torch
from scipy import stats

from mmpose_dp.extras import device_noise
from mmpose_dp.extras.device_noise import ChaCha20, DeviceRandomSource
from mmpose_dp.privacy.errors import PrivacyError
from mmpose_dp.privacy.noise import RandomSource, grid_of

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


def on_device(count, device=CPU):
    """``count`` numbers, as a step on a GPU adds them."""
    numbers = torch.zeros(count, device=device)
    DeviceRandomSource().add_on_device(numbers, 1.0)
    return numbers


def test_noise_of_a_device_is_standard_normal(monkeypatch):
    monkeypatch.setattr(device_noise, '_PAIRS', 50_000)  # several parts
    monkeypatch.setattr(os, 'urandom', lambda count: bytes(range(count)))
    sample = on_device(300_001).numpy()
    assert sample.shape == (300_001,) and sample.dtype == np.float32
    assert stats.kstest(sample, 'norm').pvalue > 1e-3
    for wrong in (0.98, 1.02):
        assert stats.kstest(sample * wrong, 'norm').pvalue < 1e-3
    for lag in (1, 50_000, 100_000):
        assert abs(np.corrcoef(sample[:-lag], sample[lag:])[0, 1]) < 0.01
        assert abs(np.corrcoef(sample[:-lag] ** 2, sample[lag:] ** 2)[0, 1]) < 0.01


def test_sums_on_a_device_are_noised_and_rounded_as_on_the_cpu(monkeypatch):
    monkeypatch.setattr(os, 'urandom', lambda count: bytes(range(count)))
    deviation, sums = 0.3, torch.randn(1001)
    noised = sums.clone()
    DeviceRandomSource().add_on_device(noised, deviation)
    assert stats.kstest(((noised - sums) / deviation).numpy(), 'norm').pvalue > 1e-3
    grid = grid_of(deviation)
    assert torch.equal(noised, (noised / grid).round() * grid)


def test_the_numbers_are_those_of_the_cpu(monkeypatch):
    words = np.random.default_rng(0).integers(0, 2**64, 20, np.uint64)
    words[:3] = 0, 2**64 - 1, 2**63
    high, low = (
        (words >> np.uint64(32)).astype(np.int64) - 2**31,
        (words & np.uint64(2**32 - 1)).astype(np.int64) - 2**31,
    )
    halves = np.stack([high.reshape(2, 10), low.reshape(2, 10)], 1).astype(np.int32)
    source = RandomSource()
    monkeypatch.setattr(source, 'uint64', lambda count, read: words)
    got = device_noise._normals(torch.from_numpy(halves).flatten(), 10).numpy()
    np.testing.assert_allclose(got, source._normal(20), rtol=1e-12, atol=1e-12)
    assert np.hypot(*got.reshape(2, 10)).max() > 9.4 and np.isfinite(got).all()


def test_each_call_has_a_key_of_its_own():
    keys, urandom = [], os.urandom
    source, numbers = DeviceRandomSource(), torch.zeros(21)
    assert not torch.equal(on_device(8), on_device(8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'urandom', lambda count: keys.append(urandom(count)) or keys[-1])
        on_device(8), on_device(8)
    assert len({*keys}) == 2 and {len(key) for key in keys} == {32}
    source.add_gaussian(numbers, 1.0)
    assert numbers.view(3, 7).any(0).all()  # one noise in 5,000 is rounded to 0


def test_on_the_cpu_and_with_a_debug_seed_the_stream_is_as_it_was():
    ours, plain = torch.zeros(5), torch.zeros(5)
    DeviceRandomSource(3).add_gaussian(ours, 2.0)
    RandomSource(3).add_gaussian(plain, 2.0)
    assert torch.equal(ours, plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_noise_on_a_gpu():
    device = torch.device('cuda')
    key = bytes(range(32))
    assert torch.equal(ChaCha20(key, device).blocks(9).cpu(), ChaCha20(key, CPU).blocks(9))
    numbers = torch.zeros(400_003, device=device)
    DeviceRandomSource().add_gaussian(numbers, 2.0)
    sample = numbers.cpu().numpy() / 2
    assert stats.kstest(sample, 'norm').pvalue > 1e-7  # secret: by chance once in 10 million runs


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
