"""The product's own training step on random weights, and what its plan says of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from benchmarks.gpu.cases import Case, SuiteSize
from benchmarks.gpu.random_weights import RandomChroma, fill_with_random_weights
from benchmarks.gpu.step_meter import measure_step

from simpletuner.cache.batch_types import Batch, TextBatch
from simpletuner.config.load import config_from_resolved
from simpletuner.events.sinks import null_emit
from simpletuner.training import loop, train_state
from simpletuner.training.device import select_device
from simpletuner.training.loop import TrainSchedule
from simpletuner.training.memory_plan.fake_step import BatchShape, make_fake_context
from simpletuner.training.memory_plan.memory_tracker import MemoryTrackerMode
from simpletuner.training.memory_plan.prediction import predict_memory

SCHEDULE_STEPS = 1000  # of the run that is imitated; no more than a schedule's length


def measure(case: Case, world: SuiteSize) -> dict[str, Any]:
    """As trainee.make builds it, with weights that are drawn instead of read."""
    torch.manual_seed(0)
    run, family = config_from_resolved(case.run_options(world)), RandomChroma(world)
    device = select_device(run.model)
    sketch = family.build_spec(run.model, device.weights_dtype)
    at = torch.device("cpu") if run.model.musubi_blocks_to_swap else device.device
    network = sketch.transformer
    fill_with_random_weights(network, device.device, at)
    trained = train_state.attach_trainable_parameters(run, family, network, null_emit)
    train_state.configure_blocks(run, family, network, device.device)
    family.compile_blocks(network, run.model)
    net = train_state.assemble_train_state(run, network, trained)

    px = world.scaled_px(case)
    feed = BatchShape(1, (px, px), world.text_rows)
    parts = make_fake_context(
        run,
        family,
        sketch,
        feed,
        net,
        TrainSchedule(SCHEDULE_STEPS, 1, SCHEDULE_STEPS, 0),
        MemoryTrackerMode(1),
    )
    empty = parts.load_batch(0)
    text = TextBatch(torch.randn_like(empty.text.embeddings), empty.text.lengths)
    batch = Batch(torch.randn_like(empty.latents), text, empty.sample_ids, empty.visit_keys)
    parts = dataclasses.replace(parts, device=device, load_batch=lambda number: batch)
    count = iter(range(SCHEDULE_STEPS))
    measured = measure_step(lambda: loop.train_step(parts, next(count)).loss, world, device.device)
    return {**measured, "trained": sum(parameter.numel() for parameter in net.trainable_parameters.values())}


def predict_step(case: Case, world: SuiteSize) -> dict[str, Any]:
    """Bytes and operations of a step, from empty tensors; the device is not asked."""
    torch.set_num_threads(1)
    run = config_from_resolved(case.run_options(world))
    plan = predict_memory(run, RandomChroma(world), kind=world.device)
    return {
        "parts": plan.parts, "allowances": plan.allowances, "tensors": plan.tensor_bytes,
        "training": plan.training, "flops": plan.flops, "moved": plan.moved,
    }  # fmt: skip
