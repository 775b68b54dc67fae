"""Random bits for stochastic rounding, each addressed by its position in the flat parameter.

A bf16 number has 8 significant bits, so rounding to the nearest would lose every update below 1/256
of the weight. Rounding up with a probability equal to the lost fraction is right on average
(arXiv 2010.06192).

The bits of a number are a function of (seed, step, parameter, tensor, chunk of 4,096 numbers,
position in the chunk), so a shard of a parameter rounds exactly like the whole parameter, and every
device draws the same bits. A chunk has a random key; the bits are a hash of the key and a constant
of the position, two multiplications and a shift as in MurmurHash3's finalizer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simpletuner.randomness import seed_at

CHUNK = 4096
# Odd constants of 32 bits, as signed numbers: the golden ratio, and the multipliers of MurmurHash3.
GOLDEN = -0x61C88647
MULTIPLIER_1, MULTIPLIER_2 = -0x7A143595, -0x3D4D51CB
EXPONENT_BITS = 0x7F800000  # of a float32; all set in infinities and NaN


def _hash_counters(counters: Tensor) -> Tensor:
    """Return 32 random bits for each number, a bijection of int32 (MurmurHash3's finalizer)."""
    x = counters * GOLDEN
    # torch shifts signed numbers arithmetically; the mask makes the shift a logical one.
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= MULTIPLIER_1
    x ^= (x >> 13).bitwise_and_(0x7FFFF)
    x *= MULTIPLIER_2
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _as_int32(bits: int) -> int:
    """Return the lower 32 bits as a signed number."""
    return (bits & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def chunk_lanes(device: torch.device) -> Tensor:
    """Return the constants of the positions in a chunk, (4096,) int32; a noise is built on them."""
    return _hash_counters(torch.arange(1, CHUNK + 1, dtype=torch.int32, device=device))


def chunk_keys(
    chunks: Tensor, owners: Tensor, seed: int, addresses: Sequence[tuple[int, int]], number: int
) -> Tensor:
    """Return the keys of chunks of many parameters, (chunks,) int32, in a few operations.

    chunks: number of each chunk in its parameter, int32. owners: index into `addresses`, the (step,
    parameter) of each parameter. number: of the hash.
    """
    seeds = [seed_at(seed, "stochastic_rounding", *address, number) for address in addresses]
    halves = [[_as_int32(each), _as_int32(each >> 32)] for each in seeds]
    low, high = torch.tensor(halves, dtype=torch.int32).to(chunks.device)[owners].unbind(1)
    return _hash_counters(chunks + low) ^ high


class RoundingNoise:
    """The random bits of one parameter, or of a shard of it, in one step.

    lanes: of chunk_lanes, on the parameter's device. address: seed, step and parameter. first:
    position of the shard's first number in the flat parameter. Parts are slices of the shard.
    """

    def __init__(self, lanes: Tensor, seed: int, step: int, parameter: int, first: int = 0) -> None:
        self._lanes = lanes
        self._address = (step, parameter)
        self._seed = seed
        self._first = first
        self._latest: tuple[int, slice, Tensor] | None = None

    def bits(self, tensor: int, part: slice) -> Tensor:
        """Return 16 random bits as (numbers,) int16, for tensor 0 (the weights), 1, ... .

        Two tensors share the two halves of one hash.
        """
        halves = self._words(tensor // 2, part).view(torch.int16).view(-1, 2)
        # Only the upper half of a product depends on all bits of its factors.
        return halves[:, 1] if tensor % 2 else halves[:, 0] ^ halves[:, 1]

    def uniform(self, tensor: int, part: slice) -> Tensor:
        """Return (numbers,) float32 in [0, 1), from 24 random bits, for tensor 1, 2, ... .

        A caller uses `bits` or `uniform` for tensors above 0, not both.
        """
        words = self._hash(tensor, part)
        return words.bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24)

    def _words(self, number: int, part: slice) -> Tensor:
        """Return _hash(number, part); the latest result is kept for its other half."""
        if self._latest is None or self._latest[:2] != (number, part):
            self._latest = (number, part, self._hash(number, part))
        return self._latest[2]

    def _hash(self, number: int, part: slice) -> Tensor:
        """Return 32 random bits of each number of the part, (numbers,) int32."""
        x, offset = self._hash_input(number, part)
        x *= MULTIPLIER_1
        x ^= (x >> 15).bitwise_and_(0x1FFFF)
        x *= MULTIPLIER_2
        return x.view(-1)[offset : offset + part.stop - part.start]

    def _hash_input(self, number: int, part: slice) -> tuple[Tensor, int]:
        """Return the keys of the chunks combined with the constants, (chunks, 4096) int32.

        The second value is the position of the part's first number in them.
        """
        start, stop = self._first + part.start, self._first + part.stop
        seed = seed_at(self._seed, "stochastic_rounding", *self._address, number)
        chunks = torch.arange(
            start // CHUNK, -(-stop // CHUNK), dtype=torch.int32, device=self._lanes.device
        )
        keys = _hash_counters(chunks + _as_int32(seed)) ^ _as_int32(seed >> 32)
        return keys[:, None] ^ self._lanes, start % CHUNK


def round_stochastically(exact: Tensor, bits: Tensor) -> Tensor:
    """Round float32 to bf16, up or down, with the probability that makes the mean exact.

    bits: int16, as many as numbers. Infinities and NaN do not change.
    """
    # bf16 is the upper half of a float32, so a carry from the lower half rounds up. Uniform int16
    # bits and 2^15 are uniform from 0 to 2^16 - 1.
    pattern = exact.contiguous().view(torch.int32)
    rounded = (pattern + bits.view(exact.shape)).add_(1 << 15).bitwise_and_(-65536)
    # The carry of a NaN may reach the sign and leave -0.0: CUDA's NaN has every lower bit set.
    is_finite = pattern.bitwise_and(EXPONENT_BITS) != EXPONENT_BITS
    return torch.where(is_finite, rounded.view(torch.float32), exact).to(torch.bfloat16)


def copy_stochastically(
    target: Tensor, exact: Tensor, noise: RoundingNoise, tensor: int, part: slice
) -> None:
    """Copy float32 numbers into a tensor; into a bf16 tensor they are rounded stochastically.

    tensor, part: which tensor of the parameter, and which of its numbers.
    """
    if target.dtype != torch.bfloat16:
        target.copy_(exact)
        return
    target.copy_(round_stochastically(exact, noise.bits(tensor, part)))
