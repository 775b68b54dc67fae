"""The launcher: exit codes, restarts, signals, and what is left when a process is killed.

The processes here are small scripts without torch; tests/distributed/test_launch_training.py does
the same with a training.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.load import config_from_resolved
from tests.distributed.harness import CONTEXT

pytest.importorskip("torch")

TIMEOUT_S = 60.0
# Every script starts with its rank, and a file that counts how often it was started.
PRELUDE = """\
import os, pathlib, signal, sys, time
rank = int(os.environ["RANK"])
folder = pathlib.Path(sys.argv[1])
starts = folder / f"starts-{rank}"
starts.write_text(str(int(starts.read_text() if starts.exists() else 0) + 1))
attempt = int(starts.read_text())
(folder / f"pid-{rank}").write_text(str(os.getpid()))
(folder / f"arguments-{rank}").write_text(" ".join(sys.argv[2:]))
def stop_after(seconds, signals=(signal.SIGTERM,)):
    got = []
    for one in signals:
        signal.signal(one, lambda number, frame: got.append(number))
    (folder / f"ready-{rank}").touch()
    while not got:
        time.sleep(0.01)
    time.sleep(seconds)
    (folder / f"signals-{rank}").write_text(",".join(map(str, got)))
    sys.exit(75)
"""


class Launched:
    """A launcher in a process of its own, forked from one that has imported torch."""

    def __init__(self, folder: Path, script: str, count: int, **options: Any) -> None:
        self.folder = folder
        (folder / "script.py").write_text(PRELUDE + script)
        settings = {name: options.pop(name) for name in list(options) if name.isupper()}
        self.process = CONTEXT.Process(
            target=run_launcher, args=(str(folder), count, options, settings)
        )
        self.process.start()

    def wait(self) -> int:
        """Return the exit code of the launcher."""
        self.process.join(TIMEOUT_S)
        assert self.process.exitcode is not None, "the launcher did not end"
        return self.process.exitcode

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, f"{names}: {self.output()}"
            assert self.process.is_alive(), self.output()
            time.sleep(0.01)

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def output(self) -> str:
        return self.read("output")

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in sorted(self.folder.glob("pid-*"))]

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


def run_launcher(
    folder: str, count: int, options: dict[str, Any], settings: dict[str, float]
) -> None:
    """Run the launcher as the process that it is in; everything that is written goes to a file."""
    output = os.open(f"{folder}/output", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from simpletuner.training import launcher

    if settings.pop("SIGNAL_DURING_START", False):
        signal_during_start(launcher, folder)
    for name, value in settings.items():
        setattr(launcher, name, value)
    run = config_from_resolved({"num_processes": count, "output_dir": folder, **options})
    sys.exit(launcher.launch(run, count, [sys.executable, f"{folder}/script.py", folder]))


def signal_during_start(launcher: Any, folder: str) -> None:
    """Signal this process from within the start of the others, when both of them are ready."""
    base = launcher.LocalElasticAgent
    original = base._start_workers

    def start(self: Any, group: Any) -> Any:
        pids = original(self, group)
        while not all(Path(folder, f"ready-{rank}").exists() for rank in (0, 1)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        return pids

    base._start_workers = start


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Any]:
    started: list[Launched] = []

    def start(script: str, count: int = 2, **options: Any) -> Launched:
        started.append(Launched(tmp_path, script, count, **options))
        return started[-1]

    yield start
    for launched in started:
        launched.process.kill()
        for pid in filter(is_running, launched.pids()):
            with contextlib.suppress(ProcessLookupError):  # it ends with the one that launched it
                os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Return whether a process runs; one that nobody has waited for yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until_gone(pids: Sequence[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.01)


def test_all_succeed_and_only_the_first_writes_to_the_terminal(launch: Any) -> None:
    launched = launch("print('hello from', rank, os.environ['WORLD_SIZE'], flush=True)", count=3)
    assert launched.wait() == 0
    assert launched.output() == "hello from 0 3\n"
    wait_until_gone(launched.pids())


@pytest.mark.parametrize("code", [2, 4, 11, 75])
def test_a_reason_of_the_run_is_the_exit_code_and_no_cause_to_restart(
    launch: Any, code: int
) -> None:
    launched = launch(f"sys.exit({code} if rank == 1 else 0)")
    assert launched.wait() == code
    assert launched.read("starts-0") == launched.read("starts-1") == "1"


def test_a_killed_process_is_named_and_costs_one_restart(launch: Any) -> None:
    launched = launch("if attempt == 1 and rank == 1: os.kill(os.getpid(), 9)\ntime.sleep(0.3)")
    assert launched.wait() == 0
    assert launched.read("starts-0") == launched.read("starts-1") == "2"
    lines = launched.output().splitlines()
    assert len(lines) == 1
    assert "process 1 (pid " in lines[0]
    assert "killed by SIGKILL; the kernel does that when the memory of the host" in lines[0]
    assert lines[0].endswith("restarting from the last checkpoint (1 of 3)")


def test_a_crash_shows_its_traceback_and_restarts_are_counted(launch: Any) -> None:
    launched = launch("if rank == 1: raise ValueError('boom')", max_restarts=1)
    assert launched.wait() == 1
    assert launched.read("starts-1") == "2"
    assert launched.output().count("process 1: ValueError: boom") == 2
    assert launched.output().count("restarting from the last checkpoint (1 of 1)") == 1


def test_killed_for_good(launch: Any) -> None:
    launched = launch("os.kill(os.getpid(), 9) if rank == 0 else time.sleep(60)", max_restarts=0,
                      FAILURE_GRACE_S=0.1)  # fmt: skip
    assert launched.wait() == 128 + 9
    assert "process 0 (pid " in launched.output()
    wait_until_gone(launched.pids())


def test_the_others_have_time_to_say_why(launch: Any) -> None:
    script = "if rank == 0:\n  time.sleep(0.7)\n  (folder / 'said').touch()\nsys.exit(3)"
    launched = launch(script)
    assert launched.wait() == 3
    assert (launched.folder / "said").exists()


def test_the_others_are_terminated_when_they_do_not_end(launch: Any) -> None:
    launched = launch("time.sleep(60) if rank == 0 else sys.exit(3)", FAILURE_GRACE_S=0.1)
    assert launched.wait() == 3
    wait_until_gone(launched.pids())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_every_process_once_and_nobody_is_hurried(
    launch: Any, number: signal.Signals
) -> None:
    launched = launch(
        "stop_after(0.8 * (1 - rank), (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1))",
        FAILURE_GRACE_S=0.1,
    )
    launched.wait_for("ready-0", "ready-1")
    launched.signal(number)
    assert launched.wait() == 75
    assert launched.read("signals-0") == launched.read("signals-1") == str(int(number))
    assert launched.read("starts-0") == "1"


def test_a_second_signal_reaches_them_too(launch: Any) -> None:
    launched = launch("stop_after(1, (signal.SIGINT, signal.SIGTERM))")
    launched.wait_for("ready-0", "ready-1")
    launched.signal(signal.SIGINT)  # two of the same kind could arrive as one
    launched.signal(signal.SIGTERM)
    assert launched.wait() == 75
    assert sorted(launched.read("signals-0").split(",")) == ["15", "2"]
    assert sorted(launched.read("signals-1").split(",")) == ["15", "2"]


def test_after_a_second_signal_stuck_processes_are_killed(launch: Any) -> None:
    script = (
        "signal.signal(2, signal.SIG_IGN)\nsignal.signal(15, signal.SIG_IGN)\n"
        "(folder / f'ready-{rank}').touch()\ntime.sleep(60)"
    )
    launched = launch(script, KILL_GRACE_S=0.1)
    launched.wait_for("ready-0", "ready-1")
    launched.signal(signal.SIGINT)
    launched.signal(signal.SIGTERM)
    assert launched.wait() == 128 + 9
    assert launched.read("starts-0") == "1"
    wait_until_gone(launched.pids())


def test_a_signal_before_the_training_is_a_stop(launch: Any) -> None:
    launched = launch("(folder / f'ready-{rank}').touch()\ntime.sleep(60)")
    launched.wait_for("ready-0", "ready-1")
    launched.signal(signal.SIGTERM)
    assert launched.wait() == 75
    assert "stopped before the training began" in launched.output()


def test_a_signal_while_the_processes_are_started_is_a_stop(launch: Any) -> None:
    """It arrives when they run already, and before the launcher knows their numbers."""
    launched = launch("stop_after(0.0)", SIGNAL_DURING_START=True)
    assert launched.wait() == 75
    assert [launched.read(f"signals-{rank}") for rank in (0, 1)] == ["15", "15"]


def test_no_process_outlives_a_killed_launcher(launch: Any) -> None:
    script = (
        "from simpletuner.training.parent_watch import end_with_parent\n"
        "end_with_parent(int(os.environ['_SIMPLETUNER_LAUNCHER_PID']))\n"
        "(folder / f'ready-{rank}').touch()\ntime.sleep(60)"
    )
    launched = launch(script)
    launched.wait_for("ready-0", "ready-1")
    launched.signal(signal.SIGKILL)
    launched.wait()
    wait_until_gone(launched.pids())


def test_a_process_whose_parent_is_gone_already_ends(launch: Any) -> None:
    script = (
        "from simpletuner.training.parent_watch import end_with_parent\n"
        "end_with_parent(1 if rank == 1 else os.getppid())\n(folder / f'alive-{rank}').touch()"
    )
    launched = launch(script, max_restarts=0)
    assert launched.wait() == 1
    assert (launched.folder / "alive-0").exists()
    assert not (launched.folder / "alive-1").exists()


def test_two_machines_find_each_other_by_address(tmp_path: Path) -> None:
    """Two launchers, as on two machines; the processes join and exchange their ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    machines = []
    for number in (1, 0):
        folder = tmp_path / str(number)
        folder.mkdir()
        machines.append(
            Launched(
                folder, JOIN, 2, num_machines=2, machine_rank=number, main_process_ip="127.0.0.1",
                main_process_port=port, device="cpu",
            )
        )  # fmt: skip
    assert [machine.wait() for machine in machines] == [0, 0]
    for number in range(2):
        assert (tmp_path / str(number) / f"told-{number}").read_text() == "[0, 1] 0 1"


JOIN = """
from simpletuner.config.load import config_from_resolved
from simpletuner.training.world import join_world
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
with join_world(config_from_resolved({"device": "cpu"})) as world:
    known = world.gather_json(world.rank)
    told = f"{known} {world.local_rank} {world.local_size}"
(folder / f"told-{rank}").write_text(told)
"""


def test_everything_listens_on_loopback(launch: Any) -> None:
    launched = launch("(folder / f'ready-{rank}').touch()\ntime.sleep(60)")
    launched.wait_for("ready-0", "ready-1")
    addresses = listening_addresses(launched.process.pid)
    assert addresses
    assert set(addresses) == {"127.0.0.1"}


def listening_addresses(pid: int) -> list[str]:
    """Return the addresses on which a process listens, from /proc."""
    sockets = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            target = os.readlink(entry)
            if target.startswith("socket:["):
                sockets.add(target[len("socket:[") : -1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                packed = bytes.fromhex(fields[1].partition(":")[0])
                found.append(".".join(map(str, packed[::-1])) if len(packed) == 4 else "v6")
    return found


def join_by_srun(answer: Any, number: int) -> None:
    """Join as a task of srun, and answer what every task knows."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(
        SLURM_JOB_ID=str(os.getppid()), SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="2",
        SLURM_PROCID=str(number), SLURM_LOCALID=str(number), SLURM_NODEID="0",
        SLURM_STEP_NODELIST="localhost", SLURM_STEP_TASKS_PER_NODE="2", GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    from simpletuner.training.world import join_world

    with join_world(config_from_resolved({"device": "cpu"})) as world:
        known = world.gather_json([world.rank, world.local_rank, world.local_size])
        answer.put((number, known, set(listening_addresses(os.getpid()))))


def test_tasks_of_srun_join_without_torchrun() -> None:
    answer = CONTEXT.Queue()
    tasks = [CONTEXT.Process(target=join_by_srun, args=(answer, number)) for number in range(2)]
    for task in tasks:
        task.start()
    answers = sorted(answer.get(timeout=TIMEOUT_S) for _ in tasks)
    for task in tasks:
        task.join(TIMEOUT_S)
        assert task.exitcode == 0
    known = [[0, 0, 2], [1, 1, 2]]
    assert answers == [(0, known, {"127.0.0.1"}), (1, known, {"127.0.0.1"})]


@pytest.mark.parametrize(
    ("wanted", "own", "expected"),
    [
        ("latest", True, ()),
        ("must", True, ()),
        ("never", False, ("--resume_from_checkpoint=latest",)),
        ("elsewhere/checkpoint-3", False, ()),
        ("elsewhere/checkpoint-3", True, ("--resume_from_checkpoint=latest",)),
    ],
)
def test_another_attempt_does_not_start_over(
    tmp_path: Path, wanted: str, own: bool, expected: tuple[str, ...]
) -> None:
    from simpletuner.training import launcher

    (tmp_path / "checkpoint-1").mkdir()
    os.utime(tmp_path / "checkpoint-1", (1000, 1000))
    run = config_from_resolved({"output_dir": str(tmp_path), "resume_from_checkpoint": wanted})
    assert launcher.resume_arguments(run, 999 if own else 1001) == expected


def test_which_ends_are_worth_another_attempt() -> None:
    from simpletuner.training.launcher import EndedProcess, may_restart
    from simpletuner.training.world import Failure

    def judge(code: int, kind: str | None = None) -> bool:
        failure = None if kind is None else Failure(0, kind, "", 1)
        return may_restart(EndedProcess(0, 1, code), failure)

    assert judge(-9)
    assert judge(-11)
    assert judge(1)
    assert judge(1, "RuntimeError")
    assert judge(13)
    assert not judge(1, "SimpleTunerError")
    assert not any(judge(code) for code in (*range(2, 13), 75))


def test_the_number_of_processes() -> None:
    from simpletuner.training.launcher import count_processes

    def count(**options: Any) -> int:
        return count_processes(config_from_resolved({"device": "cpu", **options}))

    assert count(num_processes="auto") == 1
    assert count(num_processes=3) == 3
    assert count(num_processes="auto", num_machines=2, main_process_ip="a") == 2
