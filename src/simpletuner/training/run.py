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

from simpletuner.config.load import LoadedConfig, resolved_options
from simpletuner.config.schema import RunConfig
from simpletuner.data.dataset_config import DatasetFile
from simpletuner.errors import DiskFull, SimpleTunerError, TrainingStopped
from simpletuner.events import event_types, trackers, webhook_sink
from simpletuner.events.event_log import EventLog
from simpletuner.events.html_report import write_report
from simpletuner.events.sinks import (
    CloseableSink,
    Sink,
    call_and_catch,
    close_all_sinks,
    fan_out,
    null_emit,
)
from simpletuner.events.terminal_sink import TerminalSink
from simpletuner.training import loop, resume
from simpletuner.training.build import build_trainer_context
from simpletuner.training.device import describe_out_of_memory
from simpletuner.training.memory_plan.memory_saving import suggest_next_setting
from simpletuner.training.memory_plan.preflight import preflight_check
from simpletuner.training.run_folder import RunFolder

DEFAULT_CONFIG = resolved_options(RunConfig())


class StopFlag:
    """Set by Ctrl-C, SIGTERM, SIGUSR1 or the file control/stop. A second signal leaves at once.

    The loop leaves after the step; caches, pictures and held-out loss are left where they are.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self.requested = False

    def __call__(self) -> bool:
        self.requested = self.requested or self._folder.consume_control_request("stop")
        return self.requested

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        name = signal.Signals(number).name
        print(
            f"\n{name}: saving and leaving; once more to leave at once", file=sys.stderr, flush=True
        )

    @contextmanager
    def signal_handlers_installed(self) -> Iterator[None]:
        names = [
            name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if name in signal.Signals.__members__
        ]
        before = {name: signal.signal(signal.Signals[name], self.handle_signal) for name in names}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(signal.Signals[name], handler)


class LastStepSink:
    """Sink that remembers how far the run is, for exit.json."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self, event: event_types.Event) -> None:
        if isinstance(event, (event_types.StepCompleted, event_types.RunResumed)):
            self.step = event.step


def run_training(loaded: LoadedConfig, backends: DatasetFile, within: str | None = None) -> int:
    """Train to the end: 0. Errors are raised after exit.json and events.jsonl have told of them.

    within: as announce has it.
    """
    run = loaded.config
    folder = RunFolder(Path(run.training.output_dir).expanduser().absolute())
    stop, position, started = StopFlag(folder), LastStepSink(), time.monotonic()
    emit: event_types.Emit = null_emit
    with stop.signal_handlers_installed(), folder, ExitStack() as closing:
        try:
            earlier = None
            if run.checkpoint.resume_from_checkpoint == "never":
                earlier = folder.set_aside_earlier_results()
            emit = fan_out([position, *build_sinks(run, folder, closing)])
            for note in (*loaded.notices, *backends.notices):
                emit(event_types.NoticeIssued(note))
            if earlier is not None:
                emit(
                    event_types.NoticeIssued(
                        f"resume_from_checkpoint = never: earlier results are now in {earlier}"
                    )
                )
            tell, framings = (
                emit_with_stop_check(stop, emit),
                [one.resize_crop for one in backends.train],
            )
            before = None if within is None else resumed_config(run, folder, emit)
            run = preflight_check(run, framings, tell, within, before)
            base_dir = loaded.config_path.parent if loaded.config_path else Path.cwd()
            with ExitStack() as opened:
                loop.train(
                    build_trainer_context(run, backends, base_dir, folder, stop, tell, opened)
                )
        except (
            BaseException
        ) as error:  # the outermost edge: nothing may end without exit.json saying how
            known = to_user_error(error, run)
            if known is None:
                with folder.log_path.open("a", encoding="utf-8") as log:
                    traceback.print_exception(error, file=log)
            finalize_run(folder, position.step, time.monotonic() - started, known or error, emit)
            if known is None or known is error:
                raise
            raise known from error
        finalize_run(folder, position.step, time.monotonic() - started, None, emit)
    return 0


def build_sinks(run: RunConfig, folder: RunFolder, closing: ExitStack) -> list[Sink]:
    """Who hears of this run: the record, the terminal, train.log, and what the options name."""
    options = run.logging
    record = EventLog(folder.events_path)
    shown = TerminalSink(sys.stdout, options.log_level, failures=False)
    logged = TerminalSink(
        closing.enter_context(folder.log_path.open("a", encoding="utf-8")),
        options.log_level,
        every_s=30,
    )
    told = trackers.make_trackers(
        options.report_to,
        folder.path,
        options.tracker_project_name,
        options.tracker_run_name,
        resolved_options(run),
    )
    hooks = (
        [
            webhook_sink.WebhookSink(hook)
            for hook in webhook_sink.parse_webhook_config(options.webhook_config)
        ]
        if options.webhook_config
        else []
    )
    everyone: list[CloseableSink] = [record, shown, logged, *told, *hooks]
    closing.callback(close_all_sinks, everyone)
    return [*everyone]


def emit_with_stop_check(stop: StopFlag, emit: event_types.Emit) -> event_types.Emit:
    """Whoever tells of progress hears of a wish to stop."""

    def tell(event: event_types.Event) -> None:
        emit(event)
        if isinstance(event, (event_types.StageStarted, event_types.StageProgress)) and stop():
            raise TrainingStopped("stopped before the first step; the same command goes on")

    return tell


def resumed_config(
    run: RunConfig, folder: RunFolder, emit: event_types.Emit
) -> Mapping[str, Any] | None:
    """Options of the checkpoint that the run goes on from."""
    origin = resume.find_resume_point(folder.path, run.checkpoint.resume_from_checkpoint, emit)
    return None if origin is None else cast(Mapping[str, Any], origin.state["config"])


def finalize_run(
    folder: RunFolder,
    step: int,
    seconds: float,
    error: BaseException | None,
    emit: event_types.Emit,
) -> None:
    """Tell how it ended: events, report, exit.json. What cannot be written does not hide the reason."""
    code = error.exit_code if isinstance(error, SimpleTunerError) else int(error is not None)
    message = "" if error is None else str(error) or type(error).__name__
    status = (
        "done" if error is None else "stopped" if isinstance(error, TrainingStopped) else "failed"
    )
    emit(
        event_types.RunFailed(step, message, code)
        if status == "failed"
        else event_types.RunFinished(step, seconds, status)
    )
    why = call_and_catch(partial(write_report, folder.path, DEFAULT_CONFIG))
    if why:
        emit(event_types.WarningIssued(f"no report.html: {why}"))
    elif status != "failed":
        emit(event_types.NoticeIssued(f"report: {folder.path / 'report.html'}"))
    sheet = folder.path / "images" / "before_after.png"
    if status == "done" and sheet.exists():
        emit(event_types.NoticeIssued(f"before and after: {sheet}"))
    why = call_and_catch(partial(folder.write_exit_status, code, status, step, message))
    if why:
        emit(event_types.WarningIssued(f"no exit.json: {why}"))


def to_user_error(error: BaseException, run: RunConfig) -> SimpleTunerError | None:
    """The failure in a person's words; None for a mistake of this program, which needs its traceback."""
    if isinstance(error, SimpleTunerError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return TrainingStopped("left at once; the same command goes on from the last checkpoint")
    if short := describe_out_of_memory(error):
        return SimpleTunerError(
            f"{short}. The last checkpoint is kept. {suggest_next_setting(run)}"
        )
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or (isinstance(error, SafetensorError) and f"os error {errno.ENOSPC}" in str(error)):
        return DiskFull(f"the disk is full ({error}); checkpoints are kept. Make room and go on")
    return None
