"""Optimizers that update each parameter independently, and stochastic rounding to bf16.

A bf16 number has 8 significant bits, so rounding to the nearest would lose every update below 1/256
of the weight. Rounding up with a probability equal to the lost fraction is right on average
(arXiv 2010.06192).
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
    """Round float32 to bf16, up or down, with the probability that makes the mean exact.

    Infinities and NaN do not change.
    """
    noise = torch.randint(
        0, 1 << 16, exact.shape, generator=generator, device=exact.device, dtype=torch.int32
    )
    bits = exact.contiguous().view(torch.int32)
    # bf16 is the upper half of a float32, so a carry from the lower half rounds up.
    rounded = ((bits + noise) & -65536).view(torch.float32)
    # The carry of a NaN may reach the sign and leave -0.0: CUDA's NaN has every lower bit set.
    return torch.where(exact.isfinite(), rounded, exact).to(torch.bfloat16)


def copy_stochastically(target: Tensor, exact: Tensor, noise: torch.Generator) -> None:
    """Copy float32 numbers into a tensor; into a bf16 tensor they are rounded stochastically."""
    target.copy_(round_stochastically(exact, noise) if target.dtype == torch.bfloat16 else exact)


class IndependentParameterOptimizer(Optimizer, ABC):
    """Base class. The number of the step is stored in the parameter group.

    Each parameter has its own random numbers in every step, generated on its device. Their address
    is (seed, step, index of the parameter), so a resumed run rounds like an uninterrupted one.
    """

    def __init__(self, params: Iterable[Tensor], seed: int, defaults: dict[str, Any]) -> None:
        super().__init__(params, {**defaults, "step": 0})
        self.seed = seed
        params_in_order = (param for group in self.param_groups for param in group["params"])
        self.parameter_index = {param: number for number, param in enumerate(params_in_order)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise TypeError(f"{type(self).__name__} takes no closure")
        for group in self.param_groups:
            group["step"] += 1
            for param in group["params"]:
                if param.grad is not None:
                    seed = seed_at(
                        self.seed, "stochastic_rounding", group["step"], self.parameter_index[param]
                    )
                    noise = torch.Generator(param.device).manual_seed(seed)
                    self.update_parameter(param, param.grad, group, noise)

    @abstractmethod
    def update_parameter(
        self, param: Tensor, grad: Tensor, group: dict[str, Any], noise: torch.Generator
    ) -> None:
        """Update one parameter in place. noise: the generator for stochastic rounding."""
