"""Before a training downloads or loads anything: what it will need, and no for what cannot be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from simpletuner.config.schema import RunConfig
from simpletuner.config.values import read_size
from simpletuner.data.geometry import Framing
from simpletuner.errors import ConfigError
from simpletuner.events.types import Emit, Noted, Warned
from simpletuner.models import registry
from simpletuner.models.family import ModelFamily
from simpletuner.training.device import choose
from simpletuner.training.plan import advice, wording
from simpletuner.training.plan.fit import Ladder, changed, checkpointing, demanded, fit
from simpletuner.training.plan.prediction import Prediction, is_worth_it, predict
from simpletuner.training.plan.room import Room, found, lacking_on_disks

SHOWN = 3  # ways out that a refusal names
SETTLED = ("base_model_precision", "text_encoder_1_precision")  # by the checkpoint that a run goes on from


def announce(
    run: RunConfig, framings: Sequence[Framing], emit: Emit, within: str | None = None,
    before: Mapping[str, Any] | None = None,
) -> RunConfig:  # fmt: skip
    """The same run, its "auto" settled. ConfigError when device, host or a disk has too little room.

    within: a size, or "" for what is free: the fastest way that fits takes the place of the run's own.
    before: options of the checkpoint that it goes on from.
    Of a small base whose plan is not known nothing is said: it would not be noticed in any memory.
    """
    family = registry.family(run.model.model_family)
    room = found(choose(run.model))
    limit = room.tensors
    if within is not None:
        run = fitted(run, family, framings, room, within, before, emit)
    elif run.model.gradient_checkpointing == "auto":
        ladder = None if limit is None else Ladder(run, family, framings, room)
        count = demanded(ladder, limit) if ladder and limit is not None else 0
        emit(Noted(f"gradient_checkpointing auto: {count} blocks are recomputed"))
        asked = checkpointing(count, ladder.blocks) if ladder else False
        run = changed(run, {"gradient_checkpointing": asked})
    elif not is_worth_it(run, family, framings, room.kind):
        return run
    plan = predict(run, family, framings, room.kind)
    emit(Noted(wording.brief(plan, room)))
    if limit is not None and plan.tensors > limit:
        raise ConfigError(too_large(plan, Ladder(run, family, framings, room), limit))
    refuse_host_and_disks(run, plan, room)
    for what, size in plan.before.items():
        if limit is not None and size > limit:
            told = f"the {what} takes {wording.gb(size)} of {wording.gb(limit)}: text_encoder_1_precision"
            emit(Warned(told))
    if limit is not None and plan.training > limit:
        emit(Warned(f"{wording.gb(plan.training)} with allowances, {wording.gb(limit)} free: it may not fit"))
    return run


def fitted(
    run: RunConfig, family: ModelFamily, framings: Sequence[Framing], room: Room, within: str,
    before: Mapping[str, Any] | None, emit: Emit,
) -> RunConfig:  # fmt: skip
    """The run in the fastest way that fits. ConfigError, with the cheapest changes, where none does."""
    known = [size for size in (read_size(within) if within else None, room.tensors) if size is not None]
    if not known:
        raise ConfigError("how much memory is free is not known here; write --fit 12GB")
    if before is not None:
        run = changed(run, {name: before[name] for name in SETTLED})
    ladder, limit = Ladder(run, family, framings, room, settled=before is not None), min(known)
    best = fit(ladder, limit)
    if best.chosen is None:
        raise ConfigError(f"nothing fits {wording.gb(limit)}. {smaller(ladder, limit)}")
    for line in wording.taken(run, best):
        emit(Noted(line))
    return changed(run, best.chosen.options())


def too_large(plan: Prediction, ladder: Ladder, limit: int) -> str:
    ways = ladder.ways(limit)[:SHOWN]
    told = [f"\n  {wording.flags(ladder.run, way)}  (about {wording.gb(way.size)})" for way in ways]
    out = f"What would fit, the fastest first:{''.join(told)}" if told else smaller(ladder, limit)
    what = f"this training needs {wording.gb(plan.tensors)} for its tensors alone"
    return f"{what}, and {ladder.room.name} has {wording.gb(limit)} free. {out}"


def smaller(ladder: Ladder, limit: int) -> str:
    """Where no way of running it fits: changes of the training itself, the cheapest first, until one does."""
    least = ladder.least()
    run, framings = changed(ladder.run, least.options()), list(ladder.framings)
    told = wording.flags(ladder.run, least)
    lines = [f"The least is about {wording.gb(least.size)}: {told}. Then, each added to those before:"]
    for options in advice.steps(run):
        try:
            run = changed(run, options)
        except ConfigError:  # the rest of the options does not go with it
            continue
        if "resolution" in options:
            framings = [
                dataclasses.replace(one, resolution=one.resolution * advice.SMALLER[one.resolution_type])
                for one in framings
            ]
        size = predict(run, ladder.family, framings, ladder.room.kind).training
        lines.append(f"  {advice.told(options)}  ({wording.gb(size)})")
        if size <= limit:
            break
    return "\n".join(lines)


def refuse_host_and_disks(run: RunConfig, plan: Prediction, room: Room) -> None:
    needed = sum(plan.host.values())
    if plan.kind != "cpu" and room.host is not None and needed > room.host:
        rows = ", ".join(f"{what} {wording.gb(size)}" for what, size in plan.host.items() if size)
        raise ConfigError(
            f"this training needs {wording.gb(needed)} of host memory ({rows}), and {wording.gb(room.host)}"
            " is free. Less: text_encoder_1_precision = int8, a smaller musubi_blocks_to_swap,"
            " gradient_checkpointing_backend = torch"
        )
    for folder, size, free in lacking_on_disks(run, plan.disk):
        raise ConfigError(
            f"{folder} needs {wording.gb(size)} and its disk has {wording.gb(free)} free. Less: another"
            " output_dir, HF_HOME on another disk, a smaller checkpoints_total_limit"
        )
