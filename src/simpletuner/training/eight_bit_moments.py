"""Moments of AdamW in 8 bits: a code for every number and a float32 scale for every 256 of them.

The codes lie the denser the nearer to 0, over seven decades (dynamic quantisation, arXiv
2110.02861). Between two codes the choice is drawn, right on average: the square moves by a
thousandth a step, less than half the way from code to code, and would stand still if it were
rounded to the nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_SIZE = 256
CODE_DECADES = 7


def code_magnitudes(in_the_last: int) -> Tensor:
    """Ascending in (0, 1), evenly spaced within a decade, twice as many in each as in the one below it."""
    found = []
    for decade in range(CODE_DECADES):
        edges = torch.linspace(
            0.1, 1.0, (in_the_last >> (CODE_DECADES - 1 - decade)) + 1, dtype=torch.float64
        )
        found.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - CODE_DECADES + 1))
    return torch.cat(found)


def mean_codes() -> Tensor:
    """256 ascending values, -1, 0 and 1 among them: what never had a gradient stays exactly at 0."""
    positive, one = code_magnitudes(64), torch.ones(1)
    return torch.cat([-one, -positive[1:].flip(0), 0 * one, positive, one]).float()


def square_codes() -> Tensor:
    """255 ascending values up to 1. Not 0: the update divides by the root, which must not vanish alone."""
    return torch.cat([code_magnitudes(128), torch.ones(1)]).square().float()


def quantize_moments(exact: Tensor, table: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """(rows, 256) float32 -> codes (rows, 256) uint8 of a neighbour in `table`, scales (rows,) float32."""
    scales = exact.abs().amax(1)
    share = exact / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    upper = torch.bucketize(share, table, out_int32=True).clamp_(1, len(table) - 1)
    below = table[upper - 1]
    chance = share.sub_(below).div_(table[upper].sub_(below))
    draws = torch.rand(exact.shape, generator=noise, device=exact.device)
    return (upper - (draws >= chance).int()).to(torch.uint8), scales


def dequantize_moments(codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """The inverse: (rows, 256) float32."""
    return table[codes.int()].mul_(scales[:, None])


class EightBitMoments:
    """2.03 bytes per parameter. The largest of each 256 is exact; others lie between neighbouring codes."""

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
        noise: torch.Generator,
    ) -> None:
        rows = slice(part.start // BLOCK_SIZE, -(-part.stop // BLOCK_SIZE))
        exact = {"mean": mean, "square": square}
        for which, table in self._code_tables(mean.device).items():
            full = F.pad(exact[which], (0, -len(mean) % BLOCK_SIZE)).view(-1, BLOCK_SIZE)
            codes, scales = quantize_moments(full, table, noise)
            state[f"{which}_codes"][rows], state[f"{which}_scales"][rows] = codes, scales

    def _code_tables(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self.code_tables:
            self.code_tables[device] = {
                "mean": mean_codes().to(device),
                "square": square_codes().to(device),
            }
        return self.code_tables[device]
