"""The steps of a run as columns, thin enough to draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simpletuner.events import event_types
from simpletuner.events.event_log import EventRecord, event_from_dict
from simpletuner.events.run_history import RunHistory
from simpletuner.server import log_reader
from simpletuner.server.schemas.runs import RunMetrics

OPTIONAL_COLUMNS = ("loss", "grad_norm", "memory_gib")
REQUIRED_COLUMNS = ("t", "learning_rate", "seconds")
MetricsRow = tuple[
    float | None, ...
]  # of COLUMNS and ALWAYS: a hundred thousand whole records take 135 MB


def read_metrics(path: Path, max_points: int) -> RunMetrics:
    """Of events.jsonl. A step that a later process did anew is there once, the new one."""
    rows: dict[int, MetricsRow] = {}
    history, part = RunHistory(), log_reader.LineChunk(0, 0, [], has_more=True)
    while part.has_more:
        part = log_reader.read_lines(path, part.end)
        if part.start == 0:
            rows, history = {}, RunHistory()
        for found in filter(None, map(log_reader.parse_record, part.lines)):
            if found["kind"] == "step" and found.get("step"):
                figures = [found.get(name) or 0.0 for name in REQUIRED_COLUMNS]
                rows[found["step"]] = (*map(found.get, OPTIONAL_COLUMNS), *figures)
            elif (event := event_from_dict(found)) is not None:
                history.add_record(EventRecord(found["t"], event, part.end))
                if isinstance(event, (event_types.RunStarted, event_types.RunResumed)):
                    last = (
                        event.step
                        if isinstance(event, event_types.RunResumed)
                        else event.resumed_step
                    )
                    rows = {step: row for step, row in rows.items() if step <= last}
    steps = sorted(rows)
    steps = [steps[place] for place in downsample([rows[step][0] for step in steps], max_points)]
    named = enumerate((*OPTIONAL_COLUMNS, *REQUIRED_COLUMNS))
    columns: dict[str, Any] = {name: [rows[step][at] for step in steps] for at, name in named}
    scores = [
        (one.step, one.metric, name, rate)
        for one in history.scores.values()
        for name, (rate, _, _) in one.rates.items()
    ]
    held_out = [(e.step, e.split, e.loss) for e in history.evaluations.values() if e.loss == e.loss]
    return RunMetrics(
        step=steps,
        **columns,
        held_out=held_out,
        scores=scores,
        resumes=history.resume_steps,
        end=part.end,
    )


def downsample(losses: Sequence[float | None], most: int) -> Sequence[int]:
    """The places of at most `most`: the first, the last, and of equal stretches the lowest and the highest;
    one that is no number counts as the highest.
    """
    count, stretches = len(losses), (most - 2) // 2
    if count <= most:
        return range(count)
    keep, heights = {0, count - 1}, [float("inf") if loss is None else loss for loss in losses]
    for stretch in range(stretches):
        places = range(count * stretch // stretches, count * (stretch + 1) // stretches)
        keep |= {min(places, key=heights.__getitem__), max(places, key=heights.__getitem__)}
    return sorted(keep)
