"""The process around a job: it outlives the server, and whatever dies, the folder says so."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from simpletuner.server import runner
from simpletuner.server.file_reader import is_locked
from simpletuner.server.job_folder import JobFolder
from simpletuner.server.job_states import JobState

PATIENCE_S = 60.0
NAP = "import signal, sys, time\nprint('here', flush=True)\n"


def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def started(folder: Path, code: str) -> subprocess.Popen[bytes]:
    """A runner for `python -c code`, as the supervisor starts one."""
    work = {
        "name": "a",
        "kind": "rehearse",
        "argv": [sys.executable, "-c", NAP + code],
        "cwd": str(folder),
        "run_dir": "",
        "run": "",
        "devices": "cpu",
        "queued_t": time.time(),
        "env": {},
    }
    (folder / "job.json").write_text(json.dumps(work))
    lock = JobFolder(folder).take_lock()
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "simpletuner.server.runner", str(folder), str(lock)],
            pass_fds=(lock,),
            start_new_session=True,
        )
    finally:
        os.close(lock)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    made: list[subprocess.Popen[bytes]] = []

    def begin(code: str) -> subprocess.Popen[bytes]:
        made.append(started(tmp_path, code))
        until(lambda: "here" in output(tmp_path), "the program runs")
        until((tmp_path / "state.json").exists, "the runner says who it is")
        return made[-1]

    yield begin
    for process in made:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def output(folder: Path) -> str:
    path = folder / "output.log"
    return path.read_text() if path.exists() else ""


def state(folder: Path) -> JobState:
    return JobFolder(folder).read_state()


def exited(folder: Path) -> dict[str, object]:
    record: dict[str, object] = json.loads((folder / "exit.json").read_text())
    return record


def trainer_of(folder: Path) -> int:
    pid: int = json.loads((folder / "state.json").read_text())["trainer"]
    return pid


Start = Callable[[str], "subprocess.Popen[bytes]"]


def test_a_normal_end_and_its_code(tmp_path: Path, start: Start) -> None:
    process = started(tmp_path, "print('to stderr', file=sys.stderr); sys.exit(3)")
    process.wait(PATIENCE_S)
    record = exited(tmp_path)
    assert (record["code"], record["signal"]) == (3, None)
    assert output(tmp_path) == "here\nto stderr\n"
    assert not is_locked(tmp_path / "runner.lock")
    assert state(tmp_path) == "failed"


def test_one_group_of_its_own_and_the_lock_while_it_lives(tmp_path: Path, start: Start) -> None:
    process = start("time.sleep(600)")
    assert is_locked(tmp_path / "runner.lock")
    assert (
        os.getpgid(trainer_of(tmp_path))
        == os.getpgid(process.pid)
        == process.pid
        == os.getsid(process.pid)
    )
    assert os.getpgid(process.pid) != os.getpgid(0)
    assert state(tmp_path) == "starting"


def test_a_killed_trainer_is_told_by_its_signal(tmp_path: Path, start: Start) -> None:
    process = start("time.sleep(600)")
    os.kill(trainer_of(tmp_path), signal.SIGKILL)
    process.wait(PATIENCE_S)
    assert (exited(tmp_path)["code"], exited(tmp_path)["signal"]) == (None, "SIGKILL")
    view = JobFolder(tmp_path).build_job()
    assert view is not None
    assert view.state == "failed"
    assert "out of memory" in view.message


def test_a_killed_group_is_lost(tmp_path: Path, start: Start) -> None:
    process = start("time.sleep(600)")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(PATIENCE_S)
    until(lambda: not is_locked(tmp_path / "runner.lock"), "the lock is free")
    assert not (tmp_path / "exit.json").exists()
    assert state(tmp_path) == "lost"


def test_a_training_whose_runner_was_killed_still_counts(tmp_path: Path, start: Start) -> None:
    process = start("time.sleep(600)")
    process.kill()
    process.wait(PATIENCE_S)
    assert is_locked(tmp_path / "runner.lock"), "its device is not free"
    assert JobFolder(tmp_path).send_signal(signal.SIGTERM), "it is reached by its group"
    until(lambda: not is_locked(tmp_path / "runner.lock"), "it has ended")


RANKS = """
import os, subprocess
rank = "import time; time.sleep({seconds})"
ranks = [
    subprocess.Popen([sys.executable, "-c", rank], start_new_session=True) for _ in range(2)
]
print("ranks", *(one.pid for one in ranks), flush=True)
"""


def ranks_of(folder: Path) -> list[int]:
    """The processes that the training has started in sessions of their own, as torchrun does."""
    until(lambda: "ranks" in output(folder) and output(folder).endswith("\n"), "they run")
    return [int(word) for word in output(folder).split("ranks ")[1].split()]


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
def test_a_kill_reaches_processes_in_sessions_of_their_own(tmp_path: Path, start: Start) -> None:
    process = start(RANKS.format(seconds=600) + "time.sleep(600)")
    ranks = ranks_of(tmp_path)
    assert not any(map(has_ended, ranks))
    assert JobFolder(tmp_path).send_signal(signal.SIGKILL)
    process.wait(PATIENCE_S)
    until(lambda: all(map(has_ended, ranks)), "all are gone")
    assert not is_locked(tmp_path / "runner.lock")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
def test_the_devices_are_free_when_the_last_process_has_ended(tmp_path: Path, start: Start) -> None:
    process = start(RANKS.format(seconds=2) + "time.sleep(600)")
    ranks = ranks_of(tmp_path)
    os.kill(trainer_of(tmp_path), signal.SIGKILL)
    until(lambda: has_ended(trainer_of(tmp_path)), "the training has ended")
    while is_locked(tmp_path / "runner.lock"):
        assert not (tmp_path / "exit.json").exists() or all(map(has_ended, ranks))
        time.sleep(0.01)
    process.wait(PATIENCE_S)
    assert all(map(has_ended, ranks)), "they had their time to end"
    assert exited(tmp_path)["signal"] == "SIGKILL"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
def test_what_outlives_a_training_is_killed() -> None:
    """In a process of its own, because end_orphans waits for all that this process has started."""
    code = (
        "import os, subprocess, sys\n"
        "from simpletuner.server import process_tree, runner\n"
        "process_tree.become_subreaper()\n"
        "again = 'import subprocess, sys; subprocess.Popen(' \\\n"
        '    \'[sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)\'\n'
        "subprocess.run([sys.executable, '-c', again], check=True)\n"
        "(left,) = process_tree.descendants([os.getpid()])\n"
        "runner.end_orphans(0.2)\n"
        "print(left)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert found.returncode == 0, found.stderr
    assert has_ended(int(found.stdout))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals_are_passed_on_once(tmp_path: Path, start: Start, name: str) -> None:
    count = f"signal.signal(signal.{name}, lambda *_: print('{name}', flush=True))\n"
    count += "print('armed', flush=True)\n"
    process = start(count + "time.sleep(0.5)\n" * 240)
    until(lambda: "armed" in output(tmp_path), "its handler is there")
    os.kill(process.pid, signal.Signals[name])
    until(lambda: name in output(tmp_path), "it heard of it")
    time.sleep(0.2)
    assert output(tmp_path).count(name) == 1, "twice would mean: at once, without saving"


def test_what_comes_before_the_training_is_kept_for_it() -> None:
    relay, heard = runner.SignalRelay(), []

    class Child:
        def send_signal(self, number: int) -> None:
            heard.append(number)

    relay(15, None)
    assert heard == []
    relay.attach(Child())  # type: ignore[arg-type]
    relay(2, None)
    assert heard == [15, 2]


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    lock = JobFolder(tmp_path).take_lock()
    (tmp_path / "job.json").write_text(
        json.dumps({"argv": ["/no/such/program"], "cwd": str(tmp_path)})
    )
    runner.run_job(tmp_path, lock)
    os.close(lock)
    assert exited(tmp_path)["code"] == runner.NOT_STARTED_CODE
    assert "/no/such/program cannot be started" in output(tmp_path)


def test_output_begins_anew_when_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "MAX_OUTPUT_BYTES", 100)
    path = tmp_path / "output.log"
    with path.open("ab") as log:
        log.write(b"x" * 90)
        log.flush()
        runner.rotate_output(path)
        assert path.stat().st_size == 90
        log.write(b"y" * 20)
        log.flush()
        runner.rotate_output(path)
        log.write(b"after")
    assert path.read_bytes() == b"after", "whoever appends goes on at the new end"
    assert (tmp_path / "output.1.log").stat().st_size == 110


def test_the_lock_has_its_name_only_when_it_is_held(tmp_path: Path) -> None:
    descriptor = JobFolder(tmp_path).take_lock()
    assert is_locked(tmp_path / "runner.lock")
    other = os.open(tmp_path / "runner.lock", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)
    os.close(descriptor)
    assert not is_locked(tmp_path / "runner.lock")


def test_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, simpletuner.server.runner; "
        "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {
        "torch",
        "numpy",
        "pydantic",
        "fastapi",
        "starlette",
        "PIL",
        "click",
        "rich",
        "sqlite3",
        "asyncio",
    }
    assert not heavy & set(found)
