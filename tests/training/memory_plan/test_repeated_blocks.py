"""A few blocks of many equal ones, counted as the whole network."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.config.schema import RunConfig
from simpletuner.models.block_executor import block_memory_policy
from simpletuner.models.family import ModelSpec
from simpletuner.training.memory_plan import fake_step
from simpletuner.training.memory_plan.fake_step import StepMeasurement, measure_fake_step
from simpletuner.training.memory_plan.memory_tracker import MemoryTrackerMode
from simpletuner.training.memory_plan.repeated_blocks import EqualBlocks, find_equal_blocks
from tests.training.memory_plan.test_fake_step import CASES
from tests.training.memory_plan.tiny_family import (
    BATCH_SHAPE,
    CONFIG,
    FAMILY,
    make_model_spec,
    make_run_config,
)

WIDE = {"num_attention_heads": 2, "axes_dims_rope": (8, 28, 28)}


def make_spec(run: RunConfig, doubles: int, singles: int) -> ModelSpec:
    config = dataclasses.replace(CONFIG, **WIDE, num_layers=doubles, num_single_layers=singles)
    return make_model_spec(run, config)


def measure(
    run: RunConfig, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, whole: bool = False
) -> tuple[StepMeasurement, set[int]]:
    """Return the measurement, and the numbers of the blocks that were run for it."""
    numbers = {id(block): number for number, block in enumerate(spec.blocks)}
    ran = set[int]()

    def remember(block: nn.Module, *_: object) -> None:
        ran.add(numbers[id(block)])

    for block in spec.blocks:
        block.register_forward_pre_hook(remember)
    memory = block_memory_policy(run.model, len(spec.blocks))
    with monkeypatch.context() as patch:
        if whole:
            patch.setattr(fake_step, "find_equal_blocks", lambda *_: [])
        return measure_fake_step(run, FAMILY, spec, memory, BATCH_SHAPE, granule=512), ran


QUICK = {"flux_lora_target": "all"}
SLOW = {
    **CASES,
    "partly kept": {"gradient_checkpointing": 7},
    "two micro-batches, kept": {"gradient_accumulation_steps": 2, "gradient_checkpointing": False},
    "dropout": {"lora_dropout": 0.2},
    "base's prediction": {"diff_output_preservation": True, "diff_output_preservation_class": "a"},
    "bf16 by blocks": {"gradient_checkpointing": 9},
}


@pytest.mark.parametrize(
    ("options", "doubles", "singles"),
    [pytest.param(QUICK, 1, 7, id="recomputed"),
     *(pytest.param(options, 7, 8, id=name, marks=pytest.mark.slow) for name, options in SLOW.items())],
)  # fmt: skip
def test_some_blocks_count_as_the_whole_network(
    options: dict[str, Any], doubles: int, singles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run_config(**options)
    some, ran = measure(run, make_spec(run, doubles, singles), monkeypatch)
    whole, ran_whole = measure(run, make_spec(run, doubles, singles), monkeypatch, whole=True)
    assert some == whole
    assert ran_whole == set(range(doubles + singles))
    if "gradient_checkpointing_interval" not in options:
        assert len(ran) <= doubles + singles - 3


def test_blocks_that_only_look_equal_are_all_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fifth of six equal blocks keeps one more tensor than the second, for its backward pass."""
    run = make_run_config(flux_lora_target="all", gradient_checkpointing=False)

    def unequal() -> ModelSpec:
        spec = make_spec(run, 1, 6)
        block = spec.blocks[5]
        former = block.forward

        def forward(x: Tensor, *rest: Any) -> Tensor:
            more = x.exp().exp()
            return former(x, *rest) + more.sum()

        block.forward = forward
        return spec

    some, ran = measure(run, unequal(), monkeypatch)
    whole, _ = measure(run, unequal(), monkeypatch, whole=True)
    assert some == whole
    assert ran == set(range(7))


def test_runs_of_equal_blocks() -> None:
    """Another shape, class, trained parameter or memory policy ends a run; short ones are left."""
    blocks: list[nn.Module] = [nn.Linear(2, 2) for _ in range(9)]
    assert find_equal_blocks(blocks, ()) == [EqualBlocks(0, 8)]
    assert [*EqualBlocks(0, 8).skipped] == [2, 3, 4, 5, 6]
    assert find_equal_blocks(blocks, (0, 1, 2)) == [EqualBlocks(3, 8)]
    assert find_equal_blocks(blocks, range(0, 9, 2)) == []
    blocks[8] = nn.Linear(2, 3)
    assert find_equal_blocks(blocks, ()) == [EqualBlocks(0, 7)]
    blocks[0].requires_grad_(False)
    assert find_equal_blocks(blocks, ()) == [EqualBlocks(1, 7)]
    blocks[1] = nn.Bilinear(2, 2, 2)
    assert find_equal_blocks(blocks, ()) == [EqualBlocks(2, 7)]
    blocks[7].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.bfloat16))
    assert find_equal_blocks(blocks, ()) == []


def test_a_replaced_segment_counts_as_the_other() -> None:
    count = MemoryTrackerMode(1)
    with count:
        held = [torch.ones(10)]
        count.begin_segment()
        held.append(torch.ones(5))
        torch.ones(100)
        segment = count.end_segment()
        count.begin_segment()
        torch.ones(1000)
        added = count.replace_segment(segment)
    assert segment.change["weights"] == added["weights"] == 20
    assert segment.peak["weights"] == 420
    assert count.live_bytes["weights"] == count.total_bytes == 40 + 20 + 20
    assert count.peak_total_bytes == sum(count.peak_bytes.values()) == 40 + 20 + 420
