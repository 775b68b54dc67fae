"""AdamW for weights that exist in bf16 only: the update is computed in float32 and rounded stochastically.

A bf16 number keeps 8 bits: an update below 1/256 of the weight would be rounded away every time. Rounding
up with a chance equal to the lost fraction is right on average (arXiv 2010.06192).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from simpletuner.randomness import seed_at


def round_stochastically(exact: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bf16, up or down with the chance that makes the mean exact. Infinities stay."""
    noise = torch.randint(
        0, 1 << 16, exact.shape, generator=generator, device=exact.device, dtype=torch.int32
    )
    bits = exact.contiguous().view(torch.int32)
    # bf16 is the upper half of a float32: the carry of the lower half is the rounding up
    return ((bits + noise) & -65536).view(torch.float32).to(torch.bfloat16)


class StochasticAdamW(Optimizer):
    """AdamW with decoupled decay, moments in the dtype of the weights, 6 bytes per bf16 parameter.

    Weights and both moments in bf16 are rounded stochastically; weights of any other dtype are updated
    like AdamW's. The noise of a step is drawn on the weight's device from (seed, step, index of the
    parameter), so a resumed run rounds as an uninterrupted one.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float,
        weight_decay: float, seed: int,
    ) -> None:  # fmt: skip
        self.seed = seed
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise TypeError("StochasticAdamW takes no closure")
        index = 0
        for group in self.param_groups:
            group["step"] += 1
            for param in group["params"]:
                if param.grad is not None:
                    generator = torch.Generator(param.device)
                    address = seed_at(self.seed, "stochastic_rounding", group["step"], index)
                    self._update(param, param.grad, group, generator.manual_seed(address))
                index += 1

    def _update(self, param: Tensor, grad: Tensor, group: dict[str, Any], generator: torch.Generator) -> None:
        state, (beta1, beta2) = self.state[param], group["betas"]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        grad = grad.float()
        mean = state["exp_avg"].float().lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = square.sqrt().div_(math.sqrt(1 - beta2 ** group["step"])).add_(group["eps"])
        new = param.float().mul_(1 - group["lr"] * group["weight_decay"])
        new.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1 ** group["step"]))
        for target, exact in ((param, new), (state["exp_avg"], mean), (state["exp_avg_sq"], square)):
            rounds = target.dtype == torch.bfloat16
            target.copy_(round_stochastically(exact, generator) if rounds else exact)
