"""Find the fastest memory settings that fit, and the alternatives, for the same training.

The cost model: operations at half of the device's peak, a factor for dequantising the weights, and
the transfers between host and device that blocks wait for. It is meant for ranking; the seconds are
only estimates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from simpletuner.config.distributed_constraints import find_distributed_errors
from simpletuner.config.load import config_from_resolved, resolved_options
from simpletuner.config.schema import RunConfig
from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.models.block_swap import DEVICE_BUFFERS
from simpletuner.models.family import BlockMemoryPolicy, ModelFamily, ModelSpec
from simpletuner.training.memory_plan import host_memory, prediction, step_time
from simpletuner.training.memory_plan.fake_step import cpu_device_without_gpu_options
from simpletuner.training.memory_plan.machine_resources import MachineResources
from simpletuner.training.memory_plan.measure_once import Progress, silent
from simpletuner.training.memory_plan.prediction import MemoryPrediction, predict_memory
from simpletuner.training.memory_plan.world_layout import read_layout, weight_bytes_by_unit

# Time of a step relative to the unquantised one. Not measured on a GPU: an estimate for reading the
# weights of each block once more.
DEQUANTIZATION_SLOWDOWN = {"no_change": 1.0, "int8": 1.05, "int4": 1.1, "nf4": 1.1}
SWAP_FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the blocks, with their weights in host memory
HOST_APPROXIMATOR_S = 0.4  # 0.2 TFLOP on a desktop CPU, where the option asks for it
MAX_VERIFICATIONS = 5  # exact predictions, some seconds each, before a choice is rejected


@dataclass(frozen=True)
class MemoryConfig:
    """One combination of base precision and block memory policy.

    blocks: of the model. size: device bytes while training, with allowances; an estimate unless
    exact. seconds: of a step, by the cost model.
    """

    precision: str
    memory: BlockMemoryPolicy
    blocks: int
    size: int
    seconds: float
    exact: bool = False
    shards: bool = False  # fsdp_enable

    def options(self) -> dict[str, Any]:
        """Return all options of this combination, also those that are at their defaults."""
        options: dict[str, Any] = {
            "base_model_precision": self.precision,
            "gradient_checkpointing": checkpointing_option(self.memory.checkpointed, self.blocks),
            "gradient_checkpointing_interval": None,
            "gradient_checkpointing_backend": "offload"
            if self.memory.offload_activations
            else "torch",
            "musubi_blocks_to_swap": self.memory.swapped,
            "fsdp_enable": self.shards,
        }
        return options


def checkpointing_option(count: int, blocks: int) -> bool | int:
    """Return the value of gradient_checkpointing for `count` blocks; 1 would be read as all."""
    return count >= blocks or (max(2, count) if count else False)


class MemoryConfigSearch:
    """The memory configurations of one run.

    Two configurations are predicted exactly, each when it is asked for: no block checkpointed, and
    all blocks checkpointed. The others are estimated between them, as if all blocks needed the same
    memory. fixed_precisions: only the precisions of the run are tried.
    """

    def __init__(
        self,
        run: RunConfig,
        family: ModelFamily,
        framings: Sequence[ResizeCropConfig],
        budget: MachineResources,
        fixed_precisions: bool = False,
        progress: Progress = silent,
    ) -> None:
        self.run = run
        self.family = family
        self.framings = framings
        self.budget = budget
        self.fixed_precisions = fixed_precisions
        self.progress = progress
        dtype = cpu_device_without_gpu_options(run.model).weights_dtype
        is_frozen = run.model.model_type == "lora"
        precisions = tuple(DEQUANTIZATION_SLOWDOWN) if is_frozen and not fixed_precisions else ()
        self.own_precision = run.model.base_model_precision
        self.model_specs: dict[str, ModelSpec] = {
            name: family.build_spec(
                run.model.model_copy(update={"base_model_precision": name}), dtype
            )
            for name in dict.fromkeys((*precisions, self.own_precision))
        }
        self.weight_bytes = {
            name: prediction.weight_bytes(spec) for name, spec in self.model_specs.items()
        }
        # What one process holds of them.
        self.world = read_layout(run)
        self.held_bytes = {
            name: weight_bytes_by_unit(
                spec.transformer, family.shard_units(spec.transformer), is_frozen
            ).per_process(self.world)
            for name, spec in self.model_specs.items()
        }
        self.blocks = len(self.model_specs[self.own_precision].blocks)
        self.own_memory = prediction.memory_policy(run, self.blocks, budget.kind)
        # Weights can be in host memory only if that is separate memory with enough space.
        host_limit = (
            math.inf
            if budget.host_free_bytes is None
            else budget.host_free_bytes // self.world.local
            - host_memory.HOST_RUNTIME_BYTES[budget.kind]
        )
        can_offload = is_frozen and budget.kind == "cuda" and self.world.mode == "replicated"
        self.offloadable_precisions = [
            name for name, size in self.weight_bytes.items() if can_offload and size <= host_limit
        ]

    @cached_property
    def uncheckpointed_prediction(self) -> MemoryPrediction:
        return self._predict(0)

    @cached_property
    def checkpointed_prediction(self) -> MemoryPrediction:
        return self._predict(self.blocks)

    def _predict(self, checkpointed: int) -> MemoryPrediction:
        return self.predict(self.run, self.policy(checkpointed))

    def predict(self, run: RunConfig, memory: BlockMemoryPolicy) -> MemoryPrediction:
        """Predict a run like that of the search, with its exact size."""
        kind, progress = self.budget.kind, self.progress
        return predict_memory(run, self.family, self.framings, kind, memory, progress=progress)

    @property
    def bytes_per_block(self) -> float:
        saved = self.uncheckpointed_prediction.training - self.checkpointed_prediction.training
        return saved / max(1, self.blocks - 1)

    def policy(
        self, checkpointed: int, swapped: int = 0, offload_activations: bool = False
    ) -> BlockMemoryPolicy:
        """Return a policy with the run's own place of the approximator."""
        own = self.own_memory
        return BlockMemoryPolicy(
            checkpointed,
            1,
            swapped,
            offload_activations,
            own.approximator_on_host,
            own.approximator_computes_on_host,
        )

    def estimate_config(self, precision: str, memory: BlockMemoryPolicy) -> MemoryConfig:
        """Estimate size and seconds by interpolating between the two exact predictions."""
        spec, count = self.model_specs[precision], memory.checkpointed
        size: float = self.uncheckpointed_prediction.training
        if count:
            size = self.checkpointed_prediction.training + self.bytes_per_block * (
                self.blocks - count
            )
        size += self.held_bytes[precision] - self.held_bytes[self.own_precision]
        fetched = [
            prediction.aligned_block_bytes(spec.blocks[number])
            for number in memory.swapped_block_numbers(self.blocks)
        ]
        size -= sum(fetched) - DEVICE_BUFFERS * max(fetched, default=0)
        moved = 2 * sum(fetched)
        if memory.offload_activations:
            inputs = host_memory.checkpointed_input_bytes(
                spec, memory, self.uncheckpointed_prediction.feed
            )
            size, moved = size - inputs, moved + 2 * inputs
        flops = self.uncheckpointed_prediction.flops
        if count:
            more = self.checkpointed_prediction.flops - flops
            flops += more * count / self.blocks
        moved *= self.run.training.gradient_accumulation_steps
        seconds = step_time.estimate_seconds(
            flops * DEQUANTIZATION_SLOWDOWN.get(precision, 1.05), self.budget.peak_flops, moved
        )
        seconds += HOST_APPROXIMATOR_S * memory.approximator_computes_on_host
        shards = self.run.distributed.fsdp_enable
        return MemoryConfig(precision, memory, self.blocks, int(size), seconds, shards=shards)

    def fitting_configs(self, limit: int) -> list[MemoryConfig]:
        """Return the fastest configuration that fits for each precision, the fastest first.

        Where offloading is needed, it is the fastest of each kind of offloading.
        """
        fitting: list[MemoryConfig] = []
        for precision in self.model_specs:
            first = self.fewest_checkpointed_config(precision, limit)
            fitting += [first] if first is not None else self._offloading_configs(precision, limit)
        return sorted(fitting, key=lambda config: config.seconds)

    def fewest_checkpointed_config(self, precision: str, limit: int) -> MemoryConfig | None:
        """Return the one with the fewest checkpointed blocks that fits, without offloading."""
        configs = (
            self.estimate_config(precision, self.policy(count)) for count in range(self.blocks + 1)
        )
        return next((config for config in configs if config.size <= limit), None)

    def lowest_memory_config(self) -> MemoryConfig:
        """Return the configuration that needs the least memory."""
        configs = [
            self.estimate_config(name, self.policy(self.blocks)) for name in self.model_specs
        ]
        everything = self.policy(self.blocks, self.blocks, True)
        configs += [self.estimate_config(name, everything) for name in self.offloadable_precisions]
        return min(configs, key=lambda config: config.size)

    def _offloading_configs(self, precision: str, limit: int) -> list[MemoryConfig]:
        """Return those with swapped blocks or offloaded inputs, if the host has the memory."""
        fitting: list[MemoryConfig] = []
        for offload in (False, True) if precision in self.offloadable_precisions else ():
            counts = (round(share * self.blocks) for share in SWAP_FRACTIONS)
            memories = (self.policy(self.blocks, count, offload) for count in counts)
            configs = (self.estimate_config(precision, memory) for memory in memories)
            fitting += list(islice((config for config in configs if config.size <= limit), 1))
        return fitting

    def verify_config(self, config: MemoryConfig, limit: int) -> MemoryConfig | None:
        """Return the configuration with its exact size, or None if it cannot be made to fit.

        More blocks are checkpointed while the size is above the limit.
        """
        for _ in range(MAX_VERIFICATIONS):
            run = with_options(self.run, config.options())
            exact = self.predict(run, config.memory)
            config = dataclasses.replace(config, size=exact.training, exact=True)
            if config.size <= limit:
                return config
            count, memory = config.memory.checkpointed, config.memory
            if count >= self.blocks or self.bytes_per_block <= 0:
                return None
            more = count + max(1, math.ceil((config.size - limit) / self.bytes_per_block))
            config = self.estimate_config(
                config.precision, dataclasses.replace(memory, checkpointed=min(self.blocks, more))
            )
        return None


@dataclass(frozen=True)
class FitResult:
    """The result of a search. chosen: None if nothing fits. others: estimates, fastest first."""

    limit: int
    chosen: MemoryConfig | None
    others: tuple[MemoryConfig, ...]


def find_fitting_config(search: MemoryConfigSearch, limit: int) -> FitResult:
    """Return the fastest configuration whose exact size is within the limit, and the others."""
    configs = search.fitting_configs(limit)
    for position, config in enumerate(configs):
        verified = search.verify_config(config, limit)
        if verified is not None:
            return FitResult(limit, verified, tuple(configs[:position] + configs[position + 1 :]))
    return FitResult(limit, None, ())


def find_fitting_mode(
    search: MemoryConfigSearch, limit: int
) -> tuple[MemoryConfigSearch, FitResult]:
    """Return the best configuration over the modes of several processes, with its search.

    Whole copies of the base are faster than shards, so shards are chosen where the copies do not
    fit without swapping blocks.
    """
    replicated = find_fitting_config(search, limit)
    fits = replicated.chosen is not None and replicated.chosen.memory.swapped == 0
    if fits or search.world.processes == 1 or search.world.mode != "replicated":
        return search, replicated
    run = with_options(search.run, {"fsdp_enable": True, "musubi_blocks_to_swap": 0.0})
    if any(find_distributed_errors(run)):  # another option does not allow it
        return search, replicated
    other = MemoryConfigSearch(
        run,
        search.family,
        search.framings,
        search.budget,
        search.fixed_precisions,
        search.progress,
    )
    sharded = find_fitting_config(other, limit)
    return (search, replicated) if sharded.chosen is None else (other, sharded)


def with_options(run: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """Return the same run with other options; ConfigError when they contradict the rest."""
    return config_from_resolved({**resolved_options(run), **options})


def blocks_to_checkpoint(search: MemoryConfigSearch, limit: int) -> int:
    """Return the blocks to checkpoint for "auto": the smallest number that fits, or all.

    Blocks that the run swaps are checkpointed in any case.
    """
    swapped = search.own_memory.swapped
    configs = (
        search.estimate_config(search.own_precision, search.policy(count, swapped))
        for count in range(swapped, search.blocks + 1)
    )
    first = next((config for config in configs if config.size <= limit), None)
    verified = None if first is None else search.verify_config(first, limit)
    return search.blocks if verified is None else verified.memory.checkpointed
