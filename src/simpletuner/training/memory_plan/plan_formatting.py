"""A plan in a person's words: a table, two lines before a training, the ways that fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from simpletuner.config.load import resolved_options
from simpletuner.config.schema import RunConfig
from simpletuner.training.memory_plan import step_time
from simpletuner.training.memory_plan.fit import FitResult, MemoryConfig
from simpletuner.training.memory_plan.memory_budget import MemoryBudget
from simpletuner.training.memory_plan.prediction import MemoryPrediction

MAX_ALTERNATIVES = 5  # runners-up
MEMORY_LABELS = {"cuda": "GPU memory", "mps": "GPU memory (shared)", "cpu": "memory for tensors"}


def format_bytes(size: float) -> str:
    """Bytes in GB (1e9), two digits that say something."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def format_plan(plan: MemoryPrediction, room: MemoryBudget) -> list[str]:
    """The whole plan."""
    width, height = plan.feed.size_px
    feed = f"{plan.feed.samples} x {width} x {height} px, {plan.feed.text_rows} text tokens"
    recomputed = f"{plan.memory.checkpointed} blocks recomputed, {plan.memory.swapped} swapped"
    lines = [f"{plan.trained / 1e6:.1f} M parameters trained; {feed}; {recomputed}"]
    if plan.assumed:
        lines.append("Chroma 1 as published: the base is not on this machine yet")
    lines += _format_group(
        f"{MEMORY_LABELS[plan.kind]} while training",
        {**plan.parts, **plan.allowances},
        room.device_free_bytes,
    )
    for what, size in plan.before.items():
        lines.append(f"  {what + ', before training':<34}{format_bytes(size):>9}")
    lines += _format_group("host memory", plan.host, room.host_free_bytes)
    lines += _format_group("disk", plan.disk, None)
    return [*lines, format_step_time(plan, room)]


def _format_group(title: str, rows: Mapping[str, int], free: int | None) -> list[str]:
    total = f"{title:<36}{format_bytes(sum(rows.values())):>9}" + (
        "" if free is None else f"   free {format_bytes(free)}"
    )
    allowed = ("context", "fragmentation", "Python and libraries")
    return [
        total,
        *(
            f"  {what + ' (allowance)' * (what in allowed):<34}{format_bytes(size):>9}"
            for what, size in rows.items()
            if size
        ),
    ]


def format_step_time(plan: MemoryPrediction, room: MemoryBudget) -> str:
    took = step_time.estimate_seconds(plan.flops, room.peak_flops, plan.moved)
    return f"step: {plan.flops / 1e12:.3g} TFLOP, about {took:.2g} s on {room.name} (estimate)"


def format_summary(plan: MemoryPrediction, room: MemoryBudget) -> str:
    """What a training says first."""
    parts = ", ".join(
        f"{what} {format_bytes(size)}"
        for what, size in {**plan.parts, **plan.allowances}.items()
        if size
    )
    free = (
        "" if room.device_free_bytes is None else f", free {format_bytes(room.device_free_bytes)}"
    )
    device = f"{MEMORY_LABELS[plan.kind]} {format_bytes(plan.training)} ({parts}){free}"
    others = f"host {format_bytes(sum(plan.host.values()))}; disk {format_bytes(sum(plan.disk.values()))}"
    return f"plan: {device}; {others}; {format_step_time(plan, room)}"


def format_fit(run: RunConfig, fit: FitResult) -> list[str]:
    """The choice with the options to set, then the runners-up."""
    if fit.chosen is None:
        return [f"nothing fits {format_bytes(fit.limit)}"]
    lines = [f"fastest within {format_bytes(fit.limit)}:", f"  {_format_config(fit.chosen)}"]
    lines += [f"    {name} = {value}" for name, value in changed_options(run, fit.chosen).items()]
    if fit.others:
        lines.append("also within it, by the cost model:")
    return [
        *lines,
        *(
            f"  {_format_config(way)}: {format_flags(run, way)}"
            for way in fit.others[:MAX_ALTERNATIVES]
        ),
    ]


def format_applied_fit(run: RunConfig, fit: FitResult) -> list[str]:
    """What a training says that goes on with the choice: what it changed, and the runners-up in a line."""
    if fit.chosen is None:
        return []
    lines = [
        f"fit {format_bytes(fit.limit)}: {format_flags(run, fit.chosen)} ({_format_config(fit.chosen)})"
    ]
    others = "; ".join(
        f"{format_flags(run, way)} ({_format_config(way)})" for way in fit.others[:MAX_ALTERNATIVES]
    )
    return [*lines, *([f"would fit too: {others}"] if others else [])]


def _format_config(way: MemoryConfig) -> str:
    return (
        f"{'' if way.exact else 'about '}{format_bytes(way.size)}, about {way.seconds:.2g} s a step"
    )


def changed_options(run: RunConfig, way: MemoryConfig) -> dict[str, str]:
    """Options that differ from the run's, as JSON."""
    now: dict[str, Any] = resolved_options(run)
    return {name: json.dumps(value) for name, value in way.options().items() if now[name] != value}


def format_flags(run: RunConfig, way: MemoryConfig) -> str:
    changed = changed_options(run, way).items()
    return " ".join(f"--{name}={value.strip(chr(34))}" for name, value in changed) or "as it is"
