"""Attacks on public views by somebody who knows everything but the picture: the inversions behind the view audit.

The attacks use the published view only. Must not influence what is released: the figures are computed from originals.
"""

import time
from collections.abc import Sequence

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from scipy.fft import dctn
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from mmpose_dp.datasets.transforms import PublicView
from mmpose_dp.datasets.transforms.public_view import REGION_MODES, window

BANDS = ((0, 4), (4, 8), (8, 16), (16, 64))  # cycles per padded box
# weight of total variation against squared differences of samples, chosen on public pictures to recover the most
_WEIGHTS = {'blur': 5e-4, 'pixelate': 5e-4, 'blur_full_resolution': 5e-3}


def invert_by_tv(
    seen: np.ndarray,
    view: PublicView,
    center: np.ndarray,
    box: float,
    view_box: float | None = None,
    iterations: int = 300,
) -> np.ndarray:
    """The picture with the least total variation that explains the view; kernel, samples, border and box are known.

    Args:
        seen: (H, W, C) uint8, the published view.
        view: the transform that made it; not of a region mode.
        center, box: (2,) and the longer side of the padded box, in pixels.
        view_box: the box that sizes the view, if it is another one.
        iterations: of the solver.

    Returns:
        (H, W, C) uint8. Outside the view's window, ``seen`` as it is.
    """
    assert view.mode not in REGION_MODES
    down, across = window(center, box, seen.shape)
    rows, columns = (view.axis(n, part, view_box or box) for n, part in zip(seen.shape, (down, across)))
    shown = seen[down, across].astype(float)
    samples = np.einsum('rh,hwc,sw->rsc', np.linalg.pinv(rows.show), shown, np.linalg.pinv(columns.show), optimize=True)
    found = _least_tv(samples.round(), rows.keep, columns.keep, _WEIGHTS[view.mode], iterations)
    recovered = seen.copy()
    recovered[down, across] = found[
        down.start - rows.read.start : down.stop - rows.read.start,
        across.start - columns.read.start : across.stop - columns.read.start,
    ]
    return recovered


def _least_tv(samples: np.ndarray, rows: np.ndarray, columns: np.ndarray, weight: float, iterations: int) -> np.ndarray:
    """Minimises |rows x columns' - samples|^2 / 2 + weight * TV(x) over 0 <= x <= 255 by ADMM; the gradients of the colours are
    coupled.

    (R, S, C) samples, (R, H) and (S, W) weights -> (H, W, C) uint8.
    """
    rho = weight / 2
    y = torch.as_tensor(samples).permute(2, 0, 1)
    u, s, v = torch.linalg.svd(torch.as_tensor(rows), full_matrices=False)
    q, t, w = torch.linalg.svd(torch.as_tensor(columns), full_matrices=False)
    gain, known, v, w = (x.float() for x in (torch.outer(s, t), u.T @ y @ q, v, w))
    z = y.float().mean((1, 2))[:, None, None].expand(-1, rows.shape[1], columns.shape[1]).contiguous()
    dual, flow = torch.zeros_like(z), torch.zeros(2, *z.shape)
    for _ in range(iterations):
        start = z - dual
        x = start + v.T @ (gain * (known - gain * (v @ start @ w.T)) / (gain * gain + rho)) @ w
        wanted = 1.6 * x - 0.6 * z + dual
        smooth, flow = _denoised(wanted, weight / rho, flow)
        z = smooth.clamp(0, 255)
        dual = wanted - z
    return z.round().byte().permute(1, 2, 0).numpy()


def _denoised(image: Tensor, weight: float, flow: Tensor, iterations: int = 3) -> tuple[Tensor, Tensor]:
    """Chambolle's projection from the dual field ``flow`` (2, C, H, W): (C, H, W) with less total variation, and the new field."""
    for _ in range(iterations):
        d = _divergence(flow) + image / weight
        slope = torch.zeros_like(flow)
        slope[0, :, :-1], slope[1, :, :, :-1] = d[:, 1:] - d[:, :-1], d[:, :, 1:] - d[:, :, :-1]
        flow = flow + slope / 4
        flow = flow / flow.square().sum((0, 1)).sqrt().clamp_min(1)
    return image + weight * _divergence(flow), flow


def _divergence(flow: Tensor) -> Tensor:
    found = torch.zeros_like(flow[0])
    found[:, :-1] += flow[0, :, :-1]
    found[:, 1:] -= flow[0, :, :-1]
    found[:, :, :-1] += flow[1, :, :, :-1]
    found[:, :, 1:] -= flow[1, :, :, :-1]
    return found


class ViewNetwork(nn.Module):
    """A small network that refines a first reconstruction: (N, 6, H, W) in 0..1, view and reconstruction, with H and W multiples
    of 8, -> (N, 3, H, W). Untrained, it returns the reconstruction itself."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(6 * 64, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.last = nn.Conv2d(width, 3 * 64, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, given: Tensor) -> Tensor:
        """The refined reconstruction."""
        hidden = self.first(nn.functional.pixel_unshuffle(4 * (given - 0.5), 8))
        for block in self.blocks:
            hidden = hidden + block(nn.functional.gelu(hidden))
        return given[:, 3:] + nn.functional.pixel_shuffle(self.last(nn.functional.gelu(hidden)), 8) / 4

    def restore(self, given: np.ndarray) -> np.ndarray:
        """(N, H, W, 6) uint8, views and reconstructions -> (N, H, W, 3) uint8."""
        with torch.no_grad():
            found = torch.cat([self(_as_input(part)) for part in np.array_split(given, -(-len(given) // 16))])
        return (found * 255).clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()


def train_network(originals: np.ndarray, given: np.ndarray, seconds: float, batch_size: int = 16) -> ViewNetwork:
    """A ViewNetwork trained for ``seconds`` on (N, H, W, 3) uint8 public pictures, given their views and reconstructions, (N, H,
    W, 6) uint8."""
    network = ViewNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)
    begun, spent = time.monotonic(), 0.0
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task('network', total=1.0)
        while spent < 1:
            for group in optimizer.param_groups:
                group['lr'] = 2e-3 * (1 + np.cos(np.pi * spent)) / 2
            batch = torch.randint(len(given), (batch_size,)).numpy()
            seen, wanted = _as_input(given[batch]), _as_input(originals[batch])
            if torch.rand(()) < 0.5:
                seen, wanted = seen.flip(3), wanted.flip(3)
            optimizer.zero_grad()
            nn.functional.mse_loss(network(seen), wanted).backward()
            optimizer.step()
            spent = (time.monotonic() - begun) / seconds
            bar.update(task, completed=spent)
    return network.eval()


def _as_input(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255


def figures(originals: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> dict[str, float]:
    """PSNR (dB) and SSIM, means over the pictures, and the share of detail recovered in each of ``BANDS``: 1 minus the energy of
    the difference over that of the original, all pictures together; at least 0."""
    psnr, ssim = [], []
    energy, missed = np.zeros(len(BANDS)), np.zeros(len(BANDS))
    for a, b in zip(originals, found):
        difference = a.astype(float) - b.astype(float)
        psnr.append(10 * np.log10(255**2 / max((difference**2).mean(), 1e-3)))
        ssim.append(structural_similarity(a, b, channel_axis=2))
        energy += _energies(a - a.mean((0, 1)))
        missed += _energies(difference)
    shares = {
        f'{low} to {high} cycles': max(1 - float(m / max(e, 1e-9)), 0.0)
        for (low, high), e, m in zip(BANDS, energy, missed)
    }
    return dict(psnr=float(np.mean(psnr)), ssim=float(np.mean(ssim)), **shares)


def _energies(image: np.ndarray) -> np.ndarray:
    """The energy of (H, W, C) in each band; a cosine of index k has k / 2 cycles."""
    power = (dctn(image.astype(float), axes=(0, 1), norm='ortho') ** 2).sum(2)
    cycles = np.hypot(*np.ogrid[: image.shape[0], : image.shape[1]]) / 2
    return np.array([power[(cycles >= low) & (cycles < high)].sum() for low, high in BANDS])
