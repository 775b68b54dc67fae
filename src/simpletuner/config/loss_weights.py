"""The value of loss_weight_by_sigma: a name, or points of a curve."""

from __future__ import annotations

import math

WEIGHT_NAMES = ("cosmap", "min_snr")
MAX_POINTS = 100
MAX_WEIGHT = 1000.0


def parse_weight_points(text: str) -> tuple[tuple[float, float], ...]:
    """Return (sigma, weight) in the order of the sigmas, which must increase from 0 to 1.

    Raises ValueError with what is allowed.
    """
    points: list[tuple[float, float]] = []
    for part in text.split(","):
        sigma_text, colon, weight_text = part.partition(":")
        try:
            point = float(sigma_text), float(weight_text)
        except ValueError:
            colon = ""
        if not colon:
            raise ValueError(
                f"{part.strip()!r} is neither {' nor '.join(WEIGHT_NAMES)} nor a point "
                'sigma:weight such as those in "0:0.5, 1:2"'
            )
        if not 0 <= point[0] <= 1 or not 0 <= point[1] <= MAX_WEIGHT:
            raise ValueError(
                f"{part.strip()!r}: sigma must be from 0 to 1 and the weight from 0 to "
                f"{MAX_WEIGHT:g}"
            )
        if points and not point[0] > points[-1][0]:
            raise ValueError(f"{part.strip()!r}: each sigma must be larger than the one before")
        points.append(point)
    if len(points) > MAX_POINTS:
        raise ValueError(f"has {len(points)} points; the limit is {MAX_POINTS}")
    if not any(weight > 0 and math.isfinite(weight) for _, weight in points):
        raise ValueError("all weights are 0, so nothing would be trained")
    return tuple(points)
