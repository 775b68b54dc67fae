"""Launching, stopping, killing, taking over, and how jobs ended, with a fake trainer."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from simpletuner.config.option_catalog import all_options
from simpletuner.errors import SimpleTunerError
from simpletuner.events.event_log import EventLog
from simpletuner.events.event_types import RunStarted, RunWorld
from simpletuner.server import failure_advice, job_folder, queue_order
from simpletuner.server.api_errors import ApiError
from simpletuner.server.file_reader import is_locked
from simpletuner.server.job_config import JobConfig
from simpletuner.server.job_folder import JobFolder
from simpletuner.server.schemas.jobs import Job, JobRequest, QueueWrite
from simpletuner.server.schemas.runs import ResumeRequest
from simpletuner.server.supervisor import (
    job_devices,
    job_environment,
    join_devices,
    split_devices,
)
from simpletuner.server.workspace import run_id
from simpletuner.training.run_folder import RunFolder
from tests.server.queue_harness import (
    ENDED_STATES,
    FAKE_TRAIN_COMMAND,
    QueueHarness,
    make_device,
    wait_until,
)

SERVER = """
import sys, time
from pathlib import Path
from tests.server.queue_harness import QueueHarness
harness = QueueHarness(Path(sys.argv[1]))
harness.supervisor.start()
harness.enqueue()
time.sleep(600)
"""


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[QueueHarness]:
    monkeypatch.setenv("FAKE_STEP_S", "0.01")
    one = QueueHarness(Path(os.path.realpath(tmp_path)))
    yield one
    end_all(one)


def end_all(bench: QueueHarness) -> None:
    """Also what was started a moment ago and has not said its process yet."""
    bench.supervisor.close()
    for path in bench.jobs.jobs_dir.glob("*/runner.lock"):
        folder = JobFolder(path.parent)
        wait_until(
            lambda folder=folder: not folder.is_alive or folder.send_signal(signal.SIGKILL),
            "it is reached",
        )  # type: ignore[misc]
        wait_until(lambda folder=folder: not folder.is_alive, "nothing is left behind")  # type: ignore[misc]


def forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEPS", "100000")


def test_one_after_the_other_to_the_end(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEPS", "6")
    first, second = harness.enqueue("one"), harness.enqueue("two")
    harness.supervisor.run_once()
    assert harness.job_state(first) == "starting"
    assert harness.job_state(second) == "queued", "the device is taken"
    done = harness.wait_for_state(second, *ENDED_STATES)
    ended = [harness.jobs.get_job(first.id), done]
    assert [(job.state, job.exit_code, job.devices) for job in ended] == [("done", 0, "cpu")] * 2
    assert ended[0].ended_t is not None
    assert done.started_t is not None
    assert ended[0].ended_t <= done.started_t
    assert [job.id for job in harness.jobs.get_queue().jobs] == [second.id, first.id]
    assert (Path(first.run_dir) / "pytorch_lora_weights.safetensors").exists()
    assert harness.restart().jobs.get_queue() == harness.jobs.get_queue()


@pytest.mark.parametrize("ending", ["done", "stopped"])
def test_states_on_the_way(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setenv("FAKE_STEPS", "5" if ending == "done" else "100000")
    monkeypatch.setenv("FAKE_STEP_S", "0.2")
    monkeypatch.setenv("FAKE_LINGER_S", "0.5")
    job, seen = harness.enqueue(), list[str]()

    def note() -> None:
        harness.supervisor.run_once()
        state = harness.job_state(job)
        seen.extend([state] if seen[-1:] != [state] else [])

    wait_until(lambda: "running" in seen, "it runs", note)
    if ending == "stopped":
        harness.jobs.stop(job.run, insist=False)
    wait_until(lambda: seen[-1] in ENDED_STATES, "it ends", note)
    stopping = ["stopping"] if ending == "stopped" else []
    assert seen == ["starting", "caching", "running", *stopping, ending]
    assert harness.jobs.get_job(job.id).exit_code == (75 if ending == "stopped" else 0)


def test_stop_saves_and_resume_goes_on(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    forever(monkeypatch)
    job = harness.enqueue()
    harness.wait_for_state(job, "running")
    harness.jobs.stop(job.run, insist=False)
    stopped = harness.wait_for_state(job, *ENDED_STATES)
    assert stopped.state == "stopped"
    assert harness.read_job_file(job, "stop.json")["sent"] == ["control/stop"]
    (checkpoint,) = Path(job.run_dir).glob("checkpoint-*")
    step = int(checkpoint.name.rpartition("-")[2])
    monkeypatch.setenv("FAKE_STEPS", str(step + 5))
    again = harness.jobs.resume(job.run, ResumeRequest(max_train_steps=step + 5))
    assert harness.jobs.newest_by_run()[job.run].id == again.id
    assert harness.wait_for_state(again, *ENDED_STATES).state == "done"
    events = [
        json.loads(line) for line in (Path(job.run_dir) / "events.jsonl").read_text().splitlines()
    ]
    assert [event["step"] for event in events if event["kind"] == "resumed"] == [step]
    assert harness.read_job_file(again, "config/config.json")["max_train_steps"] == step + 5


@pytest.mark.parametrize("when", ["starting", "caching", "running"])
def test_a_stop_is_heard_whenever_it_comes(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Also in the first instant, when there is no process yet that could be told."""
    forever(monkeypatch)
    monkeypatch.setenv("FAKE_STEP_S", "2" if when == "caching" else "0.01")
    job = harness.enqueue()
    harness.wait_for_state(job, when)
    harness.jobs.stop(job.run, insist=False)
    assert harness.job_state(job) == "stopping"
    ended = harness.wait_for_state(job, *ENDED_STATES)
    assert ended.state == "stopped", (harness.read_job_file(job, "exit.json"), ended.last_lines)
    assert harness.jobs.resume(job.run, ResumeRequest()).state == "queued", (
        "with a run folder and without one"
    )


def test_a_rehearsal_that_was_begun_can_be_ended(harness: QueueHarness, tmp_path: Path) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ntime.sleep(600)\n")
    harness.jobs._train_command = (sys.executable, str(slow))
    job = harness.jobs.enqueue(JobRequest(draft=harness.create_draft(), kind="rehearse"))
    harness.wait_for_state(job, "starting")
    harness.jobs.cancel(job.id)
    assert harness.wait_for_state(job, *ENDED_STATES).state == "stopped"


def test_a_removed_folder_takes_its_failed_run_out_of_the_list(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "3")
    job = harness.wait_for_state(harness.enqueue(), *ENDED_STATES)
    assert [run.state for run in harness.runs.summaries()] == ["failed"]
    shutil.rmtree(job.run_dir)
    assert harness.restart().runs.summaries() == []


def test_a_deaf_training_is_ended_in_three_steps(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    forever(monkeypatch)
    monkeypatch.setenv("FAKE_DEAF", "1")
    harness = QueueHarness(harness.workspace.root, grace_s=0.3)
    job = harness.enqueue()
    harness.wait_for_state(job, "running")
    begun = time.monotonic()
    harness.jobs.stop(job.run, insist=False)
    assert harness.wait_for_state(job, *ENDED_STATES).state == "stopped"
    assert time.monotonic() - begun > 0.6
    assert harness.read_job_file(job, "stop.json")["sent"] == ["control/stop", "SIGTERM", "SIGKILL"]
    harness.supervisor.close()


def test_a_stop_that_was_swept_away_is_laid_again(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that begins empties its control/ when it has the lock."""
    forever(monkeypatch)
    monkeypatch.setenv("FAKE_DEAF", "1")
    job = harness.enqueue()
    harness.wait_for_state(job, "running")
    harness.jobs.stop(job.run, insist=False)
    for _ in range(2):
        harness.supervisor.run_once()
        (Path(job.run_dir) / "control" / "stop").unlink()
    assert harness.read_job_file(job, "stop.json")["sent"] == ["control/stop"]


def test_who_insists_does_not_wait(harness: QueueHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    forever(monkeypatch)
    monkeypatch.setenv("FAKE_DEAF", "1")
    job = harness.enqueue()
    harness.wait_for_state(job, "running")
    harness.jobs.stop(job.run, insist=False)
    harness.supervisor.run_once()
    harness.jobs.stop(job.run, insist=True)
    assert harness.wait_for_state(job, *ENDED_STATES).state == "stopped"
    assert harness.read_job_file(job, "stop.json")["sent"] == ["control/stop", "SIGKILL"]


def test_before_there_is_a_run_folder_the_process_is_asked(
    harness: QueueHarness, tmp_path: Path
) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import time\nprint('loading', flush=True)\ntime.sleep(600)\n")
    harness.jobs._train_command = (sys.executable, str(slow))
    job = harness.enqueue()
    log = harness.jobs.jobs_dir / job.id / "output.log"
    wait_until(
        lambda: log.exists() and "loading" in log.read_text(),
        "it loads",
        harness.supervisor.run_once,
    )
    harness.jobs.stop(job.run, insist=False)
    assert harness.wait_for_state(job, *ENDED_STATES).state == "stopped"
    assert harness.read_job_file(job, "stop.json")["sent"] == ["SIGINT"]


def test_a_killed_server_leaves_the_training_alone(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    forever(monkeypatch)
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(harness.workspace.root)], cwd=Path.cwd()
    )
    wait_until(
        lambda: any(job.state == "running" for job in harness.jobs.get_queue().jobs), "it runs"
    )
    (job,) = harness.jobs.get_queue().jobs
    harness.supervisor.run_once()
    assert harness.supervisor._lock is None, "two servers do not both act"
    server.kill()
    server.wait()
    events = Path(job.run_dir) / "events.jsonl"
    size = events.stat().st_size
    wait_until(lambda: events.stat().st_size > size + 2000, "it goes on")
    assert harness.job_state(job) == "running"
    harness.supervisor.run_once()
    harness.jobs.stop(job.run, insist=False)
    assert harness.wait_for_state(job, *ENDED_STATES).state == "stopped"


def test_what_ended_while_no_server_was_there(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEPS", "5")
    job = harness.enqueue()
    harness.supervisor.run_once()
    wait_until((harness.jobs.jobs_dir / job.id / "exit.json").exists, "it ends by itself")
    wait_until(lambda: not JobFolder(harness.jobs.jobs_dir / job.id).is_alive, "its runner too")
    later = harness.restart()
    assert later.wait_for_state(job, *ENDED_STATES).state == "done"
    assert later.read_job_file(job, "end.json")["state"] == "done"
    later.supervisor.close()


def test_the_whole_group_killed_is_lost_and_can_be_resumed(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    forever(monkeypatch)
    job = harness.enqueue(checkpoint_step_interval=5)
    wait_until(
        lambda: [*Path(job.run_dir).glob("checkpoint-*")],
        "a checkpoint",
        harness.supervisor.run_once,
    )
    os.killpg(harness.read_job_file(job, "state.json")["pid"], signal.SIGKILL)
    lost = harness.wait_for_state(job, *ENDED_STATES)
    assert (lost.state, lost.exit_code) == ("lost", None)
    assert "Resume" in lost.advice
    again = harness.jobs.resume(job.run, ResumeRequest())
    harness.wait_for_state(again, "running")


@pytest.mark.parametrize(
    ("how", "code", "options"),
    [("host", None, "base_model_precision"), ("cuda", 1, "gradient_checkpointing")],
)
def test_out_of_memory_is_told_with_what_to_change(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch, how: str, code: int | None, options: str
) -> None:
    monkeypatch.setenv("FAKE_OOM", how)
    job = harness.wait_for_state(harness.enqueue(), *ENDED_STATES)
    assert (job.state, job.exit_code) == ("failed", code)
    assert "out of memory" in job.message
    assert options in job.advice
    assert any("step 10/" in line for line in job.last_lines)


def test_a_failure_holds_those_that_wait_unless_told_otherwise(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "3")
    first, second = harness.enqueue("one"), harness.enqueue("two")
    failed = harness.wait_for_state(first, *ENDED_STATES)
    assert (failed.state, failed.exit_code, failed.message) == ("failed", 3, "failed on request")
    assert harness.jobs.get_queue().paused
    for _ in range(3):
        harness.supervisor.run_once()
    assert harness.job_state(second) == "queued"
    harness.jobs.update_queue(QueueWrite(paused=False, continue_on_error=True))
    third = harness.enqueue("three")
    harness.wait_for_state(second, "failed")
    harness.wait_for_state(third, "failed")
    assert not harness.jobs.get_queue().paused


def test_one_job_for_one_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forever(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setenv("FAKE_STEP_S", "0.05")
    bench = QueueHarness(Path(os.path.realpath(tmp_path)), "cuda", "cuda")
    try:
        jobs = [bench.enqueue(name) for name in ("one", "two", "three")]
        rehearsal = bench.jobs.enqueue(JobRequest(draft=bench.create_draft(), kind="rehearse"))
        bench.supervisor.run_once()
        assert [bench.jobs.get_job(job.id).devices for job in jobs] == ["cuda:2", "cuda:5", "gpu"]
        begun = ("starting", "caching", "running")
        assert all(bench.job_state(job) in begun for job in jobs[:2])
        assert bench.job_state(jobs[2]) == "queued"
        assert bench.wait_for_state(rehearsal, *ENDED_STATES).state == "done", (
            "it needs the processor only"
        )
        wait_until((bench.jobs.jobs_dir / jobs[1].id / "state.json").exists, "it has a process")
        trainer = bench.read_job_file(jobs[1], "state.json")["trainer"]
        environ = Path(f"/proc/{trainer}/environ").read_bytes().split(b"\0")
        assert b"CUDA_VISIBLE_DEVICES=5" in environ
        bench.jobs.stop(jobs[1].run, insist=True)
        bench.wait_for_state(jobs[1], "stopped")
        bench.supervisor.run_once()
        assert bench.jobs.get_job(jobs[2].id).devices == "cuda:5"
    finally:
        end_all(bench)


def enqueue_wide(bench: QueueHarness, name: str, count: int | None) -> Job:
    job = bench.enqueue(name)
    folder = JobFolder(bench.jobs.jobs_dir / job.id)
    spec = folder.read_spec()
    assert spec is not None
    folder.write_spec(dataclasses.replace(spec, device_count=count))
    return job


def devices_of(bench: QueueHarness, *jobs: Job) -> list[str]:
    return [bench.jobs.get_job(job.id).devices for job in jobs]


def test_a_job_gets_a_set_of_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forever(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,GPU-8a,2,3")
    monkeypatch.setenv("FAKE_STEP_S", "0.05")
    bench = QueueHarness(Path(os.path.realpath(tmp_path)), *["cuda"] * 4)
    try:
        one, three = bench.enqueue("one"), enqueue_wide(bench, "three", 3)
        everything, more = enqueue_wide(bench, "all", None), enqueue_wide(bench, "more", 99)
        assert bench.jobs.get_job(three.id).device_count == 3
        bench.supervisor.run_once()
        assert devices_of(bench, one, three) == ["cuda:7", "cuda:GPU-8a,2,3"]
        assert devices_of(bench, everything, more) == ["gpu", "gpu"]
        wait_until((bench.jobs.jobs_dir / three.id / "state.json").exists, "it has a process")
        trainer = bench.read_job_file(three, "state.json")["trainer"]
        environ = Path(f"/proc/{trainer}/environ").read_bytes().split(b"\0")
        assert b"CUDA_VISIBLE_DEVICES=GPU-8a,2,3" in environ
        for ending, beginning in ((three, one), (one, everything), (everything, more)):
            assert bench.job_state(ending) not in ("queued", *ENDED_STATES)
            bench.jobs.stop(ending.run, insist=True)
            bench.wait_for_state(ending, "stopped")
            bench.supervisor.run_once()
            assert bench.job_state(beginning) != "queued"
        assert devices_of(bench, everything, more) == ["cuda:7,GPU-8a,2,3"] * 2
    finally:
        end_all(bench)


def test_a_wide_job_waits_for_its_set_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its overtakings are counted over restarts of the server."""
    monkeypatch.setattr(queue_order, "MAX_OVERTAKES", 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    forever(monkeypatch)
    monkeypatch.setenv("FAKE_STEP_S", "0.05")
    bench = QueueHarness(Path(os.path.realpath(tmp_path)), "cuda", "cuda")
    try:
        first, wide = bench.enqueue("first"), enqueue_wide(bench, "wide", 2)
        second, third = bench.enqueue("second"), bench.enqueue("third")
        bench.supervisor.run_once()
        assert devices_of(bench, first, wide, second) == ["cuda:0", "gpu", "cuda:1"]
        bench = bench.restart()
        bench.jobs.stop(second.run, insist=True)
        bench.wait_for_state(second, "stopped")
        bench.supervisor.run_once()
        assert bench.job_state(third) == "queued", "the free one is reserved"
        bench.jobs.stop(first.run, insist=True)
        bench.wait_for_state(first, "stopped")
        bench.supervisor.run_once()
        assert devices_of(bench, wide, third) == ["cuda:0,1", "gpu"]
    finally:
        end_all(bench)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_was_started_by_hand_has_a_card_for_each_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    monkeypatch.setenv("FAKE_STEPS", "3")
    bench = QueueHarness(Path(os.path.realpath(tmp_path)), *["cuda"] * 3)
    try:
        with RunFolder(bench.workspace.output_dir / "by-hand") as folder:
            folder.write_config({})
            world = RunWorld(processes, "replicated", 1) if processes > 1 else None
            log = EventLog(folder.events_path)
            log(RunStarted("", "", "m", "cuda", 9, 0, world))
            log.close()
            id = run_id(folder.path)
            wait_until(lambda: bench.runs.summary(id).state == "running", "it is seen")
            job = bench.enqueue()
            bench.supervisor.run_once()
            assert devices_of(bench, job) == [f"cuda:{processes}"]
        bench.wait_for_state(job, *ENDED_STATES)
    finally:
        end_all(bench)


def test_devices_are_written_as_one_text() -> None:
    for names in (["cuda:0"], ["cuda:1", "cuda:GPU-8a"], ["cpu"], ["mps"]):
        assert split_devices(join_devices(names)) == names
    assert join_devices(["cuda:1", "cuda:3"]) == "cuda:1,3"


@pytest.mark.parametrize(("written", "count"), [({}, 1), (4, 4), ("2", 2), ("auto", None)])
def test_processes_are_the_cards_that_a_job_asks_for(written: object, count: int | None) -> None:
    config = {} if written == {} else {"num_processes": written}
    assert JobConfig(config, ()).device_count == count


def test_a_job_of_an_older_server_asks_for_one_card(harness: QueueHarness) -> None:
    job = harness.enqueue()
    path = harness.jobs.jobs_dir / job.id / "job.json"
    old = json.loads(path.read_text())
    del old["device_count"], old["overtaken"]
    path.write_text(json.dumps(old))
    assert harness.jobs.get_job(job.id) == job
    del old["argv"]
    path.write_text(json.dumps(old))
    assert JobFolder(path.parent).read_spec() is None


def test_a_run_that_was_started_by_hand_has_the_device(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEPS", "3")
    job = harness.enqueue()
    with RunFolder(harness.workspace.output_dir / "by-hand") as folder:
        folder.write_config({})
        id = run_id(folder.path)
        wait_until(lambda: harness.runs.summary(id).state == "starting", "it is seen")
        for _ in range(3):
            harness.supervisor.run_once()
        assert harness.job_state(job) == "queued"
        with pytest.raises(ApiError, match="started from a terminal"):
            harness.jobs.stop(id, insist=True)
        harness.jobs.stop(id, insist=False)
        assert folder.consume_control_request("stop")
    assert harness.wait_for_state(job, *ENDED_STATES).state == "done"


def test_the_environment_of_a_job() -> None:
    environ = {
        "PATH": "/bin",
        "SIMPLETUNER_SEED": "7",
        "SIMPLETUNER_OTHER": "x",
        "SIMPLETUNER_SERVER_TOKEN": "a secret of the server's",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    found = job_environment("cuda:1", environ)
    assert found["CUDA_VISIBLE_DEVICES"] == "1"
    assert "SIMPLETUNER_SEED" not in found, "the configuration is frozen"
    assert "SIMPLETUNER_SERVER_TOKEN" not in found
    assert (found["PATH"], found["SIMPLETUNER_OTHER"]) == ("/bin", "x")
    assert job_environment("cpu", environ)["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_job_devices() -> None:
    cards = [make_device("cuda"), make_device("cuda")]
    assert job_devices(cards, {}) == ("cuda:0", "cuda:1")
    assert job_devices(cards, {"CUDA_VISIBLE_DEVICES": "1"}) == ("cuda:1",)
    assert job_devices(cards, {"CUDA_VISIBLE_DEVICES": "GPU-8a, 3"}) == ("cuda:GPU-8a", "cuda:3")
    assert job_devices(cards, {"CUDA_VISIBLE_DEVICES": ""}) == ()
    assert job_devices([make_device("rocm")], {}) == ("cuda:0",)
    assert job_devices([make_device("mps")], {}) == ("mps",)
    assert job_devices([make_device("cpu")], {}) == ()


ADVICE = [
    *failure_advice.EXIT_CODE_ADVICE.values(),
    *failure_advice.SIGNAL_ADVICE.values(),
    *(what for _, what in failure_advice.OUTPUT_PATTERNS),
]


def test_advice_names_options_that_there_are() -> None:
    assert ADVICE
    for sentence in ADVICE:
        for word in re.findall(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b", sentence):
            assert word in all_options(), f"{word} in {sentence!r}"


def test_every_exit_code_has_its_advice() -> None:
    codes = {
        kind.exit_code
        for kind in SimpleTunerError.__subclasses__()
        if kind.__module__ == "simpletuner.errors"
    }
    assert codes - {1, 75} <= set(failure_advice.EXIT_CODE_ADVICE)


@pytest.mark.parametrize(
    ("line", "options"),
    [
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
            "train_batch_size",
        ),
        (
            "out of memory: 2.00 GiB requested, 1.2 GiB free. Next: ...",
            "train_batch_size",
        ),
        ("RuntimeError: HIP out of memory. Tried to allocate", "train_batch_size"),
        ("RuntimeError: MPS backend out of memory (MPS allocated: 18.00 GB", "train_batch_size"),
        (
            "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory",
            "base_model_precision",
        ),
        ("OSError: [Errno 12] Cannot allocate memory", "base_model_precision"),
        ("terminate called after throwing an instance of 'std::bad_alloc'", "base_model_precision"),
        ("OSError: [Errno 28] No space left on device", "checkpoints_total_limit"),
    ],
)
def test_last_lines_are_recognised(line: str, options: str) -> None:
    found = failure_advice.explain_failure(1, None, ["step 3", line, "", "more"])
    assert found.message == line
    assert options in found.advice
    assert failure_advice.explain_failure(
        4, None, ["step 3", "loss is not finite"]
    ).advice.startswith("Lower learning_rate")
    assert failure_advice.explain_failure(1, None, []).message == "ended with exit code 1"


def test_the_thread_works_by_itself(harness: QueueHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEPS", "3")
    harness.supervisor.start()
    job = harness.enqueue()
    wait_until(lambda: harness.job_state(job) == "done", "nobody looks but the thread")
    assert not is_locked(Path(job.run_dir) / "run.lock")
    assert FAKE_TRAIN_COMMAND[1].endswith("fake_trainer.py")


def test_a_leap_of_the_clock_shortens_no_grace(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A laptop that slept, or was set right: the training has not had its time to save."""
    forever(monkeypatch)
    monkeypatch.setenv("FAKE_DEAF", "1")
    job = harness.enqueue()
    harness.wait_for_state(job, "running")
    harness.jobs.stop(job.run, insist=False)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 9000.0)
    for _ in range(3):
        harness.supervisor.run_once()
    assert harness.read_job_file(job, "stop.json")["sent"] == ["control/stop"]


def test_on_a_full_disk_a_training_can_be_stopped(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    forever(monkeypatch)
    job = harness.enqueue()
    harness.wait_for_state(job, "running")

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job_folder, "write_atomically", full)
    harness.jobs.stop(job.run, insist=False)
    wait_until(lambda: not is_locked(Path(job.run_dir) / "run.lock"), "it hears")


def test_one_folder_that_cannot_be_tended_does_not_keep_the_others(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEPS", "3")
    first = harness.enqueue("one")
    harness.supervisor.run_once()
    wait_until(lambda: not JobFolder(harness.jobs.jobs_dir / first.id).is_alive, "it ends")
    (harness.jobs.jobs_dir / first.id / "end.json").mkdir()  # cannot be written
    second = harness.enqueue("two")

    def look() -> None:
        with suppress(OSError):
            harness.supervisor.run_once()

    wait_until(lambda: harness.job_state(second) == "done", "the next one runs", look)


@pytest.mark.parametrize("content", ['{"t": "x"}', '{"t": null}', "[" * 9000, "{}"])
def test_an_odd_exit_of_a_run_takes_nothing_down(harness: QueueHarness, content: str) -> None:
    job = harness.enqueue()
    Path(job.run_dir).mkdir(parents=True)
    (harness.jobs.jobs_dir / job.id / "runner.lock").write_text("")
    (Path(job.run_dir) / "exit.json").write_text(content)
    (harness.jobs.jobs_dir / job.id / "state.json").write_text("{}")
    (harness.jobs.jobs_dir / job.id / "exit.json").write_text("{}")
    assert [one.state for one in harness.jobs.get_queue().jobs] == ["failed"]


def test_a_full_disk_repeats_no_signal(
    harness: QueueHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second one would mean "at once"."""
    slow = tmp_path / "slow.py"
    slow.write_text("import time\nprint('loading', flush=True)\ntime.sleep(600)\n")
    harness.jobs._train_command = (sys.executable, str(slow))
    job = harness.enqueue()
    log = harness.jobs.jobs_dir / job.id / "output.log"
    wait_until(
        lambda: log.exists() and "loading" in log.read_text(),
        "it loads",
        harness.supervisor.run_once,
    )
    harness.jobs.stop(job.run, insist=False)
    sent: list[int] = []
    monkeypatch.setattr(JobFolder, "send_signal", lambda self, number: sent.append(number) or True)

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(job_folder, "write_atomically", full)
        for _ in range(3):
            harness.supervisor.run_once()
    assert sent == [signal.SIGINT]
    monkeypatch.undo()


def test_a_run_goes_on_while_its_last_process_still_leaves(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page offers Resume once exit.json exists; the process may exit seconds later."""
    monkeypatch.setenv("FAKE_LINGER_S", "2")
    job = harness.enqueue()
    harness.wait_for_state(job, "running")
    harness.jobs.stop(job.run, insist=False)
    wait_until(
        lambda: harness.runs.summary(job.run).state == "stopped",
        "told",
        harness.supervisor.run_once,
    )
    assert harness.job_state(job) not in ENDED_STATES, "the process is still there"
    again = harness.jobs.resume(job.run, ResumeRequest())
    assert harness.job_state(again) == "queued"
    assert harness.wait_for_state(again, "done").exit_code == 0


@pytest.mark.parametrize(("told", "state"), [(None, "stopped"), ("failed", "failed")])
def test_one_that_was_interrupted_while_it_loaded_is_stopped(
    harness: QueueHarness, told: str | None, state: str
) -> None:
    """An interrupted Python exits with code 1; only the training decides what a failure is."""
    job = harness.enqueue()
    folder = harness.jobs.jobs_dir / job.id
    (folder / "runner.lock").write_text("")
    (folder / "state.json").write_text('{"started_t": 1.0}')
    (folder / "stop.json").write_text('{"t": 2.0, "insist": false, "sent": ["SIGINT"]}')
    (folder / "output.log").write_text("Fatal Python error: init_import_site\nKeyboardInterrupt\n")
    (folder / "exit.json").write_text('{"code": 1, "signal": null, "t": 3.0}')
    if told is not None:
        Path(job.run_dir).mkdir(parents=True)
        (Path(job.run_dir) / "exit.json").write_text(
            json.dumps({"status": told, "message": "", "t": 2.5})
        )
    assert harness.job_state(job) == state
