"""The change of the trained weights, block by block: ||delta W|| / ||W||."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from simpletuner.adapters.adapted_linear import adapted_modules
from simpletuner.adapters.delta_norms import squared_change, squared_weight
from simpletuner.events.event_types import Emit, WeightChangeMeasured
from simpletuner.randomness import seed_at
from simpletuner.training.train_state import TrainState
from simpletuner.training.world import World

SAMPLED_WEIGHTS = 4096  # of each matrix of a full fine-tuning
SEED = 0  # which ones: the same in every run, and after a resume


def block_of(name: str) -> str:
    """Return "transformer_blocks.3" for a module in a block, else the first part of its name."""
    parts = name.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 and parts[1].isdecimal() else parts[0]


class WeightChange:
    """Measures the change since the base; must be made before a checkpoint is restored.

    Of an adapter the norms are exact. In a full fine-tuning the base is no longer in memory, so a
    fixed sample of each matrix is remembered, and the ratio is estimated from it. A sharded network
    is not measured: no process has all of its weights.
    """

    def __init__(self, train_state: TrainState, world: World, emit: Emit) -> None:
        self._state, self._emit = train_state, emit
        self._is_active = world.is_main and not train_state.sharding.is_sharded
        self._weights: dict[str, float] = {}
        self._samples: dict[str, tuple[Tensor, Tensor]] = {}
        self._last_step: int | None = None
        if self._is_active and not train_state.uses_lora:
            self._samples = sample_weights(train_state.trainable_parameters)

    def measure(self, step: int) -> None:
        """Emit the ratios of a step; does nothing if it was measured."""
        if not self._is_active or step == self._last_step:
            return
        self._last_step = step
        changes = self._adapter_changes() if self._state.uses_lora else self._sampled_changes()
        by_block: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for name, (change, weight) in changes.items():
            sums = by_block[block_of(name)]
            sums[0] += change
            sums[1] += weight
        totals = [sum(sums[at] for sums in by_block.values()) for at in (0, 1)]
        blocks = {name: ratio(*sums) for name, sums in by_block.items()}
        self._emit(WeightChangeMeasured(step, ratio(*totals), blocks))

    def _adapter_changes(self) -> dict[str, tuple[float, float]]:
        modules = adapted_modules(self._state.transformer)
        for name, module in modules.items():
            if name not in self._weights:
                self._weights[name] = squared_weight(module.base_layer)
        return {
            name: (squared_change(module), self._weights[name]) for name, module in modules.items()
        }

    def _sampled_changes(self) -> dict[str, tuple[float, float]]:
        changes = {}
        for name, parameter in self._state.trainable_parameters.items():
            if name in self._samples:
                places, before = self._samples[name]
                after = parameter.detach().flatten()[places.to(parameter.device)].cpu().double()
                changes[name] = (
                    float((after - before).square().sum()), float(before.square().sum())
                )  # fmt: skip
        return changes


def sample_weights(parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return name -> places and values, float64 on the CPU, of a fixed sample of each matrix."""
    samples = {}
    for name, parameter in parameters.items():
        if parameter.ndim < 2:
            continue
        generator = torch.Generator().manual_seed(seed_at(SEED, "weight-change", name))
        count = min(SAMPLED_WEIGHTS, parameter.numel())
        places = torch.randint(parameter.numel(), (count,), generator=generator)
        values = parameter.detach().flatten()[places.to(parameter.device)].cpu().double()
        samples[name] = places, values
    return samples


def ratio(change: float, weight: float) -> float:
    """Return the ratio of two norms from their squares; 0 where the weight is 0."""
    return math.sqrt(change / weight) if weight > 0 else 0.0
