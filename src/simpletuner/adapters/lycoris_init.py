"""How LoHa and LoKr start: LyCORIS' shapes and draws, a delta of zero."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from simpletuner.adapters.deltas import LycorisDelta
from simpletuner.config.lycoris_config import LycorisConfig
from simpletuner.errors import ConfigError


def init_lycoris(asked: LycorisConfig, size: tuple[int, int], generator: Generator) -> LycorisDelta:
    """size: (out, in) of the linear."""
    parts = (_init_loha if asked.algo == "loha" else _init_lokr)(asked, size, generator)
    return LycorisDelta(parts, asked.alpha / asked.dim if LycorisDelta(parts).rank else 1.0)


def warm_start_lycoris(told: LycorisDelta, start: LycorisDelta, name: str) -> LycorisDelta:
    """`told` in the sizes and at the strength of `start`. ConfigError where those cannot hold it."""
    theirs, ours = (
        {part: tuple(one.shape) for part, one in each.factors.items()} for each in (told, start)
    )
    if theirs != ours:
        whole = "is a part of a fused matrix" if told.shape != start.shape else f"has {theirs}"
        raise ConfigError(f"init_lora: {name} {whole}, and lycoris_config makes {ours}")
    first = "hada_w1_a" if told.kind == "LoHa" else "lokr_w1" if "lokr_w1" in ours else "lokr_w1_a"
    return LycorisDelta(
        {**told.factors, first: told.factors[first] * (told.scale / start.scale)}, start.scale
    )


def factorization(number: int, factor: int) -> tuple[int, int]:
    """Smaller and larger side: `factor` where it divides, else the nearest to square with a side up to it."""
    if factor > 0 and number % factor == 0:
        small = factor
    else:
        limit = int(number**0.5) if factor < 0 else min(factor, int(number**0.5))
        small = next(side for side in range(limit, 0, -1) if number % side == 0)
    return min(small, number // small), max(small, number // small)


def _init_loha(
    asked: LycorisConfig, size: tuple[int, int], generator: Generator
) -> dict[str, Tensor]:
    (out, columns), rank = size, asked.dim
    return {
        "hada_w1_a": torch.randn(out, rank, generator=generator) * 0.1,
        "hada_w1_b": torch.randn(rank, columns, generator=generator),
        "hada_w2_a": torch.zeros(out, rank),
        "hada_w2_b": torch.randn(rank, columns, generator=generator),
    }


def _init_lokr(
    asked: LycorisConfig, size: tuple[int, int], generator: Generator
) -> dict[str, Tensor]:
    (a, c), (b, d) = (factorization(side, asked.factor) for side in size)
    parts = {}
    if asked.decompose_both and not asked.full_matrix and asked.dim < max(a, b) / 2:
        parts["lokr_w1_a"] = _kaiming_uniform(a, asked.dim, generator)
        parts["lokr_w1_b"] = _kaiming_uniform(asked.dim, b, generator)
    else:
        parts["lokr_w1"] = _kaiming_uniform(a, b, generator)
    if asked.full_matrix or asked.dim >= max(c, d) / 2:
        return {**parts, "lokr_w2": torch.zeros(c, d)}
    return {
        **parts,
        "lokr_w2_a": _kaiming_uniform(c, asked.dim, generator),
        "lokr_w2_b": torch.zeros(asked.dim, d),
    }


def _kaiming_uniform(rows: int, columns: int, generator: Generator) -> Tensor:
    """Kaiming's with a = sqrt(5), as nn.Linear starts."""
    return (2 * torch.rand(rows, columns, generator=generator) - 1) * columns**-0.5
