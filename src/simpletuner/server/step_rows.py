"""The steps of a run as rows, which the charts and the tables of a run are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from simpletuner.events import event_types
from simpletuner.events.event_log import EventRecord, event_from_dict
from simpletuner.events.run_history import RunHistory
from simpletuner.server import file_reader

Row = TypeVar("Row")


class StepRows(ABC, Generic[Row]):
    """The rows of the steps, by step, and the other events, after the lines that were added.

    A step that was repeated after a resume is contained once, with its new values.
    """

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.history = RunHistory()

    @abstractmethod
    def make_row(self, record: dict[str, Any]) -> Row | None:
        """Return the row of a step, None for a record that is not complete."""

    def add_lines(self, lines: list[bytes], end_offset: int) -> None:
        """Add lines of events.jsonl, which end at byte `end_offset`."""
        for record in filter(None, map(file_reader.parse_record, lines)):
            if record["kind"] == "step":
                row = self.make_row(record) if record.get("step") else None
                if row is not None:
                    self.rows[record["step"]] = row
                continue
            event = event_from_dict(record)
            if event is None:
                continue
            self.history.add_record(EventRecord(record["t"], event, end_offset))
            match event:
                case event_types.RunStarted(resumed_step=step) | event_types.RunResumed(step=step):
                    self.rows = {at: row for at, row in self.rows.items() if at <= step}
