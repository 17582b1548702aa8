"""DPAdamBC: AdamW without noise, and with noise what AdamW would do without it."""

import pytest
import torch
from runs import train, train_until, unvalidated

from mmpose_dp.engine import DPAdamBC, DPOptimWrapper
from mmpose_dp.privacy.errors import PrivacyError

SETTINGS = dict(lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)


def moved(optimizer_type, gradients, noise_std=None, **settings):
    """Where a parameter of ones ends under these gradients."""
    param = torch.nn.Parameter(torch.ones_like(gradients[0]))
    optimizer = optimizer_type([param], **{**SETTINGS, **settings})
    for number, gradient in enumerate(gradients):
        if noise_std is not None:
            optimizer.noise_std = noise_std[number]
        param.grad = gradient
        optimizer.step()
    return param.detach()


def test_without_noise_it_is_adamw():
    gradients = torch.randn(7, 50, dtype=torch.float64)
    assert torch.allclose(moved(DPAdamBC, gradients), moved(torch.optim.AdamW, gradients), rtol=1e-12)


@pytest.mark.parametrize('deviations', [[1.0] * 400, [2.0] * 100 + [0.5] * 300])
def test_the_noise_is_taken_off_the_second_moments(deviations):
    """Entries of 3 and 0.3 under noise of about 1 move alike without noise and under it, and not so in AdamW."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.tensor([3.0, 0.3]).repeat_interleave(2000).expand(400, -1)
    noisy = clean + torch.tensor(deviations)[:, None] * torch.randn(clean.shape, generator=generator)

    def travelled(optimizer_type, gradients, *noise_std):
        """The mean way of the large entries and of the small ones."""
        end = moved(optimizer_type, gradients, *noise_std, betas=(0.9, 0.999), weight_decay=0.0, lr=1e-3)
        return (1 - end).view(2, -1).mean(1).tolist()

    wanted, plain = travelled(torch.optim.AdamW, clean), travelled(torch.optim.AdamW, noisy)
    corrected = travelled(DPAdamBC, noisy, deviations)
    assert corrected[0] == pytest.approx(wanted[0], rel=0.05)
    assert plain[1] < 0.4 * wanted[1] and corrected[1] > 1.5 * plain[1]  # chance is left of a small second moment


def test_a_second_moment_below_the_noise_is_held_up_by_the_floor():
    moves = 1 - moved(DPAdamBC, torch.full((1, 1), 0.5), [1.0], weight_decay=0.0, floor=0.25)
    assert moves.item() == pytest.approx(1e-2 * 0.5 / 0.25**0.5, rel=1e-5)
    with pytest.raises(ValueError, match='floor'):
        DPAdamBC([torch.nn.Parameter(torch.ones(1))], floor=0.0)


def test_the_wrapper_tells_the_noise_and_a_resume_keeps_the_state(synthetic, tmp_path):
    settings = dict(
        train_cfg__max_epochs=3,
        train_cfg__public_epochs=1,
        optim_wrapper__projector=None,
        optim_wrapper__public_optimizer=None,
        optim_wrapper__optimizer=dict(_delete_=True, type='DPAdamBC', lr=1e-3),
    )
    wrapper = train_until(unvalidated(synthetic, tmp_path, 'hybrid', **settings), 5).optim_wrapper
    assert wrapper.optimizer.noise_std == 0  # public steps alone
    wrapper = train(unvalidated(synthetic, tmp_path, 'hybrid', resume=True, **settings)).optim_wrapper
    noise_std = wrapper.noise_multiplier * wrapper.max_grad_norm / wrapper.expected_batch_size
    assert wrapper.optimizer.noise_std == noise_std > 0
    states = list(wrapper.optimizer.state.values())
    assert {state['step'] for state in states} == {13}  # 5 public and 8 private
    assert states[0]['noise_avg_sq'] == pytest.approx((1 - 0.999**8) * noise_std**2)


def test_a_projector_is_refused():
    param = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(PrivacyError, match=r'DPAdamBC.*write optim_wrapper.projector=None'):
        DPOptimWrapper(DPAdamBC([param]), max_grad_norm=1.0, projector=dict(rank=2))
