"""Muon: momentum whose matrices are orthogonalised before each step (Jordan et al. 2024).

Every singular direction of a matrix is then updated by the same amount, which needs fewer steps
than Adam. The update is scaled to the RMS of an Adam step (arXiv 2502.16982), so that one learning
rate suits both: parameters that are not matrices (biases, norms) are updated by Adam.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from simpletuner.training.independent_parameter_optimizer import IndependentParameterOptimizer
from simpletuner.training.rounding_noise import RoundingNoise, copy_stochastically

# Coefficients of the odd quintic polynomial that moves singular values to about 1, as Jordan chose
# them for speed.
QUINTIC_A, QUINTIC_B, QUINTIC_C = 3.4445, -4.7750, 2.0315
ADAM_UPDATE_RMS = 0.2


def orthogonalise(matrix: Tensor, iterations: int) -> Tensor:
    """Return a bfloat16 matrix of the same shape, with singular values of about 0.7 to 1.2.

    Singular values that were very small remain smaller.
    """
    x = matrix.to(torch.bfloat16)
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.float().norm().clamp_min(1e-7).to(x.dtype)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.addmm(
            x, torch.addmm(gram, gram, gram, beta=QUINTIC_B, alpha=QUINTIC_C), x, beta=QUINTIC_A
        )
    return x.mT if tall else x


class Muon(IndependentParameterOptimizer):
    """Orthogonalised Nesterov momentum for matrices, and AdamW for the other parameters.

    Matrices need one number of state per weight. Weight decay is decoupled and the same for both.
    momentum: of matrices. betas, eps: of the other parameters. The state has the dtype of the
    weights; bf16 is computed in float32 and rounded stochastically.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        seed: int,
        momentum: float = 0.95,
        iterations: int = 5,
    ) -> None:
        if not 0 <= momentum < 1 or not 1 <= iterations <= 20:
            raise ValueError("momentum must be in [0, 1) and iterations from 1 to 20")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, seed, {**defaults, "momentum": momentum, "iterations": iterations})

    def update_parameter(
        self, param: Tensor, grad: Tensor, group: dict[str, Any], noise: RoundingNoise
    ) -> None:
        exact = param.float()  # no copy where the parameter is float32
        exact.mul_(1 - group["lr"] * group["weight_decay"])
        is_matrix = param.ndim == 2
        update = self._update_matrix if is_matrix else self._update_with_adam
        keys = ("momentum",) if is_matrix else ("exp_avg", "exp_avg_sq")
        state = self.state[param]
        if not state:
            state.update({key: torch.zeros_like(param) for key in keys})
        means = {key: state[key].float() for key in keys}
        update(exact, grad.float(), means, group)
        whole = slice(0, param.numel())
        copy_stochastically(param, exact, noise, 0, whole)
        for number, key in enumerate(keys, 1):
            copy_stochastically(state[key], means[key], noise, number, whole)

    def _update_matrix(
        self, exact: Tensor, grad: Tensor, means: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        mean = means["momentum"].lerp_(grad, 1 - group["momentum"])
        step = orthogonalise(grad.lerp(mean, group["momentum"]), group["iterations"])
        exact.add_(step.float(), alpha=-group["lr"] * ADAM_UPDATE_RMS * math.sqrt(max(exact.shape)))

    def _update_with_adam(
        self, exact: Tensor, grad: Tensor, means: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        mean = means["exp_avg"].lerp_(grad, 1 - beta1)
        square = means["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = square.sqrt().div_(math.sqrt(1 - beta2 ** group["step"])).add_(group["eps"])
        exact.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1 ** group["step"]))
