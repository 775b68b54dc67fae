"""Prodigy (arXiv 2306.06101) with its update computed for many parameters at a time.

The library steps parameter by parameter and reads two numbers from the device for each: 1,672 times
a step for a LoRA on all linears. Here the sums over all parameters stay on the device, and are read
once. State and settings are the library's, so that checkpoints fit both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from prodigyopt import Prodigy
from torch import Tensor

from simpletuner.training.gradient_sum import make_buckets


@dataclass(frozen=True)
class ProdigyStep:
    """The numbers that a group's parameters share in a step.

    d: the estimated distance, before the step. rate: learning rate times d, with the bias
    correction. beta3: decay of the two sums of d.
    """

    d: float
    d0: float
    rate: float
    beta3: float
    group: dict[str, Any]


class GroupedProdigy(Prodigy):  # type: ignore[misc]  # the library is untyped
    """The library's optimizer; its sums over parameters are rounded in another order."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        if closure is not None:
            raise TypeError("GroupedProdigy takes no closure")
        first = self.param_groups[0]
        rate = max(group["lr"] for group in self.param_groups)
        if any(group["lr"] not in (rate, 0.0) for group in self.param_groups):
            raise ValueError("Prodigy takes one learning rate for all parameters, or 0 for some")
        steps = [self._shared(group, first, rate) for group in self.param_groups]
        parts = [
            sums
            for shared in steps
            if shared.group["lr"] > 0
            for bucket in self._buckets(shared.group)
            for sums in [self._update_moments(bucket, shared)]
        ]
        if not parts:
            return
        # The only moment in which the host waits for the device.
        numerator, denominator = torch.stack(parts).double().sum(0).tolist()
        if denominator == 0:
            return
        first_step = steps[0]
        numerator += first_step.beta3 * first["d_numerator"]
        estimate = first["d_coef"] * numerator / denominator
        # The library lets the first estimate jump; later ones may grow by growth_rate only.
        d = max(first_step.d, estimate) if first_step.d == first["d0"] else first_step.d
        largest = max(first["d_max"], estimate)
        d = min(largest, d * first["growth_rate"])
        for shared in steps:
            shared.group.update(
                d_numerator=numerator, d_denom=denominator, d=d, d_max=largest, d_hat=estimate
            )
            for bucket in self._buckets(shared.group):
                self._update_weights(bucket, shared, d)
            shared.group["k"] += 1

    def _shared(self, group: dict[str, Any], first: dict[str, Any], rate: float) -> ProdigyStep:
        (beta1, beta2), k, d = first["betas"], first["k"], first["d"]
        correction = 1.0
        if first["use_bias_correction"]:
            correction = math.sqrt(1 - beta2 ** (k + 1)) / (1 - beta1 ** (k + 1))
        beta3 = math.sqrt(beta2) if first["beta3"] is None else first["beta3"]
        return ProdigyStep(d, group["d0"], d * rate * correction, beta3, group)

    def _buckets(self, group: dict[str, Any]) -> list[list[Tensor]]:
        return list(make_buckets([param for param in group["params"] if param.grad is not None]))

    def _init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return the state of a parameter; a start of zeros is stored as one number."""
        state: dict[str, Any] = self.state[param]
        if state:
            return state
        chosen = param.flatten()[:: group["slice_p"]]
        state["step"] = 0
        state["s"] = torch.zeros_like(chosen)
        # B of a new LoRA is 0, and a copy of zeros would take memory for nothing.
        state["p0"] = chosen.clone() if bool(param.any()) else param.new_zeros(())
        if group["betas"][0] > 0:
            state["exp_avg"] = torch.zeros_like(param)
        state["exp_avg_sq"] = torch.zeros_like(param)
        return state

    def _update_moments(self, params: Sequence[Tensor], shared: ProdigyStep) -> Tensor:
        """Update moments and sums; return this bucket's numerator and denominator of d, (2,)."""
        group, d = shared.group, shared.d
        beta1, beta2 = group["betas"]
        states = [self._init_state(param, group) for param in params]
        gradients = [param.grad for param in params if param.grad is not None]
        if group["weight_decay"] and not group["decouple"]:
            torch._foreach_add_(gradients, list(params), alpha=group["weight_decay"])
        sliced = [gradient.flatten()[:: group["slice_p"]] for gradient in gradients]
        travelled = [
            part if state["p0"].ndim == 0 else part - state["p0"]
            for param, state in zip(params, states, strict=True)
            for part in [param.flatten()[:: group["slice_p"]]]
        ]
        product = torch.cat(sliced).float().mul_(torch.cat(travelled)).sum()
        numerator = product.mul_(-d / shared.d0 * shared.rate)
        if beta1 > 0:
            means = [state["exp_avg"] for state in states]
            torch._foreach_mul_(means, beta1)
            torch._foreach_add_(means, gradients, alpha=d * (1 - beta1))
        squares = [state["exp_avg_sq"] for state in states]
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=d * d * (1 - beta2))
        sums = [state["s"] for state in states]
        factor = d if group["safeguard_warmup"] else shared.rate
        torch._foreach_mul_(sums, shared.beta3)
        torch._foreach_add_(sums, sliced, alpha=d / shared.d0 * factor)
        denominator = torch.stack(torch._foreach_norm(sums, 1, torch.float32)).sum()
        return torch.stack((numerator, denominator))

    def _update_weights(self, params: Sequence[Tensor], shared: ProdigyStep, d: float) -> None:
        """Step the weights; d: as just estimated."""
        group = shared.group
        states = [self._init_state(param, group) for param in params]
        denominators = torch._foreach_sqrt([state["exp_avg_sq"] for state in states])
        torch._foreach_add_(denominators, d * group["eps"])
        if group["weight_decay"] and group["decouple"]:
            # Not as a factor: its rounding differs, and d is estimated from how far weights moved.
            decay = -group["weight_decay"] * shared.rate
            torch._foreach_add_(list(params), list(params), alpha=decay)
        if group["betas"][0] > 0:
            means = [state["exp_avg"] for state in states]
            torch._foreach_addcdiv_(list(params), means, denominators, value=-shared.rate)
        else:
            gradients = [param.grad for param in params if param.grad is not None]
            value = -shared.rate * d
            torch._foreach_addcdiv_(list(params), gradients, denominators, value=value)
        for state in states:
            state["step"] += 1
