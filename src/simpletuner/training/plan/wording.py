"""A plan in a person's words: a table, two lines before a training, the ways that fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from simpletuner.config.load import resolved
from simpletuner.config.schema import RunConfig
from simpletuner.training.plan import speed
from simpletuner.training.plan.fit import Fit, Way
from simpletuner.training.plan.prediction import Prediction
from simpletuner.training.plan.room import Room

SHOWN = 5  # runners-up
MEMORY = {"cuda": "GPU memory", "mps": "GPU memory (shared)", "cpu": "memory for tensors"}


def gb(size: float) -> str:
    """Bytes in GB (1e9), two digits that say something."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def table(plan: Prediction, room: Room) -> list[str]:
    """The whole plan."""
    width, height = plan.feed.size_px
    feed = f"{plan.feed.samples} x {width} x {height} px, {plan.feed.text_rows} text tokens"
    recomputed = f"{plan.memory.checkpointed} blocks recomputed, {plan.memory.swapped} swapped"
    lines = [f"{plan.trained / 1e6:.1f} M parameters trained; {feed}; {recomputed}"]
    if plan.assumed:
        lines.append("Chroma 1 as published: the base is not on this machine yet")
    lines += _group(f"{MEMORY[plan.kind]} while training", {**plan.parts, **plan.allowances}, room.device)
    for what, size in plan.before.items():
        lines.append(f"  {what + ', before training':<34}{gb(size):>9}")
    lines += _group("host memory", plan.host, room.host)
    lines += _group("disk", plan.disk, None)
    return [*lines, step(plan, room)]


def _group(title: str, rows: Mapping[str, int], free: int | None) -> list[str]:
    total = f"{title:<36}{gb(sum(rows.values())):>9}" + ("" if free is None else f"   free {gb(free)}")
    allowed = ("context", "fragmentation", "Python and libraries")
    return [
        total,
        *(
            f"  {what + ' (allowance)' * (what in allowed):<34}{gb(size):>9}"
            for what, size in rows.items()
            if size
        ),
    ]


def step(plan: Prediction, room: Room) -> str:
    took = speed.seconds(plan.flops, room.peak, plan.moved)
    return f"step: {plan.flops / 1e12:.3g} TFLOP, about {took:.2g} s on {room.name} (estimate)"


def brief(plan: Prediction, room: Room) -> str:
    """What a training says first."""
    parts = ", ".join(
        f"{what} {gb(size)}" for what, size in {**plan.parts, **plan.allowances}.items() if size
    )
    free = "" if room.device is None else f", free {gb(room.device)}"
    device = f"{MEMORY[plan.kind]} {gb(plan.training)} ({parts}){free}"
    others = f"host {gb(sum(plan.host.values()))}; disk {gb(sum(plan.disk.values()))}"
    return f"plan: {device}; {others}; {step(plan, room)}"


def ways(run: RunConfig, fit: Fit) -> list[str]:
    """The choice with the options to set, then the runners-up."""
    if fit.chosen is None:
        return [f"nothing fits {gb(fit.limit)}"]
    lines = [f"fastest within {gb(fit.limit)}:", f"  {_way(fit.chosen)}"]
    lines += [f"    {name} = {value}" for name, value in settings(run, fit.chosen).items()]
    if fit.others:
        lines.append("also within it, by the cost model:")
    return [*lines, *(f"  {_way(way)}: {flags(run, way)}" for way in fit.others[:SHOWN])]


def taken(run: RunConfig, fit: Fit) -> list[str]:
    """What a training says that goes on with the choice: what it changed, and the runners-up in a line."""
    if fit.chosen is None:
        return []
    lines = [f"fit {gb(fit.limit)}: {flags(run, fit.chosen)} ({_way(fit.chosen)})"]
    others = "; ".join(f"{flags(run, way)} ({_way(way)})" for way in fit.others[:SHOWN])
    return [*lines, *([f"would fit too: {others}"] if others else [])]


def _way(way: Way) -> str:
    return f"{'' if way.exact else 'about '}{gb(way.size)}, about {way.seconds:.2g} s a step"


def settings(run: RunConfig, way: Way) -> dict[str, str]:
    """Options that differ from the run's, as JSON."""
    now: dict[str, Any] = resolved(run)
    return {name: json.dumps(value) for name, value in way.options().items() if now[name] != value}


def flags(run: RunConfig, way: Way) -> str:
    changed = settings(run, way).items()
    return " ".join(f"--{name}={value.strip(chr(34))}" for name, value in changed) or "as it is"
