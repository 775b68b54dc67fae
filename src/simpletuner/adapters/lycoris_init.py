"""Initial values of LoHa and LoKr: LyCORIS' shapes and distributions, and a delta of zero."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from simpletuner.adapters.deltas import LycorisDelta
from simpletuner.config.lycoris_config import LycorisConfig
from simpletuner.errors import ConfigError


def init_lycoris(
    config: LycorisConfig, size: tuple[int, int], generator: Generator
) -> LycorisDelta:
    """Return the initial delta of a linear. size: (out, in)."""
    factors = (_init_loha if config.algo == "loha" else _init_lokr)(config, size, generator)
    return LycorisDelta(factors, config.alpha / config.dim if LycorisDelta(factors).rank else 1.0)


def warm_start_lycoris(source: LycorisDelta, target: LycorisDelta, name: str) -> LycorisDelta:
    """Return `source` in the factor sizes and at the scale of `target`.

    Raises ConfigError where the sizes differ.
    """
    source_shapes, target_shapes = (
        {factor: tuple(matrix.shape) for factor, matrix in delta.factors.items()}
        for delta in (source, target)
    )
    if source_shapes != target_shapes:
        fused = source.shape != target.shape
        mismatch = "is a part of a fused matrix" if fused else f"has factors {source_shapes}"
        raise ConfigError(
            f"init_lora: {name} {mismatch}, but lycoris_config describes {target_shapes}; set"
            " lycoris_config to the values that the file was trained with"
        )
    # The delta is linear in each factor: the ratio of the scales goes into one of them.
    first = (
        "hada_w1_a"
        if source.kind == "LoHa"
        else "lokr_w1"
        if "lokr_w1" in target_shapes
        else "lokr_w1_a"
    )
    return LycorisDelta(
        {**source.factors, first: source.factors[first] * (source.scale / target.scale)},
        target.scale,
    )


def factorization(number: int, factor: int) -> tuple[int, int]:
    """Split `number` into a smaller and a larger factor.

    The first is `factor` if it divides `number`, else the largest divisor up to `factor` and the
    square root.
    """
    if factor > 0 and number % factor == 0:
        small = factor
    else:
        limit = int(number**0.5) if factor < 0 else min(factor, int(number**0.5))
        small = next(side for side in range(limit, 0, -1) if number % side == 0)
    return min(small, number // small), max(small, number // small)


def _init_loha(
    config: LycorisConfig, size: tuple[int, int], generator: Generator
) -> dict[str, Tensor]:
    (out, columns), rank = size, config.dim
    return {
        "hada_w1_a": torch.randn(out, rank, generator=generator) * 0.1,
        "hada_w1_b": torch.randn(rank, columns, generator=generator),
        # One factor of the four is 0, so that the first step starts from the base exactly.
        "hada_w2_a": torch.zeros(out, rank),
        "hada_w2_b": torch.randn(rank, columns, generator=generator),
    }


def _init_lokr(
    config: LycorisConfig, size: tuple[int, int], generator: Generator
) -> dict[str, Tensor]:
    (a, c), (b, d) = (factorization(side, config.factor) for side in size)
    factors = {}
    if config.decompose_both and not config.full_matrix and config.dim < max(a, b) / 2:
        factors["lokr_w1_a"] = _kaiming_uniform(a, config.dim, generator)
        factors["lokr_w1_b"] = _kaiming_uniform(config.dim, b, generator)
    else:
        factors["lokr_w1"] = _kaiming_uniform(a, b, generator)
    if config.full_matrix or config.dim >= max(c, d) / 2:
        # A pair of this rank would have as many numbers as the whole matrix.
        return {**factors, "lokr_w2": torch.zeros(c, d)}
    return {
        **factors,
        "lokr_w2_a": _kaiming_uniform(c, config.dim, generator),
        "lokr_w2_b": torch.zeros(config.dim, d),
    }


def _kaiming_uniform(rows: int, columns: int, generator: Generator) -> Tensor:
    """Kaiming uniform with a = sqrt(5), the default of nn.Linear."""
    bound: float = columns**-0.5
    return (2 * torch.rand(rows, columns, generator=generator) - 1) * bound
