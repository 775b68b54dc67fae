"""One process that trains one run: the lock, the logs, the signals, and the recorded end."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

from safetensors import SafetensorError

from simpletuner.atomic_io import os_error_of
from simpletuner.config.load import LoadedConfig, resolved_options
from simpletuner.config.schema import RunConfig
from simpletuner.data.dataset_config import DatasetFile
from simpletuner.errors import (
    DISK_FULL_ERRNOS,
    STORAGE_HINTS,
    ConfigError,
    SimpleTunerError,
    StorageError,
    TrainingStopped,
    storage_error,
)
from simpletuner.events import event_types, trackers, webhook_sink
from simpletuner.events.event_log import EventLog, count_damaged_lines
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
from simpletuner.training.memory_plan.fake_step import TargetUse
from simpletuner.training.memory_plan.fit import with_options
from simpletuner.training.memory_plan.memory_saving import suggest_next_setting
from simpletuner.training.memory_plan.preflight import preflight_check
from simpletuner.training.own_files import remember_own_file, set_edited_aside
from simpletuner.training.run_folder import FollowerRunFolder, RunFolder
from simpletuner.training.world import World, join_world

DEFAULT_CONFIG = resolved_options(RunConfig())


class StopFlag:
    """Set by Ctrl-C, SIGTERM, SIGUSR1 or the file control/stop. A second signal exits at once.

    The loop stops after the current step. Encoding, image generation and evaluation stop at once;
    the resumed run continues them.
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
            f"\n{name}: saving a checkpoint and exiting; press Ctrl-C again to exit at once",
            file=sys.stderr,
            flush=True,
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
    """Sink that stores the last completed step, for exit.json, and the final weight files.

    programs: name of the file -> programs that load it.
    """

    def __init__(self) -> None:
        self.step = 0
        self.programs: dict[str, str] = {}

    def __call__(self, event: event_types.Event) -> None:
        if isinstance(event, (event_types.StepCompleted, event_types.RunResumed)):
            self.step = event.step
        if isinstance(event, event_types.WeightsSaved) and event.programs:
            self.programs[event.path] = event.programs


def run_training(loaded: LoadedConfig, backends: DatasetFile, within: str | None = None) -> int:
    """Train to the end and return 0.

    within: a memory size to fit, as in preflight_check. An error is raised only after it was
    recorded in events.jsonl and exit.json.
    """
    run = loaded.config
    # Before the run folder: who writes it depends on the rank.
    world = join_world(run)
    path = Path(os.path.expanduser(run.training.output_dir)).absolute()
    folder = RunFolder(path) if world.is_main else FollowerRunFolder(path)
    stop, position, started = StopFlag(folder), LastStepSink(), time.monotonic()
    emit: event_types.Emit = null_emit
    with stop.signal_handlers_installed(), world, ExitStack() as closing:
        open_run_folder(folder, world, closing)
        try:
            earlier = None
            if run.checkpoint.resume_from_checkpoint == "never":
                earlier = folder.set_aside_earlier_results()
            emit = open_sinks(run, folder, position, closing) if world.is_main else position
            for notice in (*loaded.notices, *backends.notices):
                emit(event_types.NoticeIssued(notice))
            if earlier is not None:
                emit(
                    event_types.NoticeIssued(
                        f"resume_from_checkpoint = never: earlier results were moved to {earlier}"
                    )
                )
            stopping_emit = emit_with_stop_check(stop, world, emit)
            run = preflight_once(run, backends, folder, world, within, stopping_emit)
            base_dir = loaded.config_path.parent if loaded.config_path else Path.cwd()
            with ExitStack() as opened:
                loop.train(
                    build_trainer_context(
                        run, backends, base_dir, folder, world, stop, stopping_emit, opened
                    )
                )
            # The main process must not report the end while another one may still fail.
            world.wait_for_all("end")
        # The outermost edge catches everything, because exit.json must say how every run ended.
        except BaseException as error:
            known = world.explain(to_user_error(error, run) or error)
            # A message for users says all; a traceback is for bugs, and for disks that fail.
            if not isinstance(known, SimpleTunerError) or isinstance(known, StorageError):
                append_traceback(folder.log_path, error)
            if world.is_main:
                finalize_run(folder, position.step, time.monotonic() - started, known, emit)
            if known is error:
                raise
            raise known from error
        if world.is_main:
            finalize_run(folder, position.step, time.monotonic() - started, None, emit)
            for name, programs in position.programs.items():
                emit(event_types.NoticeIssued(f"{name}: for {programs}"))
    return 0


def open_sinks(
    run: RunConfig, folder: RunFolder, position: LastStepSink, closing: ExitStack
) -> event_types.Emit:
    """Return the emit of the main process, after reporting damage in events.jsonl."""
    damaged_lines = count_damaged_lines(folder.events_path)
    sinks = build_sinks(run, folder, closing)
    emit = fan_out([position, *sinks], [sink for sink in sinks if isinstance(sink, EventLog)])
    if damaged_lines:
        lines = "1 line" if damaged_lines == 1 else f"{damaged_lines} lines"
        emit(event_types.WarningIssued(f"{folder.events_path}: {lines} cannot be read"))
    return emit


def open_run_folder(folder: RunFolder, world: World, closing: ExitStack) -> None:
    """Lock the run folder in the main process, and check that the others see the same folder."""
    try:
        with world.main_first("run folder"):
            closing.enter_context(folder)
        # The lock names its holder: a process that reads another one sees another folder.
        holder = world.broadcast_json(folder.read_lock_holder())
        if folder.read_lock_holder() != holder:
            raise ConfigError(
                f"output_dir = {folder.path} is another folder for process {world.rank} than for "
                "process 0; put it on a file system that all machines share"
            )
    except SimpleTunerError as error:
        raise world.explain(error) from error


def preflight_once(
    run: RunConfig,
    backends: DatasetFile,
    folder: RunFolder,
    world: World,
    within: str | None,
    emit: event_types.Emit,
) -> RunConfig:
    """Check memory and disk in the main process; every process gets the options that it chose."""
    changes: dict[str, object] = {}
    with world.main_first("plan"):
        if world.is_main:
            resize_crops = [dataset.resize_crop for dataset in backends.train]
            # --fit must not choose other precisions than a checkpoint was trained with.
            saved_config = None if within is None else read_checkpoint_options(run, folder, emit)
            before = resolved_options(run)
            targets = TargetUse(
                any(dataset.regularisation_target == "base" for dataset in backends.train),
                any(dataset.masks or dataset.alpha_mask for dataset in backends.train),
            )
            planned = resolved_options(
                preflight_check(run, resize_crops, emit, within, saved_config, targets, folder.path)
            )
            changes = {name: value for name, value in planned.items() if value != before[name]}
    changes = world.broadcast_json(changes)
    return with_options(run, changes) if changes else run


def build_sinks(run: RunConfig, folder: RunFolder, closing: ExitStack) -> list[Sink]:
    """Return the sinks of the run: events.jsonl, the terminal, train.log, trackers, webhooks."""
    options = run.logging
    event_log = EventLog(folder.events_path)
    terminal = TerminalSink(sys.stdout, options.log_level, failures=False)
    log_file = TerminalSink(
        closing.enter_context(folder.log_path.open("a", encoding="utf-8")),
        options.log_level,
        every_s=30,
    )
    run_trackers = trackers.make_trackers(
        options.report_to,
        folder.path,
        options.tracker_project_name,
        options.tracker_run_name,
        resolved_options(run),
    )
    webhooks = (
        [
            webhook_sink.WebhookSink(hook)
            for hook in webhook_sink.parse_webhook_config(options.webhook_config)
        ]
        if options.webhook_config
        else []
    )
    sinks: list[CloseableSink] = [event_log, terminal, log_file, *run_trackers, *webhooks]
    closing.callback(close_all_sinks, sinks)
    return [*sinks]


def emit_with_stop_check(stop: StopFlag, world: World, emit: event_types.Emit) -> event_types.Emit:
    """Return an emit that raises TrainingStopped on progress events when a stop was requested.

    In this way every long stage can be stopped without checking for it. Several processes that
    train stop together, between two steps.
    """
    started = False

    def emit_or_stop(event: event_types.Event) -> None:
        nonlocal started
        emit(event)
        started = started or isinstance(event, event_types.RunStarted)
        if started and world.size > 1:
            return
        if isinstance(event, (event_types.StageStarted, event_types.StageProgress)) and stop():
            raise TrainingStopped("stopped before the first step. Run the same command to resume")

    return emit_or_stop


def read_checkpoint_options(
    run: RunConfig, folder: RunFolder, emit: event_types.Emit
) -> Mapping[str, Any] | None:
    """Return the options of the checkpoint that the run resumes from; None without one."""
    resume_point = resume.find_resume_point(
        folder.path, run.checkpoint.resume_from_checkpoint, emit
    )
    if resume_point is None:
        return None
    return cast(Mapping[str, Any], resume_point.state["config"])


def finalize_run(
    folder: RunFolder,
    step: int,
    seconds: float,
    error: BaseException | None,
    emit: event_types.Emit,
) -> None:
    """Record how the run ended: the last event, report.html and exit.json.

    A file that cannot be written gives a warning, and does not replace the error of the run.
    """
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
    why = call_and_catch(partial(replace_report, folder.path))
    if why:
        emit(event_types.WarningIssued(f"report.html was not written: {why}"))
    elif status != "failed":
        emit(event_types.NoticeIssued(f"report: {folder.path / 'report.html'}"))
    sheet = folder.path / "images" / "before_after.png"
    if status == "done" and sheet.exists():
        emit(event_types.NoticeIssued(f"before and after: {sheet}"))
    why = call_and_catch(partial(folder.write_exit_status, code, status, step, message))
    if why:
        emit(event_types.WarningIssued(f"exit.json was not written: {why}"))


def replace_report(run_dir: Path) -> None:
    """Write report.html; one that was edited is moved to earlier-N/."""
    set_edited_aside(run_dir, "report.html")
    write_report(run_dir, DEFAULT_CONFIG)
    remember_own_file(run_dir, "report.html")


def to_user_error(error: BaseException, run: RunConfig) -> SimpleTunerError | None:
    """Return the error with a message for users; None for a bug, which needs its traceback."""
    if isinstance(error, SimpleTunerError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return TrainingStopped(
            "exited at once, without saving. Run the same command to resume from the last "
            "checkpoint"
        )
    if short := describe_out_of_memory(error):
        return SimpleTunerError(
            f"{short}. The last checkpoint is not affected. {suggest_next_setting(run)}"
        )
    # safetensors reports errors of the system as text, with their number in it.
    if isinstance(error, SafetensorError) and "os error" in str(error):
        error = os_error_of(error)
    if isinstance(error, OSError) and error.errno in (*DISK_FULL_ERRNOS, *STORAGE_HINTS):
        name = error.filename if isinstance(error.filename, str) else "a file of the run"
        return storage_error(f"{name} (checkpoints are not affected)", error)
    return None


def append_traceback(path: Path, error: BaseException) -> None:
    """Append the traceback to the log, if that is possible."""
    with suppress(OSError), path.open("a", encoding="utf-8") as log:
        traceback.print_exception(error, file=log)
