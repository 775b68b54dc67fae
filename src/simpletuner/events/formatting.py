"""Events and figures in a person's words: one line each, shared by the terminal, the report and messages."""

from __future__ import annotations

from collections.abc import Sequence

from simpletuner.events import event_types


class SmoothedMean:
    """Exponential mean without the pull of its start (Adam's bias correction). share: the newest one's."""

    def __init__(self, share: float = 0.05) -> None:
        self._weight_of_newest = share
        self._sum = self._weight = 0.0

    def __call__(self, value: float) -> float:
        """Values that are not a number are passed over."""
        if value == value:
            self._sum += self._weight_of_newest * (value - self._sum)
            self._weight += self._weight_of_newest * (1.0 - self._weight)
        return self._sum / self._weight if self._weight else value


def format_duration(seconds: float | None) -> str:
    """41 s, 3:07 min, 2:05 h; "?" when unknown."""
    if seconds is None or seconds != seconds:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def format_bytes(count: int) -> str:
    """Bytes in binary units."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


def format_rate(per_s: float, unit: str) -> str:
    """Per second, or seconds per unit when that reads better."""
    if per_s <= 0:
        return f"? {unit}/s"
    return f"{per_s:.2f} {unit}/s" if per_s >= 0.5 else f"{1 / per_s:.1f} s/{unit}"


def format_score(value: float, error: float, unit: str) -> str:
    """Return a value and its standard error in its unit: "96 ± 1 %" for a share of 0.96."""
    if unit == "share":
        return f"{100 * value:.0f} ± {100 * error:.0f} %"
    return f"{value:.3f} ± {error:.3f} {unit}"


def pick_evenly(steps: Sequence[int], most: int) -> list[int]:
    """At most that many, the first and the last always among them, the rest evenly spaced by position."""
    if len(steps) <= most:
        return list(steps)
    return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]


def describe_event(event: event_types.Event) -> str:
    """One line of plain text."""
    match event:
        case event_types.RunStarted():
            steps = f"steps {event.resumed_step} to {event.total_steps}"
            return f"simpletuner {event.version}: {event.model} on {event.device}, {steps}"
        case event_types.NoticeIssued() | event_types.WarningIssued():
            return event.message
        case event_types.StageStarted():
            return f"{event.stage}: {'' if event.total is None else f'{event.total} '}{event.unit}"
        case event_types.StageProgress():
            of = "" if event.total is None else f" of {event.total}"
            return f"{event.stage}: {event.done}{of}, {event.rate:.1f}/s, {format_duration(event.left_s)} left"
        case event_types.StageCompleted():
            note = f" ({event.note})" if event.note else ""
            return f"{event.stage}: {event.done} in {format_duration(event.seconds)}{note}"
        case event_types.DatasetScanned():
            dropped = "".join(
                f", {count} {reason}" for reason, count in sorted(event.rejected.items())
            )
            return (
                f"dataset {event.dataset}: {event.samples} in {len(event.buckets)} buckets{dropped}"
            )
        case event_types.StepCompleted():
            return f"step {event.step} of {event.total}: loss {event.loss:.4f}"
        case event_types.WeightsSaved():
            return f"saved {event.path} ({format_bytes(event.size_bytes)} in {format_duration(event.seconds)})"
        case event_types.RunResumed():
            return f"going on from {event.path} at step {event.step}"
        case event_types.CheckpointSetAside():
            return f"{event.path} is damaged and was set aside: {event.reason}"
        case event_types.ImageSaved():
            return f"step {event.step}: {event.path} [{event.weights}]"
        case event_types.ContactSheetSaved():
            return f"step {event.step}: contact sheet {event.path}"
        case event_types.LossEvaluated():
            best = ", the best so far" if event.best and event.step else ""
            change = f"change {event.change:+.4f} ± {event.change_se:.4f}"
            return f"step {event.step}: {event.split} loss ({event.dataset}) {event.loss:.4f}, {change}{best}"
        case event_types.ScoresComputed():
            told = ", ".join(
                f"{name} {format_score(value, error, event.unit)}"
                for name, (value, error, _) in event.rates.items()
            )
            return f"step {event.step}: {event.metric} in {event.prompts} pictures [{event.weights}]: {told}"
        case event_types.RunFinished():
            return f"{event.status} at step {event.step} after {format_duration(event.seconds)}"
        case event_types.RunFailed():
            when = f"at step {event.step}" if event.step else "before the first step"
            return f"failed {when}: {event.error}"
        case _:
            return event.kind
