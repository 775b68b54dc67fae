"""The steps of a run as columns, downsampled for charts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simpletuner.server.schemas.runs import RunMetrics
from simpletuner.server.step_rows import StepRows

OPTIONAL_COLUMNS = ("loss", "grad_norm", "memory_gib")
REQUIRED_COLUMNS = ("t", "learning_rate", "seconds")
# Values of OPTIONAL_COLUMNS and REQUIRED_COLUMNS; 100,000 complete records would take 135 MB.
MetricsRow = tuple[float | None, ...]


class MetricsTable(StepRows[MetricsRow]):
    """The metrics of a run after the events that were added."""

    def make_row(self, record: dict[str, Any]) -> MetricsRow:
        required = [record.get(name) or 0.0 for name in REQUIRED_COLUMNS]
        return (*map(record.get, OPTIONAL_COLUMNS), *required)

    def to_message(self, max_points: int, end_offset: int) -> RunMetrics:
        """Return the metrics with at most `max_points` steps."""
        steps = sorted(self.rows)
        losses = [self.rows[step][0] for step in steps]
        steps = [steps[index] for index in downsample(losses, max_points)]
        names = (*OPTIONAL_COLUMNS, *REQUIRED_COLUMNS)
        columns: dict[str, Any] = {
            name: [self.rows[step][at] for step in steps] for at, name in enumerate(names)
        }
        scores = [
            (event.step, event.metric, name, rate, event.unit)
            for event in self.history.scores.values()
            for name, (rate, _, _) in event.rates.items()
        ]
        held_out = [
            (event.step, event.split, event.loss)
            for event in self.history.evaluations.values()
            if event.loss == event.loss
        ]
        return RunMetrics(
            step=steps,
            **columns,
            held_out=held_out,
            scores=scores,
            resumes=self.history.resume_steps,
            end=end_offset,
        )


def downsample(losses: Sequence[float | None], max_points: int) -> Sequence[int]:
    """Return at most `max_points` indices: the first, the last, and the extremes of intervals.

    A missing loss counts as the highest, so that it stays visible.
    """
    count = len(losses)
    if count <= max_points:
        return range(count)
    heights = [float("inf") if loss is None else loss for loss in losses]
    intervals = (max_points - 2) // 2
    chosen = {0, count - 1}
    for interval in range(intervals):
        indices = range(count * interval // intervals, count * (interval + 1) // intervals)
        chosen |= {min(indices, key=heights.__getitem__), max(indices, key=heights.__getitem__)}
    return sorted(chosen)
