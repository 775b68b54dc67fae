"""The product's own training step on random weights, and what its plan says of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from benchmarks.gpu.cases import Case, World
from benchmarks.gpu.meter import metered
from benchmarks.gpu.weights import Shaped, fill

from simpletuner.cache.types import Batch, TextBatch
from simpletuner.config.load import from_resolved
from simpletuner.events.sinks import silent
from simpletuner.training import loop, trainee
from simpletuner.training.device import choose
from simpletuner.training.loop import Plan
from simpletuner.training.plan.count import LiveBytes
from simpletuner.training.plan.imitation import Feed, parts_of
from simpletuner.training.plan.prediction import predict

STEPS = 1000  # of the run that is imitated; no more than a schedule's length


def measure(case: Case, world: World) -> dict[str, Any]:
    """As trainee.make builds it, with weights that are drawn instead of read."""
    torch.manual_seed(0)
    run, family = from_resolved(case.flat(world)), Shaped(world)
    device = choose(run.model)
    sketch = family.sketch(run.model, device.weights)
    at = torch.device("cpu") if run.model.musubi_blocks_to_swap else device.device
    network = sketch.transformer
    fill(network, device.device, at)
    trained = trainee.attach(run, family, network, silent)
    trainee.prepare_blocks(run, family, network, device.device)
    family.compile_blocks(network, run.model)
    net = trainee.equip(run, network, trained)

    px = world.px(case)
    feed = Feed(1, (px, px), world.text_rows)
    parts = parts_of(run, family, sketch, feed, net, Plan(STEPS, 1, STEPS, 0), LiveBytes(1))
    empty = parts.batch(0)
    text = TextBatch(torch.randn_like(empty.text.rows), empty.text.lengths)
    batch = Batch(torch.randn_like(empty.latents), text, empty.sample_ids, empty.visit_keys)
    parts = dataclasses.replace(parts, device=device, batch=lambda number: batch)
    count = iter(range(STEPS))
    measured = metered(lambda: loop.train_step(parts, next(count)).loss, world, device.device)
    return {**measured, "trained": sum(parameter.numel() for parameter in net.trained.values())}


def planned(case: Case, world: World) -> dict[str, Any]:
    """Bytes and operations of a step, from empty tensors; the device is not asked."""
    torch.set_num_threads(1)
    run = from_resolved(case.flat(world))
    plan = predict(run, Shaped(world), kind=world.device)
    return {
        "parts": plan.parts, "allowances": plan.allowances, "tensors": plan.tensors,
        "training": plan.training, "flops": plan.flops, "moved": plan.moved,
    }  # fmt: skip
