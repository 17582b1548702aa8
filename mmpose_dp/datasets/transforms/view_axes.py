"""A public view along one axis as two matrices: which samples it keeps of a picture, and how it shows them.

The view and the attacks on it use the same description. Must depend on nothing but the picture's size and the view's scale, and
not on the window that is shown: windows with other sample positions would together hold more than one view.
"""

from dataclasses import dataclass

import cv2
import numpy as np

# Distance of the blur's samples, in sigmas. Closer samples hold what a deconvolution needs: at two sigmas (sigma 8) it gains up
# to 4 dB on people; at three (sigma 6) 1.3 dB, and the view itself is nearer to the picture.
SPACING = 3.0


@dataclass(frozen=True)
class ViewAxis:
    """Pixels start..stop of an axis of ``size`` pixels, seen through a view.

    Attributes:
        read: the pixels that the view reads; they may begin before the window and end after it.
        keep: (S, pixels read), the weights of each sample; each row sums to 1. Samples are rounded to 8 bits.
        show: (pixels shown, S), how samples become pixels; each row sums to 1.
    """

    read: slice
    keep: np.ndarray
    show: np.ndarray

    @classmethod
    def sampled_blur(cls, size: int, start: int, stop: int, sigma: float) -> 'ViewAxis':
        """Samples ``SPACING`` sigmas apart, with Gaussian weights cut off at four sigmas, and cubic interpolation between them. The
        outermost samples are repeated."""
        step = SPACING * sigma
        first, last = np.ceil((np.array([start, stop]) + 0.5) / step - 0.5)
        if first == last:  # no sample is inside: take the last one before it, or the picture's first
            first = max(first - 1, 0)
            last = first + 1
        places = (np.arange(first, last) + 0.5) * step - 0.5
        read = slice(max(int(places[0] - 4 * sigma), 0), min(int(places[-1] + 4 * sigma) + 1, size))
        away = np.arange(read.start, read.stop) - places[:, None]
        weights = np.exp(-0.5 * (away / sigma) ** 2) * (np.abs(away) <= 4 * sigma)
        keep = weights / weights.sum(1, keepdims=True)
        return cls(read, keep, _cubic((np.arange(start, stop) - places[0]) / step, len(places)))

    @classmethod
    def pixelation(cls, size: int, start: int, stop: int, block: float) -> 'ViewAxis':
        """Means over as many blocks of at least ``block`` pixels as fit into the picture; pixels on an edge count in part."""
        count = max(int(size / block), 1)
        edges = np.linspace(0, size, count + 1)
        shown = np.searchsorted(edges, np.arange(start, stop) + 0.5) - 1
        first, last = int(shown[0]), int(shown[-1]) + 1
        read = slice(int(edges[first]), min(int(np.ceil(edges[last])), size))
        pixel = np.arange(read.start, read.stop)
        low, high = edges[first:last, None], edges[first + 1 : last + 1, None]
        shares = (np.minimum(high, pixel + 1) - np.maximum(low, pixel)).clip(0)
        return cls(read, shares / shares.sum(1, keepdims=True), np.eye(last - first)[shown - first])

    @classmethod
    def full_blur(cls, size: int, start: int, stop: int, kernel_size: int, sigma: float) -> 'ViewAxis':
        """The blur of cv2.GaussianBlur on bytes: weights in 1/256, mirrored at the picture's border. Each pixel is a sample."""
        half = kernel_size // 2
        read = slice(max(start - half, 0), min(stop + half, size))
        pixels = np.abs(np.arange(start, stop)[:, None] + np.arange(-half, half + 1))
        period = max(2 * (size - 1), 1)
        pixels = pixels % period
        pixels = np.where(pixels >= size, period - pixels, pixels).clip(read.start, read.stop - 1)
        keep = np.zeros((stop - start, read.stop - read.start))
        np.add.at(keep, (np.arange(stop - start)[:, None], pixels - read.start), _kernel_of_bytes(kernel_size, sigma))
        return cls(read, keep, np.eye(stop - start))


def both_ways(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(H, W, C) -> (R, S, C) by matrices (R, H) and (S, W), rounded to a millionth.

    The order of a sum depends on the window and the machine. In double precision, the rounding makes sums of different order
    equal, ties between two bytes too: otherwise two windows of a picture would show some pixels as different bytes, which
    together say more than one view.
    """
    image = image.astype(np.float64)
    narrow = (rows @ image.reshape(len(image), -1)).reshape(len(rows), *image.shape[1:])
    return np.round(columns @ narrow, 6)


def _cubic(at: np.ndarray, count: int) -> np.ndarray:
    """(n,) positions in units of the samples -> (n, count) weights of Keys' cubic convolution."""
    weights = np.zeros((len(at), count))
    low = np.floor(at).astype(int)
    for sample in (low - 1, low, low + 1, low + 2):
        x = np.abs(at - sample)
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        np.add.at(weights, (np.arange(len(at)), sample.clip(0, count - 1)), np.where(x <= 1, near, far))
    return weights


def _kernel_of_bytes(kernel_size: int, sigma: float) -> np.ndarray:
    """(kernel_size,) weights that cv2 uses on bytes, read from its response to one bright pixel among dark ones."""
    pixel = np.zeros((1, 4 * kernel_size + 1), np.uint8)
    pixel[:, 2 * kernel_size] = 255
    seen = cv2.GaussianBlur(pixel, (kernel_size, 1), sigma)[0].astype(float)
    first = 2 * kernel_size - kernel_size // 2
    return np.round(seen[first : first + kernel_size] * 256 / 255) / 256
