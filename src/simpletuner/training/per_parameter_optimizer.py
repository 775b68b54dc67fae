"""Optimizers whose parameters know nothing of each other, and how numbers are rounded to bf16.

A bf16 number keeps 8 bits: an update below 1/256 of the weight would be rounded away every time.
Rounding up with a chance equal to the lost fraction is right on average (arXiv 2010.06192).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from simpletuner.randomness import seed_at


def round_stochastically(exact: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bf16, up or down with the probability that makes the mean exact.

    Infinities and NaN stay.
    """
    noise = torch.randint(
        0, 1 << 16, exact.shape, generator=generator, device=exact.device, dtype=torch.int32
    )
    bits = exact.contiguous().view(torch.int32)
    # bf16 is the upper half of a float32: the carry of the lower half is the rounding up
    rounded = ((bits + noise) & -65536).view(torch.float32)
    # The carry of a NaN may reach the sign and leave -0.0: CUDA's NaN has every lower bit set.
    return torch.where(exact.isfinite(), rounded, exact).to(torch.bfloat16)


def copy_stochastically(target: Tensor, exact: Tensor, noise: torch.Generator) -> None:
    """Write float32 numbers, into bf16 rounded stochastically. Nothing to do where they are the target."""
    target.copy_(round_stochastically(exact, noise) if target.dtype == torch.bfloat16 else exact)


class PerParameterOptimizer(Optimizer, ABC):
    """Steps count in the group. Each parameter of a step has its own noise, drawn on its device.

    Its address is (seed, step, index of the parameter), so a resumed run rounds as an uninterrupted
    one.
    """

    def __init__(self, params: Iterable[Tensor], seed: int, defaults: dict[str, Any]) -> None:
        super().__init__(params, {**defaults, "step": 0})
        self.seed = seed
        every = (param for group in self.param_groups for param in group["params"])
        self.parameter_index = {param: number for number, param in enumerate(every)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise TypeError(f"{type(self).__name__} takes no closure")
        for group in self.param_groups:
            group["step"] += 1
            for param in group["params"]:
                if param.grad is not None:
                    where = seed_at(
                        self.seed, "stochastic_rounding", group["step"], self.parameter_index[param]
                    )
                    noise = torch.Generator(param.device).manual_seed(where)
                    self.update_parameter(param, param.grad, group, noise)

    @abstractmethod
    def update_parameter(
        self, param: Tensor, grad: Tensor, group: dict[str, Any], noise: torch.Generator
    ) -> None:
        """One step of one parameter."""
