"""Resolve gradient_checkpointing "auto": as few checkpointed blocks as the memory allows.

Blocks that keep their activations and blocks that compute them again give the same bits, so the
choice may depend on the machine. It is part of the resolved options, so a run folder has it, and a
resumed run takes it from there while it fits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simpletuner.config.schema import RunConfig
from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.errors import ConfigError
from simpletuner.models.family import ModelFamily
from simpletuner.training.memory_plan import prediction
from simpletuner.training.memory_plan.fake_step import NO_TARGETS, TargetUse
from simpletuner.training.memory_plan.fit import (
    MemoryConfigSearch,
    blocks_to_checkpoint,
    checkpointing_option,
    with_options,
)
from simpletuner.training.memory_plan.machine_resources import MachineResources

OPTION = "gradient_checkpointing"
# Of a small base whose blocks keep everything: tensors of the streams' size that a block saves,
# and the part of the free memory that they may take without a plan.
SAVED_STREAMS_PER_BLOCK = 24
UNPLANNED_FRACTION = 0.5


@dataclass(frozen=True)
class CheckpointingChoice:
    """A value of gradient_checkpointing, how many of the blocks it checkpoints, and why."""

    value: bool | int
    checkpointed: int
    blocks: int
    reason: str

    def __str__(self) -> str:
        return (
            f"gradient_checkpointing auto: {self.blocks - self.checkpointed} of {self.blocks} "
            f"blocks keep their activations, {self.checkpointed} compute them again ({self.reason})"
        )


def choose_checkpointing(
    run: RunConfig,
    family: ModelFamily,
    framings: Sequence[ResizeCropConfig],
    budget: MachineResources,
    run_dir: Path | None = None,
    targets: TargetUse = NO_TARGETS,
) -> CheckpointingChoice:
    """Return the choice for a run whose option is "auto".

    run_dir: a folder whose former choice is kept. targets: what the datasets ask for. A base that
    is too small to be planned keeps all activations where an upper estimate of them fits into a
    part of the free memory.
    """
    described = prediction.planning_inputs(run, family, framings, budget.kind, None)
    spec, memory, feed, _ = described
    blocks, limit = len(spec.blocks), budget.available_for_tensors

    def chosen(value: bool | int, reason: str) -> CheckpointingChoice:
        policy = prediction.memory_policy(with_options(run, {OPTION: value}), blocks, budget.kind)
        count = len(policy.checkpointed_block_numbers(blocks))
        return CheckpointingChoice(value, count, blocks, reason)

    if memory.offload_activations or memory.interval > 1:
        return chosen(True, "as the other options of checkpointing ask")
    is_planned = prediction.is_worth_planning(run, family, framings, budget.kind, described)
    former = None if run_dir is None else read_former_choice(run, run_dir)
    if former is not None and (
        not is_planned or fits(run, family, framings, budget, former, targets)
    ):
        return chosen(former, "as in the run folder")
    if limit is None:
        return chosen(True, "the free memory is not known")
    if not is_planned:
        tokens = feed.size_px[0] * feed.size_px[1] // spec.constants.token_px**2 + feed.text_rows
        stream = feed.samples * tokens * spec.width * 4
        if stream * blocks * SAVED_STREAMS_PER_BLOCK <= UNPLANNED_FRACTION * limit:
            return chosen(max(2, memory.swapped) if memory.swapped else False, "a small base")
        if spec.may_differ_from_published:
            return chosen(True, "the size of the base is not known yet")
    search = MemoryConfigSearch(run, family, framings, budget)
    count = blocks_to_checkpoint(search, limit)
    # The search does not know the targets.
    while count < blocks and targets != NO_TARGETS:
        if fits(run, family, framings, budget, checkpointing_option(count, blocks), targets):
            break
        count = min(blocks, count + blocks // 8 + 1)
    return chosen(checkpointing_option(count, blocks), f"planned for {budget.name}")


def fits(
    run: RunConfig,
    family: ModelFamily,
    framings: Sequence[ResizeCropConfig],
    budget: MachineResources,
    value: bool | int,
    targets: TargetUse,
) -> bool:
    """Return whether the tensors of a training with this value fit the free memory."""
    limit = budget.available_for_tensors
    plan = prediction.predict_memory(
        with_options(run, {OPTION: value}), family, framings, budget.kind, targets=targets
    )
    return limit is None or plan.tensor_bytes <= limit


def read_former_choice(run: RunConfig, run_dir: Path) -> bool | int | None:
    """Return the value in the config.json of a run folder; None where it has none for this run."""
    try:
        value = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))[OPTION]
        former = with_options(run, {OPTION: value}).model.gradient_checkpointing
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None
    return None if former == "auto" else former
