"""Ways to run the same training in less memory, by what they cost: the fastest that fits, and the runners-up.

The cost model: operations over half the device's peak, the quantised bases' extra for unpacking
weights, and weights that come over the bus beside the blocks' own time. It ranks; it does not
promise seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from simpletuner.config.load import config_from_resolved, resolved_options
from simpletuner.config.schema import RunConfig
from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.models.family import BlockMemoryPolicy, ModelFamily, ModelSpec
from simpletuner.training.memory_plan import prediction, step_time
from simpletuner.training.memory_plan.fake_step import cpu_planning_device
from simpletuner.training.memory_plan.memory_budget import MemoryBudget
from simpletuner.training.memory_plan.prediction import predict_memory

# Time of a step beside the unquantised one's. Not measured on a GPU: each block's weights are read once more.
DEQUANTIZATION_SLOWDOWN = {"no_change": 1.0, "int8": 1.05, "int4": 1.1, "nf4": 1.1}
SWAP_FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)  # share of the blocks whose weights wait on the host
HOST_APPROXIMATOR_S = 0.4  # 0.2 TFLOP on a desktop's CPU
MAX_VERIFICATIONS = 5  # exact predictions, each some seconds, before a choice is given up


@dataclass(frozen=True)
class MemoryConfig:
    """precision and memory of so many blocks. size: device bytes while training with allowances; about, or
    exact once predicted. seconds: of a step, by the cost model.
    """

    precision: str
    memory: BlockMemoryPolicy
    blocks: int
    size: int
    seconds: float
    exact: bool = False
    text_encoder: str | None = None  # its precision, where it must be another than the run's

    def options(self) -> dict[str, Any]:
        """What to set, also where the run has set another way before."""
        told: dict[str, Any] = {
            "base_model_precision": self.precision,
            "gradient_checkpointing": checkpointing_option(self.memory.checkpointed, self.blocks),
            "gradient_checkpointing_interval": None,
            "gradient_checkpointing_backend": "offload"
            if self.memory.offload_activations
            else "torch",
            "musubi_blocks_to_swap": self.memory.swapped,
            "chroma_approximator_device": "cpu"
            if self.memory.approximator_on_host
            else "accelerator",
        }
        if self.text_encoder is not None:
            told["text_encoder_1_precision"] = self.text_encoder
        return told


def checkpointing_option(count: int, blocks: int) -> bool | int:
    """The option's value for so many blocks; 1 would be read as all."""
    return count >= blocks or (max(2, count) if count else False)


class MemoryConfigSearch:
    """The ways of one run: predicted with every block kept and with every block recomputed, counted between.

    settled: the precisions stay the run's own. About, not exact: a block's share is taken to be the
    same for all.
    """

    def __init__(
        self,
        run: RunConfig,
        family: ModelFamily,
        framings: Sequence[ResizeCropConfig],
        room: MemoryBudget,
        settled: bool = False,
    ) -> None:
        self.run, self.family, self.framings, self.budget, self.fixed_precisions = (
            run,
            family,
            framings,
            room,
            settled,
        )
        dtype, frozen = cpu_planning_device(run.model).weights_dtype, run.model.model_type == "lora"
        precisions = tuple(DEQUANTIZATION_SLOWDOWN) if frozen and not settled else ()
        self.own_precision = run.model.base_model_precision
        self.model_specs: dict[str, ModelSpec] = {
            name: family.build_spec(
                run.model.model_copy(update={"base_model_precision": name}), dtype
            )
            for name in dict.fromkeys((*precisions, self.own_precision))
        }
        self.weight_bytes = {
            name: prediction.weight_bytes(sketch) for name, sketch in self.model_specs.items()
        }
        self.blocks = len(self.model_specs[self.own_precision].blocks)
        self.uncheckpointed_prediction = predict_memory(
            run, family, framings, room.kind, BlockMemoryPolicy()
        )
        self.checkpointed_prediction = predict_memory(
            run, family, framings, room.kind, BlockMemoryPolicy(self.blocks)
        )
        self.bytes_per_block = (
            self.uncheckpointed_prediction.training - self.checkpointed_prediction.training
        ) / max(1, self.blocks - 1)
        # Weights may wait on the host where it is another memory, and has room for them.
        most = (
            math.inf
            if room.host_free_bytes is None
            else room.host_free_bytes - prediction.HOST_RUNTIME_BYTES[room.kind]
        )
        apart = frozen and room.kind == "cuda"
        self.offloadable_precisions = [
            name for name, size in self.weight_bytes.items() if apart and size <= most
        ]

    def estimate_config(self, precision: str, memory: BlockMemoryPolicy) -> MemoryConfig:
        sketch, count = self.model_specs[precision], memory.checkpointed
        size: float = self.uncheckpointed_prediction.training
        if count:
            size = self.checkpointed_prediction.training + self.bytes_per_block * (
                self.blocks - count
            )
        size += self.weight_bytes[precision] - self.weight_bytes[self.own_precision]
        fetched = [
            prediction.aligned_block_bytes(sketch.blocks[number])
            for number in memory.swapped_block_numbers(self.blocks)
        ]
        size -= sum(fetched) - prediction.DEVICE_BUFFERS * max(fetched, default=0)
        size -= sketch.cpu_offloadable_bytes if memory.approximator_on_host else 0
        moved = 2 * sum(fetched)
        if memory.offload_activations:
            inputs = prediction.checkpointed_input_bytes(
                sketch, memory, self.uncheckpointed_prediction.feed
            )
            size, moved = size - inputs, moved + 2 * inputs
        flops = (
            self.uncheckpointed_prediction.flops
            + (self.checkpointed_prediction.flops - self.uncheckpointed_prediction.flops)
            * count
            / self.blocks
        )
        moved *= self.run.training.gradient_accumulation_steps
        seconds = step_time.estimate_seconds(
            flops * DEQUANTIZATION_SLOWDOWN.get(precision, 1.05), self.budget.peak_flops, moved
        )
        seconds += HOST_APPROXIMATOR_S * memory.approximator_on_host
        return MemoryConfig(precision, memory, self.blocks, int(size), seconds)

    def fitting_configs(self, limit: int) -> list[MemoryConfig]:
        """Of every precision the fastest that fits, of those that move weights the fastest of each kind."""
        fitting: list[MemoryConfig] = []
        for precision in self.model_specs:
            first = self.fewest_checkpointed_config(precision, limit)
            fitting += [first] if first is not None else self._offloading_configs(precision, limit)
        return sorted(fitting, key=lambda way: way.seconds)

    def fewest_checkpointed_config(self, precision: str, limit: int) -> MemoryConfig | None:
        """With as few blocks recomputed as fit, and nothing on the host."""
        ways = (
            self.estimate_config(precision, BlockMemoryPolicy(count))
            for count in range(self.blocks + 1)
        )
        return next((way for way in ways if way.size <= limit), None)

    def lowest_memory_config(self) -> MemoryConfig:
        """In as little memory as can be."""
        ways = [
            self.estimate_config(name, BlockMemoryPolicy(self.blocks)) for name in self.model_specs
        ]
        everything = BlockMemoryPolicy(self.blocks, 1, self.blocks, True, True)
        ways += [self.estimate_config(name, everything) for name in self.offloadable_precisions]
        return min(ways, key=lambda way: way.size)

    def text_encoder_precision(self, limit: int) -> str | None:
        """The finest precision of T5 within the limit, None for the run's own. It comes before training."""
        for precision in (None, *list(DEQUANTIZATION_SLOWDOWN)[1:]):
            changed = {} if precision is None else {"text_encoder_1_precision": precision}
            sketch = self.family.build_spec(
                self.run.model.model_copy(update=changed), torch.bfloat16
            )
            if (
                sketch.text_encoder_bytes + prediction.DEVICE_CONTEXT_BYTES[self.budget.kind]
                <= limit
            ):
                return precision
        return list(DEQUANTIZATION_SLOWDOWN)[-1]

    def _offloading_configs(self, precision: str, limit: int) -> list[MemoryConfig]:
        """With weights or inputs on the host, if it has room; the approximator there as a last resort."""
        for on_host in (False, True) if precision in self.offloadable_precisions else ():
            found = []
            for offload in (False, True):
                counts = (round(share * self.blocks) for share in SWAP_FRACTIONS)
                memories = (
                    BlockMemoryPolicy(self.blocks, 1, count, offload, on_host) for count in counts
                )
                ways = (self.estimate_config(precision, memory) for memory in memories)
                found += list(islice((way for way in ways if way.size <= limit), 1))
            if found:
                return found
        return []

    def verify_config(self, way: MemoryConfig, limit: int) -> MemoryConfig | None:
        """The way with its exact size, with more blocks recomputed where that is over the limit."""
        for _ in range(MAX_VERIFICATIONS):
            run = with_options(self.run, way.options())
            exact = predict_memory(run, self.family, self.framings, self.budget.kind, way.memory)
            way = dataclasses.replace(way, size=exact.training, exact=True)
            if way.size <= limit:
                return way
            count, memory = way.memory.checkpointed, way.memory
            if count >= self.blocks or self.bytes_per_block <= 0:
                return None
            more = count + max(1, math.ceil((way.size - limit) / self.bytes_per_block))
            again = self.estimate_config(
                way.precision, dataclasses.replace(memory, checkpointed=min(self.blocks, more))
            )
            way = dataclasses.replace(again, text_encoder=way.text_encoder)
        return None


@dataclass(frozen=True)
class FitResult:
    """chosen: None when nothing fits. others: about, in order of cost."""

    limit: int
    chosen: MemoryConfig | None
    others: tuple[MemoryConfig, ...]


def find_fitting_config(ladder: MemoryConfigSearch, limit: int) -> FitResult:
    """The fastest way whose exact size is within the limit, and what else would fit."""
    text_encoder = None if ladder.fixed_precisions else ladder.text_encoder_precision(limit)
    ways = [
        dataclasses.replace(way, text_encoder=text_encoder) for way in ladder.fitting_configs(limit)
    ]
    for position, way in enumerate(ways):
        proven = ladder.verify_config(way, limit)
        if proven is not None:
            return FitResult(limit, proven, tuple(ways[:position] + ways[position + 1 :]))
    return FitResult(limit, None, ())


def with_options(run: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """The same run with other options. ConfigError when they contradict the rest."""
    return config_from_resolved({**resolved_options(run), **options})


def blocks_to_checkpoint(ladder: MemoryConfigSearch, limit: int) -> int:
    """gradient_checkpointing "auto": the fewest blocks to recompute; all where even that is too little."""
    first = ladder.fewest_checkpointed_config(ladder.own_precision, limit)
    proven = None if first is None else ladder.verify_config(first, limit)
    return ladder.blocks if proven is None else proven.memory.checkpointed
