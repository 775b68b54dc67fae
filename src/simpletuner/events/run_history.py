"""History of a run: its events without those that a resumed process replaced."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner.events import event_types
from simpletuner.events.event_log import EventRecord, read_events

ImageKey = tuple[str, int, int, int, str]


@dataclass
class RunHistory:
    """Events of a run that the present weights descend from.

    images: ((prompt id, width, height, seed, weights), step) -> event. warnings: (unix seconds,
    event). verdict, prompts: the last one. sample_losses: split -> event of the end. resume_steps:
    steps at which a later process resumed. end_event: how the last process ended, None while it
    runs.
    """

    start_event: event_types.RunStarted | None = None
    steps: dict[int, event_types.StepCompleted] = field(default_factory=dict)
    evaluations: dict[tuple[str, str, int], event_types.LossEvaluated] = field(default_factory=dict)
    scores: dict[tuple[str, int], event_types.ScoresComputed] = field(default_factory=dict)
    images: dict[tuple[ImageKey, int], event_types.ImageSaved] = field(default_factory=dict)
    verdict: event_types.VerdictReached | None = None
    prompts: event_types.PromptsChosen | None = None
    sample_losses: dict[str, event_types.SampleLossesMeasured] = field(default_factory=dict)
    caption_fit: event_types.CaptionFitMeasured | None = None
    knowledge: dict[str, event_types.KnowledgeCompared] = field(default_factory=dict)
    weight_changes: dict[int, event_types.WeightChangeMeasured] = field(default_factory=dict)
    saved_weights: dict[str, event_types.WeightsSaved] = field(default_factory=dict)
    warnings: list[
        tuple[
            float,
            event_types.WarningIssued | event_types.RunFailed | event_types.CheckpointSetAside,
        ]
    ] = field(default_factory=list)
    resume_steps: list[int] = field(default_factory=list)
    end_event: event_types.RunFinished | event_types.RunFailed | None = None
    last_event_time: float = 0.0

    def add_record(self, record: EventRecord) -> None:
        event = record.event
        self.last_event_time = record.unix_time
        match event:
            case event_types.RunStarted():
                self.start_event, self.end_event = event, None
                self._drop_after(event.resumed_step or -1)  # a fresh start has nothing before it
            case event_types.RunResumed():
                self.resume_steps.append(event.step)
                self._drop_after(event.step)
            case event_types.StepCompleted():
                self.steps[event.step] = event
            case event_types.LossEvaluated():
                self.evaluations[event.dataset, event.split, event.step] = event
            case event_types.VerdictReached():
                self.verdict = event
            case event_types.PromptsChosen():
                self.prompts = event
            case event_types.KnowledgeCompared():
                self.knowledge[event.metric] = event
            case event_types.WeightChangeMeasured():
                self.weight_changes[event.step] = event
            case event_types.SampleLossesMeasured():
                self.sample_losses[event.split] = event
            case event_types.CaptionFitMeasured():
                self.caption_fit = event
            case event_types.ScoresComputed():
                self.scores[event.metric, event.step] = event
            case event_types.ImageSaved():
                key = (event.prompt_id, event.width_px, event.height_px, event.seed, event.weights)
                self.images[key, event.step] = event
            case event_types.WeightsSaved():
                self.saved_weights[event.path] = event
            case event_types.RunFinished():
                self.end_event = event
            case (
                event_types.WarningIssued()
                | event_types.RunFailed()
                | event_types.CheckpointSetAside()
            ):
                self.warnings.append((record.unix_time, event))
                if isinstance(event, event_types.RunFailed):
                    self.end_event = event

    def _drop_after(self, step: int) -> None:
        self.steps = {at: event for at, event in self.steps.items() if at <= step}
        self.evaluations = {
            key: event for key, event in self.evaluations.items() if event.step <= step
        }
        self.scores = {key: event for key, event in self.scores.items() if event.step <= step}
        self.images = {key: event for key, event in self.images.items() if event.step <= step}
        self.knowledge = {
            name: event for name, event in self.knowledge.items() if event.step <= step
        }
        self.weight_changes = {at: event for at, event in self.weight_changes.items() if at <= step}
        self.sample_losses = {
            split: event for split, event in self.sample_losses.items() if event.step <= step
        }
        if self.verdict is not None and self.verdict.step > step:
            self.verdict = None


def history_from_records(records: Iterable[EventRecord]) -> RunHistory:
    """Return the history of these records."""
    history = RunHistory()
    for record in records:
        history.add_record(record)
    return history


def read_run_history(run_dir: Path) -> RunHistory:
    """Read the history of a run folder."""
    return history_from_records(read_events(run_dir / "events.jsonl"))
