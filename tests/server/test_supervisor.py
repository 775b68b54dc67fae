"""Starting, stopping, insisting, taking over, telling how it ended; with a trainer that trains nothing."""

from __future__ import annotations

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

from simpletuner.config.catalog import catalog
from simpletuner.errors import SimpleTunerError
from simpletuner.server import advice, jobfolder
from simpletuner.server.jobfolder import JobFolder
from simpletuner.server.place import run_id
from simpletuner.server.refusal import Refused
from simpletuner.server.runs import held
from simpletuner.server.supervisor import device_sets, environment_of
from simpletuner.server.wire.jobs import JobAsk, QueueWrite
from simpletuner.server.wire.runs import ResumeAsk
from simpletuner.training.rundir import RunFolder
from tests.server.bench import ENDED, TRAINER, Bench, card, until

SERVER = """
import sys, time
from pathlib import Path
from tests.server.bench import Bench
bench = Bench(Path(sys.argv[1]))
bench.supervisor.start()
bench.enqueue()
time.sleep(600)
"""


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("FAKE_STEP_S", "0.01")
    one = Bench(Path(os.path.realpath(tmp_path)))
    yield one
    end_all(one)


def end_all(bench: Bench) -> None:
    """Also what was started a moment ago and has not said its process yet."""
    bench.supervisor.close()
    for path in bench.jobs.folder.glob("*/runner.lock"):
        folder = JobFolder(path.parent)
        until(lambda folder=folder: not folder.alive or folder.signal(signal.SIGKILL), "it is reached")  # type: ignore[misc]
        until(lambda folder=folder: not folder.alive, "nothing is left behind")  # type: ignore[misc]


def forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEPS", "100000")


def test_one_after_the_other_to_the_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEPS", "6")
    first, second = bench.enqueue("one"), bench.enqueue("two")
    bench.supervisor.look()
    assert bench.state(first) == "starting"
    assert bench.state(second) == "queued", "the device is taken"
    done = bench.reach(second, *ENDED)
    ended = [bench.jobs.job(first.id), done]
    assert [(job.state, job.exit_code, job.devices) for job in ended] == [("done", 0, "cpu")] * 2
    assert ended[0].ended_t is not None
    assert done.started_t is not None
    assert ended[0].ended_t <= done.started_t
    assert [job.id for job in bench.jobs.queue().jobs] == [second.id, first.id]
    assert (Path(first.run_dir) / "pytorch_lora_weights.safetensors").exists()
    assert bench.restarted().jobs.queue() == bench.jobs.queue()


@pytest.mark.parametrize("ending", ["done", "stopped"])
def test_states_on_the_way(bench: Bench, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setenv("FAKE_STEPS", "5" if ending == "done" else "100000")
    monkeypatch.setenv("FAKE_STEP_S", "0.2")
    monkeypatch.setenv("FAKE_LINGER_S", "0.5")
    job, seen = bench.enqueue(), list[str]()

    def note() -> None:
        bench.supervisor.look()
        state = bench.state(job)
        seen.extend([state] if seen[-1:] != [state] else [])

    until(lambda: "running" in seen, "it runs", note)
    if ending == "stopped":
        bench.jobs.stop(job.run, insist=False)
    until(lambda: seen[-1] in ENDED, "it ends", note)
    stopping = ["stopping"] if ending == "stopped" else []
    assert seen == ["starting", "caching", "running", *stopping, ending]
    assert bench.jobs.job(job.id).exit_code == (75 if ending == "stopped" else 0)


def test_stop_saves_and_resume_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    forever(monkeypatch)
    job = bench.enqueue()
    bench.reach(job, "running")
    bench.jobs.stop(job.run, insist=False)
    stopped = bench.reach(job, *ENDED)
    assert stopped.state == "stopped"
    assert bench.file(job, "stop.json")["sent"] == ["control/stop"]
    (checkpoint,) = Path(job.run_dir).glob("checkpoint-*")
    step = int(checkpoint.name.rpartition("-")[2])
    monkeypatch.setenv("FAKE_STEPS", str(step + 5))
    again = bench.jobs.resume(job.run, ResumeAsk(max_train_steps=step + 5))
    assert bench.jobs.by_run()[job.run].id == again.id
    assert bench.reach(again, *ENDED).state == "done"
    events = [json.loads(line) for line in (Path(job.run_dir) / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["kind"] == "resumed"] == [step]
    assert bench.file(again, "config/config.json")["max_train_steps"] == step + 5


@pytest.mark.parametrize("when", ["starting", "caching", "running"])
def test_a_stop_is_heard_whenever_it_comes(bench: Bench, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Also in the first instant, when there is no process yet that could be told."""
    forever(monkeypatch)
    monkeypatch.setenv("FAKE_STEP_S", "2" if when == "caching" else "0.01")
    job = bench.enqueue()
    bench.reach(job, when)
    bench.jobs.stop(job.run, insist=False)
    assert bench.state(job) == "stopping"
    ended = bench.reach(job, *ENDED)
    assert ended.state == "stopped", (bench.file(job, "exit.json"), ended.last_lines)
    assert bench.jobs.resume(job.run, ResumeAsk()).state == "queued", "with a run folder and without one"


def test_a_rehearsal_that_was_begun_can_be_ended(bench: Bench, tmp_path: Path) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import time\ntime.sleep(600)\n")
    bench.jobs._trainer = (sys.executable, str(slow))
    job = bench.jobs.enqueue(JobAsk(draft=bench.draft(), kind="rehearse"))
    bench.reach(job, "starting")
    bench.jobs.withdraw(job.id)
    assert bench.reach(job, *ENDED).state == "stopped"


def test_a_removed_folder_takes_its_failed_run_out_of_the_list(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "3")
    job = bench.reach(bench.enqueue(), *ENDED)
    assert [run.state for run in bench.runs.summaries()] == ["failed"]
    shutil.rmtree(job.run_dir)
    assert bench.restarted().runs.summaries() == []


def test_a_deaf_training_is_ended_in_three_steps(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    forever(monkeypatch)
    monkeypatch.setenv("FAKE_DEAF", "1")
    bench = Bench(bench.place.workspace, grace_s=0.3)
    job = bench.enqueue()
    bench.reach(job, "running")
    begun = time.monotonic()
    bench.jobs.stop(job.run, insist=False)
    assert bench.reach(job, *ENDED).state == "stopped"
    assert time.monotonic() - begun > 0.6
    assert bench.file(job, "stop.json")["sent"] == ["control/stop", "SIGTERM", "SIGKILL"]
    bench.supervisor.close()


def test_a_stop_that_was_swept_away_is_laid_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that begins empties its control/ when it has the lock."""
    forever(monkeypatch)
    monkeypatch.setenv("FAKE_DEAF", "1")
    job = bench.enqueue()
    bench.reach(job, "running")
    bench.jobs.stop(job.run, insist=False)
    for _ in range(2):
        bench.supervisor.look()
        (Path(job.run_dir) / "control" / "stop").unlink()
    assert bench.file(job, "stop.json")["sent"] == ["control/stop"]


def test_who_insists_does_not_wait(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    forever(monkeypatch)
    monkeypatch.setenv("FAKE_DEAF", "1")
    job = bench.enqueue()
    bench.reach(job, "running")
    bench.jobs.stop(job.run, insist=False)
    bench.supervisor.look()
    bench.jobs.stop(job.run, insist=True)
    assert bench.reach(job, *ENDED).state == "stopped"
    assert bench.file(job, "stop.json")["sent"] == ["control/stop", "SIGKILL"]


def test_before_there_is_a_run_folder_the_process_is_asked(bench: Bench, tmp_path: Path) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import time\nprint('loading', flush=True)\ntime.sleep(600)\n")
    bench.jobs._trainer = (sys.executable, str(slow))
    job = bench.enqueue()
    log = bench.jobs.folder / job.id / "output.log"
    until(lambda: log.exists() and "loading" in log.read_text(), "it loads", bench.supervisor.look)
    bench.jobs.stop(job.run, insist=False)
    assert bench.reach(job, *ENDED).state == "stopped"
    assert bench.file(job, "stop.json")["sent"] == ["SIGINT"]


def test_a_killed_server_leaves_the_training_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    forever(monkeypatch)
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(bench.place.workspace)], cwd=Path.cwd())
    until(lambda: any(job.state == "running" for job in bench.jobs.queue().jobs), "it runs")
    (job,) = bench.jobs.queue().jobs
    bench.supervisor.look()
    assert bench.supervisor._lock is None, "two servers do not both act"
    server.kill()
    server.wait()
    events = Path(job.run_dir) / "events.jsonl"
    size = events.stat().st_size
    until(lambda: events.stat().st_size > size + 2000, "it goes on")
    assert bench.state(job) == "running"
    bench.supervisor.look()
    bench.jobs.stop(job.run, insist=False)
    assert bench.reach(job, *ENDED).state == "stopped"


def test_what_ended_while_no_server_was_there(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEPS", "5")
    job = bench.enqueue()
    bench.supervisor.look()
    until((bench.jobs.folder / job.id / "exit.json").exists, "it ends by itself")
    until(lambda: not JobFolder(bench.jobs.folder / job.id).alive, "its runner too")
    later = bench.restarted()
    assert later.reach(job, *ENDED).state == "done"
    assert later.file(job, "end.json")["state"] == "done"
    later.supervisor.close()


def test_the_whole_group_killed_is_lost_and_can_be_resumed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    forever(monkeypatch)
    job = bench.enqueue(checkpoint_step_interval=5)
    until(lambda: [*Path(job.run_dir).glob("checkpoint-*")], "a checkpoint", bench.supervisor.look)
    os.killpg(bench.file(job, "state.json")["pid"], signal.SIGKILL)
    lost = bench.reach(job, *ENDED)
    assert (lost.state, lost.exit_code) == ("lost", None)
    assert "Resume" in lost.advice
    again = bench.jobs.resume(job.run, ResumeAsk())
    bench.reach(again, "running")


@pytest.mark.parametrize(
    ("how", "code", "options"),
    [("host", None, "base_model_precision"), ("cuda", 1, "gradient_checkpointing")],
)
def test_out_of_memory_is_told_with_what_to_change(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, how: str, code: int | None, options: str
) -> None:
    monkeypatch.setenv("FAKE_OOM", how)
    job = bench.reach(bench.enqueue(), *ENDED)
    assert (job.state, job.exit_code) == ("failed", code)
    assert "out of memory" in job.message
    assert options in job.advice
    assert any("step 10/" in line for line in job.last_lines)


def test_a_failure_holds_those_that_wait_unless_told_otherwise(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_FAIL", "3")
    first, second = bench.enqueue("one"), bench.enqueue("two")
    failed = bench.reach(first, *ENDED)
    assert (failed.state, failed.exit_code, failed.message) == ("failed", 3, "failed on request")
    assert bench.jobs.queue().paused
    for _ in range(3):
        bench.supervisor.look()
    assert bench.state(second) == "queued"
    bench.jobs.arrange(QueueWrite(paused=False, continue_on_error=True))
    third = bench.enqueue("three")
    bench.reach(second, "failed")
    bench.reach(third, "failed")
    assert not bench.jobs.queue().paused


def test_one_job_for_one_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forever(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setenv("FAKE_STEP_S", "0.05")
    bench = Bench(Path(os.path.realpath(tmp_path)), "cuda", "cuda")
    try:
        jobs = [bench.enqueue(name) for name in ("one", "two", "three")]
        rehearsal = bench.jobs.enqueue(JobAsk(draft=bench.draft(), kind="rehearse"))
        bench.supervisor.look()
        assert [bench.jobs.job(job.id).devices for job in jobs] == ["cuda:2", "cuda:5", "gpu"]
        begun = ("starting", "caching", "running")
        assert all(bench.state(job) in begun for job in jobs[:2])
        assert bench.state(jobs[2]) == "queued"
        assert bench.reach(rehearsal, *ENDED).state == "done", "it needs the processor only"
        until((bench.jobs.folder / jobs[1].id / "state.json").exists, "it has a process")
        trainer = bench.file(jobs[1], "state.json")["trainer"]
        environ = Path(f"/proc/{trainer}/environ").read_bytes().split(b"\0")
        assert b"CUDA_VISIBLE_DEVICES=5" in environ
        bench.jobs.stop(jobs[1].run, insist=True)
        bench.reach(jobs[1], "stopped")
        bench.supervisor.look()
        assert bench.jobs.job(jobs[2].id).devices == "cuda:5"
    finally:
        end_all(bench)


def test_a_run_that_was_started_by_hand_has_the_device(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEPS", "3")
    job = bench.enqueue()
    with RunFolder(bench.place.outputs / "by-hand") as folder:
        folder.write_config({})
        id = run_id(folder.path)
        until(lambda: bench.runs.summary(id).state == "starting", "it is seen")
        for _ in range(3):
            bench.supervisor.look()
        assert bench.state(job) == "queued"
        with pytest.raises(Refused, match="started elsewhere"):
            bench.jobs.stop(id, insist=True)
        bench.jobs.stop(id, insist=False)
        assert folder.take_control("stop")
    assert bench.reach(job, *ENDED).state == "done"


def test_the_environment_of_a_job() -> None:
    environ = {
        "PATH": "/bin",
        "SIMPLETUNER_SEED": "7",
        "SIMPLETUNER_OTHER": "x",
        "SIMPLETUNER_SERVER_TOKEN": "a secret of the server's",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    found = environment_of("cuda:1", environ)
    assert found["CUDA_VISIBLE_DEVICES"] == "1"
    assert "SIMPLETUNER_SEED" not in found, "the configuration is frozen"
    assert "SIMPLETUNER_SERVER_TOKEN" not in found
    assert (found["PATH"], found["SIMPLETUNER_OTHER"]) == ("/bin", "x")
    assert environment_of("cpu", environ)["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_device_sets() -> None:
    cards = [card("cuda"), card("cuda")]
    assert device_sets(cards, {}) == ("cuda:0", "cuda:1")
    assert device_sets(cards, {"CUDA_VISIBLE_DEVICES": "1"}) == ("cuda:1",)
    assert device_sets(cards, {"CUDA_VISIBLE_DEVICES": "GPU-8a, 3"}) == ("cuda:GPU-8a", "cuda:3")
    assert device_sets(cards, {"CUDA_VISIBLE_DEVICES": ""}) == ()
    assert device_sets([card("rocm")], {}) == ("cuda:0",)
    assert device_sets([card("mps")], {}) == ("mps",)
    assert device_sets([card("cpu")], {}) == ()


ADVICE = [*advice.CODES.values(), *advice.SIGNALS.values(), *(what for _, what in advice.PATTERNS)]


def test_advice_names_options_that_there_are() -> None:
    assert ADVICE
    for sentence in ADVICE:
        for word in re.findall(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b", sentence):
            assert word in catalog(), f"{word} in {sentence!r}"


def test_every_exit_code_has_its_advice() -> None:
    codes = {
        kind.exit_code
        for kind in SimpleTunerError.__subclasses__()
        if kind.__module__ == "simpletuner.errors"
    }
    assert codes - {1, 75} <= set(advice.CODES)


@pytest.mark.parametrize(
    ("line", "options"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "train_batch_size"),
        (
            "out of memory: 2.00 GiB was asked for, 1.2 GiB was free. Next: ...",
            "train_batch_size",
        ),
        ("RuntimeError: HIP out of memory. Tried to allocate", "train_batch_size"),
        ("RuntimeError: MPS backend out of memory (MPS allocated: 18.00 GB", "train_batch_size"),
        ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory", "base_model_precision"),
        ("OSError: [Errno 12] Cannot allocate memory", "base_model_precision"),
        ("terminate called after throwing an instance of 'std::bad_alloc'", "base_model_precision"),
        ("OSError: [Errno 28] No space left on device", "checkpoints_total_limit"),
    ],
)
def test_last_lines_are_recognised(line: str, options: str) -> None:
    found = advice.reason(1, None, ["step 3", line, "", "more"])
    assert found.message == line
    assert options in found.advice
    assert advice.reason(4, None, ["step 3", "loss is not finite"]).advice.startswith("Lower learning_rate")
    assert advice.reason(1, None, []).message == "ended with exit code 1"


def test_the_thread_works_by_itself(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_STEPS", "3")
    bench.supervisor.start()
    job = bench.enqueue()
    until(lambda: bench.state(job) == "done", "nobody looks but the thread")
    assert not held(Path(job.run_dir) / "run.lock")
    assert TRAINER[1].endswith("fake_trainer.py")


def test_a_leap_of_the_clock_shortens_no_grace(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop that slept, or was set right: the training has not had its time to save."""
    forever(monkeypatch)
    monkeypatch.setenv("FAKE_DEAF", "1")
    job = bench.enqueue()
    bench.reach(job, "running")
    bench.jobs.stop(job.run, insist=False)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 9000.0)
    for _ in range(3):
        bench.supervisor.look()
    assert bench.file(job, "stop.json")["sent"] == ["control/stop"]


def test_on_a_full_disk_a_training_can_be_stopped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    forever(monkeypatch)
    job = bench.enqueue()
    bench.reach(job, "running")

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jobfolder, "write_atomically", full)
    bench.jobs.stop(job.run, insist=False)
    until(lambda: not held(Path(job.run_dir) / "run.lock"), "it hears")


def test_one_folder_that_cannot_be_tended_does_not_keep_the_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_STEPS", "3")
    first = bench.enqueue("one")
    bench.supervisor.look()
    until(lambda: not JobFolder(bench.jobs.folder / first.id).alive, "it ends")
    (bench.jobs.folder / first.id / "end.json").mkdir()  # cannot be written
    second = bench.enqueue("two")

    def look() -> None:
        with suppress(OSError):
            bench.supervisor.look()

    until(lambda: bench.state(second) == "done", "the next one runs", look)


@pytest.mark.parametrize("content", ['{"t": "x"}', '{"t": null}', "[" * 9000, "{}"])
def test_an_odd_exit_of_a_run_takes_nothing_down(bench: Bench, content: str) -> None:
    job = bench.enqueue()
    Path(job.run_dir).mkdir(parents=True)
    (bench.jobs.folder / job.id / "runner.lock").write_text("")
    (Path(job.run_dir) / "exit.json").write_text(content)
    (bench.jobs.folder / job.id / "state.json").write_text("{}")
    (bench.jobs.folder / job.id / "exit.json").write_text("{}")
    assert [one.state for one in bench.jobs.queue().jobs] == ["failed"]


def test_a_full_disk_repeats_no_signal(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one would mean "at once"."""
    slow = tmp_path / "slow.py"
    slow.write_text("import time\nprint('loading', flush=True)\ntime.sleep(600)\n")
    bench.jobs._trainer = (sys.executable, str(slow))
    job = bench.enqueue()
    log = bench.jobs.folder / job.id / "output.log"
    until(lambda: log.exists() and "loading" in log.read_text(), "it loads", bench.supervisor.look)
    bench.jobs.stop(job.run, insist=False)
    sent: list[int] = []
    monkeypatch.setattr(JobFolder, "signal", lambda self, number: sent.append(number) or True)

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(jobfolder, "write_atomically", full)
        for _ in range(3):
            bench.supervisor.look()
    assert sent == [signal.SIGINT]
    monkeypatch.undo()


def test_a_run_goes_on_while_its_last_process_still_leaves(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page offers Resume as soon as the run has said how it ended; unloading may take seconds more."""
    monkeypatch.setenv("FAKE_LINGER_S", "2")
    job = bench.enqueue()
    bench.reach(job, "running")
    bench.jobs.stop(job.run, insist=False)
    until(lambda: bench.runs.summary(job.run).state == "stopped", "told", bench.supervisor.look)
    assert bench.state(job) not in ENDED, "the process is still there"
    again = bench.jobs.resume(job.run, ResumeAsk())
    assert bench.state(again) == "queued"
    assert bench.reach(again, "done").exit_code == 0


@pytest.mark.parametrize(("told", "state"), [(None, "stopped"), ("failed", "failed")])
def test_one_that_was_interrupted_while_it_loaded_is_stopped(
    bench: Bench, told: str | None, state: str
) -> None:
    """Python ends with code 1 and words of its own then; a failure is what the training itself calls one."""
    job = bench.enqueue()
    folder = bench.jobs.folder / job.id
    (folder / "runner.lock").write_text("")
    (folder / "state.json").write_text('{"started_t": 1.0}')
    (folder / "stop.json").write_text('{"t": 2.0, "insist": false, "sent": ["SIGINT"]}')
    (folder / "output.log").write_text("Fatal Python error: init_import_site\nKeyboardInterrupt\n")
    (folder / "exit.json").write_text('{"code": 1, "signal": null, "t": 3.0}')
    if told is not None:
        Path(job.run_dir).mkdir(parents=True)
        (Path(job.run_dir) / "exit.json").write_text(json.dumps({"status": told, "message": "", "t": 2.5}))
    assert bench.state(job) == state
