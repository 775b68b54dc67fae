"""A Chroma small enough to be trained for real beside its prediction, and what the allocator says of it."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from simpletuner.cache.types import Batch, TextBatch
from simpletuner.config.load import from_resolved
from simpletuner.config.schema import ModelOptions, RunConfig
from simpletuner.events.sinks import silent
from simpletuner.models import registry
from simpletuner.models.blocks import block_memory
from simpletuner.models.chroma.family import Chroma
from simpletuner.models.chroma.sketch import FACTS
from simpletuner.models.chroma.transformer import TransformerConfig
from simpletuner.models.chroma.weights import empty_transformer
from simpletuner.models.family import Sketch
from simpletuner.training import loop, trainee
from simpletuner.training.loop import Plan
from simpletuner.training.plan.count import LiveBytes
from simpletuner.training.plan.imitation import Feed, measure, parts_of, stand_in

CONFIG = TransformerConfig(
    num_layers=1, num_single_layers=3, attention_head_dim=64, num_attention_heads=4, joint_attention_dim=128,
    axes_dims_rope=(8, 28, 28), approximator_hidden_dim=128, approximator_layers=2,
)  # fmt: skip
FEED = Feed(samples=2, size_px=(256, 192), text_rows=40)
FAMILY = registry.family("chroma")


def run_of(**options: Any) -> RunConfig:
    return from_resolved({"lora_rank": 4, "flux_lora_target": "all+ffs", "device": "cpu", **options})


def sketch_of(run: RunConfig, config: TransformerConfig = CONFIG) -> Sketch:
    network = empty_transformer(config, run.model.base_model_precision, stand_in(run.model).weights)
    facts = dataclasses.replace(FACTS, text_width=config.joint_attention_dim)
    blocks = (*network.transformer_blocks, *network.single_transformer_blocks)
    return Sketch(network, blocks, config.width, facts, False, torch.bfloat16, 0, 0, 0, 0)


def planned_peak(run: RunConfig) -> int:
    sketch = sketch_of(run)
    memory = block_memory(run.model, len(sketch.blocks))
    return sum(measure(run, FAMILY, sketch, memory, FEED, granule=1).peak.values())


def allocator_peak(run: RunConfig, config: TransformerConfig = CONFIG, feed: Feed = FEED) -> int:
    """Bytes at the highest moment of building everything and of two real steps."""
    torch.manual_seed(0)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        train_for_real(run, config, feed)
    kineto = profiled.profiler
    assert kineto is not None
    results = kineto.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        assert event.device_type() == DeviceType.CPU
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def train_for_real(run: RunConfig, config: TransformerConfig, feed: Feed) -> None:
    sketch = sketch_of(run, config)
    sketch.transformer.to_empty(device="cpu")
    for tensor in (*sketch.transformer.parameters(), *sketch.transformer.buffers()):
        tensor.zero_() if tensor.itemsize == 1 else tensor.normal_(std=0.02)
    trained = trainee.attach(run, FAMILY, sketch.transformer, silent)
    trainee.prepare_blocks(run, FAMILY, sketch.transformer, torch.device("cpu"))
    net = trainee.equip(run, sketch.transformer, trained)
    micro = run.training.gradient_accumulation_steps
    parts = parts_of(run, FAMILY, sketch, feed, net, Plan(9, micro, 1, 0), LiveBytes(1))
    empty = parts.batch

    def batch(number: int) -> Batch:
        shapes = empty(number)
        rows = torch.randn_like(shapes.text.rows)
        text = TextBatch(rows, shapes.text.lengths)
        return dataclasses.replace(shapes, latents=torch.randn_like(shapes.latents), text=text)

    parts = dataclasses.replace(parts, batch=batch)
    for step in range(2):
        loop.train_step(parts, step)


class Small(Chroma):
    """The family with the small network; everything else of a sketch is Chroma's."""

    def sketch(self, options: ModelOptions, dtype: torch.dtype) -> Sketch:
        run = run_of().model_copy(update={"model": options})
        return dataclasses.replace(sketch_of(run), hosted_bytes=1_000_000)
