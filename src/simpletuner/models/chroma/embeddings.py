"""Position and time embeddings of Chroma's transformer."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

TEXT_ROWS = 512  # of a table that is kept; a longer text gets a table of its own
KEPT_TABLES = 8  # 2.6 MB each at 1024 px


def sinusoidal_embedding(positions: Tensor, width: int) -> Tensor:
    """Embed (K,) float32 as (K, width) float32, cosines first.

    Computed in float32, because bf16 rounds 654.3 to 656.
    """
    half = width // 2
    frequencies = torch.exp(
        -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=positions.device) / half
    )
    angles = positions.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rotary_table(axes: Sequence[int], text: int, rows: int, columns: int) -> Tensor:
    """(S, 1, D / 2, 2) float32 on the CPU: cosine, sine.

    Text sits at position (0, 0, 0), patches at (0, row, column).
    """

    def turns(width: int, count: int) -> Tensor:
        # float64 on the CPU: MPS has none, and the angles are shared by every width and size.
        frequencies = 1.0 / (10_000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width))
        angles = torch.outer(torch.arange(count, dtype=torch.float64), frequencies)
        return torch.complex(angles.cos(), angles.sin())

    half = sum(axes) // 2
    still = torch.ones(rows, columns, axes[0] // 2, dtype=torch.complex128)
    down = turns(axes[1], rows)[:, None].expand(rows, columns, -1)
    across = turns(axes[2], columns)[None].expand(rows, columns, -1)
    image = torch.cat((still, down, across), dim=-1).reshape(rows * columns, half)
    table = torch.cat((torch.ones(text, half, dtype=torch.complex128), image))
    return torch.view_as_real(table[:, None].to(torch.complex64))


class RotaryTables:
    """The tables of the latest grids, on the device: one takes 9 ms of a CPU at 1024 px.

    All text rows are equal, so the table for any number of them is a view of one with many.
    """

    def __init__(self, axes: Sequence[int]) -> None:
        self._axes = tuple(axes)
        self._tables: OrderedDict[tuple[int, int, torch.device], Tensor] = OrderedDict()

    def __call__(self, text: int, rows: int, columns: int, device: torch.device) -> Tensor:
        """Return the table (S, 1, D / 2, 2) float32 on the device; do not change it."""
        key = (rows, columns, device)
        table = self._tables.get(key)
        length = text + rows * columns
        if table is None or len(table) < length:
            most = max(text, TEXT_ROWS)
            table = rotary_table(self._axes, most, rows, columns).to(device, non_blocking=True)
            self._tables[key] = table
        self._tables.move_to_end(key)
        if len(self._tables) > KEPT_TABLES:
            self._tables.popitem(last=False)
        return table[len(table) - length :]


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x (B, S, heads, D); pairs of channels are complex numbers in float32.

    Complex multiplication is 4 times cheaper than the same in real numbers. A compiled graph uses
    real numbers, because the compiler fuses them and has no code for complex ones; the results
    differ by one unit in the last place.
    """
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        rotated = multiply_complex_pairs(pairs, table)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return rotated.flatten(-2).to(x.dtype)


def multiply_complex_pairs(pairs: Tensor, table: Tensor) -> Tensor:
    """Multiply (..., 2) by (..., 2) as complex numbers."""
    (real, imaginary), (cosine, sine) = pairs.unbind(-1), table.unbind(-1)
    rotated = (real * cosine - imaginary * sine, real * sine + imaginary * cosine)
    return torch.stack(rotated, dim=-1)
