"""Optimizers that update each parameter independently, with noise for stochastic rounding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from simpletuner.training.rounding_noise import RoundingNoise, chunk_lanes


class IndependentParameterOptimizer(Optimizer, ABC):
    """Base class. The number of the step is stored in the parameter group.

    Each parameter has its own random bits in every step, addressed by (seed, step, index of the
    parameter, position in the flat parameter), so a resumed run rounds like an uninterrupted one
    and a shard like the whole parameter. first_number: parameter -> position of its first number,
    for parameters that are shards.
    """

    def __init__(self, params: Iterable[Tensor], seed: int, defaults: dict[str, Any]) -> None:
        super().__init__(params, {**defaults, "step": 0})
        self.seed = seed
        # Counted over all groups: lr_by_module must not change the random bits of a parameter.
        params_in_order = (param for group in self.param_groups for param in group["params"])
        self.parameter_index = {param: number for number, param in enumerate(params_in_order)}
        self.first_number: dict[Tensor, int] = {}
        self._lanes: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise TypeError(f"{type(self).__name__} takes no closure")
        for group in self.param_groups:
            group["step"] += 1
            self.update_parameters([p for p in group["params"] if p.grad is not None], group)

    def lanes(self, device: torch.device) -> Tensor:
        """Return the constants of the random bits on a device."""
        if device not in self._lanes:
            self._lanes[device] = chunk_lanes(device)
        return self._lanes[device]

    def update_parameters(self, params: Sequence[Tensor], group: dict[str, Any]) -> None:
        """Update parameters that have gradients, one by one."""
        for param in params:
            index, first = self.parameter_index[param], self.first_number.get(param, 0)
            lanes = self.lanes(param.device)
            noise = RoundingNoise(lanes, self.seed, group["step"], index, first)
            assert param.grad is not None
            self.update_parameter(param, param.grad, group, noise)

    @abstractmethod
    def update_parameter(
        self, param: Tensor, grad: Tensor, group: dict[str, Any], noise: RoundingNoise
    ) -> None:
        """Update one parameter in place. noise: the random bits for stochastic rounding."""
