"""Before a training downloads or loads anything: what it will need, and no for what cannot be."""

from __future__ import annotations

from collections.abc import Sequence

from simpletuner.config.schema import RunConfig
from simpletuner.data.geometry import Framing
from simpletuner.errors import ConfigError
from simpletuner.events.types import Emit, Noted, Warned
from simpletuner.models import registry
from simpletuner.training.device import Device, choose
from simpletuner.training.plan import speed, wording
from simpletuner.training.plan.fit import Ladder, demanded
from simpletuner.training.plan.prediction import RUNTIME, Prediction, is_worth_it, predict
from simpletuner.training.plan.room import Room, found, lacking_on_disks

SHOWN = 3  # ways out that a refusal names


def announce(run: RunConfig, framings: Sequence[Framing], emit: Emit) -> RunConfig:
    """The same run, its "auto" settled. ConfigError when device, host or a disk has too little room.

    Of a small base whose plan is not known nothing is said: it would not be noticed in any memory.
    """
    device, family = choose(run.model), registry.family(run.model.model_family)
    room, kind = found(device), device.device.type
    peak = peak_of(device, room.name)
    limit = room_for_tensors(room, kind)
    if run.model.gradient_checkpointing == "auto":
        count = 0
        if limit is not None:
            count = demanded(Ladder(run, family, framings, kind, peak, room.host), limit)
        emit(Noted(f"gradient_checkpointing auto: {count} blocks are recomputed"))
        model = run.model.model_copy(update={"gradient_checkpointing": count})
        run = run.model_copy(update={"model": model})
    elif not is_worth_it(run, family, framings, kind):
        return run
    plan = predict(run, family, framings)
    emit(Noted(wording.brief(plan, room, peak)))
    if limit is not None and plan.tensors > limit:
        ladder = Ladder(run, family, framings, kind, peak, room.host)
        raise ConfigError(too_large(run, plan, room, ladder, limit))
    refuse_host_and_disks(run, plan, room)
    for what, size in plan.before.items():
        if limit is not None and size > limit:
            emit(
                Warned(
                    f"the {what} takes {wording.gb(size)} of {wording.gb(limit)}: text_encoder_1_precision"
                )
            )
    if limit is not None and plan.training > limit:
        emit(Warned(f"{wording.gb(plan.training)} with allowances, {wording.gb(limit)} free: it may not fit"))
    return run


def peak_of(device: Device, name: str) -> float:
    """FLOP/s: by the device's name, measured on a CPU, and a good card's where nothing is known."""
    known = speed.here(device.weights) if device.device.type == "cpu" else speed.peak_flops(name)
    return known or speed.PEAKS[speed.REFERENCE] * 1e12


def room_for_tensors(room: Room | None, kind: str) -> int | None:
    """What a training may take of the free memory, where that is known."""
    if room is None or room.device is None:
        return None
    return room.device - (RUNTIME["cpu"] if kind == "cpu" else 0)


def too_large(run: RunConfig, plan: Prediction, room: Room, ladder: Ladder, limit: int) -> str:
    ways = ladder.ways(limit)[:SHOWN]
    told = [f"\n  {wording.flags(run, way, ladder.blocks)}  (about {wording.gb(way.size)})" for way in ways]
    out = f"What would fit, the fastest first:{''.join(told)}" if told else wording.last_way(run)
    return (
        f"this training needs {wording.gb(plan.tensors)} for its tensors alone, and {room.name} has"
        f" {wording.gb(limit)} free. {out}"
    )


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
