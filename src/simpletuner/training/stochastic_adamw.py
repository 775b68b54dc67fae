"""AdamW for bf16 weights without a float32 copy: float32 updates, rounded stochastically."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from simpletuner.training.eight_bit_moments import EightBitMoments
from simpletuner.training.independent_parameter_optimizer import IndependentParameterOptimizer
from simpletuner.training.rounding_noise import RoundingNoise, copy_stochastically

# Numbers that are computed in float32 at a time: about nine temporary tensors of 16 MB, for a
# parameter of any size.
CHUNK_SIZE = 1 << 22


class SameDtypeMoments:
    """Moments in the dtype of the weights: 4 bytes per bf16 parameter, rounded stochastically.

    The moments are the mean of the gradient and the mean of its square. `read` returns both as
    (numbers,) float32 for a part of the flattened parameter; `write` stores them again.
    """

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        flat = torch.contiguous_format
        return {
            key: torch.zeros_like(param, memory_format=flat) for key in ("exp_avg", "exp_avg_sq")
        }

    def read(self, state: dict[str, Tensor], part: slice) -> tuple[Tensor, Tensor]:
        return state["exp_avg"].view(-1)[part].float(), state["exp_avg_sq"].view(-1)[part].float()

    def write(
        self,
        state: dict[str, Tensor],
        part: slice,
        mean: Tensor,
        square: Tensor,
        noise: RoundingNoise,
    ) -> None:
        copy_stochastically(state["exp_avg"].view(-1)[part], mean, noise, 1, part)
        copy_stochastically(state["exp_avg_sq"].view(-1)[part], square, noise, 2, part)


class StochasticAdamW(IndependentParameterOptimizer):
    """AdamW with decoupled weight decay; bf16 weights are rounded stochastically.

    Weights of another dtype get the same update as from torch's AdamW.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        seed: int,
        moments: SameDtypeMoments | EightBitMoments,
    ) -> None:
        super().__init__(
            params, seed, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.moments = moments

    def update_parameter(
        self, param: Tensor, grad: Tensor, group: dict[str, Any], noise: RoundingNoise
    ) -> None:
        state = self.state[param]
        if not state:
            state.update(self.moments.init_state(param))
        weights, gradient = param.contiguous().view(-1), grad.reshape(-1)
        for start in range(0, param.numel(), CHUNK_SIZE):
            part = slice(start, min(start + CHUNK_SIZE, param.numel()))
            self._update_chunk(weights[part], gradient[part].float(), state, part, group, noise)
        if not param.is_contiguous():
            param.copy_(weights.view_as(param))

    def _update_chunk(
        self,
        weights: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        part: slice,
        group: dict[str, Any],
        noise: RoundingNoise,
    ) -> None:
        beta1, beta2 = group["betas"]
        mean, square = self.moments.read(state, part)
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = square.sqrt().div_(math.sqrt(1 - beta2 ** group["step"])).add_(group["eps"])
        new = weights.float().mul_(1 - group["lr"] * group["weight_decay"])
        new.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1 ** group["step"]))
        copy_stochastically(weights, new, noise, 0, part)
        self.moments.write(state, part, mean, square, noise)
