"""Ways to run the same training in less memory, by what they cost: the fastest that fits, and the runners-up.

The cost model: operations over half the device's peak, the quantised bases' extra for unpacking weights, and
weights that come over the bus beside the blocks' own time. It ranks; it does not promise seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from simpletuner.config.load import from_resolved, resolved
from simpletuner.config.schema import RunConfig
from simpletuner.data.geometry import Framing
from simpletuner.models.family import BlockMemory, ModelFamily, Sketch
from simpletuner.training.plan import prediction, speed
from simpletuner.training.plan.imitation import stand_in
from simpletuner.training.plan.prediction import predict
from simpletuner.training.plan.room import Room

# Time of a step beside the unquantised one's. Not measured on a GPU: each block's weights are read once more.
UNPACKING = {"no_change": 1.0, "int8": 1.05, "int4": 1.1, "nf4": 1.1}
SWAPS = (0.0, 0.25, 0.5, 0.75, 1.0)  # share of the blocks whose weights wait on the host
APPROXIMATOR_S = 0.4  # 0.2 TFLOP on a desktop's CPU
VERIFIED = 5  # exact predictions, each some seconds, before a choice is given up


@dataclass(frozen=True)
class Way:
    """precision and memory of so many blocks. size: device bytes while training with allowances; about, or
    exact once predicted. seconds: of a step, by the cost model."""

    precision: str
    memory: BlockMemory
    blocks: int
    size: int
    seconds: float
    exact: bool = False
    text_encoder: str | None = None  # its precision, where it must be another than the run's

    def options(self) -> dict[str, Any]:
        """What to set, also where the run has set another way before."""
        told: dict[str, Any] = {
            "base_model_precision": self.precision,
            "gradient_checkpointing": checkpointing(self.memory.checkpointed, self.blocks),
            "gradient_checkpointing_interval": None,
            "gradient_checkpointing_backend": "offload" if self.memory.offload_activations else "torch",
            "musubi_blocks_to_swap": self.memory.swapped,
            "chroma_approximator_device": "cpu" if self.memory.approximator_on_host else "accelerator",
        }
        if self.text_encoder is not None:
            told["text_encoder_1_precision"] = self.text_encoder
        return told


def checkpointing(count: int, blocks: int) -> bool | int:
    """The option's value for so many blocks; 1 would be read as all."""
    return count >= blocks or (max(2, count) if count else False)


class Ladder:
    """The ways of one run: predicted with every block kept and with every block recomputed, counted between.

    settled: the precisions stay the run's own. About, not exact: a block's share is taken to be the same for
    all.
    """

    def __init__(
        self, run: RunConfig, family: ModelFamily, framings: Sequence[Framing], room: Room,
        settled: bool = False,
    ) -> None:  # fmt: skip
        self.run, self.family, self.framings, self.room, self.settled = run, family, framings, room, settled
        dtype, frozen = stand_in(run.model).weights, run.model.model_type == "lora"
        precisions = tuple(UNPACKING) if frozen and not settled else ()
        self.own = run.model.base_model_precision
        self.sketches: dict[str, Sketch] = {
            name: family.sketch(run.model.model_copy(update={"base_model_precision": name}), dtype)
            for name in dict.fromkeys((*precisions, self.own))
        }
        self.weights = {name: prediction.weight_bytes(sketch) for name, sketch in self.sketches.items()}
        self.blocks = len(self.sketches[self.own].blocks)
        self.kept = predict(run, family, framings, room.kind, BlockMemory())
        self.recomputed = predict(run, family, framings, room.kind, BlockMemory(self.blocks))
        self.each = (self.kept.training - self.recomputed.training) / max(1, self.blocks - 1)
        # Weights may wait on the host where it is another memory, and has room for them.
        most = math.inf if room.host is None else room.host - prediction.RUNTIME[room.kind]
        apart = frozen and room.kind == "cuda"
        self.movable = [name for name, size in self.weights.items() if apart and size <= most]

    def way(self, precision: str, memory: BlockMemory) -> Way:
        sketch, count = self.sketches[precision], memory.checkpointed
        size: float = self.kept.training
        if count:
            size = self.recomputed.training + self.each * (self.blocks - count)
        size += self.weights[precision] - self.weights[self.own]
        fetched = [prediction.frozen_bytes(sketch.blocks[number]) for number in memory.fetched(self.blocks)]
        size -= sum(fetched) - prediction.ROOMS * max(fetched, default=0)
        size -= sketch.hosted_bytes if memory.approximator_on_host else 0
        moved = 2 * sum(fetched)
        if memory.offload_activations:
            inputs = prediction.kept_inputs(sketch, memory, self.kept.feed)
            size, moved = size - inputs, moved + 2 * inputs
        flops = self.kept.flops + (self.recomputed.flops - self.kept.flops) * count / self.blocks
        moved *= self.run.training.gradient_accumulation_steps
        seconds = speed.seconds(flops * UNPACKING.get(precision, 1.05), self.room.peak, moved)
        seconds += APPROXIMATOR_S * memory.approximator_on_host
        return Way(precision, memory, self.blocks, int(size), seconds)

    def ways(self, limit: int) -> list[Way]:
        """Of every precision the fastest that fits, of those that move weights the fastest of each kind."""
        fitting: list[Way] = []
        for precision in self.sketches:
            first = self.plain(precision, limit)
            fitting += [first] if first is not None else self._moving(precision, limit)
        return sorted(fitting, key=lambda way: way.seconds)

    def plain(self, precision: str, limit: int) -> Way | None:
        """With as few blocks recomputed as fit, and nothing on the host."""
        ways = (self.way(precision, BlockMemory(count)) for count in range(self.blocks + 1))
        return next((way for way in ways if way.size <= limit), None)

    def least(self) -> Way:
        """In as little memory as can be."""
        ways = [self.way(name, BlockMemory(self.blocks)) for name in self.sketches]
        everything = BlockMemory(self.blocks, 1, self.blocks, True, True)
        ways += [self.way(name, everything) for name in self.movable]
        return min(ways, key=lambda way: way.size)

    def text_encoder(self, limit: int) -> str | None:
        """The finest precision of T5 within the limit, None for the run's own. It comes before training."""
        for precision in (None, *list(UNPACKING)[1:]):
            changed = {} if precision is None else {"text_encoder_1_precision": precision}
            sketch = self.family.sketch(self.run.model.model_copy(update=changed), torch.bfloat16)
            if sketch.text_encoder_bytes + prediction.CONTEXT[self.room.kind] <= limit:
                return precision
        return list(UNPACKING)[-1]

    def _moving(self, precision: str, limit: int) -> list[Way]:
        """With weights or inputs on the host, if it has room; the approximator there as a last resort."""
        for on_host in (False, True) if precision in self.movable else ():
            found = []
            for offload in (False, True):
                counts = (round(share * self.blocks) for share in SWAPS)
                memories = (BlockMemory(self.blocks, 1, count, offload, on_host) for count in counts)
                ways = (self.way(precision, memory) for memory in memories)
                found += list(islice((way for way in ways if way.size <= limit), 1))
            if found:
                return found
        return []

    def proven(self, way: Way, limit: int) -> Way | None:
        """The way with its exact size, with more blocks recomputed where that is over the limit."""
        for _ in range(VERIFIED):
            run = changed(self.run, way.options())
            exact = predict(run, self.family, self.framings, self.room.kind, way.memory)
            way = dataclasses.replace(way, size=exact.training, exact=True)
            if way.size <= limit:
                return way
            count, memory = way.memory.checkpointed, way.memory
            if count >= self.blocks or self.each <= 0:
                return None
            more = count + max(1, math.ceil((way.size - limit) / self.each))
            again = self.way(way.precision, dataclasses.replace(memory, checkpointed=min(self.blocks, more)))
            way = dataclasses.replace(again, text_encoder=way.text_encoder)
        return None


@dataclass(frozen=True)
class Fit:
    """chosen: None when nothing fits. others: about, in order of cost."""

    limit: int
    chosen: Way | None
    others: tuple[Way, ...]


def fit(ladder: Ladder, limit: int) -> Fit:
    """The fastest way whose exact size is within the limit, and what else would fit."""
    text_encoder = None if ladder.settled else ladder.text_encoder(limit)
    ways = [dataclasses.replace(way, text_encoder=text_encoder) for way in ladder.ways(limit)]
    for position, way in enumerate(ways):
        proven = ladder.proven(way, limit)
        if proven is not None:
            return Fit(limit, proven, tuple(ways[:position] + ways[position + 1 :]))
    return Fit(limit, None, ())


def changed(run: RunConfig, options: Mapping[str, Any]) -> RunConfig:
    """The same run with other options. ConfigError when they contradict the rest."""
    return from_resolved({**resolved(run), **options})


def demanded(ladder: Ladder, limit: int) -> int:
    """gradient_checkpointing "auto": the fewest blocks to recompute; all where even that is too little."""
    first = ladder.plain(ladder.own, limit)
    proven = None if first is None else ladder.proven(first, limit)
    return ladder.blocks if proven is None else proven.memory.checkpointed
