"""Start of the processes of a run on this machine, by torch's elastic agent.

The agent (torch.distributed.elastic, what torchrun is made of) starts one process for each GPU with
RANK and WORLD_SIZE. Here is what a run needs around it: the first process that fails decides what
happens, the others may end by themselves before they are terminated, signals reach every process
once, and a killed or crashed process costs the steps since the last checkpoint.

On one machine nothing listens outside of the loopback interface.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std

from simpletuner import errors
from simpletuner.config import environment
from simpletuner.config.distributed_constraints import check_process_count
from simpletuner.config.launch_environment import LAUNCHER_VARIABLE
from simpletuner.config.schema import RunConfig
from simpletuner.errors import ConfigError, ProcessLost, TrainingStopped
from simpletuner.training.rendezvous import LoopbackRendezvous, make_rendezvous
from simpletuner.training.world import FAILURE_KEY, Failure, Store, run_store

FORWARDED_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")
POLL_S = 0.1
FAILURE_GRACE_S = 30.0  # for the others to end by themselves after one has failed
KILL_GRACE_S = 10.0  # after a second signal, which asks every process to exit at once
LOG_TAIL_LINES = 40
OUT_OF_MEMORY_HINT = "; the kernel does that when the memory of the host runs out"


@dataclass(frozen=True)
class EndedProcess:
    """A process that has ended. code: negative for the number of the signal that killed it."""

    rank: int
    pid: int
    code: int

    @property
    def end(self) -> str:
        """Return "killed by SIGKILL" or "ended with exit code 1"."""
        if self.code >= 0:
            return f"ended with exit code {self.code}"
        name = signal.Signals(-self.code).name
        return f"killed by {name}{OUT_OF_MEMORY_HINT if name == 'SIGKILL' else ''}"

    def describe(self) -> str:
        """Return "process 1 (pid 123) killed by SIGKILL"."""
        return f"process {self.rank} (pid {self.pid}) {self.end}"


class StopRequests:
    """Signals to the launcher, each forwarded once to every process of this machine.

    A signal that arrives while there is no process is forwarded as soon as there are any.
    """

    def __init__(self) -> None:
        self.count = 0
        self.last_at = 0.0
        self._pids: Sequence[int] = ()
        self._waiting: int | None = None  # the signal that no process has received yet

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.last_at = time.monotonic()
        # A third one does not wait for processes that cannot react.
        number = number if self.count < 3 else signal.SIGKILL
        if self._pids:
            self._send(number)
        else:
            self._waiting = number

    def forward_to(self, pids: Sequence[int]) -> None:
        """Forward signals to these processes from now on; to none, until they are started."""
        self._pids = tuple(pids)
        if self._pids and self._waiting is not None:
            self._send(self._waiting)
            self._waiting = None

    def kill_all(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    @contextlib.contextmanager
    def handlers_installed(self) -> Iterator[None]:
        numbers = [
            signal.Signals[name] for name in FORWARDED_SIGNALS if name in signal.Signals.__members__
        ]
        before = {number: signal.signal(number, self.handle_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class PatientAgent(LocalElasticAgent):
    """torch's agent, which lets the processes end by themselves after the first one has ended.

    The agent terminates all processes as soon as one has failed, and kills them 30 seconds later.
    A process that fails reports why, and one that stops waits for a checkpoint: both take
    their time. first_ended: the process that failed first; None if all succeeded.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        logs: DefaultLogsSpecs,
        stop: StopRequests,
        server: Store | None,
    ) -> None:
        super().__init__(spec, logs)
        self.first_ended: EndedProcess | None = None
        self._stop = stop
        self._server = server
        self._failed_at = 0.0
        self._ended: dict[int, EndedProcess] = {}

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        pids: dict[int, Any] = super()._start_workers(worker_group)
        self._stop.forward_to(tuple(pids.values()))
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        # The base class terminates the others as soon as it sees that one has failed.
        if self._poll(worker_group) and not self._patience_is_over():
            return RunResult(state=WorkerState.HEALTHY)
        result: RunResult = super()._monitor_workers(worker_group)
        return result

    def _poll(self, worker_group: WorkerGroup) -> bool:
        """Record what has ended since the last call; return whether a process still runs."""
        handlers = self._pcontext.subprocess_handlers  # type: ignore[union-attr]
        ended = []
        for local_rank, handler in handlers.items():
            code = handler.proc.poll()
            if code is not None and local_rank not in self._ended:
                rank = worker_group.workers[local_rank].global_rank
                self._ended[local_rank] = EndedProcess(rank, handler.proc.pid, code)
                if code != 0:
                    ended.append(self._ended[local_rank])
        if ended and self.first_ended is None:
            self._failed_at = time.monotonic()
            # Of several that ended at once, a killed one is the cause, and a lost connection the
            # consequence.
            self.first_ended = min(
                ended,
                key=lambda process: (
                    process.code >= 0,
                    process.code == ProcessLost.exit_code,
                    process.rank,
                ),
            )
            if self.first_ended.code < 0 and self._server is not None:
                record_killed(self._server, self.first_ended)
        return len(self._ended) < len(handlers)

    def _patience_is_over(self) -> bool:
        """Return whether processes that still run are to be terminated."""
        now = time.monotonic()
        if self._stop.count > 1 and now - self._stop.last_at > KILL_GRACE_S:
            self._stop.kill_all()
        stopping = all(
            process.code in (0, TrainingStopped.exit_code) for process in self._ended.values()
        )
        return not stopping and now - self._failed_at > FAILURE_GRACE_S


def record_killed(server: Store, ended: EndedProcess) -> None:
    """Store why a process has ended, for the others, unless one of them has given a reason."""
    message = f"{ended.end}. Run the same command to resume from the last checkpoint"
    reason = [ended.rank, "ProcessLost", message, ProcessLost.exit_code]
    run_store(server).compare_set(FAILURE_KEY, "", json.dumps(reason))


def read_failure(server: Store) -> Failure | None:
    """Return why the first process failed, if one of them said so."""
    store = run_store(server)
    return Failure(*json.loads(store.get(FAILURE_KEY))) if store.check([FAILURE_KEY]) else None


def count_processes(run: RunConfig) -> int:
    """Return how many processes the run has over all machines; 1 where it runs in this one.

    Raises ConfigError where this machine cannot run its part of them.
    """
    options = run.distributed
    gpus = 0
    if run.model.device in ("auto", "cuda"):
        gpus = torch.cuda.device_count()
    count = options.num_processes
    if count == "auto":
        count = max(1, gpus) * options.num_machines
        for name, reason in check_process_count(run, count):
            raise ConfigError(f"{name}: {reason}")
    local = count // options.num_machines
    if 0 < gpus < local:
        raise ConfigError(
            f"num_processes = {count}: this machine would run {local} processes and has "
            f"{gpus} {'GPU' if gpus == 1 else 'GPUs'}; each process needs one"
        )
    uses_mps = run.model.device == "mps" or (
        run.model.device == "auto" and not gpus and torch.backends.mps.is_available()
    )
    if local > 1 and uses_mps:
        raise ConfigError(
            f'num_processes = {count}: an Apple GPU trains with one process; use 1, or device "cpu"'
        )
    return count


def launch(run: RunConfig, count: int, command: Sequence[str]) -> int:
    """Run a command, `simpletuner train` and its flags, on `count` processes.

    Returns the exit code of the run.

    Processes that were killed or crashed are started again from the last checkpoint, at most
    max_restarts times; whatever has a reason of its own is not.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    options = run.distributed
    local_size = count // options.num_machines
    # Before the agent is made: it and the processes read them.
    environment.set_variables(variables_of_launcher())
    if run.model.torch_num_threads is None:
        threads = max(1, torch.get_num_threads() // local_size)
        environment.set_missing_variables({"OMP_NUM_THREADS": str(threads)})
    stop = StopRequests()
    # Checkpoints that are newer are those of this run, also where it started with "never".
    began = time.time()
    # One of several machines alone would wait for the others.
    restarts = options.max_restarts if options.num_machines == 1 else 0
    with stop.handlers_installed():
        for attempt in range(restarts + 1):
            again = resume_arguments(run, began) if attempt else ()
            ended, failure, log = run_attempt(run, local_size, [*command, *again], stop)
            if ended is None:
                return 0
            if log:
                print(log, file=sys.stderr, flush=True)
            if attempt == restarts or stop.count or not may_restart(ended, failure):
                return exit_code_of(ended, stop)
            print(
                f"{ended.describe()}; restarting from the last checkpoint "
                f"({attempt + 1} of {restarts})",
                file=sys.stderr,
                flush=True,
            )
    raise AssertionError("the last attempt returns")


def exit_code_of(ended: EndedProcess, stop: StopRequests) -> int:
    """Return the exit code of the launcher; a killed process is named."""
    if ended.code >= 0:
        return ended.code
    if stop.count and -ended.code in {signal.Signals[name] for name in FORWARDED_SIGNALS}:
        print("stopped before the training began", file=sys.stderr)
        return TrainingStopped.exit_code
    print(ended.describe(), file=sys.stderr)
    # As a shell reports a signal.
    return 128 - ended.code


def may_restart(ended: EndedProcess, failure: Failure | None) -> bool:
    """Return whether another attempt may succeed: a process was killed, or crashed by itself."""
    if ended.code < 0 or ended.code == ProcessLost.exit_code:
        return True
    return ended.code == 1 and (failure is None or failure.kind not in vars(errors))


def resume_arguments(run: RunConfig, began: float) -> Sequence[str]:
    """Return the option with which another attempt resumes from the run's own checkpoints."""
    wanted = run.checkpoint.resume_from_checkpoint
    folder = Path(os.path.expanduser(run.training.output_dir))
    own = any(path.stat().st_mtime >= began for path in folder.glob("checkpoint-*"))
    # The first attempt has moved earlier results away, so the latest checkpoint is the run's own.
    if wanted == "never" or (wanted not in ("latest", "must") and own):
        return ("--resume_from_checkpoint=latest",)
    return ()


def run_attempt(
    run: RunConfig, local_size: int, command: Sequence[str], stop: StopRequests
) -> tuple[EndedProcess | None, Failure | None, str]:
    """Start the processes and wait for them.

    Returns the one that failed first, why if it said so, and the last lines that it wrote; None
    for the first where all succeeded.
    """
    rendezvous = make_rendezvous(run.distributed)
    server = rendezvous.server if isinstance(rendezvous, LoopbackRendezvous) else None
    spec = WorkerSpec(
        role="train",
        local_world_size=local_size,
        rdzv_handler=rendezvous,
        entrypoint=command[0],
        args=tuple(command[1:]),
        max_restarts=0,
        monitor_interval=POLL_S,
    )
    with tempfile.TemporaryDirectory(prefix="simpletuner-") as logs:
        # The first process of a machine writes to the terminal, the others to files: what they
        # have to say is a reason, which the first one reports.
        others = (
            {} if run.logging.log_level == "debug" else dict.fromkeys(range(1, local_size), Std.ALL)
        )
        agent = PatientAgent(spec, DefaultLogsSpecs(logs, redirects=others), stop, server)
        agent.run()
        # A signal between two attempts waits for the processes of the next one.
        stop.forward_to(())
        ended = agent.first_ended
        failure = read_failure(server) if ended and server is not None else None
        explained = ended is not None and ended.code > 1
        log = "" if ended is None or explained else read_log_tail(Path(logs), ended.rank)
        return ended, failure, log


def read_log_tail(folder: Path, local_rank: int) -> str:
    """Return the last lines that a process wrote to its file; "" where it wrote to the terminal."""
    lines: list[str] = []
    for path in folder.glob(f"*/attempt_0/{local_rank}/stderr.log"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"process {local_rank}: {line}" for line in lines[-LOG_TAIL_LINES:])


def variables_of_launcher() -> Mapping[str, str]:
    """Return the variables that the agent and the processes of this launcher read."""
    return {
        LAUNCHER_VARIABLE: str(os.getpid()),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "",  # they are handled here
        "PYTHONSAFEPATH": "1",
    }
