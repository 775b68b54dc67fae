"""Terminal output: one live line per stage on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from simpletuner.events import event_types
from simpletuner.events.formatting import SmoothedMean, describe_event, format_duration, format_rate
from simpletuner.events.sinks import LOG_LEVELS, event_level

LEVEL_STYLES = {LOG_LEVELS["warning"]: "yellow", LOG_LEVELS["info"]: ""}
TRAIN_STAGE = "train"


class TerminalSink:
    """Sink for a terminal or a log file.

    level: "debug", "info" or "warning". every_s: interval of plain progress lines. failures: False
    where the caller prints itself why the run ended.
    """

    def __init__(
        self, stream: TextIO, level: str = "info", every_s: float = 5.0, failures: bool = True
    ) -> None:
        self._failures = failures
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._level = LOG_LEVELS[level]
        self._every_s = every_s
        self._last_line = time.monotonic()
        self._tasks: dict[str, TaskID] = {}
        self._loss, self._seconds = SmoothedMean(), SmoothedMean()
        self._live: Progress | None = None
        if self._console.is_terminal and self._level <= LOG_LEVELS["info"]:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}", markup=False),
            )
            self._live = Progress(
                *columns, console=self._console, transient=True, refresh_per_second=4
            )

    def __call__(self, event: event_types.Event) -> None:
        match event:
            case event_types.StageStarted():
                self._get_task(event.stage, event.total)
            case event_types.StageProgress():
                self._show_progress(
                    event.stage, event.done, event.total, _stage_text(event), describe_event(event)
                )
            case event_types.StepCompleted():
                text = self._step_text(event)
                self._show_progress(TRAIN_STAGE, event.step, event.total, text, f"step {text}")
            case event_types.DatasetScanned():
                self._end_task(event.dataset)
                if self._level <= LOG_LEVELS["info"]:
                    self._console.print(render_bucket_table(event, self._sanitize))
            case event_types.StageCompleted():
                self._end_task(event.stage)
                self._print_event(event)
            case event_types.ImageSaved() if self._level > LOG_LEVELS["debug"]:
                pass  # the contact sheet is printed instead
            case _:
                if isinstance(
                    event, event_types.RunStarted
                ):  # another run in the same process: start new averages
                    self._loss, self._seconds = SmoothedMean(), SmoothedMean()
                if isinstance(event, (event_types.RunFinished, event_types.RunFailed)):
                    self.close()
                self._print_event(event)

    def close(self) -> None:
        """Remove the live line from the screen."""
        for name in list(self._tasks):
            self._end_task(name)

    def _print_event(self, event: event_types.Event) -> None:
        level = event_level(event)
        if level >= self._level and (
            self._failures or not isinstance(event, event_types.RunFailed)
        ):
            style = (
                "red" if isinstance(event, event_types.RunFailed) else LEVEL_STYLES.get(level, "")
            )
            prefix = (
                "warning: "
                if level == LOG_LEVELS["warning"] and not isinstance(event, event_types.RunFailed)
                else ""
            )
            self._console.print(Text(self._sanitize(prefix + describe_event(event)), style=style))

    def _get_task(self, name: str, total: int | None) -> TaskID | None:
        if self._live is None:
            return None
        if name not in self._tasks:
            self._tasks[name] = self._live.add_task(name, total=total, text="")
            self._live.start()
        return self._tasks[name]

    def _end_task(self, name: str) -> None:
        if self._live is not None and name in self._tasks:
            self._live.remove_task(self._tasks.pop(name))
            if not self._tasks:
                self._live.stop()

    def _show_progress(self, name: str, done: int, total: int | None, text: str, line: str) -> None:
        task = self._get_task(name, total)
        if self._live is not None and task is not None:
            self._live.update(task, completed=done, total=total, text=self._sanitize(text))
            return
        now = time.monotonic()
        due = now - self._last_line >= self._every_s or (name == TRAIN_STAGE and done in (1, total))
        if due and self._level <= LOG_LEVELS["info"]:
            self._last_line = now
            self._console.print(Text(self._sanitize(line)))

    def _sanitize(self, text: str) -> str:
        """Remove escape sequences (a file name may hold some) and what the encoding cannot hold."""
        plain = "".join(char if char.isprintable() or char == "\n" else "?" for char in text)
        return plain.encode(self._console.encoding, "replace").decode(self._console.encoding)

    def _step_text(self, event: event_types.StepCompleted) -> str:
        loss, seconds = self._loss(event.loss), self._seconds(event.seconds)
        parts = [
            f"{event.step}/{event.total}",
            f"loss {loss:.4f}",
            f"lr {event.learning_rate:.3g}",
            format_rate(1 / seconds if seconds > 0 else 0.0, "it"),
            f"{format_duration(seconds * (event.total - event.step))} left",
        ]
        if event.memory_gib is not None:
            parts.append(f"{event.memory_gib:.1f} GiB")
        return " · ".join(parts)


def _stage_text(event: event_types.StageProgress) -> str:
    of = "" if event.total is None else f"/{event.total}"
    return f"{event.done}{of} · {event.rate:.1f}/s · {format_duration(event.left_s)} left"


def render_bucket_table(event: event_types.DatasetScanned, safe: Callable[[str], str]) -> Table:
    """Return a table of bucket sizes with their counts, then of rejected files by reason."""
    title = Text(safe(f"dataset {event.dataset}: {event.samples} samples"))
    table = Table(title=title, title_justify="left", min_width=36)
    table.add_column("bucket (px)")
    table.add_column("samples", justify="right")
    for width, height, count in event.buckets:
        table.add_row(f"{width} x {height}", str(count))
    for position, (reason, count) in enumerate(sorted(event.rejected.items())):
        if position == 0:
            table.add_section()
        table.add_row(Text(safe(f"dropped: {reason}"), style="yellow"), str(count))
    return table
