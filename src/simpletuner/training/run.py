"""One process that works on one run: lock, log, signals, train, and an honest end."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from simpletuner.config.load import Loaded, resolved
from simpletuner.config.schema import RunConfig
from simpletuner.data.backends import Backends
from simpletuner.errors import SimpleTunerError, Stopped
from simpletuner.events import terminal, trackers
from simpletuner.events.log import EventLog
from simpletuner.events.report import write_report
from simpletuner.events.sinks import Sink, fan_out
from simpletuner.events.types import Emit, Event, Failed, Finished, Noted, Resumed, Stepped
from simpletuner.training import loop
from simpletuner.training.build import build
from simpletuner.training.rundir import RunFolder


class StopFlag:
    """Set by Ctrl-C, SIGTERM or SIGUSR1; the loop leaves after the step. A second signal leaves at once."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self) -> bool:
        return self.requested

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        name = signal.Signals(number).name
        print(f"\n{name}: saving after this step; once more to leave at once", file=sys.stderr, flush=True)

    @contextmanager
    def installed(self) -> Iterator[None]:
        names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if name in signal.Signals.__members__]
        before = {name: signal.signal(signal.Signals[name], self.handle) for name in names}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(signal.Signals[name], handler)


class Position:
    """Remembers how far the run is, for exit.json."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, (Stepped, Resumed)):
            self.step = event.step


def train(loaded: Loaded, backends: Backends) -> int:
    """Train to the end. Returns the exit code; errors that a person can mend are in exit.json and raised."""
    run = loaded.run
    folder_path = Path(run.training.output_dir).expanduser().absolute()
    with RunFolder(folder_path) as folder:
        earlier = folder.set_aside_earlier() if run.checkpoint.resume_from_checkpoint == "never" else None
        folder.write_config(resolved(run))
        position = Position()
        sinks: list[Sink] = [EventLog(folder.events).append, position, *terminal.sinks(folder.log)]
        sinks += trackers.make(run.logging, folder_path)
        with fan_out(sinks) as emit:
            for note in loaded.notes:
                emit(Noted(note))
            if earlier is not None:
                emit(Noted(f"resume_from_checkpoint = never: earlier results are now in {earlier}"))
            base_dir = loaded.source.parent if loaded.source else Path.cwd()
            return work(run, backends, base_dir, folder, position, emit)


def work(
    run: RunConfig, backends: Backends, base_dir: Path, folder: RunFolder, position: Position, emit: Emit
) -> int:
    """Build, train, and write how it ended whatever happens."""
    started = time.monotonic()
    stop = StopFlag()
    try:
        with stop.installed():
            built = build(run, backends, base_dir, folder, stop, emit)
            try:
                last = loop.train(built.parts)
            finally:
                built.close()
        emit(Finished(last, time.monotonic() - started, "done"))
        folder.write_exit(0, "done", last)
    except Stopped as stopped:
        emit(Finished(position.step, time.monotonic() - started, "stopped"))
        folder.write_exit(stopped.exit_code, "stopped", position.step, str(stopped))
        raise
    except BaseException as error:  # the outermost edge: nothing may end without exit.json saying how
        code = (
            error.exit_code
            if isinstance(error, SimpleTunerError)
            else 130
            if isinstance(error, KeyboardInterrupt)
            else 1
        )
        reason = out_of_memory(error) or str(error) or type(error).__name__
        emit(Failed(position.step, reason, code))
        folder.write_exit(code, "failed", position.step, reason)
        if not isinstance(error, SimpleTunerError):
            with folder.log.open("a", encoding="utf-8") as log:
                traceback.print_exception(error, file=log)
        raise
    finally:
        report = write_report(folder.path)
        emit(Noted(f"report: {report}"))
    return 0


def out_of_memory(error: BaseException) -> str | None:
    """What to change when the device ran out of memory."""
    if not isinstance(error, torch.OutOfMemoryError):
        return None
    return (
        f"out of memory: {str(error).splitlines()[0]} The last checkpoint is kept. "
        "Use gradient_checkpointing, a smaller resolution or train_batch_size"
    )
