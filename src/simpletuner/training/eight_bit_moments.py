"""Moments of AdamW in 8 bits: a code for every number and a float32 scale for every 256 numbers.

The codes are denser near 0 and span seven decades (dynamic quantisation, arXiv 2110.02861). The
choice between two neighbouring codes is random and right on average: the mean of the square changes
by a thousandth per step, less than half the distance between two codes, and would never change if
it were rounded to the nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from simpletuner.training.rounding_noise import RoundingNoise

BLOCK_SIZE = 256
CODE_DECADES = 7


def code_magnitudes(codes_in_last_decade: int) -> Tensor:
    """Return ascending codes in (0, 1), evenly spaced within each decade.

    Each decade has twice as many codes as the one below it.
    """
    decades = []
    for decade in range(CODE_DECADES):
        edges = torch.linspace(
            0.1, 1.0, (codes_in_last_decade >> (CODE_DECADES - 1 - decade)) + 1, dtype=torch.float64
        )
        decades.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - CODE_DECADES + 1))
    return torch.cat(decades)


def mean_codes() -> Tensor:
    """Return 256 ascending values, with -1, 0 and 1.

    A moment that never had a gradient is exactly 0.
    """
    positive, largest = code_magnitudes(64), torch.ones(1)
    return torch.cat([-largest, -positive[1:].flip(0), 0 * largest, positive, largest]).float()


def square_codes() -> Tensor:
    """Return 255 ascending values up to 1.

    0 is not among them: the update divides by the root, which must not be 0 while the mean is not.
    """
    return torch.cat([code_magnitudes(128), torch.ones(1)]).square().float()


def quantize_moments(
    exact: Tensor, table: Tensor, draw_uniform: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return codes (rows, 256) uint8 and scales (rows,) float32 for (rows, 256) float32 numbers.

    Each code is that of one of the two neighbours in `table`. draw_uniform: returns as
    many random numbers in [0, 1), which choose; it is called late, to need less memory.
    """
    scales = exact.abs().amax(1)
    scaled = exact / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    upper = torch.bucketize(scaled, table, out_int32=True).clamp_(1, len(table) - 1)
    below = table[upper - 1]
    probability = scaled.sub_(below).div_(table[upper].sub_(below))
    del below  # memory, here and below: a chunk's tensors are the highest moment at full rank
    is_lower = draw_uniform().view(exact.shape) >= probability
    return upper.sub_(is_lower.view(torch.uint8)).to(torch.uint8), scales


def dequantize_moments(codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """Return the numbers (rows, 256) float32 from their codes and scales."""
    return table[codes.int()].mul_(scales[:, None])


class EightBitMoments:
    """Moments in 2.03 bytes per parameter; the largest of each 256 numbers is exact."""

    per_weight = False

    def __init__(self) -> None:
        self.code_tables: dict[torch.device, dict[str, Tensor]] = {}

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        rows, device = -(-param.numel() // BLOCK_SIZE), param.device
        codes = {f"{which}_codes": (rows, BLOCK_SIZE) for which in ("mean", "square")}
        zero = {
            key: torch.zeros(shape, dtype=torch.uint8, device=device)
            for key, shape in codes.items()
        }
        return zero | {
            f"{which}_scales": torch.zeros(rows, device=device) for which in ("mean", "square")
        }

    def read(self, state: dict[str, Tensor], part: slice) -> tuple[Tensor, Tensor]:
        rows = slice(part.start // BLOCK_SIZE, -(-part.stop // BLOCK_SIZE))
        mean, square = (
            dequantize_moments(state[f"{which}_codes"][rows], state[f"{which}_scales"][rows], table)
            for which, table in self._code_tables(state["mean_codes"].device).items()
        )
        count = part.stop - part.start
        return mean.view(-1)[:count], square.view(-1)[:count]

    def write(
        self,
        state: dict[str, Tensor],
        part: slice,
        mean: Tensor,
        square: Tensor,
        noise: RoundingNoise,
    ) -> None:
        rows = slice(part.start // BLOCK_SIZE, -(-part.stop // BLOCK_SIZE))
        exact = {"mean": mean, "square": square}
        padding = -len(mean) % BLOCK_SIZE
        # Padding gets random bits too, so that each row of 256 has those of its place.
        padded = slice(part.start, part.stop + padding)
        for number, (which, table) in enumerate(self._code_tables(mean.device).items(), 1):
            full = F.pad(exact[which], (0, padding)) if padding else exact[which]
            codes, scales = quantize_moments(
                full.view(-1, BLOCK_SIZE), table, partial(noise.uniform, number, padded)
            )
            state[f"{which}_codes"][rows], state[f"{which}_scales"][rows] = codes, scales

    def _code_tables(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self.code_tables:
            self.code_tables[device] = {
                "mean": mean_codes().to(device),
                "square": square_codes().to(device),
            }
        return self.code_tables[device]
