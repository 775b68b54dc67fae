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


def metrics(path: Path, since: int, max_points: int) -> Metrics:
    """Of events.jsonl, from byte `since` on. A step that a later process did anew is there once, the new one.

    start: 0 where the file is another than the one asked about. forget_after: steps of before `since` behind
    this one are void too.
    """
    rows: dict[int, Row] = {}
    history, start, forget_after = History(), None, None
    more = True
    while more:
        part = tail.lines(path, since)
        if start is None or part.start < since:
            rows, history, start = {}, History(), part.start
        since, more = part.end, part.more
        for found in filter(None, map(tail.record, part.lines)):
            if found["kind"] == "step" and found.get("step"):
                figures = [found.get(name) or 0.0 for name in ALWAYS]
                rows[found["step"]] = (*map(found.get, COLUMNS), *figures)
            elif (event := from_record(found)) is not None:
                history.add(Record(found["t"], event, since))
                if isinstance(event, (types.RunStarted, types.Resumed)):
                    last = event.step if isinstance(event, types.Resumed) else event.resumed_step
                    rows = {step: row for step, row in rows.items() if step <= last}
                    forget_after = last if forget_after is None else min(last, forget_after)
    steps = sorted(rows)
    steps = [steps[place] for place in thinned([rows[step][0] for step in steps], max_points)]
    named = enumerate((*COLUMNS, *ALWAYS))
    columns: dict[str, Any] = {name: [rows[step][at] for step in steps] for at, name in named}
    return Metrics(
        step=steps,
        **columns,
        held_out=[(e.step, e.split, e.loss) for e in history.evaluations.values() if e.loss == e.loss],
        scores=[
            (s.step, s.metric, name, rate)
            for s in history.scores.values()
            for name, (rate, _, _) in s.rates.items()
        ],
        resumes=history.resumes,
        start=start or 0,
        end=since,
        forget_after=forget_after if start else None,
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
