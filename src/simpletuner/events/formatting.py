"""Text of events and numbers, shared by the terminal, the report and messages."""

from __future__ import annotations

from collections.abc import Sequence

from simpletuner.events import event_types, findings

MODE_NAMES = {
    "replicated": "replicated",
    "sharded": "sharded by FSDP2",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
}


class SmoothedMean:
    """Exponential moving average without the bias of its start (Adam's correction).

    share: the weight of the newest value.
    """

    def __init__(self, share: float = 0.05) -> None:
        self._weight_of_newest = share
        self._sum = self._weight = 0.0

    def __call__(self, value: float) -> float:
        """Add a value and return the average. NaN is skipped."""
        if value == value:
            self._sum += self._weight_of_newest * (value - self._sum)
            self._weight += self._weight_of_newest * (1.0 - self._weight)
        return self._sum / self._weight if self._weight else value


def format_duration(seconds: float | None) -> str:
    """Return "41 s", "3:07 min", "2:05 h"; "?" when unknown."""
    if seconds is None or seconds != seconds:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def format_bytes(count: int) -> str:
    """Return bytes in binary units."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def format_rate(per_s: float, unit: str) -> str:
    """Return units per second, or seconds per unit when that is easier to read."""
    if per_s <= 0:
        return f"? {unit}/s"
    return f"{per_s:.2f} {unit}/s" if per_s >= 0.5 else f"{1 / per_s:.1f} s/{unit}"


def format_score(value: float, error: float, unit: str) -> str:
    """Return a value and its standard error in its unit: "96 ± 1 %" for a share of 0.96."""
    if unit == "share":
        return f"{100 * value:.0f} ± {100 * error:.0f} %"
    return f"{value:.3f} ± {error:.3f} {unit}"


def pick_evenly(steps: Sequence[int], most: int) -> list[int]:
    """Return at most `most` steps: the first, the last, and evenly spaced ones between."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]


def count_of(count: int, noun: str, plural: str = "") -> str:
    """Return "1 image" or "3 images"."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def format_world(world: event_types.RunWorld) -> str:
    """Return "2 processes, sharded by FSDP2, 4.6 GiB of base weights in each"."""
    mode = MODE_NAMES.get(world.mode, world.mode)
    processes = count_of(world.processes, "process", "processes")
    return f"{processes}, {mode}, {format_bytes(world.base_bytes_per_rank)} of base weights in each"


def describe_event(event: event_types.Event) -> str:
    """Return one line of plain text."""
    match event:
        case event_types.RunStarted():
            steps = f"steps {event.resumed_step} to {event.total_steps}"
            world = "" if event.world is None else f"{format_world(event.world)}, "
            return f"simpletuner {event.version}: {event.model} on {event.device}, {world}{steps}"
        case event_types.NoticeIssued() | event_types.WarningIssued():
            return event.message
        case event_types.StageStarted():
            return f"{event.stage}: {'' if event.total is None else f'{event.total} '}{event.unit}"
        case event_types.StageProgress():
            of = "" if event.total is None else f" of {event.total}"
            left = format_duration(event.left_s)
            return f"{event.stage}: {event.done}{of}, {event.rate:.1f}/s, {left} left"
        case event_types.StageCompleted():
            note = f" ({event.note})" if event.note else ""
            return f"{event.stage}: {event.done} in {format_duration(event.seconds)}{note}"
        case event_types.DatasetScanned():
            dropped = "".join(
                f", {count} {reason}" for reason, count in sorted(event.rejected.items())
            )
            return (
                f"dataset {event.dataset}: {count_of(event.samples, 'image')} in "
                f"{count_of(len(event.buckets), 'bucket')}{dropped}"
            )
        case event_types.StepCompleted():
            return f"step {event.step} of {event.total}: loss {event.loss:.4f}"
        case event_types.WeightsSaved():
            size = format_bytes(event.size_bytes)
            return f"saved {event.path} ({size} in {format_duration(event.seconds)})"
        case event_types.RunResumed():
            return f"resuming from {event.path} at step {event.step}"
        case event_types.CheckpointSetAside():
            return f"{event.path} is damaged and was renamed: {event.reason}"
        case event_types.ImageSaved():
            return f"step {event.step}: {event.path} [{event.weights}]"
        case event_types.ContactSheetSaved():
            return f"step {event.step}: contact sheet {event.path}"
        case event_types.LossEvaluated():
            best = ", the best so far" if event.best and event.step else ""
            change = f"change {event.change:+.4f} ± {event.change_se:.4f}"
            loss = f"{event.split} loss ({event.dataset}) {event.loss:.4f}"
            return f"step {event.step}: {loss}, {change}{best}"
        case event_types.ScoresComputed():
            values = ", ".join(
                f"{name} {format_score(value, error, event.unit)}"
                for name, (value, error, _) in event.rates.items()
            )
            count = count_of(event.prompts, "image")
            return f"step {event.step}: {event.metric} in {count} [{event.weights}]: {values}"
        case event_types.RunFinished():
            return f"{event.status} at step {event.step} after {format_duration(event.seconds)}"
        case event_types.RunFailed():
            when = f"at step {event.step}" if event.step else "before the first step"
            return f"failed {when}: {event.error}"
        case _:
            return findings.describe_finding(event)
