"""Device memory of each process of a run by its mode, on paper, from the bytes of one process.

Replicated: every process holds everything. Sharded (FSDP2): every process holds its part of the
transformer, and gathers one block after the other; adapters stay whole. ZeRO 1, 2 and 3 (DeepSpeed)
shard the state of the optimizer, then also the gradients, then also the weights
(Rajbhandari et al. 2020, ZeRO: Memory Optimizations Toward Training Trillion Parameter Models).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from simpletuner.config.deepspeed_config import parse_zero_config, uses_deepspeed
from simpletuner.config.environment import copy_process_environment
from simpletuner.config.launch_environment import read_launched_process
from simpletuner.config.schema import RunConfig
from simpletuner.training.memory_plan.fake_step import StepMeasurement

# What is divided by the number of processes.
SHARDED_STATE: dict[str, tuple[str, ...]] = {
    "replicated": (),
    "sharded": ("optimizer", "gradients", "weights"),
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights"),
}
GATHERED_UNITS = 2  # the one that computes, and the one that is gathered for the next
# DeepSpeed's defaults, in numbers: reduce_bucket_size and stage3_max_live_parameters.
ZERO_BUCKET, ZERO_LIVE = 500_000_000, 1_000_000_000
ITEM_BYTES = 2  # of a number in bf16


@dataclass(frozen=True)
class WorldLayout:
    """The processes of a run.

    local: those of one machine. mode: a key of SHARDED_STATE. sharded: what is divided among the
    processes. reshards: whether the weights of a block are freed between its forward and its
    backward pass. bucket_bytes: in which the engine collects gradients. live_bytes: of weights that
    the engine keeps gathered for later use. offloaded: what the engine has in host memory.
    widens_gradients: whether the engine sends and adds gradients of bf16 weights in float32.
    """

    processes: int = 1
    local: int = 1
    mode: str = "replicated"
    sharded: tuple[str, ...] = ()
    reshards: bool = True
    bucket_bytes: int = 0
    live_bytes: int = 0
    offloaded: tuple[str, ...] = ()
    widens_gradients: bool = False

    @property
    def gradient_factor(self) -> int:
        """Return the bytes of a gradient that is summed for each byte of its weight."""
        return 2 if self.widens_gradients else 1

    @property
    def uses_deepspeed(self) -> bool:
        return self.mode.startswith("zero")

    def shards(self, state: str, of_adapters: bool = False) -> bool:
        """Return whether weights, gradients or optimizer are divided among several processes."""
        whole = of_adapters and not self.uses_deepspeed
        return self.processes > 1 and state in self.sharded and not whole


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the transformer's weights.

    units: of each part that is gathered at once, such as a block. rest: outside of these. whole: of
    vectors that are never sharded.
    """

    units: tuple[int, ...]
    rest: int
    whole: int = 0

    @property
    def sharded(self) -> int:
        """Return the bytes that a mode that shards weights divides."""
        return sum(self.units) + self.rest

    @property
    def total(self) -> int:
        return self.sharded + self.whole

    def own_part(self, layout: WorldLayout) -> int:
        """Return the bytes that a process holds at any time."""
        if not layout.shards("weights"):
            return self.total
        return self.whole + -(-self.sharded // layout.processes)

    def per_process(self, layout: WorldLayout) -> int:
        """Return the bytes that a process holds while it trains, with what is gathered."""
        own = self.own_part(layout)
        if not layout.shards("weights"):
            return own
        if not layout.reshards:
            return own + self.sharded
        # What is outside of the units is gathered for the whole pass.
        gathered = sum(sorted(self.units)[-GATHERED_UNITS:]) + self.rest
        return own + min(self.sharded, max(gathered, layout.live_bytes))


def read_layout(run: RunConfig) -> WorldLayout:
    """Return the layout of a run.

    The number of processes is that of the launcher, where one has started this process, and else
    that of the options, where auto is one for each GPU of this machine.
    """
    options = run.distributed
    count, local = count_processes(run)
    if uses_deepspeed(run):
        zero = parse_zero_config(run)
        mode = f"zero{zero.stage}"
        sharded = SHARDED_STATE[mode]
        if run.model.base_model_precision != "no_change":  # ZeRO shards only floats
            sharded = tuple(state for state in sharded if state != "weights")
        offloaded = tuple(
            state
            for state, key in (("optimizer", "offload_optimizer"), ("weights", "offload_param"))
            if key in zero.section
        )
        bucket = int(zero.section.get("reduce_bucket_size", ZERO_BUCKET))
        live = int(zero.section.get("stage3_max_live_parameters", ZERO_LIVE))
        return WorldLayout(
            count, local, mode, sharded, True, ITEM_BYTES * bucket, ITEM_BYTES * live, offloaded,
            zero.widens_gradients,
        )  # fmt: skip
    if options.fsdp_enable:
        reshards = options.fsdp_reshard_after_forward
        return WorldLayout(count, local, "sharded", SHARDED_STATE["sharded"], reshards)
    return WorldLayout(count, local)


def count_processes(run: RunConfig) -> tuple[int, int]:
    """Return how many processes a run has over all machines, and on this machine."""
    options = run.distributed
    launched = read_launched_process(copy_process_environment(), options)
    if launched is not None:
        return launched.size, launched.local_size
    if options.num_processes != "auto":
        return options.num_processes, options.num_processes // options.num_machines
    uses_gpus = run.model.device in ("auto", "cuda")
    local = max(1, torch.cuda.device_count() if uses_gpus else 1)
    return local * options.num_machines, local


def weight_bytes_by_unit(
    transformer: nn.Module, units: Sequence[nn.Module], is_lora: bool
) -> WeightBytes:
    """Return the bytes of the transformer's weights, with those of each unit.

    Vectors are sharded only where they are trained.
    """

    def nbytes(module: nn.Module, vectors: bool) -> int:
        tensors = (*module.parameters(), *module.buffers())
        return sum(tensor.nbytes for tensor in tensors if (is_lora and tensor.ndim < 2) == vectors)

    sizes = tuple(nbytes(unit, False) for unit in units)
    rest = nbytes(transformer, False) - sum(sizes)
    return WeightBytes(sizes, rest, nbytes(transformer, True))


def parts_per_process(
    parts: Mapping[str, int],
    layout: WorldLayout,
    weights: WeightBytes,
    measured: StepMeasurement,
    is_lora: bool,
) -> dict[str, int]:
    """Return the device bytes by part of one process, from those of a run with one process.

    Gradients are counted among the temporaries.
    """
    result, count, trained_bytes = dict(parts), layout.processes, measured.trained_bytes
    if count == 1:
        return result
    result["weights"] += weights.per_process(layout) - weights.total
    if layout.shards("optimizer", is_lora):
        result["optimizer"] = -(-result["optimizer"] // count)
    if layout.shards("gradients", is_lora):
        freed = trained_bytes - -(-trained_bytes * layout.gradient_factor // count)
        result["temporaries"] = max(0, result["temporaries"] - freed)
        if not is_lora:
            result["temporaries"] += max(weights.units, default=0)  # before it is scattered
            # With all gradients, the highest moment may have been one without activations.
            result["activations"] = measured.activations
    if layout.uses_deepspeed:
        # The engine updates float32 copies of the parameters, each process its own part, and the
        # state of its optimizer has their dtype.
        if not is_lora:
            result["optimizer"] *= 4 * measured.trained // trained_bytes
        result["optimizer"] += -(-4 * measured.trained // count)
        bucket = min(trained_bytes, layout.bucket_bytes)
        # A bucket is collected in the dtype of the weights; a copy of it in float32 is sent.
        copy = bucket * layout.gradient_factor if layout.widens_gradients else 0
        result["communication buffers"] = bucket + copy
    if is_lora and layout.shards("weights", of_adapters=True):
        result["adapters"] = -(-result["adapters"] // count)
    return result


def offloaded_by_engine(
    parts: Mapping[str, int], layout: WorldLayout, weights: WeightBytes
) -> dict[str, int]:
    """Return the bytes that DeepSpeed moves from the parts of a process to host memory."""
    moved: dict[str, int] = {}
    if layout.processes > 1 and "optimizer" in layout.offloaded:
        moved["optimizer"] = parts["optimizer"]
    if layout.shards("weights") and "weights" in layout.offloaded:
        moved["weights"] = -(-weights.total // layout.processes)
    return moved
