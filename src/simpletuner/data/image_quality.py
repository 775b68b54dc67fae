"""Sharpness of an image at the size at which it is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

# Variance that rounding to 8 bits adds to the Laplacian: (16 + 4) / 12 levels squared.
ROUNDING_VARIANCE = 20 / 12
MEASURABLE_VARIANCE = 10 * ROUNDING_VARIANCE
MAX_HALVINGS = 4
MIN_SIDE_PX = 16
CONTRAST_PX = 64  # side of the copy in which channels are compared
MAX_BLUR_PX = 2.0 ** (MAX_HALVINGS + 2)


@dataclass(frozen=True)
class Sharpness:
    """Sharpness of one image.

    laplacian_variance: of the channel with most contrast, in levels of 255 squared. blur_px: the
    standard deviation in px of the Gaussian blur that would give edges as soft as the sharpest ones
    of the image; None where the image has no edges.
    """

    laplacian_variance: float
    blur_px: float | None


def measure_sharpness(image: Image.Image) -> Sharpness:
    """Measure an RGB or grey image at its own size.

    The variance of the Laplacian alone depends on the subject: a drawing with few lines is as low
    as a photograph out of focus. So the image is blurred once more by a known amount, and the two
    variances are compared (the idea of F. Crete et al. 2007). The variance of the Laplacian of a
    step edge under a Gaussian blur s falls as s^-3, so after a further blur t the ratio of the two
    is ((s^2 + t^2) / s^2)^1.5, which gives s. Where a strong blur leaves less than rounding to 8
    bits adds, the image is halved first.
    """
    grey = _strongest_channel(image)
    whole = _laplacian_variance(grey)
    scale = 1.0
    for _ in range(MAX_HALVINGS + 1):
        rounding = ROUNDING_VARIANCE / scale**2
        before = _laplacian_variance(grey) - rounding
        if before >= MEASURABLE_VARIANCE / scale**2:
            after = _laplacian_variance(_blur(grey))
            return Sharpness(whole, min(MAX_BLUR_PX, scale * _solve_blur(before, after)))
        if min(grey.shape) < 2 * MIN_SIDE_PX:
            break
        grey, scale = _halve(grey), 2 * scale
    return Sharpness(whole, None)


def _strongest_channel(image: Image.Image) -> np.ndarray:
    """Return the channel of the largest contrast, (H, W) float32.

    Red on green of the same brightness has no edges in grey.
    """
    small = np.asarray(image.resize((CONTRAST_PX, CONTRAST_PX), Image.Resampling.BOX), np.float32)
    if small.ndim == 2:
        return np.asarray(image, np.float32)
    strongest = int(small.std(axis=(0, 1)).argmax())
    return np.asarray(image.getchannel(strongest), np.float32)


def _solve_blur(before: float, after: float) -> float:
    ratio = (before / max(after, 1e-6)) ** (2 / 3)
    return math.inf if ratio <= 1 else 1 / math.sqrt(ratio - 1)


def _laplacian_variance(grey: np.ndarray) -> float:
    """Return the variance of the Laplacian of four neighbours, without the border."""
    inner = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    inner -= 4 * grey[1:-1, 1:-1]
    return float(inner.var(dtype=np.float64))


def _blur(grey: np.ndarray) -> np.ndarray:
    """Blur by the binomial filter 1 4 6 4 1, whose standard deviation is 1 px."""
    rows = grey[:-4] + grey[4:] + 4 * (grey[1:-3] + grey[3:-1]) + 6 * grey[2:-2]
    both = rows[:, :-4] + rows[:, 4:] + 4 * (rows[:, 1:-3] + rows[:, 3:-1]) + 6 * rows[:, 2:-2]
    blurred: np.ndarray = both / np.float32(256)
    return blurred


def _halve(grey: np.ndarray) -> np.ndarray:
    height, width = (side // 2 * 2 for side in grey.shape)
    even = grey[:height, :width]
    mean: np.ndarray = (
        even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]
    ) / np.float32(4)
    return mean
