"""A Chroma small enough to be trained for real beside its prediction, and what the allocator says
of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from simpletuner.cache.batch_types import Batch, TextBatch
from simpletuner.config.load import config_from_resolved
from simpletuner.config.schema import ModelOptions, RunConfig
from simpletuner.events.sinks import null_emit
from simpletuner.models import registry
from simpletuner.models.block_executor import block_memory_policy
from simpletuner.models.chroma.family import ChromaFamily
from simpletuner.models.chroma.model_spec import CHROMA_CONSTANTS
from simpletuner.models.chroma.transformer_config import TransformerConfig
from simpletuner.models.chroma.weights import empty_transformer
from simpletuner.models.family import ModelSpec, TextTensor
from simpletuner.training import loop, train_state
from simpletuner.training.loop import TrainSchedule
from simpletuner.training.memory_plan.fake_step import (
    BatchShape,
    cpu_device_without_gpu_options,
    make_fake_context,
    measure_fake_step,
)
from simpletuner.training.memory_plan.memory_tracker import MemoryTrackerMode
from simpletuner.training.world import World
from tests.training.memory_plan.allocator import Allocated, allocated

CONFIG = TransformerConfig(
    num_layers=1, num_single_layers=3, attention_head_dim=64, num_attention_heads=4, joint_attention_dim=128,
    axes_dims_rope=(8, 28, 28), approximator_hidden_dim=128, approximator_layers=2,
)  # fmt: skip
BATCH_SHAPE = BatchShape(samples=2, size_px=(256, 192), text_rows=40)
FAMILY = registry.get_family("chroma")


def make_run_config(**options: Any) -> RunConfig:
    return config_from_resolved(
        {"lora_rank": 4, "flux_lora_target": "all+ffs", "device": "cpu", **options}
    )


def make_model_spec(run: RunConfig, config: TransformerConfig = CONFIG) -> ModelSpec:
    network = empty_transformer(
        config,
        run.model.base_model_precision,
        cpu_device_without_gpu_options(run.model).weights_dtype,
    )
    facts = dataclasses.replace(
        CHROMA_CONSTANTS, text_tensors={"rows": TextTensor(config.joint_attention_dim)}
    )
    blocks = (*network.transformer_blocks, *network.single_transformer_blocks)
    heads = config.num_attention_heads
    return ModelSpec(network, blocks, config.width, heads, facts, False, torch.bfloat16, 0, 0, 0, 0)


def planned_peak(run: RunConfig) -> int:
    sketch = make_model_spec(run)
    memory = block_memory_policy(run.model, len(sketch.blocks))
    return sum(measure_fake_step(run, FAMILY, sketch, memory, BATCH_SHAPE, granule=1).peak.values())


def really_allocated(
    run: RunConfig, config: TransformerConfig = CONFIG, batch_shape: BatchShape = BATCH_SHAPE
) -> Allocated:
    """Return what building everything and two real steps allocate."""
    return allocated(lambda: train_two_steps(run, config, batch_shape))


def train_two_steps(run: RunConfig, config: TransformerConfig, feed: BatchShape) -> None:
    sketch = make_model_spec(run, config)
    sketch.transformer.to_empty(device="cpu")
    for tensor in (*sketch.transformer.parameters(), *sketch.transformer.buffers()):
        tensor.zero_() if tensor.itemsize == 1 else tensor.normal_(std=0.02)
    trained = train_state.attach_trainable_parameters(run, FAMILY, sketch.transformer, null_emit)
    train_state.configure_blocks(run, FAMILY, sketch.transformer, torch.device("cpu"))
    micro = run.training.gradient_accumulation_steps
    net = train_state.assemble_train_state(
        run, sketch.transformer, trained, train_state.make_sharding(run, World()), micro
    )
    parts = make_fake_context(
        run, FAMILY, sketch, feed, net, TrainSchedule(9, micro, 1, 0), MemoryTrackerMode(1)
    )
    empty = parts.load_batch

    def batch(number: int) -> Batch:
        shapes = empty(number)
        rows = torch.randn_like(shapes.text.tensors["rows"])
        text = TextBatch({"rows": rows}, shapes.text.lengths)
        return dataclasses.replace(shapes, latents=torch.randn_like(shapes.latents), text=text)

    parts = dataclasses.replace(parts, load_batch=batch, flow_options=run.flow)
    for step in range(2):
        loop.train_step(parts, step)


class TinyChroma(ChromaFamily):
    """The family with the small network; everything else of a sketch is Chroma's."""

    def build_spec(self, options: ModelOptions, dtype: torch.dtype) -> ModelSpec:
        run = make_run_config().model_copy(update={"model": options})
        return dataclasses.replace(make_model_spec(run), cpu_offloadable_bytes=1_000_000)

    def text_encoder_pass(self, *_: object) -> None:
        """Count the weights of the encoders only."""

    vae_pass = text_encoder_pass  # type: ignore[assignment]
