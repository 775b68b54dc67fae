"""Pushing noise levels up for larger pictures. Off for Chroma unless asked for."""

from __future__ import annotations

import math

from torch import Tensor

from simpletuner.config.schema import FlowOptions


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """S x / (1 + (s - 1) x), eq. 23 of Esser et al. 2024; s = 1 changes nothing."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def auto_shift(image_tokens: int) -> float:
    """exp(mu), mu linear in the number of 2x2 patches: 0.5 at 256, 1.15 at 4096 (Flux's schedule)."""
    return math.exp(0.5 + (image_tokens - 256) * (1.15 - 0.5) / (4096 - 256))


def resolve_shift(options: FlowOptions, image_tokens: int | None) -> float:
    """The shift that the options ask for; 1.0 is none. The automatic one wins over a fixed one."""
    if not options.flow_schedule_auto_shift:
        return options.flow_schedule_shift or 1.0
    if image_tokens is None:
        raise ValueError("flow_schedule_auto_shift needs the number of image tokens")
    return auto_shift(image_tokens)
