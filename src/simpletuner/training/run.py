"""One process that works on one run: lock, log, signals, train, and an honest end."""

from __future__ import annotations

import errno
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

from safetensors import SafetensorError

from simpletuner.config.load import Loaded, resolved
from simpletuner.config.schema import RunConfig
from simpletuner.data.dataset import Backends
from simpletuner.errors import DiskFull, SimpleTunerError, Stopped
from simpletuner.events import trackers, types, webhook
from simpletuner.events.log import EventLog
from simpletuner.events.report import write_report
from simpletuner.events.sinks import ClosingSink, Sink, close_all, failure_of, fan_out, silent
from simpletuner.events.terminal import Terminal
from simpletuner.training import loop, resume
from simpletuner.training.build import build
from simpletuner.training.device import shortage
from simpletuner.training.plan.advice import next_down
from simpletuner.training.plan.announce import announce
from simpletuner.training.rundir import RunFolder

DEFAULTS = resolved(RunConfig())


class StopFlag:
    """Set by Ctrl-C, SIGTERM, SIGUSR1 or the file control/stop. A second signal leaves at once.

    The loop leaves after the step; caches, pictures and held-out loss are left where they are.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.requested = False

    def __call__(self) -> bool:
        self.requested = self.requested or self._folder.take_control("stop")
        return self.requested

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        name = signal.Signals(number).name
        print(f"\n{name}: saving and leaving; once more to leave at once", file=sys.stderr, flush=True)

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

    def __call__(self, event: types.Event) -> None:
        if isinstance(event, (types.Stepped, types.Resumed)):
            self.step = event.step


def train(loaded: Loaded, backends: Backends, within: str | None = None) -> int:
    """Train to the end: 0. Errors are raised after exit.json and events.jsonl have told of them.

    within: as announce has it.
    """
    run = loaded.run
    folder = RunFolder(Path(run.training.output_dir).expanduser().absolute())
    stop, position, started = StopFlag(folder), Position(), time.monotonic()
    emit: types.Emit = silent
    with stop.installed(), folder, ExitStack() as closing:
        try:
            earlier = None
            if run.checkpoint.resume_from_checkpoint == "never":
                earlier = folder.set_aside_earlier()
            emit = fan_out([position, *sinks(run, folder, closing)])
            for note in (*loaded.notes, *backends.notes):
                emit(types.Noted(note))
            if earlier is not None:
                emit(types.Noted(f"resume_from_checkpoint = never: earlier results are now in {earlier}"))
            tell, framings = hearing(stop, emit), [one.framing for one in backends.train]
            before = None if within is None else recorded(run, folder, emit)
            run = announce(run, framings, tell, within, before)
            base_dir = loaded.source.parent if loaded.source else Path.cwd()
            with ExitStack() as opened:
                loop.train(build(run, backends, base_dir, folder, stop, tell, opened))
        except BaseException as error:  # the outermost edge: nothing may end without exit.json saying how
            known = explained(error, run)
            if known is None:
                with folder.log.open("a", encoding="utf-8") as log:
                    traceback.print_exception(error, file=log)
            end(folder, position.step, time.monotonic() - started, known or error, emit)
            if known is None or known is error:
                raise
            raise known from error
        end(folder, position.step, time.monotonic() - started, None, emit)
    return 0


def sinks(run: RunConfig, folder: RunFolder, closing: ExitStack) -> list[Sink]:
    """Who hears of this run: the record, the terminal, train.log, and what the options name."""
    options = run.logging
    record = EventLog(folder.events)
    shown = Terminal(sys.stdout, options.log_level, failures=False)
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


def hearing(stop: StopFlag, emit: types.Emit) -> types.Emit:
    """Whoever tells of progress hears of a wish to stop."""

    def tell(event: types.Event) -> None:
        emit(event)
        if isinstance(event, (types.StageStarted, types.StageProgress)) and stop():
            raise Stopped("stopped before the first step; the same command goes on")

    return tell


def recorded(run: RunConfig, folder: RunFolder, emit: types.Emit) -> Mapping[str, Any] | None:
    """Options of the checkpoint that the run goes on from."""
    origin = resume.find(folder.path, run.checkpoint.resume_from_checkpoint, emit)
    return None if origin is None else cast(Mapping[str, Any], origin.state["config"])


def end(folder: RunFolder, step: int, seconds: float, error: BaseException | None, emit: types.Emit) -> None:
    """Tell how it ended: events, report, exit.json. What cannot be written does not hide the reason."""
    code = error.exit_code if isinstance(error, SimpleTunerError) else int(error is not None)
    message = "" if error is None else str(error) or type(error).__name__
    status = "done" if error is None else "stopped" if isinstance(error, Stopped) else "failed"
    emit(types.Failed(step, message, code) if status == "failed" else types.Finished(step, seconds, status))
    why = failure_of(partial(write_report, folder.path, DEFAULTS))
    if why:
        emit(types.Warned(f"no report.html: {why}"))
    elif status != "failed":
        emit(types.Noted(f"report: {folder.path / 'report.html'}"))
    sheet = folder.path / "images" / "before_after.png"
    if status == "done" and sheet.exists():
        emit(types.Noted(f"before and after: {sheet}"))
    why = failure_of(partial(folder.write_exit, code, status, step, message))
    if why:
        emit(types.Warned(f"no exit.json: {why}"))


def explained(error: BaseException, run: RunConfig) -> SimpleTunerError | None:
    """The failure in a person's words; None for a mistake of this program, which needs its traceback."""
    if isinstance(error, SimpleTunerError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Stopped("left at once; the same command goes on from the last checkpoint")
    if short := shortage(error):
        return SimpleTunerError(f"{short}. The last checkpoint is kept. {next_down(run)}")
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or (isinstance(error, SafetensorError) and f"os error {errno.ENOSPC}" in str(error)):
        return DiskFull(f"the disk is full ({error}); checkpoints are kept. Make room and go on")
    return None
