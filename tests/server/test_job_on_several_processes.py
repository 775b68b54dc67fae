"""A job of the queue that trains on several processes, with the real training and its launcher."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from simpletuner.server import process_tree
from simpletuner.server.file_reader import is_locked
from simpletuner.server.job_folder import JobFolder
from simpletuner.server.schemas.jobs import Job
from simpletuner.server.schemas.runs import ResumeRequest
from simpletuner.server.settings import TRAIN_COMMAND
from tests.server.queue_harness import ENDED_STATES, QueueHarness, wait_until

pytest.importorskip("torch", reason="the processes train")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc"),
]


def training_processes(harness: QueueHarness, job: Job) -> list[int]:
    """The processes that the runner of a job has started: launcher and ranks."""
    return process_tree.descendants([harness.read_job_file(job, "state.json")["pid"]])


def all_processes() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def wait_for_step(harness: QueueHarness, job: Job, first: int) -> list[int]:
    """Supervise until the run is past a step; return its processes."""

    def is_past() -> bool:
        state = harness.job_state(job)
        assert state not in ENDED_STATES, harness.jobs.get_job(job.id).last_lines
        return harness.runs.summary(job.run).step > first

    wait_until(is_past, f"it is past step {first}", harness.supervisor.run_once)
    return training_processes(harness, job)


def test_stopped_resumed_and_killed_without_leaving_a_process(tmp_path: Path) -> None:
    harness = QueueHarness(Path(os.path.realpath(tmp_path)))
    harness.jobs._train_command = TRAIN_COMMAND
    job = harness.enqueue(
        device="cpu", num_processes=2, torch_num_threads=1, max_train_steps=5000, lora_rank=2,
        resolution=64, validation_disable=True, checkpoint_step_interval=5000,
    )  # fmt: skip
    try:
        processes = wait_for_step(harness, job, 1)
        assert len(processes) >= 3, "a launcher and two ranks"
        harness.jobs.stop(job.run, insist=False)
        stopped = harness.wait_for_state(job, *ENDED_STATES)
        assert (stopped.state, stopped.exit_code) == ("stopped", 75), stopped.last_lines
        assert harness.read_job_file(job, "stop.json")["sent"] == ["control/stop"]
        assert not set(processes) & all_processes()
        (checkpoint,) = Path(job.run_dir).glob("checkpoint-*")
        step = int(checkpoint.name.rpartition("-")[2])

        again = harness.jobs.resume(job.run, ResumeRequest())
        processes = wait_for_step(harness, again, step)
        assert len(processes) >= 3
        harness.jobs.stop(job.run, insist=True)
        assert harness.wait_for_state(again, *ENDED_STATES).state == "stopped"
        wait_until(lambda: not set(processes) & all_processes(), "every process is gone")
        assert not is_locked(Path(job.run_dir) / "run.lock")
        world = harness.runs.detail(job.run).world
        assert world is not None
        assert (world.processes, world.mode) == (2, "replicated")
        assert world.base_bytes_per_rank > 100_000
    finally:
        harness.supervisor.close()
        for path in harness.jobs.jobs_dir.glob("*/runner.lock"):
            JobFolder(path.parent).send_signal(signal.SIGKILL)
