"""Tables of a run: one row per epoch, one row per measurement of the held-out loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from simpletuner.events import event_types
from simpletuner.events.event_log import EventRecord, event_from_dict
from simpletuner.events.run_history import RunHistory
from simpletuner.server import file_reader
from simpletuner.server.schemas.runs import EpochRow, HeldOutRow, RunTables


@dataclass(slots=True)
class StepRow:
    """A completed step. loss: None where it is not finite."""

    epoch: int
    loss: float | None
    seconds: float


class TableReader:
    """The tables after the events that were added; a repeated step is counted once."""

    def __init__(self) -> None:
        self._steps: dict[int, StepRow] = {}
        self._history = RunHistory()

    def add_lines(self, lines: list[bytes], end_offset: int) -> None:
        """Add lines of events.jsonl, which end at byte `end_offset`."""
        for record in filter(None, map(file_reader.parse_record, lines)):
            if record["kind"] == "step":
                self._add_step(record)
                continue
            event = event_from_dict(record)
            if event is None:
                continue
            self._history.add_record(EventRecord(record["t"], event, end_offset))
            match event:
                case event_types.RunStarted(resumed_step=step) | event_types.RunResumed(step=step):
                    self._steps = {at: row for at, row in self._steps.items() if at <= step}

    def _add_step(self, record: dict[str, Any]) -> None:
        step, epoch = record.get("step"), record.get("epoch")
        if step and isinstance(epoch, int):
            row = StepRow(epoch, record.get("loss"), record.get("seconds") or 0.0)
            self._steps[step] = row

    def tables(self) -> RunTables:
        """Return the tables; epochs are counted from 1."""
        epochs: dict[int, list[tuple[int, StepRow]]] = {}
        for step, row in sorted(self._steps.items()):
            epochs.setdefault(row.epoch, []).append((step, row))
        return RunTables(
            epochs=[_make_epoch(epoch, rows) for epoch, rows in sorted(epochs.items())],
            held_out=[
                HeldOutRow(
                    step=event.step,
                    dataset=event.dataset,
                    split=event.split,
                    loss=_finite(event.loss),
                    change=_finite(event.change),
                    change_se=_finite(event.change_se),
                    best=event.best,
                )
                for event in sorted(
                    self._history.evaluations.values(),
                    key=lambda event: (event.step, event.dataset, event.split),
                )
            ],
        )


def _make_epoch(epoch: int, rows: list[tuple[int, StepRow]]) -> EpochRow:
    losses = [row.loss for _, row in rows if row.loss is not None]
    return EpochRow(
        epoch=epoch + 1,
        first_step=rows[0][0],
        last_step=rows[-1][0],
        loss=sum(losses) / len(losses) if losses else None,
        seconds=sum(row.seconds for _, row in rows),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
