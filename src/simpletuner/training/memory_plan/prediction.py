"""Predict the memory and disk space of a run before anything is downloaded or loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from simpletuner.config.evaluation_models import needs_evaluation_model
from simpletuner.config.image_metrics import metric_device_bytes
from simpletuner.config.preservation_constraints import uses_base_prediction
from simpletuner.config.schema import RunConfig
from simpletuner.data.geometry import ImageSize, ResizeCropConfig, bucket_sizes
from simpletuner.flow.rollout import final_probability
from simpletuner.models.block_executor import block_memory_policy
from simpletuner.models.block_swap import ALIGNMENT, DEVICE_BUFFERS
from simpletuner.models.family import BlockMemoryPolicy, ModelFamily, ModelSpec
from simpletuner.models.weights.evaluation_files import (
    EvaluationModelSize,
    measure_evaluation_model,
)
from simpletuner.training.device import select_device
from simpletuner.training.memory_plan import plan_cache
from simpletuner.training.memory_plan.attention_scores import attention_scores_bytes
from simpletuner.training.memory_plan.communication import CollectiveUse, step_communication
from simpletuner.training.memory_plan.fake_encoders import measure_encoders
from simpletuner.training.memory_plan.fake_step import (
    NO_TARGETS,
    BatchShape,
    StepMeasurement,
    TargetUse,
    cpu_device_without_gpu_options,
)
from simpletuner.training.memory_plan.host_memory import (
    host_memory_by_use,
    offloaded_bytes,
    page_locked_bytes,
)
from simpletuner.training.memory_plan.measure_once import Progress, measure_once, silent
from simpletuner.training.memory_plan.memory_tracker import CUDA_ALLOCATION_BYTES
from simpletuner.training.memory_plan.world_layout import (
    WeightBytes,
    WorldLayout,
    offloaded_by_engine,
    parts_per_process,
    read_layout,
    weight_bytes_by_unit,
)
from simpletuner.training.train_state import streams_approximator

# Allowances in bytes: they are not counted, but observed in such programs.
# The driver's context, the kernels and the workspaces of matrix products.
DEVICE_CONTEXT_BYTES = {"cuda": 600_000_000, "mps": 300_000_000, "cpu": 0}
# Part of the activations and temporaries that a caching allocator loses in gaps.
FRAGMENTATION_FRACTION = 0.05
STEP_PARTS = ("activations", "temporaries")  # which exist only within a step
# Bytes of weights. For a smaller base, the plan would take as long as some training steps.
LARGE_MODEL_BYTES = 1_000_000_000
ASSUMED_ASPECT = (3, 2)  # where the resolution is only the shorter edge


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes by their use, on the device of each process.

    parts: of the device, counted exactly for one process, and on paper for several. allowances:
    constants of this module. before: device bytes of models that are used and dropped before
    training, with their activations. validation: device bytes between training steps, with what
    stays there of the training: while an image is decoded, and while modulations are computed.
    host: of all processes of one machine. host, disk: bytes by use. moved: bytes copied
    between host and device in a step. flops: of a step, with its rollouts. rollout_flops: the
    largest part of rollouts in it. trained: number of parameters. feed: the assumed batch. assumed:
    whether the published shape was used, because the model's own config is not on this machine yet.
    base_bytes: of the transformer's weights that each process holds at any time. communication: of
    an optimizer step.
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
    rollout_flops: float = 0.0
    world: WorldLayout = field(default_factory=WorldLayout)
    base_bytes: int = 0
    communication: tuple[CollectiveUse, ...] = ()
    base_flops: float = 0.0
    validation: dict[str, int] = field(default_factory=dict)

    @property
    def tensor_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def training(self) -> int:
        return self.tensor_bytes + sum(self.allowances.values())

    @property
    def peak(self) -> int:
        """Return the device bytes of the largest stage of the run."""
        others = (*self.before.values(), *self.validation.values())
        return max(self.training, *(size + self.allowances["context"] for size in others))


def predict_memory(
    run: RunConfig,
    family: ModelFamily,
    framings: Sequence[ResizeCropConfig] = (),
    kind: str | None = None,
    memory: BlockMemoryPolicy | None = None,
    targets: TargetUse = NO_TARGETS,
    progress: Progress = silent,
) -> MemoryPrediction:
    """Run a step on tensors without data, or use the cached measurement of one.

    framings: resize and crop settings of the datasets; none for the resolution of the options.
    kind: "cuda", "mps" or "cpu", to plan for another device than that of this machine. memory:
    replaces the policy of the options. targets: what the datasets ask for. progress: called first.
    """
    kind = kind or select_device(run.model).device.type
    spec, memory, feed, granule = planning_inputs(run, family, framings, kind, memory)
    feed = targets.apply(feed)
    world, is_lora = read_layout(run), run.model.model_type == "lora"
    # The measurement changes the network of the spec, so its sizes are read before.
    numbers = memory.swapped_block_numbers(len(spec.blocks))
    swapped = [aligned_block_bytes(spec.blocks[number]) for number in numbers]
    model_bytes = weight_bytes(spec)
    units = family.shard_units(spec.transformer)
    unit_weights = weight_bytes_by_unit(spec.transformer, units, is_lora)
    measured = measure_once(run, family, spec, memory, feed, granule, progress)
    average = 4 * measured.trained if run.optimizer.use_ema else 0
    on_host = offloaded_bytes(run, kind, spec, memory, feed, measured, average)
    parts = device_parts(measured, on_host, swapped, average)
    on_host |= page_locked_bytes(spec, memory, feed, swapped, model_bytes)
    parts, on_host = share_among_processes(parts, on_host, world, unit_weights, measured, is_lora)
    passes = run.training.gradient_accumulation_steps
    rollouts = final_probability(run.flow) * measured.rollout_flops
    # Rollouts and the base's predictions, in every micro-batch.
    more_forwards = bool(rollouts) + feed.towards_base
    encoders = measure_encoders(run, family, spec, feed, kind, granule)
    held = sum(size for part, size in parts.items() if part not in STEP_PARTS)
    return MemoryPrediction(
        kind,
        parts,
        device_allowances(run, kind, parts, attention_scores_bytes(spec, feed, memory, kind)),
        encoders.before_training,
        host_memory_by_use(
            kind, on_host, encoders.before_training, sum(parts.values()), world.local
        ),
        disk_space_by_use(run, spec, measured, model_bytes, average),
        measured.flops + rollouts,
        (2 + more_forwards) * sum(swapped) * passes,
        measured.trained,
        feed,
        memory,
        spec.uses_published_shape,
        rollouts,
        world,
        unit_weights.own_part(world),
        step_communication(world, unit_weights, measured, passes, is_lora, more_forwards),
        measured.base_flops,
        encoders.between_steps(held, on_host["approximator"]),
    )


def device_parts(
    measured: StepMeasurement, on_host: dict[str, int], swapped: Sequence[int], average: int
) -> dict[str, int]:
    """Return the measured bytes by part, without what is in host memory.

    swapped: bytes of each swapped block. They share the device buffers; each buffer has the size of
    the largest block.
    """
    parts = dict(measured.peak)
    parts["weights"] -= sum(swapped) - DEVICE_BUFFERS * max(swapped, default=0)
    parts["weights"] -= on_host["approximator"]
    parts["activations"] = max(0, parts["activations"] - on_host["inputs"])
    parts["optimizer"] += average - on_host["average"] - on_host["optimizer"]
    return parts


def share_among_processes(
    parts: dict[str, int],
    on_host: dict[str, int],
    world: WorldLayout,
    weights: WeightBytes,
    measured: StepMeasurement,
    is_lora: bool,
) -> tuple[dict[str, int], dict[str, int]]:
    """Return device and host bytes of one of several processes, from those of a single process."""
    parts = parts_per_process(parts, world, weights, measured, is_lora)
    on_host = dict(on_host)
    if world.shards("optimizer", is_lora):
        for use in ("optimizer", "average"):
            on_host[use] = -(-on_host[use] // world.processes)
    for part, size in offloaded_by_engine(parts, world, weights).items():
        parts[part] -= size
        on_host[part] = on_host.get(part, 0) + size
    return parts, on_host


def device_allowances(
    run: RunConfig, kind: str, parts: dict[str, int], attention_scores: int
) -> dict[str, int]:
    """Return estimates of what is not counted: the context, lost gaps, the models of metrics."""
    lost = int(FRAGMENTATION_FRACTION * (parts["activations"] + parts["temporaries"]))
    allowances = {
        "context": DEVICE_CONTEXT_BYTES[kind],
        "fragmentation": 0 if kind == "cpu" else lost,
    }
    metrics = metric_device_bytes(run.validation.evaluation_type)
    model = evaluation_model_size(run)
    metrics += model.weights if model is not None else 0
    uncounted = {"image metrics": metrics, "attention scores": attention_scores}
    return allowances | {use: size for use, size in uncounted.items() if size}


def evaluation_model_size(run: RunConfig) -> EvaluationModelSize | None:
    """Return the size of the model that scores images; None if no metric needs one."""
    options = run.validation
    if not needs_evaluation_model(options.evaluation_type):
        return None
    return measure_evaluation_model(options.pretrained_evaluation_model_name_or_path)


def planning_inputs(
    run: RunConfig,
    family: ModelFamily,
    framings: Sequence[ResizeCropConfig],
    kind: str,
    memory: BlockMemoryPolicy | None,
) -> tuple[ModelSpec, BlockMemoryPolicy, BatchShape, int]:
    """Return spec, memory policy, batch shape and allocation granule for a measurement."""
    spec = family.build_spec(run.model, cpu_device_without_gpu_options(run.model).weights_dtype)
    memory = memory or memory_policy(run, len(spec.blocks), kind)
    return (
        spec,
        memory,
        largest_batch_shape(run, framings, spec),
        1 if kind == "cpu" else CUDA_ALLOCATION_BYTES,
    )


def memory_policy(run: RunConfig, blocks: int, kind: str) -> BlockMemoryPolicy:
    """Return the policy of a run on such a device; "auto" checkpoints every block."""
    world = read_layout(run)
    is_sharded = world.uses_deepspeed or (world.mode == "sharded" and world.processes > 1)
    return block_memory_policy(run.model, blocks, streams_approximator(run, kind, is_sharded))


def is_worth_planning(
    run: RunConfig,
    family: ModelFamily,
    framings: Sequence[ResizeCropConfig],
    kind: str,
    described: tuple[ModelSpec, BlockMemoryPolicy, BatchShape, int] | None = None,
) -> bool:
    """Return whether a prediction is cached, or the base is large enough to spend seconds on one.

    described: the planning inputs of the run, for a caller that has them.

    False for a repository that was never read: its model may be smaller than the published one, and
    must not be refused for that.
    """
    described = described or planning_inputs(run, family, framings, kind, None)
    spec, memory, feed, granule = described
    if spec.may_differ_from_published:
        return False
    cached = plan_cache.read_cached_measurement(
        plan_cache.cache_key(run, spec, memory, feed, granule)
    )
    return weight_bytes(spec) >= LARGE_MODEL_BYTES or cached is not None


def largest_batch_shape(
    run: RunConfig, framings: Sequence[ResizeCropConfig], spec: ModelSpec
) -> BatchShape:
    """Return the largest batch of any dataset, with captions of the maximal length."""
    from_options = ResizeCropConfig(run.data.resolution, run.data.resolution_type)

    def size(framing: ResizeCropConfig) -> ImageSize:
        aspect = ASSUMED_ASPECT if framing.resolution_type == "pixel" else (1, 1)
        sizes = framing.resolution_buckets or bucket_sizes(
            framing, aspect, spec.constants.alignment_px
        )
        return max(sizes, key=lambda px: px[0] * px[1])

    samples, largest = max(
        (
            (framing.train_batch_size or run.training.train_batch_size, size(framing))
            for framing in framings or (from_options,)
        ),
        key=lambda batch: batch[0] * batch[1][0] * batch[1][1],
    )
    limit = spec.constants.max_tokens
    rows = min(limit, run.model.tokenizer_max_length or limit)
    options = run.preservation
    copies = 1 + (options.diff_output_preservation or options.blank_prompt_preservation)
    return BatchShape(
        samples,
        largest,
        rows,
        copies,
        uses_base_prediction(run),
        options.masked_prior_preservation_weight > 0,
    )


def weight_bytes(spec: ModelSpec) -> int:
    """Return the bytes of all weights of the transformer."""
    return sum(tensor.nbytes for tensor in spec.transformer.state_dict().values())


def aligned_block_bytes(block: nn.Module) -> int:
    """Return the bytes of a block in a device buffer, where every tensor is aligned."""
    sizes = (tensor.nbytes for tensor in (*block.parameters(), *block.buffers()))
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def disk_space_by_use(
    run: RunConfig, spec: ModelSpec, measured: StepMeasurement, model_bytes: int, average: int
) -> dict[str, int]:
    """Return the disk space by use; the caches of images and captions are small and not counted."""
    checkpoint_bytes = measured.trained_bytes + measured.optimizer + average
    model = evaluation_model_size(run)
    return {
        "download": spec.download_bytes + (model.download if model is not None else 0),
        "quantised base": 0 if run.model.base_model_precision == "no_change" else model_bytes,
        "checkpoints": run.checkpoint.checkpoints_total_limit * checkpoint_bytes,
        "result": measured.trained_bytes + average,
    }
