"""Check before anything is downloaded or loaded whether a training has enough memory and disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
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
from simpletuner.training.memory_plan.checkpointing_choice import choose_checkpointing
from simpletuner.training.memory_plan.compile_choice import choose_compilation
from simpletuner.training.memory_plan.fake_step import NO_TARGETS, TargetUse
from simpletuner.training.memory_plan.fit import (
    MemoryConfigSearch,
    find_fitting_mode,
    with_options,
)
from simpletuner.training.memory_plan.machine_resources import (
    MachineResources,
    detect_budget,
    find_disk_shortages,
)
from simpletuner.training.memory_plan.plan_formatting import format_bytes
from simpletuner.training.memory_plan.prediction import (
    MemoryPrediction,
    is_worth_planning,
    predict_memory,
)
from simpletuner.training.memory_plan.world_layout import read_layout

# What needs less memory, by the keys of MemoryPrediction.before and .validation.
SMALLER_USES = {
    "text encoder": "text_encoder_batch_size = 1",
    "VAE": "vae_enable_tiling = true",
    "VAE decoding": "vae_enable_tiling = true, or a smaller validation_resolution",
    "modulations": "chroma_approximator_device = cpu",
}
MAX_SUGGESTIONS = 3  # configurations that an error message names
# Options that a resumed run takes from its checkpoint, because they change the result.
FIXED_BY_CHECKPOINT = ("base_model_precision", "text_encoder_1_precision")


def preflight_check(
    run: RunConfig,
    framings: Sequence[ResizeCropConfig],
    emit: Emit,
    within: str | None = None,
    before: Mapping[str, Any] | None = None,
    targets: TargetUse = NO_TARGETS,
    run_dir: Path | None = None,
) -> RunConfig:
    """Return the run with "auto" options resolved, after emitting its memory plan.

    within: --fit, a size or "" for the free memory; the memory settings of the run are then
    replaced by the fastest that fit. before: the options of the checkpoint that is resumed.
    targets: what the datasets ask for. run_dir: the run folder, whose former choices are kept. A
    small base without a cached plan is not planned, because it fits in any memory.

    Raises ConfigError when the device, the host or a disk has too little space.
    """
    family = registry.get_family(run.model.model_family)
    budget = detect_budget(select_device(run.model)).for_process(read_layout(run).local)
    limit = budget.available_for_tensors
    if within is not None:
        run = fit_run(run, family, framings, budget, within, before, emit)
    elif run.model.gradient_checkpointing == "auto":
        choice = choose_checkpointing(run, family, framings, budget, run_dir, targets)
        emit(NoticeIssued(str(choice)))
        run = with_options(run, {"gradient_checkpointing": choice.value})
    if within is None and not is_worth_planning(run, family, framings, budget.kind):
        return resolve_compilation(run, None, budget, run_dir, emit)
    plan = predict_memory(run, family, framings, budget.kind, targets=targets)
    emit(NoticeIssued(plan_formatting.format_summary(plan, budget)))
    if limit is not None and plan.tensor_bytes > limit:
        raise ConfigError(
            too_large_message(plan, MemoryConfigSearch(run, family, framings, budget), limit)
        )
    check_host_and_disks(run, plan, budget)
    if limit is not None:
        warn_about_tight_memory(plan, limit, emit)
    return resolve_compilation(run, plan, budget, run_dir, emit)


def resolve_compilation(
    run: RunConfig,
    plan: MemoryPrediction | None,
    budget: MachineResources,
    run_dir: Path | None,
    emit: Emit,
) -> RunConfig:
    """Return the run with dynamo_backend "auto" resolved; on a GPU the choice is reported."""
    if run.model.dynamo_backend != "auto":
        return run
    choice = choose_compilation(run, plan, budget, run_dir)
    if budget.kind == "cuda":
        emit(NoticeIssued(str(choice)))
    return with_options(run, {"dynamo_backend": choice.value})


def warn_about_tight_memory(plan: MemoryPrediction, limit: int, emit: Emit) -> None:
    """Warn where a model is too large before training, or the training with its allowances."""
    free = format_bytes(limit)
    for name, size in {**plan.before, **plan.validation}.items():
        if size > limit:
            emit(
                WarningIssued(
                    f"the {name} needs {format_bytes(size)} and {free} is free; "
                    f"set {SMALLER_USES[name]}"
                )
            )
    if plan.training > limit:
        emit(
            WarningIssued(
                f"this training needs {format_bytes(plan.training)} with allowances and {free} is "
                "free: it may not fit"
            )
        )


def fit_run(
    run: RunConfig,
    family: ModelFamily,
    framings: Sequence[ResizeCropConfig],
    budget: MachineResources,
    within: str,
    before: Mapping[str, Any] | None,
    emit: Emit,
) -> RunConfig:
    """Return the run with the fastest memory settings that fit.

    Raises ConfigError, with the smallest changes of the training, when nothing fits.
    """
    limits = [
        size
        for size in (parse_memory_size(within) if within else None, budget.available_for_tensors)
        if size is not None
    ]
    if not limits:
        raise ConfigError(
            "the free memory of this device is not known; give a size, for example --fit 12GB"
        )
    if before is not None:
        run = with_options(run, {name: before[name] for name in FIXED_BY_CHECKPOINT})
    limit = min(limits)
    search = MemoryConfigSearch(
        run,
        family,
        framings,
        budget,
        before is not None,
        lambda text: emit(NoticeIssued(text)),
    )
    search, best = find_fitting_mode(search, limit)
    if best.chosen is None:
        raise ConfigError(
            f"nothing fits {format_bytes(limit)}. {smaller_training_message(search, limit)}"
        )
    for line in plan_formatting.format_applied_fit(run, best):
        emit(NoticeIssued(line))
    return with_options(run, best.chosen.options())


def too_large_message(plan: MemoryPrediction, search: MemoryConfigSearch, limit: int) -> str:
    """Return what is needed, what is free, and the settings that would fit."""
    suggestions = [
        f"\n  {plan_formatting.format_flags(search.run, config)}  "
        f"(about {format_bytes(config.size)})"
        for config in search.fitting_configs(limit)[:MAX_SUGGESTIONS]
    ]
    solution = (
        f"These settings would fit, the fastest first:{''.join(suggestions)}"
        if suggestions
        else smaller_training_message(search, limit)
    )
    return (
        f"this training needs {format_bytes(plan.tensor_bytes)} for its tensors alone, and "
        f"{search.budget.name} has {format_bytes(limit)} free. {solution}"
    )


def smaller_training_message(search: MemoryConfigSearch, limit: int) -> str:
    """Return changes of the training itself, the mildest first, until it fits."""
    least = search.lowest_memory_config()
    run, framings = with_options(search.run, least.options()), list(search.framings)
    flags = plan_formatting.format_flags(search.run, least)
    lines = [
        f"The smallest settings need about {format_bytes(least.size)}: {flags}. In addition, one "
        "after the other:"
    ]
    for options in memory_saving.memory_saving_options(run):
        try:
            run = with_options(run, options)
        except ConfigError:  # it contradicts other options of the run
            continue
        if "resolution" in options:
            framings = [
                dataclasses.replace(
                    framing,
                    resolution=framing.resolution
                    * memory_saving.RESOLUTION_FACTOR[framing.resolution_type],
                )
                for framing in framings
            ]
        size = predict_memory(run, search.family, framings, search.budget.kind).training
        lines.append(f"  {memory_saving.format_options(options)}  ({format_bytes(size)})")
        if size <= limit:
            break
    return "\n".join(lines)


def check_host_and_disks(run: RunConfig, plan: MemoryPrediction, budget: MachineResources) -> None:
    """Raise ConfigError when the host memory or a disk has too little space."""
    needed = sum(plan.host.values())
    if (
        plan.kind != "cpu"
        and budget.host_free_bytes is not None
        and needed > budget.host_free_bytes
    ):
        uses = ", ".join(f"{use} {format_bytes(size)}" for use, size in plan.host.items() if size)
        raise ConfigError(
            f"this training needs {format_bytes(needed)} of host memory ({uses}), and "
            f"{format_bytes(budget.host_free_bytes)} is free. It needs less with "
            "text_encoder_1_precision = int8, a smaller musubi_blocks_to_swap, or "
            "gradient_checkpointing_backend = torch"
        )
    for folder, size, free in find_disk_shortages(run, plan.disk):
        raise ConfigError(
            f"{folder} needs {format_bytes(size)}, and its disk has {format_bytes(free)} free. "
            "Choose another output_dir, set HF_HOME to another disk, or lower "
            "checkpoints_total_limit"
        )
