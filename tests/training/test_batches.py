"""Batches ahead of the loop: who draws their noise, and the memory in which they wait."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from simpletuner.cache.batch_types import Batch, TargetWeights, TextBatch
from simpletuner.config.load import config_from_resolved
from simpletuner.flow.objective import sample_noise
from simpletuner.training.batches import build_batch_loader
from simpletuner.training.device import ComputeDevice, copy_inputs
from simpletuner.training.loop import TrainSchedule
from simpletuner.training.world import World

SHAPE = torch.Size((2, 4, 3, 3))


def make_batch() -> Batch:
    rows = torch.zeros(2, 5, 7)
    weights = TargetWeights(torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1, 1), ())
    text = TextBatch({"rows": rows}, {"rows": (5, 5)})
    return Batch(torch.zeros(SHAPE), text, ("a", "b"), ("a@0", "b@0"), weights=weights)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_a_batch_waits_with_its_noise_in_pinned_memory(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is drawn while the loop trains on this one, and each tensor is copied once."""
    pinned, threads, loaded = dict[int, Tensor](), list[int](), threading.Semaphore(0)

    def pin(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        pinned[id(copy)] = copy
        return copy

    def load(plan: object) -> Batch:
        threads.append(threading.get_ident())
        loaded.release()
        return make_batch()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    prepared: Any = SimpleNamespace(
        train_sets=(), make_train_batches=lambda *_: SimpleNamespace(load=load)
    )
    order: Any = SimpleNamespace(micro_batch=lambda number: number)
    run = config_from_resolved({"device": "cpu"})
    device = ComputeDevice(torch.device(kind), torch.bfloat16, None)
    with ExitStack() as closing:
        load_batch, _ = build_batch_loader(
            run, prepared, order, TrainSchedule(9, 1, 9, 0), World(), device, closing
        )
        batch = load_batch(0)
        assert all(loaded.acquire(timeout=60) for _ in range(2)), "the second is loaded unasked"
    assert threading.get_ident() not in threads
    assert batch.noise is not None
    assert batch.weights is not None
    target, network_input = batch.noise
    assert target is network_input
    assert torch.equal(target, sample_noise(batch.visit_keys, SHAPE, run.training.seed))
    parts = (
        batch.latents,
        batch.text.tensors["rows"],
        target,
        batch.weights.data,
        batch.weights.base,
    )
    assert [id(part) in pinned for part in parts] == [kind == "cuda"] * len(parts)
    latents, first, second = copy_inputs((batch.latents, *batch.noise), torch.device("meta"))
    assert first is second
    assert latents is not first
