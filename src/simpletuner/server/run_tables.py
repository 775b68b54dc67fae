"""Tables of a run: one row per epoch, one row per measurement of the held-out loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from simpletuner.server.schemas.runs import EpochRow, HeldOutRow, RunTables
from simpletuner.server.step_rows import StepRows


@dataclass(slots=True)
class StepRow:
    """A completed step. loss: None where it is not finite."""

    epoch: int
    loss: float | None
    seconds: float


class TableReader(StepRows[StepRow]):
    """The tables after the events that were added."""

    def make_row(self, record: dict[str, Any]) -> StepRow | None:
        epoch = record.get("epoch")
        if not isinstance(epoch, int):
            return None
        return StepRow(epoch, record.get("loss"), record.get("seconds") or 0.0)

    def tables(self) -> RunTables:
        """Return the tables; epochs are counted from 1."""
        epochs: dict[int, list[tuple[int, StepRow]]] = {}
        for step, row in sorted(self.rows.items()):
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
                    self.history.evaluations.values(),
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
