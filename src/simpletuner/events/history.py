"""What a run came to: its events with the abandoned ends of resumed processes taken out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.events import types
from simpletuner.events.log import Record, read

PictureKey = tuple[str, int, int, int, str]


@dataclass
class History:
    """steps, evaluations, scores and pictures are those that the present weights descend from.

    pictures: ((prompt id, width, height, seed, weights), step) -> event. problems: (unix seconds, event).
    resumes: steps at which a later process went on. end: how the last process ended, None while it runs.
    """

    started: types.RunStarted | None = None
    steps: dict[int, types.Stepped] = field(default_factory=dict)
    evaluations: dict[tuple[str, str, int], types.Evaluated] = field(default_factory=dict)
    scores: dict[tuple[str, int], types.Scored] = field(default_factory=dict)
    pictures: dict[tuple[PictureKey, int], types.ImageSaved] = field(default_factory=dict)
    saved: dict[str, types.Saved] = field(default_factory=dict)
    problems: list[tuple[float, types.Warned | types.Failed | types.CheckpointSetAside]] = field(
        default_factory=list
    )
    resumes: list[int] = field(default_factory=list)
    end: types.Finished | types.Failed | None = None
    last_t: float = 0.0

    def add(self, record: Record) -> None:
        event = record.event
        self.last_t = record.t
        match event:
            case types.RunStarted():
                self.started, self.end = event, None
                self._forget_after(event.resumed_step or -1)  # a fresh start has nothing before it
            case types.Resumed():
                self.resumes.append(event.step)
                self._forget_after(event.step)
            case types.Stepped():
                self.steps[event.step] = event
            case types.Evaluated():
                self.evaluations[event.dataset, event.split, event.step] = event
            case types.Scored():
                self.scores[event.metric, event.step] = event
            case types.ImageSaved():
                key = (event.prompt_id, event.width_px, event.height_px, event.seed, event.weights)
                self.pictures[key, event.step] = event
            case types.Saved():
                self.saved[event.path] = event
            case types.Finished():
                self.end = event
            case types.Warned() | types.Failed() | types.CheckpointSetAside():
                self.problems.append((record.t, event))
                if isinstance(event, types.Failed):
                    self.end = event

    def _forget_after(self, step: int) -> None:
        self.steps = {at: event for at, event in self.steps.items() if at <= step}
        self.evaluations = {key: event for key, event in self.evaluations.items() if event.step <= step}
        self.scores = {key: event for key, event in self.scores.items() if event.step <= step}
        self.pictures = {key: event for key, event in self.pictures.items() if event.step <= step}


def of_records(records: Iterable[Record]) -> History:
    history = History()
    for record in records:
        history.add(record)
    return history


def of_run(run_dir: Path) -> History:
    return of_records(read(run_dir / "events.jsonl"))
