"""What a run will need of device, host and disk, before anything is downloaded or loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from simpletuner.config.schema import RunConfig
from simpletuner.data.geometry import Framing, Size, bucket
from simpletuner.models.blocks import block_memory
from simpletuner.models.family import BlockMemory, ModelFamily, Sketch
from simpletuner.models.swap import ALIGNMENT, ROOMS
from simpletuner.training.device import choose
from simpletuner.training.optimizers import is_hosted
from simpletuner.training.plan import stored
from simpletuner.training.plan.count import CUDA_GRANULE
from simpletuner.training.plan.imitation import Feed, Measured, measure, stand_in

# Allowances, in bytes: not counted, but what such programs are seen to take.
CONTEXT = {"cuda": 600_000_000, "mps": 300_000_000, "cpu": 0}  # the driver's, kernels, workspaces of products
RUNTIME = {"cuda": 2_500_000_000, "mps": 1_000_000_000, "cpu": 800_000_000}  # Python, torch and its libraries
FRAGMENTATION = 0.05  # of what a step makes and frees: a caching allocator cannot use every gap
COMPUTED = 2  # bytes of a number that blocks hand on; only GPUs offload it, and they compute in bf16
LARGE = 1_000_000_000  # bytes of weights; smaller bases train where a plan would take as long as some steps
UNSEEN = (3, 2)  # aspect for a size that names the shorter edge


@dataclass(frozen=True)
class Prediction:
    """Bytes by what they are for. Counted exactly: parts. By constants of this module: allowances.

    before: device bytes of what is loaded, used and dropped before training. moved: bytes between host and
    device in a step. flops: of a step. trained: parameters. feed: what was assumed of the data. assumed: the
    published shape stands for a model whose config is not at hand.
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
    feed: Feed
    memory: BlockMemory
    assumed: bool

    @property
    def tensors(self) -> int:
        return sum(self.parts.values())

    @property
    def training(self) -> int:
        return self.tensors + sum(self.allowances.values())

    @property
    def peak(self) -> int:
        """Device bytes of the whole run: the largest of its stages."""
        return max(self.training, *(size + self.allowances["context"] for size in self.before.values()))


def predict(
    run: RunConfig, family: ModelFamily, framings: Sequence[Framing] = (), kind: str | None = None,
    memory: BlockMemory | None = None,
) -> Prediction:  # fmt: skip
    """By running the step on empty tensors, or from what was measured so before.

    framings: of the datasets, none for the config's own size. kind: "cuda", "mps" or "cpu" to plan for
    another device than the one here. memory: instead of what the options say.
    """
    kind = kind or choose(run.model).device.type
    sketch, memory, feed, granule = situation(run, family, framings, kind, memory)
    blocks = len(sketch.blocks)
    # Measuring uses the network up; what is asked of it comes first.
    fetched = [frozen_bytes(sketch.blocks[number]) for number in memory.fetched(blocks)]
    model_bytes = weight_bytes(sketch)
    name = stored.key(run, sketch, memory, feed, granule)
    measured = stored.remembered(name, lambda: measure(run, family, sketch, memory, feed, granule))

    on_host = dict.fromkeys(("swapped blocks", "inputs", "approximator", "optimizer", "average"), 0)
    if memory.offload_activations:
        on_host["inputs"] = kept_inputs(sketch, memory, feed)
    if memory.approximator_on_host:
        on_host["approximator"] = sketch.hosted_bytes
    if is_hosted(run.optimizer, torch.device(kind)):
        on_host["optimizer"] = measured.optimizer
    parts = dict(measured.peak)
    parts["weights"] -= sum(fetched) - ROOMS * max(fetched, default=0) + on_host["approximator"]
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
    loose = 0 if kind == "cpu" else int(FRAGMENTATION * (parts["activations"] + parts["temporaries"]))
    return Prediction(
        kind, parts, {"context": CONTEXT[kind], "fragmentation": loose}, before,
        host_of(kind, on_host, before, sum(parts.values())),
        disk_of(run, sketch, measured, model_bytes, average), measured.flops,
        2 * sum(fetched) * run.training.gradient_accumulation_steps, measured.trained, feed, memory,
        sketch.assumed,
    )  # fmt: skip


def situation(
    run: RunConfig, family: ModelFamily, framings: Sequence[Framing], kind: str, memory: BlockMemory | None
) -> tuple[Sketch, BlockMemory, Feed, int]:
    """What `measure` takes."""
    sketch = family.sketch(run.model, stand_in(run.model).weights)
    memory = memory or block_memory(run.model, len(sketch.blocks))
    return sketch, memory, feed_of(run, framings, sketch), 1 if kind == "cpu" else CUDA_GRANULE


def is_worth_it(run: RunConfig, family: ModelFamily, framings: Sequence[Framing], kind: str) -> bool:
    """Whether a prediction is at hand, or the base so large that a few seconds for one are nothing.

    Not of a repository that was never read: it may hold a smaller one, and must not be refused for that.
    """
    sketch, memory, feed, granule = situation(run, family, framings, kind, None)
    if sketch.guessed:
        return False
    known = stored.recall(stored.key(run, sketch, memory, feed, granule))
    return weight_bytes(sketch) >= LARGE or known is not None


def feed_of(run: RunConfig, framings: Sequence[Framing], sketch: Sketch) -> Feed:
    """The largest size asked for, captions as long as they may be."""
    own = Framing(run.data.resolution, run.data.resolution_type)

    def size(framing: Framing) -> Size:
        aspect = UNSEEN if framing.resolution_type == "pixel" else (1, 1)
        return bucket(framing, aspect, sketch.facts.alignment_px)

    largest = max(map(size, framings or (own,)), key=lambda px: px[0] * px[1])
    limit = sketch.facts.max_tokens
    rows = min(limit, run.model.tokenizer_max_length or limit)
    return Feed(run.training.train_batch_size, largest, rows)


def weight_bytes(sketch: Sketch) -> int:
    return sum(tensor.nbytes for tensor in sketch.transformer.state_dict().values())


def frozen_bytes(block: nn.Module) -> int:
    """Each tensor of a block as it lies in a room."""
    sizes = (tensor.nbytes for tensor in (*block.parameters(), *block.buffers()))
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def kept_inputs(sketch: Sketch, memory: BlockMemory, feed: Feed) -> int:
    """Bytes that recomputed blocks were given, rows of text and image, two blocks' apart."""
    tokens = feed.size_px[0] * feed.size_px[1] // sketch.facts.token_px**2 + feed.text_rows
    each = feed.samples * tokens * sketch.width * COMPUTED
    return each * max(0, len(memory.recomputed(len(sketch.blocks))) - ROOMS)


def host_of(kind: str, waiting: dict[str, int], before: dict[str, int], tensors: int) -> dict[str, int]:
    """Host memory: the training where it is the device, else what waits, and the text encoder at first."""
    program = {"Python and libraries": RUNTIME[kind]}
    if kind == "cpu":
        return {**program, "training": max(tensors, *before.values())}
    passing = max(0, before["text encoder"] - sum(waiting.values()))
    return {**program, **{what: size for what, size in waiting.items() if size}, "loading": passing}


def disk_of(
    run: RunConfig, sketch: Sketch, measured: Measured, model_bytes: int, average: int
) -> dict[str, int]:
    """What is yet to be written; pictures' and captions' caches are small beside it and not counted."""
    one = measured.trained_bytes + measured.optimizer + average
    return {
        "download": sketch.missing_bytes,
        "quantised base": 0 if run.model.base_model_precision == "no_change" else model_bytes,
        "checkpoints": run.checkpoint.checkpoints_total_limit * one,
        "result": measured.trained_bytes + average,
    }
