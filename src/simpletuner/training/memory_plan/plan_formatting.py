"""Format a memory plan as text: the full table, the summary before a training, what fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from simpletuner.config.load import resolved_options
from simpletuner.config.schema import RunConfig
from simpletuner.events.formatting import MODE_NAMES
from simpletuner.training.memory_plan import step_time
from simpletuner.training.memory_plan.communication import sent_bytes
from simpletuner.training.memory_plan.fit import FitResult, MemoryConfig
from simpletuner.training.memory_plan.machine_resources import MachineResources
from simpletuner.training.memory_plan.prediction import MemoryPrediction

MAX_ALTERNATIVES = 5
MEMORY_LABELS = {"cuda": "GPU memory", "mps": "GPU memory (shared)", "cpu": "memory for tensors"}


def format_bytes(size: float) -> str:
    """Return bytes in GB (1e9 bytes) with one decimal, or in MB below 1 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def format_plan(plan: MemoryPrediction, budget: MachineResources) -> list[str]:
    """Return the lines of the full plan."""
    width, height = plan.feed.size_px
    rows = plan.feed.samples * plan.feed.copies
    feed = f"{rows} x {width} x {height} px, {plan.feed.text_rows} text tokens"
    blocks = f"checkpointed blocks: {plan.memory.checkpointed}, swapped: {plan.memory.swapped}"
    lines = [f"{plan.trained / 1e6:.1f} M trainable parameters; {feed}; {blocks}"]
    if plan.assumed:
        lines.append("planned for Chroma 1 as published: the base model is not on this machine yet")
    each = " of each process" if plan.world.processes > 1 else ""
    if each:
        lines.append(f"{format_layout(plan)}; {format_bytes(plan.base_bytes)} of the base in each")
    lines += _format_group(
        f"{MEMORY_LABELS[plan.kind]}{each} while training",
        {**plan.parts, **plan.allowances},
        budget.device_free_bytes,
    )
    for part, size in plan.before.items():
        lines.append(f"  {part + ', before training':<34}{format_bytes(size):>9}")
    for part, size in plan.validation.items():
        lines.append(f"  {part + ', between steps':<34}{format_bytes(size):>9}")
    local = f" of {plan.world.local} processes" if plan.world.local > 1 else ""
    lines += _format_group(f"host memory{local}", plan.host, budget.host_free_bytes)
    lines += _format_group("disk", plan.disk, None)
    if each:
        sent = {
            use.operation + ("" if use.calls is None else f", {use.calls} calls"): use.sent_bytes
            for use in plan.communication
        }
        lines += _format_group("sent by each process in a step", sent, None)
    return [*lines, format_step_time(plan, budget)]


def format_layout(plan: MemoryPrediction) -> str:
    """Return "4 processes, sharded by FSDP2"."""
    return f"{plan.world.processes} processes, {MODE_NAMES[plan.world.mode]}"


def _format_group(title: str, rows: Mapping[str, int], free: int | None) -> list[str]:
    total = f"{title:<36}{format_bytes(sum(rows.values())):>9}" + (
        "" if free is None else f"   free {format_bytes(free)}"
    )
    allowed = ("context", "fragmentation", "Python and libraries")
    return [
        total,
        *(
            f"  {part + ' (allowance)' * (part in allowed):<34}{format_bytes(size):>9}"
            for part, size in rows.items()
            if size
        ),
    ]


def format_step_time(plan: MemoryPrediction, budget: MachineResources) -> str:
    """Return the work and the estimated time of a step; minutes where it takes several."""
    seconds = step_time.estimate_seconds(plan.flops, budget.peak_flops, plan.moved)
    time = f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    rollouts = (
        f", of which rollouts up to {plan.rollout_flops / 1e12:.3g}" if plan.rollout_flops else ""
    )
    base = (
        f", of which the base's predictions up to {plan.base_flops / 1e12:.3g}"
        if plan.base_flops
        else ""
    )
    work = f"{plan.flops / 1e12:.3g} TFLOP{rollouts}{base}"
    return f"step: {work}, about {time} on {budget.name} (estimate)"


def format_summary(plan: MemoryPrediction, budget: MachineResources) -> str:
    """Return the summary that is logged before a training."""
    parts = ", ".join(
        f"{part} {format_bytes(size)}"
        for part, size in {**plan.parts, **plan.allowances}.items()
        if size
    )
    free = (
        ""
        if budget.device_free_bytes is None
        else f", free {format_bytes(budget.device_free_bytes)}"
    )
    device = f"{MEMORY_LABELS[plan.kind]} {format_bytes(plan.training)} ({parts}){free}"
    host, disk = format_bytes(sum(plan.host.values())), format_bytes(sum(plan.disk.values()))
    each = sends = ""
    if plan.world.processes > 1:
        each = f"{format_layout(plan)}, each: "
        sends = f"; each process sends {format_bytes(sent_bytes(plan.communication))} in a step"
    step = format_step_time(plan, budget)
    return f"plan: {each}{device}; host {host}; disk {disk}; {step}{sends}"


def format_fit(run: RunConfig, fit: FitResult) -> list[str]:
    """Return the chosen configuration with the options to set, then the alternatives."""
    if fit.chosen is None:
        return [f"nothing fits {format_bytes(fit.limit)}"]
    lines = [f"fastest within {format_bytes(fit.limit)}:", f"  {_format_config(fit.chosen)}"]
    lines += [f"    {name} = {value}" for name, value in changed_options(run, fit.chosen).items()]
    if fit.others:
        lines.append("also within this limit, by the cost model:")
    return [
        *lines,
        *(
            f"  {_format_config(config)}: {format_flags(run, config)}"
            for config in fit.others[:MAX_ALTERNATIVES]
        ),
    ]


def format_applied_fit(run: RunConfig, fit: FitResult) -> list[str]:
    """Return what --fit changed in a training, and the alternatives in one line."""
    if fit.chosen is None:
        return []
    lines = [
        f"fit {format_bytes(fit.limit)}: {format_flags(run, fit.chosen)} "
        f"({_format_config(fit.chosen)})"
    ]
    others = "; ".join(
        f"{format_flags(run, config)} ({_format_config(config)})"
        for config in fit.others[:MAX_ALTERNATIVES]
    )
    return [*lines, *([f"would also fit: {others}"] if others else [])]


def _format_config(config: MemoryConfig) -> str:
    about = "" if config.exact else "about "
    return f"{about}{format_bytes(config.size)}, about {config.seconds:.2g} s per step"


def changed_options(run: RunConfig, config: MemoryConfig) -> dict[str, str]:
    """Return the options that differ from those of the run, as JSON."""
    current: dict[str, Any] = resolved_options(run)
    return {
        name: json.dumps(value)
        for name, value in config.options().items()
        if current[name] != value
    }


def format_flags(run: RunConfig, config: MemoryConfig) -> str:
    """Return the changed options as command-line flags."""
    changed = changed_options(run, config).items()
    return " ".join(f"--{name}={value.strip(chr(34))}" for name, value in changed) or "unchanged"
