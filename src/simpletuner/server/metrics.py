"""The steps of a run as columns, thin enough to draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simpletuner.events import types
from simpletuner.events.history import History
from simpletuner.events.log import Record, from_record
from simpletuner.server import tail
from simpletuner.server.wire.runs import Metrics

COLUMNS = ("loss", "grad_norm", "memory_gib")
ALWAYS = ("t", "learning_rate", "seconds")
Row = tuple[float | None, ...]  # of COLUMNS and ALWAYS: a hundred thousand whole records take 135 MB


def metrics(path: Path, max_points: int) -> Metrics:
    """Of events.jsonl. A step that a later process did anew is there once, the new one."""
    rows: dict[int, Row] = {}
    history, part = History(), tail.Lines(0, 0, [], more=True)
    while part.more:
        part = tail.lines(path, part.end)
        if part.start == 0:
            rows, history = {}, History()
        for found in filter(None, map(tail.record, part.lines)):
            if found["kind"] == "step" and found.get("step"):
                figures = [found.get(name) or 0.0 for name in ALWAYS]
                rows[found["step"]] = (*map(found.get, COLUMNS), *figures)
            elif (event := from_record(found)) is not None:
                history.add(Record(found["t"], event, part.end))
                if isinstance(event, (types.RunStarted, types.Resumed)):
                    last = event.step if isinstance(event, types.Resumed) else event.resumed_step
                    rows = {step: row for step, row in rows.items() if step <= last}
    steps = sorted(rows)
    steps = [steps[place] for place in thinned([rows[step][0] for step in steps], max_points)]
    named = enumerate((*COLUMNS, *ALWAYS))
    columns: dict[str, Any] = {name: [rows[step][at] for step in steps] for at, name in named}
    scores = [
        (one.step, one.metric, name, rate)
        for one in history.scores.values()
        for name, (rate, _, _) in one.rates.items()
    ]
    held_out = [(e.step, e.split, e.loss) for e in history.evaluations.values() if e.loss == e.loss]
    return Metrics(
        step=steps, **columns, held_out=held_out, scores=scores, resumes=history.resumes, end=part.end
    )


def thinned(losses: Sequence[float | None], most: int) -> Sequence[int]:
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
