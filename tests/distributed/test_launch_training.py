"""Trainings under the launcher: killed and stopped processes cost no bit of the result."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

from simpletuner.training.run_folder import RunFolder
from tests.distributed.test_launch import is_running, listening_addresses, wait_until_gone
from tests.e2e.training_project import TrainingProject, read_checkpoint_files, read_losses

STEPS = 8
TIMEOUT_S = 240.0
PROCESSES = 2
TRAIN = (sys.executable, "-m", "simpletuner", "train")
TORCHRUN = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    *("-m", "simpletuner", "train"),
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> TrainingProject:
    root = tmp_path_factory.mktemp("project")
    made = TrainingProject(
        root, max_train_steps=STEPS, checkpoints_total_limit=STEPS, eval_steps_interval=STEPS
    )
    # one process with the batches of two
    reference = made.train(gradient_accumulation_steps=2 * PROCESSES, output_dir=f"{root}/one")
    assert reference.is_dir()
    (root / "config.json").write_text(json.dumps(made.options))
    return made


class Run:
    """Starts of one run folder under the launcher."""

    def __init__(self, project: TrainingProject, name: str) -> None:
        self.root, self.folder = project.root, project.root / name
        self.log = project.root / f"{name}.log"
        self.started: list[subprocess.Popen[bytes]] = []
        self.pids: dict[int, int] = {}

    def start(self, *flags: str, command: tuple[str, ...] = TRAIN) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, f"--output_dir={self.folder}", *flags],
                cwd=self.root, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.started.append(self.process)

    def launch(self, *flags: str) -> None:
        self.start(f"--num_processes={PROCESSES}", *flags)

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is logged, and note the processes that train."""
        deadline = time.monotonic() + TIMEOUT_S
        while max(self.steps(), default=0) < step:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        self.pids = ranks_of(self.process.pid)
        assert sorted(self.pids) == list(range(PROCESSES))

    def steps(self) -> list[int]:
        events = self.folder / "events.jsonl"
        return list(read_losses(self.folder)) if events.exists() else []

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.pids[rank], number)

    def exit_status(self) -> dict[str, object]:
        status: dict[str, object] = json.loads((self.folder / "exit.json").read_text())
        return status


def ranks_of(launcher: int) -> dict[int, int]:
    """Return the pid of each rank that a launcher has started."""
    found = {}
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        variables = Path(f"/proc/{child}/environ").read_text().split("\0")
        for variable in variables:
            if variable.startswith("RANK="):
                found[int(variable.removeprefix("RANK="))] = int(child)
    return found


@pytest.fixture
def run(project: TrainingProject, request: pytest.FixtureRequest) -> Iterator[Run]:
    made = Run(project, request.node.name.replace("[", "-").rstrip("]"))
    yield made
    for process in made.started:
        if process.poll() is None:
            for pid in ranks_of(process.pid).values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.kill()
            process.wait()
    wait_until_gone(list(made.pids.values()))


def assert_equal_to_one_process(run: Run) -> None:
    assert run.exit_status()["status"] == "done"
    one = run.root / "one"
    assert read_losses(run.folder) == read_losses(one)
    last = f"checkpoint-{STEPS}"
    assert read_checkpoint_files(run.folder / last) == read_checkpoint_files(one / last)


@pytest.mark.slow
def test_a_killed_process_costs_a_restart_and_no_bit(run: Run) -> None:
    run.launch()
    run.wait_for_step(3)
    addresses = [address for pid in run.pids.values() for address in listening_addresses(pid)]
    assert set(addresses) == {"127.0.0.1"}
    run.kill(1)
    assert run.wait() == 0, run.log.read_text()
    assert f"process 1 (pid {run.pids[1]}) killed by SIGKILL" in run.log.read_text()
    assert "restarting from the last checkpoint (1 of 3)" in run.log.read_text()
    failed = [line for line in events(run) if line["kind"] == "failed"]
    assert [line["exit_code"] for line in failed] == [13]
    assert str(failed[0]["error"]).startswith("process 1: killed by SIGKILL")
    assert_equal_to_one_process(run)


def events(run: Run) -> list[dict[str, object]]:
    lines = (run.folder / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_stopped_then_killed_with_its_launcher_then_finished_by_torchrun(run: Run) -> None:
    """A signal to one process stops all; a killed launcher leaves nothing; torchrun resumes."""
    run.launch()
    run.wait_for_step(1)
    run.kill(1, signal.SIGTERM)
    assert run.wait() == 75, run.log.read_text()
    assert run.exit_status()["exit_code"] == 75
    wait_until_gone(list(run.pids.values()))
    stopped_after = run.exit_status()["step"]
    assert (run.folder / f"checkpoint-{stopped_after}").is_dir()

    run.launch()
    run.wait_for_step(int(str(stopped_after)) + 1)
    run.process.kill()
    run.wait()
    wait_until_gone(list(run.pids.values()))
    with RunFolder(run.folder):
        pass  # the lock is free

    run.start(command=TORCHRUN)
    assert run.wait() == 0, run.log.read_text()
    assert_equal_to_one_process(run)


def test_a_contradiction_with_the_launcher_is_found_before_torch(run: Run) -> None:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [*TRAIN, "--num_processes=2", f"--output_dir={run.folder}"],
        cwd=run.root, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--num_processes: 2 contradicts the 4 processes" in done.stderr
    assert not run.folder.exists()


def test_what_trains_nothing_starts_no_process(run: Run) -> None:
    for words in (["train", "--show-config"], ["plan"]):
        done = subprocess.run(
            [sys.executable, "-m", "simpletuner", *words, "--num_processes=2"],
            cwd=run.root, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert not run.folder.exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_frozen_process_is_ended_after_the_timeout(run: Run) -> None:
    run.launch("--ddp_timeout=5")
    run.wait_for_step(3)
    run.kill(1, signal.SIGSTOP)
    assert run.wait() == 0, run.log.read_text()
    assert "ended with exit code 13; restarting" in run.log.read_text()
    assert_equal_to_one_process(run)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(8))
def test_a_storm_of_signals_costs_no_bit(run: Run, seed: int) -> None:
    """At random moments a process, or the launcher, is killed, stopped or frozen for a while."""
    chance = random.Random(seed)
    allowed = {0, 75, 13, 128 + 9, *(-number for number in (9, 10, 15))}
    for _ in range(6):
        run.launch("--max_restarts=1", "--ddp_timeout=60")
        time.sleep(chance.uniform(2, 20))
        ranks = ranks_of(run.process.pid) if run.process.poll() is None else {}
        target = chance.choice([*ranks.values(), run.process.pid])
        number = chance.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGSTOP])
        if is_running(target):
            os.kill(target, number)
            if number == signal.SIGSTOP:
                time.sleep(3)
                os.kill(target, signal.SIGCONT)
        assert run.wait() in allowed, run.log.read_text()
        wait_until_gone(list(ranks.values()))
        with RunFolder(run.folder):
            pass
    run.launch()
    assert run.wait() == 0, run.log.read_text()
    assert_equal_to_one_process(run)
