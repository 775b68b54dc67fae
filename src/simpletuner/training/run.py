"""One process that works on one run: lock, log, signals, train, and an honest end."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import torch

from simpletuner.config.load import Loaded, resolved
from simpletuner.config.schema import RunConfig
from simpletuner.data.dataset import Backends
from simpletuner.errors import SimpleTunerError, Stopped
from simpletuner.events import trackers, webhook
from simpletuner.events.log import EventLog
from simpletuner.events.report import write_report
from simpletuner.events.sinks import ClosingSink, Sink, close_all, fan_out
from simpletuner.events.terminal import Terminal
from simpletuner.events.types import Emit, Event, Failed, Finished, Noted, Resumed, Stepped
from simpletuner.training import loop
from simpletuner.training.build import build
from simpletuner.training.rundir import RunFolder

DEFAULTS = resolved(RunConfig())


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
    """Sink that remembers how far the run is, for exit.json."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self, event: Event) -> None:
        if isinstance(event, (Stepped, Resumed)):
            self.step = event.step


def train(loaded: Loaded, backends: Backends) -> int:
    """Train to the end: 0. Errors are raised after exit.json and events.jsonl have told of them."""
    run = loaded.run
    path = Path(run.training.output_dir).expanduser().absolute()
    with RunFolder(path) as folder, ExitStack() as closing:
        earlier = folder.set_aside_earlier() if run.checkpoint.resume_from_checkpoint == "never" else None
        folder.write_config(resolved(run))
        position = Position()
        emit = fan_out([position, *sinks(run, folder, closing)])
        for note in (*loaded.notes, *backends.notes):
            emit(Noted(note))
        if earlier is not None:
            emit(Noted(f"resume_from_checkpoint = never: earlier results are now in {earlier}"))
        base_dir = loaded.source.parent if loaded.source else Path.cwd()
        return work(run, backends, base_dir, folder, position, emit)


def sinks(run: RunConfig, folder: RunFolder, closing: ExitStack) -> list[Sink]:
    """Who hears of this run: the record, the terminal, train.log, and what the options name."""
    options = run.logging
    record = EventLog(folder.events)
    shown = Terminal(sys.stdout, options.log_level)
    logged = Terminal(
        closing.enter_context(folder.log.open("a", encoding="utf-8")), options.log_level, every_s=30
    )
    told = trackers.make(
        options.report_to, folder.path, options.tracker_project_name, options.tracker_run_name, resolved(run)
    )
    hooks = (
        [webhook.Webhook(hook) for hook in webhook.parse(options.webhook_config)]
        if options.webhook_config
        else []
    )
    everyone: list[ClosingSink] = [record, shown, logged, *told, *hooks]
    closing.callback(close_all, everyone)
    return [*everyone]


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
    except Stopped as stopped:
        emit(Finished(position.step, time.monotonic() - started, "stopped"))
        folder.write_exit(stopped.exit_code, "stopped", position.step, str(stopped))
        raise
    except BaseException as error:  # the outermost edge: nothing may end without exit.json saying how
        reason = out_of_memory(error) or str(error) or type(error).__name__
        code = error.exit_code if isinstance(error, SimpleTunerError) else 1
        emit(Failed(position.step, reason, code))
        folder.write_exit(code, "failed", position.step, reason)
        if not isinstance(error, SimpleTunerError):
            with folder.log.open("a", encoding="utf-8") as log:
                traceback.print_exception(error, file=log)
        raise
    finally:
        write_report(folder.path, DEFAULTS)
    emit(Finished(last, time.monotonic() - started, "done"))
    emit(Noted(f"report: {write_report(folder.path, DEFAULTS)}"))
    sheet = folder.path / "images" / "before_after.png"
    if sheet.exists():
        emit(Noted(f"before and after: {sheet}"))
    folder.write_exit(0, "done", last)
    return 0


def out_of_memory(error: BaseException) -> str | None:
    """What to change when the device ran out of memory."""
    if not isinstance(error, torch.OutOfMemoryError):
        return None
    return (
        f"out of memory: {str(error).splitlines()[0]} The last checkpoint is kept. "
        "Use gradient_checkpointing, a smaller resolution or train_batch_size"
    )
