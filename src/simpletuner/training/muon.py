"""Muon: momentum whose matrices are orthogonalised before each step (Jordan et al. 2024).

Every singular direction of a matrix then moves alike, which on matrices learns in fewer steps than Adam. The
update is scaled to the RMS of an Adam step (arXiv 2502.16982), so one learning rate serves both: parameters
that are not matrices (biases, norms) are Adam's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Of the odd quintic polynomial that drives singular values to about 1; Jordan's, chosen for speed.
A, B, C = 3.4445, -4.7750, 2.0315
RMS_OF_ADAM = 0.2


def orthogonalised(matrix: Tensor, iterations: int) -> Tensor:
    """The same shape, bfloat16; singular values that were not tiny lie between about 0.7 and 1.2."""
    x = matrix.to(torch.bfloat16)
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.float().norm().clamp_min(1e-7).to(x.dtype)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, on matrices (4 bytes of state per fp32 number); AdamW on the rest.

    Decay is decoupled and the same for both. momentum: of matrices. betas, eps: of the others.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float,
        weight_decay: float, momentum: float = 0.95, iterations: int = 5,
    ) -> None:  # fmt: skip
        if not 0 <= momentum < 1 or not 1 <= iterations <= 20:
            raise ValueError("momentum lies in [0, 1), iterations in 1 to 20")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        super().__init__(params, {**defaults, "momentum": momentum, "iterations": iterations})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise TypeError("Muon takes no closure")
        for group in self.param_groups:
            group["step"] += 1
            for param in group["params"]:
                if param.grad is not None:
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    (self._muon if param.ndim == 2 else self._adam)(param, param.grad, group)

    def _muon(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[param], group["momentum"]
        if not state:
            state["momentum"] = torch.zeros_like(param)
        mean = state["momentum"].lerp_(grad, 1 - momentum)
        step = orthogonalised(grad.lerp(mean, momentum), group["iterations"])
        param.add_(step.to(param.dtype), alpha=-group["lr"] * RMS_OF_ADAM * math.sqrt(max(param.shape)))

    def _adam(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[param], group["betas"]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        mean = state["exp_avg"].lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = square.sqrt().div_(math.sqrt(1 - beta2 ** group["step"])).add_(group["eps"])
        param.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1 ** group["step"]))
