"""Many small parameters as one flat tensor, so that one operation updates all of them.

The parameters follow one another; each is padded to a multiple of 256 numbers, so that the blocks
of 8-bit moments and the random bits of every number stay those of the parameter alone. A group is a
run of whole parameters. Weights, gradients and state are gathered for a group, and written back
into the parameters and their own states: what is saved does not show how it was computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simpletuner.training.rounding_noise import CHUNK, RoundingNoise, chunk_keys

ROW = 256  # numbers; a divisor of CHUNK
ROWS_PER_CHUNK = CHUNK // ROW
# Numbers of a group: about a dozen temporary tensors of 32 MB. A LoRA of 65 M numbers has 8 groups.
GROUP_NUMBERS = 1 << 23


@dataclass(frozen=True)
class FlatParameter:
    """A parameter in a layout.

    index: of the parameter in the optimizer. first: position of its first number in the whole
    parameter, a multiple of 256, which is not 0 where the parameter is a shard.
    """

    param: Tensor
    index: int
    first: int

    @property
    def rows(self) -> int:
        return -(-self.param.numel() // ROW)

    @property
    def padding(self) -> int:
        return self.rows * ROW - self.param.numel()


@dataclass(frozen=True)
class FlatGroup:
    """Consecutive parameters of a layout. first_row: of the group in the layout."""

    parameters: tuple[FlatParameter, ...]
    first_row: int
    padding: Tensor | None

    @property
    def numbers(self) -> int:
        return sum(each.rows for each in self.parameters) * ROW

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return tensors of the parameters' shapes as one, (numbers,), with zeros as padding."""
        parts: list[Tensor] = []
        for each, tensor in zip(self.parameters, tensors, strict=True):
            parts.append(tensor.reshape(-1))
            if each.padding:
                parts.append(tensor.new_zeros(each.padding))
        return torch.cat(parts)

    def scatter(self, flat: Tensor, tensors: Sequence[Tensor]) -> None:
        """Write the numbers of `gather` into contiguous tensors."""
        sizes = [
            size for each in self.parameters for size in (each.param.numel(), each.padding) if size
        ]
        parts = iter(flat.split(sizes))
        own = []
        for each in self.parameters:
            own.append(next(parts))
            if each.padding:
                next(parts)
        torch._foreach_copy_([tensor.view(-1) for tensor in tensors], own)

    def clear_padding(self, flat: Tensor) -> None:
        """Set the numbers that belong to no parameter to 0."""
        if self.padding is not None:
            flat.index_fill_(0, self.padding, 0)


class FlatLayout:
    """The groups of some parameters of one dtype and device, and where their random bits are."""

    def __init__(self, parameters: Sequence[FlatParameter], lanes: Tensor) -> None:
        self.parameters = tuple(parameters)
        self._lane_rows = lanes.view(ROWS_PER_CHUNK, ROW)
        device = lanes.device
        # numpy, because the memory plan builds layouts where torch's tensors have no numbers.
        first_chunks = np.array([each.first // CHUNK for each in parameters])
        ends = np.array([each.first + each.rows * ROW for each in parameters])
        counts = -(-ends // CHUNK) - first_chunks
        # Position of each parameter's first chunk, and for each chunk its parameter and its number
        # there.
        before = np.cumsum(counts) - counts
        owners = np.repeat(np.arange(len(parameters)), counts)
        numbers = np.arange(len(owners)) - before[owners] + first_chunks[owners]
        self._chunk_numbers = torch.from_numpy(numbers.astype(np.int32)).to(device)
        self._chunk_owners = torch.from_numpy(owners).to(device)
        # Row by row: its chunk in the layout, and its place within the chunk.
        rows = [np.arange(each.rows) + each.first % CHUNK // ROW for each in parameters]
        chunks = [part // ROWS_PER_CHUNK + start for part, start in zip(rows, before, strict=True)]
        self._chunk_of_row = torch.from_numpy(np.concatenate(chunks)).to(device)
        self._lane_of_row = torch.from_numpy(np.concatenate(rows) % ROWS_PER_CHUNK).to(device)
        self.groups = tuple(self._make_groups(device))

    def _make_groups(self, device: torch.device) -> Iterator[FlatGroup]:
        pending: list[FlatParameter] = []
        row = first_row = 0
        for each in self.parameters:
            if pending and (row - first_row + each.rows) * ROW > GROUP_NUMBERS:
                yield FlatGroup(tuple(pending), first_row, find_padding(pending, device))
                pending, first_row = [], row
            pending.append(each)
            row += each.rows
        yield FlatGroup(tuple(pending), first_row, find_padding(pending, device))

    def noise(self, seed: int, step: int) -> list[GroupNoise]:
        """Return the random bits of each group in a step."""
        keys: dict[int, Tensor] = {}
        return [GroupNoise(self, group, keys, seed, step) for group in self.groups]

    def keys(self, seed: int, step: int, number: int) -> Tensor:
        """Return the random keys of all chunks of the layout, (chunks,) int32."""
        addresses = [(step, each.index) for each in self.parameters]
        return chunk_keys(self._chunk_numbers, self._chunk_owners, seed, addresses, number)

    def words(self, keys: Tensor, rows: slice) -> Tensor:
        """Combine the keys of some rows with the constants of their numbers, (rows, 256) int32."""
        return keys[self._chunk_of_row[rows]][:, None] ^ self._lane_rows[self._lane_of_row[rows]]


def find_padding(parameters: Sequence[FlatParameter], device: torch.device) -> Tensor | None:
    """Return the positions of the padding in a group; None where there is none."""
    if not any(each.padding for each in parameters):
        return None
    ends = np.cumsum([each.rows * ROW for each in parameters])
    positions = [
        np.arange(end - each.padding, end) for each, end in zip(parameters, ends, strict=True)
    ]
    return torch.from_numpy(np.concatenate(positions)).to(device)


class GroupNoise(RoundingNoise):
    """The random bits of a group; part: of its flat tensor, in whole rows."""

    def __init__(
        self, layout: FlatLayout, group: FlatGroup, keys: dict[int, Tensor], seed: int, step: int
    ) -> None:
        super().__init__(layout._lane_rows, seed, step, 0)
        self._layout = layout
        self._first_row = group.first_row
        self._keys = keys  # of all groups, by the number of the hash

    def _hash_input(self, number: int, part: slice) -> tuple[Tensor, int]:
        if number not in self._keys:
            self._keys[number] = self._layout.keys(self._seed, self._address[0], number)
        start, stop = (self._first_row + position // ROW for position in (part.start, part.stop))
        return self._layout.words(self._keys[number], slice(start, stop)), 0
