"""Before a training downloads or loads anything: what it will need, and no for what cannot be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from simpletuner.config.option_values import parse_memory_size
from simpletuner.config.schema import RunConfig
from simpletuner.data.geometry import ResizeCropConfig
from simpletuner.errors import ConfigError
from simpletuner.events.event_types import Emit, NoticeIssued, WarningIssued
from simpletuner.models import registry
from simpletuner.models.family import ModelFamily
from simpletuner.training.device import select_device
from simpletuner.training.memory_plan import memory_saving, plan_formatting
from simpletuner.training.memory_plan.fit import (
    MemoryConfigSearch,
    blocks_to_checkpoint,
    checkpointing_option,
    find_fitting_config,
    with_options,
)
from simpletuner.training.memory_plan.memory_budget import (
    MemoryBudget,
    detect_budget,
    find_disk_shortages,
)
from simpletuner.training.memory_plan.prediction import (
    MemoryPrediction,
    is_worth_planning,
    predict_memory,
)

MAX_SUGGESTIONS = 3  # ways out that a refusal names
FIXED_BY_CHECKPOINT = (
    "base_model_precision",
    "text_encoder_1_precision",
)  # by the checkpoint that a run goes on from


def preflight_check(
    run: RunConfig,
    framings: Sequence[ResizeCropConfig],
    emit: Emit,
    within: str | None = None,
    before: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The same run, its "auto" settled. ConfigError when device, host or a disk has too little room.

    within: a size, or "" for what is free: the fastest way that fits takes the place of the run's
    own. before: options of the checkpoint that it goes on from. Of a small base whose plan is not
    known nothing is said: it would not be noticed in any memory.
    """
    family = registry.get_family(run.model.model_family)
    room = detect_budget(select_device(run.model))
    limit = room.available_for_tensors
    if within is not None:
        run = fit_run(run, family, framings, room, within, before, emit)
    elif run.model.gradient_checkpointing == "auto":
        ladder = None if limit is None else MemoryConfigSearch(run, family, framings, room)
        count = blocks_to_checkpoint(ladder, limit) if ladder and limit is not None else 0
        emit(NoticeIssued(f"gradient_checkpointing auto: {count} blocks are recomputed"))
        asked = checkpointing_option(count, ladder.blocks) if ladder else False
        run = with_options(run, {"gradient_checkpointing": asked})
    elif not is_worth_planning(run, family, framings, room.kind):
        return run
    plan = predict_memory(run, family, framings, room.kind)
    emit(NoticeIssued(plan_formatting.format_summary(plan, room)))
    if limit is not None and plan.tensor_bytes > limit:
        raise ConfigError(
            too_large_message(plan, MemoryConfigSearch(run, family, framings, room), limit)
        )
    check_host_and_disks(run, plan, room)
    for what, size in plan.before.items():
        if limit is not None and size > limit:
            told = f"the {what} takes {plan_formatting.format_bytes(size)} of {plan_formatting.format_bytes(limit)}: text_encoder_1_precision"
            emit(WarningIssued(told))
    if limit is not None and plan.training > limit:
        emit(
            WarningIssued(
                f"{plan_formatting.format_bytes(plan.training)} with allowances, {plan_formatting.format_bytes(limit)} free: it may not fit"
            )
        )
    return run


def fit_run(
    run: RunConfig,
    family: ModelFamily,
    framings: Sequence[ResizeCropConfig],
    room: MemoryBudget,
    within: str,
    before: Mapping[str, Any] | None,
    emit: Emit,
) -> RunConfig:
    """The run in the fastest way that fits. ConfigError, with the cheapest changes, where none does."""
    known = [
        size
        for size in (parse_memory_size(within) if within else None, room.available_for_tensors)
        if size is not None
    ]
    if not known:
        raise ConfigError("how much memory is free is not known here; write --fit 12GB")
    if before is not None:
        run = with_options(run, {name: before[name] for name in FIXED_BY_CHECKPOINT})
    ladder, limit = (
        MemoryConfigSearch(run, family, framings, room, settled=before is not None),
        min(known),
    )
    best = find_fitting_config(ladder, limit)
    if best.chosen is None:
        raise ConfigError(
            f"nothing fits {plan_formatting.format_bytes(limit)}. {smaller_training_message(ladder, limit)}"
        )
    for line in plan_formatting.format_applied_fit(run, best):
        emit(NoticeIssued(line))
    return with_options(run, best.chosen.options())


def too_large_message(plan: MemoryPrediction, ladder: MemoryConfigSearch, limit: int) -> str:
    ways = ladder.fitting_configs(limit)[:MAX_SUGGESTIONS]
    told = [
        f"\n  {plan_formatting.format_flags(ladder.run, way)}  (about {plan_formatting.format_bytes(way.size)})"
        for way in ways
    ]
    out = (
        f"What would fit, the fastest first:{''.join(told)}"
        if told
        else smaller_training_message(ladder, limit)
    )
    what = f"this training needs {plan_formatting.format_bytes(plan.tensor_bytes)} for its tensors alone"
    return f"{what}, and {ladder.budget.name} has {plan_formatting.format_bytes(limit)} free. {out}"


def smaller_training_message(ladder: MemoryConfigSearch, limit: int) -> str:
    """Where no way of running it fits: changes of the training itself, the cheapest first, until one does."""
    least = ladder.lowest_memory_config()
    run, framings = with_options(ladder.run, least.options()), list(ladder.framings)
    told = plan_formatting.format_flags(ladder.run, least)
    lines = [
        f"The least is about {plan_formatting.format_bytes(least.size)}: {told}. Then, each added to those before:"
    ]
    for options in memory_saving.memory_saving_options(run):
        try:
            run = with_options(run, options)
        except ConfigError:  # the rest of the options does not go with it
            continue
        if "resolution" in options:
            framings = [
                dataclasses.replace(
                    one,
                    resolution=one.resolution
                    * memory_saving.RESOLUTION_FACTOR[one.resolution_type],
                )
                for one in framings
            ]
        size = predict_memory(run, ladder.family, framings, ladder.budget.kind).training
        lines.append(
            f"  {memory_saving.format_options(options)}  ({plan_formatting.format_bytes(size)})"
        )
        if size <= limit:
            break
    return "\n".join(lines)


def check_host_and_disks(run: RunConfig, plan: MemoryPrediction, room: MemoryBudget) -> None:
    needed = sum(plan.host.values())
    if plan.kind != "cpu" and room.host_free_bytes is not None and needed > room.host_free_bytes:
        rows = ", ".join(
            f"{what} {plan_formatting.format_bytes(size)}"
            for what, size in plan.host.items()
            if size
        )
        raise ConfigError(
            f"this training needs {plan_formatting.format_bytes(needed)} of host memory ({rows}), and {plan_formatting.format_bytes(room.host_free_bytes)}"
            " is free. Less: text_encoder_1_precision = int8, a smaller musubi_blocks_to_swap,"
            " gradient_checkpointing_backend = torch"
        )
    for folder, size, free in find_disk_shortages(run, plan.disk):
        raise ConfigError(
            f"{folder} needs {plan_formatting.format_bytes(size)} and its disk has {plan_formatting.format_bytes(free)} free. Less: another"
            " output_dir, HF_HOME on another disk, a smaller checkpoints_total_limit"
        )
