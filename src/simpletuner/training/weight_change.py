"""The change of the trained weights, block by block: ||delta W|| / ||W||."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from simpletuner.adapters.adapted_linear import adapted_modules
from simpletuner.adapters.delta_norms import squared_change, squared_weight
from simpletuner.adapters.dora_linear import DoraLinear
from simpletuner.events.event_types import Emit, NoticeIssued, WeightChangeMeasured
from simpletuner.randomness import seed_at
from simpletuner.training.sharding import Sharding
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

    total_steps: length of the run. Of an adapter the norms are exact; the weights of a sharded base
    are gathered unit by unit. In a full fine-tuning the base is no longer in memory, so a fixed
    sample of each matrix is remembered, and the ratio is estimated from it; of a sharded network
    each process remembers what is in its rows, and the sums of squares are added. DeepSpeed's
    weights are not measured, which is said once.
    """

    def __init__(
        self, train_state: TrainState, world: World, emit: Emit, total_steps: int = 0
    ) -> None:
        self._state, self._world, self._emit = train_state, world, emit
        self._total_steps = total_steps
        sharding = train_state.sharding
        self._is_active = sharding.measures_change and (world.is_main or sharding.is_sharded)
        self._weights: dict[str, float] = {}
        self._samples: dict[str, tuple[Tensor, Tensor]] = {}
        self._last_step: int | None = None
        if not sharding.measures_change:
            emit(NoticeIssued(f"the change of the weights is not measured with {sharding.option}"))
        elif self._is_active and not train_state.uses_lora:
            self._samples = sample_weights(train_state.trainable_parameters, sharding)

    def measure(self, step: int) -> None:
        """Emit the ratios of a step; does nothing if it was measured.

        Of a sharded network every process must call it.
        """
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
        self._emit(WeightChangeMeasured(step, ratio(*totals), blocks, self._total_steps))

    def _adapter_changes(self) -> dict[str, tuple[float, float]]:
        """Return the squared norms of each module; only a DoRA reads its base more than once."""
        network = self._state.transformer
        modules = adapted_modules(network)
        reading = {
            name: module
            for name, module in modules.items()
            # The base does not change, so its norms are computed once.
            if name not in self._weights or isinstance(module, DoraLinear)
        }
        changes = {
            name: squared_change(module)
            for name, module in modules.items()
            if not isinstance(module, DoraLinear)
        }
        for name, _ in self._state.sharding.whole_modules(network, reading):
            module = modules[name]
            if name not in self._weights:
                self._weights[name] = squared_weight(module.base_layer)
            if isinstance(module, DoraLinear):
                changes[name] = squared_change(module)
        return {name: (changes[name], self._weights[name]) for name in modules}

    def _sampled_changes(self) -> dict[str, tuple[float, float]]:
        rows = []
        for name, (places, before) in self._samples.items():
            parameter = self._state.trainable_parameters[name].detach()
            after = parameter.flatten()[places.to(parameter.device)].cpu().double()
            rows.append([(after - before).square().sum(), before.square().sum()])
        sums = torch.tensor(rows, dtype=torch.float64)
        if self._state.sharding.is_sharded:
            self._world.all_reduce(sums)
        pairs = zip(self._samples, sums.tolist(), strict=True)
        return {name: (change, weight) for name, (change, weight) in pairs}


def sample_weights(
    parameters: Mapping[str, nn.Parameter], sharding: Sharding
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return name -> places and values, float64 on the CPU, of a fixed sample of each matrix.

    The places are those in the whole matrix; a process that holds some of its rows gets those that
    are in them, counted from its first number.
    """
    samples = {}
    for name, parameter in parameters.items():
        if parameter.ndim < 2:
            continue
        first, total = sharding.flat_range(name, parameter)
        generator = torch.Generator().manual_seed(seed_at(SEED, "weight-change", name))
        # Drawn for the whole matrix, so that all ranks together have the sample of one process.
        places = torch.randint(total, (min(SAMPLED_WEIGHTS, total),), generator=generator) - first
        places = places[(places >= 0) & (places < parameter.numel())]
        values = parameter.detach().flatten()[places.to(parameter.device)].cpu().double()
        samples[name] = places, values
    return samples


def ratio(change: float, weight: float) -> float:
    """Return the ratio of two norms from their squares; 0 where the weight is 0."""
    return math.sqrt(change / weight) if weight > 0 else 0.0
