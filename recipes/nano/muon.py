"""Muon for small networks: linears and convolutions by orthogonalised momentum, the rest by Adam.

A convolution's kernel is treated as a matrix of output channels x (input channels and taps).
Matrices of the same shape are orthogonalised together, so that a GPU runs few large products
instead of many small ones.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

# Of the odd quintic polynomial that drives singular values to about 1 (Jordan et al. 2024).
A, B, C = 3.4445, -4.7750, 2.0315
RMS_OF_ADAM = 0.2  # the update's RMS, as of an Adam step (arXiv 2502.16982)
ITERATIONS = 5


def orthogonalised(stack: Tensor) -> Tensor:
    """Return (N, R, C) with the same singular vectors and singular values near 1, bfloat16."""
    x = stack.to(torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / stack.float().flatten(1).norm(dim=1).clamp_min(1e-7).to(x.dtype)[:, None, None]
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, for weights of two and more dimensions; Adam for the rest.

    The update of both has the RMS of an Adam step, so one learning rate serves both.
    by_adam: parameters that are Adam's whatever their shape: embeddings, first and last layers.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98), eps: float = 1e-8, weight_decay: float = 0.0,
        by_adam: Iterable[Tensor] = (),
    ) -> None:  # fmt: skip
        params, adam_ids = list(params), {id(param) for param in by_adam}
        matrices = [p for p in params if p.ndim >= 2 and id(p) not in adam_ids]
        others = [p for p in params if p.ndim < 2 or id(p) in adam_ids]
        groups = [{"params": matrices, "muon": True}, {"params": others, "muon": False}]
        super().__init__(
            [group for group in groups if group["params"]],
            {
                "lr": lr, "momentum": momentum, "betas": betas, "eps": eps,
                "weight_decay": weight_decay, "step": 0,
            },
        )  # fmt: skip

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] += 1
            params = [param for param in group["params"] if param.grad is not None]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            (self._muon if group["muon"] else self._adam)(params, group)

    def _state(self, params: list[Tensor], key: str) -> list[Tensor]:
        for param in params:
            if key not in self.state[param]:
                self.state[param][key] = torch.zeros_like(param, dtype=torch.float32)
        return [self.state[param][key] for param in params]

    def _muon(self, params: list[Tensor], group: dict) -> None:
        grads = [param.grad for param in params]
        means = self._state(params, "momentum")
        torch._foreach_lerp_(means, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, means, group["momentum"])
        shapes: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, param in enumerate(params):
            shapes[tuple(param.shape)].append(index)
        for shape, indices in shapes.items():
            stack = torch.stack([ahead[index].reshape(shape[0], -1) for index in indices])
            size = group["lr"] * RMS_OF_ADAM * math.sqrt(max(stack.shape[1:]))
            for index, update in zip(indices, orthogonalised(stack)):
                params[index].add_(update.reshape(shape).to(params[index].dtype), alpha=-size)

    def _adam(self, params: list[Tensor], group: dict) -> None:
        beta1, beta2 = group["betas"]
        grads = [param.grad for param in params]
        means, squares = self._state(params, "mean"), self._state(params, "square")
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, math.sqrt(1 - beta2 ** group["step"]))
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_addcdiv_(params, means, roots, -group["lr"] / (1 - beta1 ** group["step"]))
