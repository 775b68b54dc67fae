"""What a run will need of device, host and disk, before anything is downloaded or loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from simpletuner.config.schema import RunConfig
from simpletuner.data.geometry import ImageSize, ResizeCropConfig, bucket_size
from simpletuner.models.block_executor import block_memory_policy
from simpletuner.models.block_swap import ALIGNMENT, DEVICE_BUFFERS
from simpletuner.models.family import BlockMemoryPolicy, ModelFamily, ModelSpec
from simpletuner.training.device import select_device
from simpletuner.training.memory_plan import plan_cache
from simpletuner.training.memory_plan.fake_step import (
    BatchShape,
    StepMeasurement,
    cpu_planning_device,
    measure_fake_step,
)
from simpletuner.training.memory_plan.memory_tracker import CUDA_ALLOCATION_BYTES
from simpletuner.training.optimizers import is_state_offloaded

# Allowances, in bytes: not counted, but what such programs are seen to take.
DEVICE_CONTEXT_BYTES = {
    "cuda": 600_000_000,
    "mps": 300_000_000,
    "cpu": 0,
}  # the driver's, kernels, workspaces of products
HOST_RUNTIME_BYTES = {
    "cuda": 2_500_000_000,
    "mps": 1_000_000_000,
    "cpu": 800_000_000,
}  # Python, torch and its libraries
FRAGMENTATION_FRACTION = (
    0.05  # of what a step makes and frees: a caching allocator cannot use every gap
)
ACTIVATION_ITEM_BYTES = (
    2  # bytes of a number that blocks hand on; only GPUs offload it, and they compute in bf16
)
LARGE_MODEL_BYTES = 1_000_000_000  # bytes of weights; smaller bases train where a plan would take as long as some steps
ASSUMED_ASPECT = (3, 2)  # aspect for a size that names the shorter edge


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes by what they are for. Counted exactly: parts. By constants of this module: allowances.

    before: device bytes of what is loaded, used and dropped before training. moved: bytes between
    host and device in a step. flops: of a step. trained: parameters. feed: what was assumed of the
    data. assumed: the published shape stands for a model whose config is not at hand.
    """

    kind: str
    parts: dict[str, int]
    allowances: dict[str, int]
    before: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]
    flops: float
    moved: int
    trained: int
    feed: BatchShape
    memory: BlockMemoryPolicy
    assumed: bool

    @property
    def tensor_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def training(self) -> int:
        return self.tensor_bytes + sum(self.allowances.values())

    @property
    def peak(self) -> int:
        """Device bytes of the whole run: the largest of its stages."""
        return max(
            self.training, *(size + self.allowances["context"] for size in self.before.values())
        )


def predict_memory(
    run: RunConfig,
    family: ModelFamily,
    framings: Sequence[ResizeCropConfig] = (),
    kind: str | None = None,
    memory: BlockMemoryPolicy | None = None,
) -> MemoryPrediction:
    """By running the step on empty tensors, or from what was measured so before.

    framings: of the datasets, none for the config's own size. kind: "cuda", "mps" or "cpu" to plan
    for another device than the one here. memory: instead of what the options say.
    """
    kind = kind or select_device(run.model).device.type
    sketch, memory, feed, granule = planning_inputs(run, family, framings, kind, memory)
    blocks = len(sketch.blocks)
    # Measuring uses the network up; what is asked of it comes first.
    fetched = [
        aligned_block_bytes(sketch.blocks[number])
        for number in memory.swapped_block_numbers(blocks)
    ]
    model_bytes = weight_bytes(sketch)
    name = plan_cache.cache_key(run, sketch, memory, feed, granule)
    measured = plan_cache.get_or_measure(
        name, lambda: measure_fake_step(run, family, sketch, memory, feed, granule)
    )

    on_host = dict.fromkeys(("swapped blocks", "inputs", "approximator", "optimizer", "average"), 0)
    if memory.offload_activations:
        on_host["inputs"] = checkpointed_input_bytes(sketch, memory, feed)
    if memory.approximator_on_host:
        on_host["approximator"] = sketch.cpu_offloadable_bytes
    if is_state_offloaded(run.optimizer, torch.device(kind)):
        on_host["optimizer"] = measured.optimizer
    parts = dict(measured.peak)
    parts["weights"] -= (
        sum(fetched) - DEVICE_BUFFERS * max(fetched, default=0) + on_host["approximator"]
    )
    parts["activations"] = max(0, parts["activations"] - on_host["inputs"])
    parts["optimizer"] -= on_host["optimizer"]
    average = 4 * measured.trained if run.optimizer.use_ema else 0
    if kind != "cpu" and run.optimizer.ema_device == "cpu":
        on_host["average"] = average
    else:
        parts["optimizer"] += average
    if fetched:
        on_host["swapped blocks"] = model_bytes  # loaded whole on the host, once
    before = {"text encoder": sketch.text_encoder_bytes, "VAE": sketch.vae_bytes}
    loose = (
        0
        if kind == "cpu"
        else int(FRAGMENTATION_FRACTION * (parts["activations"] + parts["temporaries"]))
    )
    return MemoryPrediction(
        kind,
        parts,
        {"context": DEVICE_CONTEXT_BYTES[kind], "fragmentation": loose},
        before,
        host_memory_by_use(kind, on_host, before, sum(parts.values())),
        disk_space_by_use(run, sketch, measured, model_bytes, average),
        measured.flops,
        2 * sum(fetched) * run.training.gradient_accumulation_steps,
        measured.trained,
        feed,
        memory,
        sketch.uses_published_shape,
    )


def planning_inputs(
    run: RunConfig,
    family: ModelFamily,
    framings: Sequence[ResizeCropConfig],
    kind: str,
    memory: BlockMemoryPolicy | None,
) -> tuple[ModelSpec, BlockMemoryPolicy, BatchShape, int]:
    """What `measure` takes."""
    sketch = family.build_spec(run.model, cpu_planning_device(run.model).weights_dtype)
    memory = memory or block_memory_policy(run.model, len(sketch.blocks))
    return (
        sketch,
        memory,
        largest_batch_shape(run, framings, sketch),
        1 if kind == "cpu" else CUDA_ALLOCATION_BYTES,
    )


def is_worth_planning(
    run: RunConfig, family: ModelFamily, framings: Sequence[ResizeCropConfig], kind: str
) -> bool:
    """Whether a prediction is at hand, or the base so large that a few seconds for one are nothing.

    Not of a repository that was never read: it may hold a smaller one, and must not be refused for
    that.
    """
    sketch, memory, feed, granule = planning_inputs(run, family, framings, kind, None)
    if sketch.may_differ_from_published:
        return False
    known = plan_cache.read_cached_measurement(
        plan_cache.cache_key(run, sketch, memory, feed, granule)
    )
    return weight_bytes(sketch) >= LARGE_MODEL_BYTES or known is not None


def largest_batch_shape(
    run: RunConfig, framings: Sequence[ResizeCropConfig], sketch: ModelSpec
) -> BatchShape:
    """The largest size asked for, captions as long as they may be."""
    own = ResizeCropConfig(run.data.resolution, run.data.resolution_type)

    def size(framing: ResizeCropConfig) -> ImageSize:
        aspect = ASSUMED_ASPECT if framing.resolution_type == "pixel" else (1, 1)
        return bucket_size(framing, aspect, sketch.constants.alignment_px)

    largest = max(map(size, framings or (own,)), key=lambda px: px[0] * px[1])
    limit = sketch.constants.max_tokens
    rows = min(limit, run.model.tokenizer_max_length or limit)
    return BatchShape(run.training.train_batch_size, largest, rows)


def weight_bytes(sketch: ModelSpec) -> int:
    return sum(tensor.nbytes for tensor in sketch.transformer.state_dict().values())


def aligned_block_bytes(block: nn.Module) -> int:
    """Each tensor of a block as it lies in a room."""
    sizes = (tensor.nbytes for tensor in (*block.parameters(), *block.buffers()))
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def checkpointed_input_bytes(sketch: ModelSpec, memory: BlockMemoryPolicy, feed: BatchShape) -> int:
    """Bytes that recomputed blocks were given, rows of text and image, two blocks' apart."""
    tokens = feed.size_px[0] * feed.size_px[1] // sketch.constants.token_px**2 + feed.text_rows
    each = feed.samples * tokens * sketch.width * ACTIVATION_ITEM_BYTES
    return each * max(
        0, len(memory.checkpointed_block_numbers(len(sketch.blocks))) - DEVICE_BUFFERS
    )


def host_memory_by_use(
    kind: str, waiting: dict[str, int], before: dict[str, int], tensors: int
) -> dict[str, int]:
    """Host memory: the training where it is the device, else what waits, and the text encoder at first."""
    program = {"Python and libraries": HOST_RUNTIME_BYTES[kind]}
    if kind == "cpu":
        return {**program, "training": max(tensors, *before.values())}
    passing = max(0, before["text encoder"] - sum(waiting.values()))
    return {**program, **{what: size for what, size in waiting.items() if size}, "loading": passing}


def disk_space_by_use(
    run: RunConfig, sketch: ModelSpec, measured: StepMeasurement, model_bytes: int, average: int
) -> dict[str, int]:
    """What is yet to be written; pictures' and captions' caches are small beside it and not counted."""
    one = measured.trained_bytes + measured.optimizer + average
    return {
        "download": sketch.download_bytes,
        "quantised base": 0 if run.model.base_model_precision == "no_change" else model_bytes,
        "checkpoints": run.checkpoint.checkpoints_total_limit * one,
        "result": measured.trained_bytes + average,
    }
