"""The steps of a run as columns, thin enough to draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simpletuner.events import types
from simpletuner.events.history import History
from simpletuner.events.log import Record, from_record
from simpletuner.server import tail
from simpletuner.server.wire.runs import Metrics

COLUMNS = ("loss", "grad_norm", "memory_gib")
ALWAYS = ("t", "learning_rate", "seconds")


def metrics(path: Path, since: int, max_points: int) -> Metrics:
    """Of events.jsonl, from byte `since` on. A step that a later process did anew is there once, the new one.

    start: 0 where the file is another than the one asked about. forget_after: steps of before `since` behind
    this one are void too.
    """
    rows: dict[int, dict[str, Any]] = {}
    history, start, forget_after = History(), None, None
    more = True
    while more:
        part = tail.lines(path, since)
        if start is None or part.start < since:
            rows, history, start = {}, History(), part.start
        since, more = part.end, part.more
        for found in filter(None, map(tail.record, part.lines)):
            if found["kind"] == "step" and found.get("step"):
                rows[found["step"]] = found
            elif (event := from_record(found)) is not None:
                history.add(Record(found["t"], event, since))
                if isinstance(event, (types.RunStarted, types.Resumed)):
                    last = event.step if isinstance(event, types.Resumed) else event.resumed_step
                    rows = {step: row for step, row in rows.items() if step <= last}
                    forget_after = last if forget_after is None else min(last, forget_after)
    kept = thinned([rows[step] for step in sorted(rows)], max_points)
    columns: dict[str, Any] = {name: [row.get(name) for row in kept] for name in COLUMNS}
    columns |= {name: [row.get(name) or 0.0 for row in kept] for name in ALWAYS}
    return Metrics(
        step=[row["step"] for row in kept],
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


def thinned(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most `most` rows: the first, the last, and of equal stretches the lowest and the highest loss; one
    that is no number counts as the highest.
    """
    if len(rows) <= most:
        return rows
    keep, stretches = {0, len(rows) - 1}, (most - 2) // 2

    def height(place: int) -> float:
        loss: float | None = rows[place].get("loss")
        return float("inf") if loss is None else loss

    for stretch in range(stretches):
        places = range(len(rows) * stretch // stretches, len(rows) * (stretch + 1) // stretches)
        keep |= {min(places, key=height), max(places, key=height)}
    return [rows[place] for place in sorted(keep)]
