"""Trained parameters of which every rank holds some rows, and the exchange of whole tensors.

FSDP2 cuts the first dimension into one part for each rank: ceil(rows / ranks) rows, the last parts
are shorter or empty. In the order of the flat parameter a part is one contiguous range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from simpletuner.models.weights.tensor_files import WholeTensor
from simpletuner.training.eight_bit_moments import BLOCK_SIZE
from simpletuner.training.world import World

Shape = Sequence[int]


def row_ranges(rows: int, ranks: int) -> list[range]:
    """Return the rows of each rank, as FSDP2 divides them."""
    per_rank = -(-rows // ranks)
    starts = [min(rank * per_rank, rows) for rank in range(ranks + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


@dataclass(frozen=True, eq=False)
class ParameterShard:
    """One trained parameter. shape: of the whole. rows: of each rank.

    distributed: the parameter in the network, as FSDP2 holds it. local: this rank's rows as a plain
    parameter that shares its memory, which optimizer, average and checkpoint work with. owner: the
    rank that steps the whole parameter and holds its optimizer state; None where every rank steps
    its own rows.
    """

    name: str
    shape: tuple[int, ...]
    rows: tuple[range, ...]
    distributed: nn.Parameter
    local: nn.Parameter
    owner: int | None

    @property
    def row_counts(self) -> list[int]:
        return [len(rows) for rows in self.rows]

    def first_number(self, rank: int) -> int:
        """Return the position of the rank's first number in the flat parameter."""
        return self.rows[rank].start * math.prod(self.shape[1:])

    def stored_rows(self, shape: Shape, rank: int) -> slice:
        """Return the rank's rows of a stored tensor: of the parameter's shape, or of its state.

        The 8-bit states have one row for each 256 numbers of the flat parameter.
        """
        rows = self.rows[rank]
        if tuple(shape) == self.shape:
            return slice(rows.start, rows.stop)
        first = self.first_number(rank)
        count = len(rows) * math.prod(self.shape[1:])
        return slice(-(-first // BLOCK_SIZE), -(-(first + count) // BLOCK_SIZE))


def _is_matrix(shape: Shape, rows: Sequence[range]) -> bool:
    return len(shape) == 2


def _splits_blocks(shape: Shape, rows: Sequence[range]) -> bool:
    """Return whether a boundary between ranks is inside one of the 256-number blocks."""
    columns, numbers = math.prod(shape[1:]), math.prod(shape)
    return any(
        part.start * columns % BLOCK_SIZE and part.start * columns < numbers for part in rows
    )


# Optimizers whose update of a parameter needs all of it at once -> whether this parameter does.
# Muon orthogonalises matrices. Adafactor takes means over rows and columns and the RMS of weights
# and update. The 8-bit states have one scale for each 256 numbers of the flat parameter.
NEEDS_WHOLE: Mapping[str, Callable[[Shape, Sequence[range]], bool]] = {
    "muon": _is_matrix,
    "adafactor": lambda shape, rows: True,
    "adamw_8bit": _splits_blocks,
}


def assign_owners(
    shapes: Mapping[str, Sequence[int]], ranks: int, optimizer: str
) -> dict[str, int | None]:
    """Return name -> the rank that steps the whole parameter; None for steps by rows.

    Each parameter goes to the rank with the fewest numbers so far, so every rank computes the same.
    """
    needs_whole = NEEDS_WHOLE.get(optimizer)
    loads = [0] * ranks
    owners: dict[str, int | None] = {}
    # A greedy division: the difference between two ranks is at most the largest one.
    for name, shape in shapes.items():
        owners[name] = None
        if needs_whole is not None and needs_whole(shape, row_ranges(shape[0], ranks)):
            owner = loads.index(min(loads))
            loads[owner] += math.prod(shape)
            owners[name] = owner
    return owners


def gather_rows(world: World, part: Tensor, counts: Sequence[int], to: int) -> Tensor | None:
    """Return the whole tensor on rank `to`, on the device of the part; None on the other ranks.

    part: this rank's rows. counts: rows of each rank.
    """
    if world.rank != to:
        if part.numel():
            world.send(part.contiguous(), to)
        return None
    whole = part.new_empty(sum(counts), *part.shape[1:])
    for rank, rows in enumerate(whole.split(list(counts))):
        if rank == to:
            rows.copy_(part)
        elif rows.numel():
            rows.copy_(world.receive(rows, rank))
    return whole


def scatter_rows(
    world: World, whole: Tensor | None, part: Tensor, counts: Sequence[int], source: int
) -> None:
    """Overwrite every rank's rows with those of the whole tensor of rank `source`."""
    if world.rank != source:
        if part.numel():
            part.copy_(world.receive(part, source))
        return
    assert whole is not None
    for rank, rows in enumerate(whole.split(list(counts))):
        if rank == source:
            part.copy_(rows)
        elif rows.numel():
            world.send(rows.contiguous(), rank)


def gathered_tensor(world: World, part: Tensor, counts: Sequence[int]) -> WholeTensor:
    """Return the tensor whose rows the ranks hold."""

    def load() -> Tensor | None:
        whole = gather_rows(world, part, counts, 0)
        return None if whole is None else whole.cpu()

    return WholeTensor((sum(counts), *part.shape[1:]), part.dtype, load)


def remote_tensor(
    world: World, tensor: Tensor | None, shape: Shape, dtype: torch.dtype, owner: int,
    device: torch.device,
) -> WholeTensor:  # fmt: skip
    """Return a tensor that one rank holds whole. device: where the owner has it."""

    def load() -> Tensor | None:
        if world.rank == owner:
            assert tensor is not None
            if owner == 0:
                return tensor.cpu()
            world.send(tensor.contiguous(), 0)
            return None
        if world.is_main:
            like = torch.empty(tuple(shape), dtype=dtype, device=device)
            return world.receive(like, owner).cpu()
        return None

    return WholeTensor(tuple(shape), dtype, load)
