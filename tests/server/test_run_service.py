"""Runs: found, read where they grew, and in the state that their files add up to."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest

from simpletuner.events import event_types
from simpletuner.events.run_history import read_run_history
from simpletuner.server import event_summary, file_reader, job_service, run_finder
from simpletuner.server.api_errors import ApiError
from simpletuner.server.run_service import RunService
from simpletuner.server.schemas.base import JobState
from simpletuner.server.schemas.jobs import Job
from simpletuner.server.schemas.runs import RunSummary
from simpletuner.server.workspace import Workspace, run_id
from simpletuner.training import run_folder
from tests.quick import assert_quick
from tests.server.run_folder_writer import START_T, RunFolderWriter
from tests.unicode_names import needs_unicode_names


@pytest.fixture(autouse=True)
def _scans_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_finder, "RESCAN_INTERVAL_S", 0.0)


def job(
    run_dir: Path, state: JobState, started: float | None = START_T, ended: float | None = None
) -> Job:
    return Job(
        id="0123456789ab",
        run=run_id(run_dir),
        name="a job",
        kind="train",
        state=state,
        devices="cpu",
        queued_t=START_T,
        started_t=started,
        ended_t=ended,
        exit_code=None,
        message="said by the job",
        advice="",
        last_lines=[],
        run_dir=str(run_dir),
    )


class SomeJobs:
    def __init__(self, *jobs: Job) -> None:
        self.jobs = {one.run: one for one in jobs}

    def by_run(self) -> Mapping[str, Job]:
        return self.jobs


def only(workspace: Path, *jobs: Job) -> RunSummary:
    found = RunService(Workspace(workspace))
    found.set_job_lookup(SomeJobs(*jobs).by_run)
    (summary,) = found.summaries()
    return summary


def test_control_names_are_the_training_s() -> None:
    assert get_args(job_service.ControlFile) == run_folder.CONTROL_REQUESTS


# -- where runs are found


def test_runs_are_found_three_levels_deep_and_nowhere_else(tmp_path: Path) -> None:
    place, other = tmp_path / "workspace", tmp_path / "elsewhere"
    wanted = ["output/one", "a/b/c", "top", "output/one/inner"]
    unwanted = [
        "a/b/c/d",
        "datasets/x",
        "top/images/x",
        "top/checkpoint-5",
        "top/earlier-1",
        ".simpletuner/x",
        "node_modules/x",
        "top/cache/x",
    ]
    for name in (*wanted, *unwanted):
        RunFolderWriter(place / name).write_start()
    RunFolderWriter(other / "secret").write_start()
    (place / "link").symlink_to(other)
    (place / "starting").mkdir()
    (place / "starting" / "config.json").write_text("{}")
    assert {run.path for run in RunService(Workspace(place)).summaries()} == {
        str(place / name) for name in wanted
    }
    (place / "starting" / "run.lock").touch()
    found = RunService(Workspace(place, (other,))).summaries()
    added = {str(place / "starting"), str(other / "secret")}
    assert {run.path for run in found} == added | {str(place / name) for name in wanted}


def test_runs_come_and_go_while_folders_that_did_not_change_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_finder, "CLOCK_MARGIN_NS", -(10**12))
    for number in range(3):
        RunFolderWriter(tmp_path / "output" / str(number)).write_start()
    known, read = RunService(Workspace(tmp_path)), []
    real = run_finder.RunFinder._list_folder
    monkeypatch.setattr(
        run_finder.RunFinder,
        "_list_folder",
        lambda self, folder: read.append(folder) or real(self, folder),
    )
    known.summaries()
    assert len(read) == 5
    known.summaries()
    assert len(read) == 5, "nothing changed"
    time.sleep(0.02)
    RunFolderWriter(tmp_path / "output" / "new").write_start()
    assert [run.name for run in known.summaries()].count("new") == 1
    assert sorted(read[5:]) == [str(tmp_path / "output"), str(tmp_path / "output" / "new")]
    id = run_id(tmp_path / "output" / "new")
    assert known.find_folder(id) == tmp_path / "output" / "new"
    (tmp_path / "output" / "new").rename(tmp_path / ".gone")
    assert known.find_folder(id) is None
    with pytest.raises(ApiError) as refused:
        known.summary(id)
    assert refused.value.status == 404


def test_a_job_brings_the_folder_it_writes_to_unless_that_is_not_allowed(tmp_path: Path) -> None:
    place = tmp_path / "workspace"
    deep, outside = place / "a" / "b" / "c" / "d" / "e", tmp_path / "outside"
    for folder in (deep, outside):
        RunFolderWriter(folder).write_start().write_steps(1, 3)
    assert only(place, job(deep, "running")).step == 3
    assert only(place, job(outside, "queued", None)).step == 0
    known = RunService(Workspace(place))
    known.set_job_lookup(SomeJobs(job(outside, "queued", None)).by_run)
    assert known.find_folder(run_id(outside)) is None


def test_output_is_looked_through_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_finder, "MAX_FOLDERS", 20)
    for number in range(50):
        (tmp_path / "a" / str(number)).mkdir(parents=True)
    RunFolderWriter(tmp_path / "output" / "one").write_start()
    assert [run.name for run in RunService(Workspace(tmp_path)).summaries()] == ["one"]


# -- states


def test_the_state_while_a_process_works(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run")
    known = RunService(Workspace(tmp_path))

    def state() -> str:
        return known.summaries()[0].state

    run.events.touch()
    with run.hold_lock():
        assert state() == "starting"
        run.write_events(event_types.StageStarted("encode images", 10, "images"))
        run.write_events(event_types.StageProgress("encode images", 3, 10, 1.0, 7.0))
        summary = known.summaries()[0]
        assert summary.state == "caching"
        assert summary.stage is not None
        assert (summary.stage.done, summary.stage.total, summary.stage.unit) == (3, 10, "images")
        run.write_events(event_types.StageCompleted("encode images", 10, 9.0)).write_start()
        assert state() == "running"
        run.write_steps(1, 2)
        assert state() == "running"
        (run.path / "control" / "stop").touch()
        assert state() == "stopping"
        (run.path / "control" / "stop").unlink()
        run.write_events(event_types.RunFinished(2, 9.0, "stopped"))
        run.write_exit("stopped", 2, "as asked")
    summary = known.summaries()[0]
    assert (summary.state, summary.message, summary.step, summary.left_s) == (
        "stopped",
        "as asked",
        2,
        None,
    )


@pytest.mark.parametrize("ending", ["finished", "killed"])
def test_a_resumed_run_begins_again(tmp_path: Path, ending: str) -> None:
    """Also before its new process has told anything: run.lock is younger than the events."""
    run = RunFolderWriter(tmp_path / "run").write_start().write_steps(1, 20)
    if ending == "finished":
        run.write_events(event_types.RunFinished(20, 9.0, "stopped"))
    known = RunService(Workspace(tmp_path))
    assert known.summaries()[0].state == "lost"
    with run.hold_lock():
        os.utime(run.path / "run.lock", (run.next_event_t + 5, run.next_event_t + 5))
        assert known.summaries()[0].state == "starting"
        run.next_event_t += 100
        run.write_events(event_types.StageStarted("scan", 4, "pictures"))
        assert known.summaries()[0].state == "caching"
        assert known.summaries()[0].started_t == run.next_event_t - 2
        run.write_start(resumed=10)
        summary = known.summaries()[0]
        assert (summary.state, summary.step) == ("running", 10)
        assert known.detail(summary.id).stages_done == ["scan"]


@pytest.mark.parametrize("status", ["done", "stopped", "failed"])
def test_the_state_after_the_end(tmp_path: Path, status: str) -> None:
    RunFolderWriter(tmp_path / "run").write_start().write_steps(1, 5).write_exit(status, 5, "why")
    summary = only(tmp_path)
    assert (summary.state, summary.message) == (status, "why")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"status": 3, "t": "x", "message": 4}', '{"status": "odd"}']
)
def test_an_exit_that_says_nothing_is_no_end(tmp_path: Path, content: str) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start()
    (run.path / "exit.json").write_text(content)
    assert (only(tmp_path).state, only(tmp_path).message) == ("lost", "")


HOLD = """
import fcntl, sys, time
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def test_a_killed_process_is_lost_unless_its_job_knows_more(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start().write_steps(1, 5)
    known = RunService(Workspace(tmp_path))
    command = [sys.executable, "-c", HOLD, str(run.path / "run.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        os.utime(run.path / "run.lock", (START_T, START_T))
        assert known.summaries()[0].state == "running"
        process.kill()
    assert known.summaries()[0].state == "lost"
    for state in ("failed", "stopped", "lost"):
        summary = only(tmp_path, job(run.path, state, ended=run.next_event_t))
        assert (summary.state, summary.message, summary.job) == (
            state,
            "said by the job",
            "0123456789ab",
        )
    by_hand_since = only(tmp_path, job(run.path, "failed", START_T - 90, ended=START_T - 50))
    assert by_hand_since.state == "lost"


def test_the_younger_of_job_and_exit_is_believed(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start().write_steps(1, 5)
    run.write_exit("stopped", 5, "said by the run", t=run.next_event_t)
    assert only(tmp_path, job(run.path, "queued", None)).state == "queued"
    assert only(tmp_path, job(run.path, "starting", run.next_event_t + 1)).state == "starting"
    refused = only(tmp_path, job(run.path, "failed", run.next_event_t + 1, run.next_event_t + 2))
    assert (refused.state, refused.message) == ("failed", "said by the job")
    told = only(tmp_path, job(run.path, "running", run.next_event_t - 9))
    assert (told.state, told.message) == ("stopped", "said by the run")


def test_jobs_without_a_folder_are_runs_too(tmp_path: Path) -> None:
    RunFolderWriter(tmp_path / "output" / "old").write_start().write_exit()
    coming = job(tmp_path / "output" / "new", "queued", None)
    known = RunService(Workspace(tmp_path))
    known.set_job_lookup(SomeJobs(coming).by_run)
    first, second = known.summaries()
    assert (first.name, first.state, first.job, first.id) == (
        "new",
        "queued",
        coming.id,
        coming.run,
    )
    assert (second.name, second.state) == ("old", "done")
    assert known.find_folder(coming.run) is None
    assert known.summary(coming.run) == first
    detail = known.detail(coming.run)
    assert (detail.checkpoints, detail.config, detail.exit, detail.events_end) == ([], {}, None, 0)
    assert known.list_images(coming.run) == []


def test_a_free_lock_is_tried_once_and_not_again_before_something_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that starts in the instant of a trial would find its lock taken."""
    run = RunFolderWriter(tmp_path / "run").write_start()
    (run.path / "run.lock").touch()
    tried, real = [], fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda *of: tried.append(of) or real(*of))
    known = RunService(Workspace(tmp_path))
    for _ in range(5):
        assert known.summaries()[0].state == "lost"
    assert len(tried) == 1
    run.write_exit()
    assert known.summaries()[0].state == "done"
    assert len(tried) == 1, "a run that has said how it ended is not tried at all"
    (run.path / "exit.json").unlink()
    with run_folder.RunFolder(run.path):
        assert known.summaries()[0].state == "starting"
    assert len(tried) == 3  # its own, and that of the look
    assert known.summaries()[0].state == "lost"


# -- reading


def test_only_what_was_added_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start().write_steps(1, 50)
    known = RunService(Workspace(tmp_path))
    asked: list[int] = []
    real = file_reader.read_lines
    monkeypatch.setattr(
        file_reader,
        "read_lines",
        lambda path, since, limit: asked.append(since) or real(path, since, limit),
    )
    before = known.summaries()[0]
    size = run.events.stat().st_size
    assert known.summaries()[0] == before
    assert asked == [0]
    run.write_steps(51, 51)
    assert known.summaries()[0].step == 51
    assert asked == [0, size]


def test_a_long_run_agrees_with_its_whole_history(tmp_path: Path) -> None:
    """Steps are passed over while reading; what is shown is what reading every single one gives."""
    run = (
        RunFolderWriter(tmp_path / "run")
        .write_start(5000)
        .write_steps(1, 1500, 5000)
        .write_image(1000)
        .write_image(1500)
    )
    run.write_start(5000, resumed=1200).write_steps(1201, 3000, 5000)
    summary, history = only(tmp_path), read_run_history(run.path)
    assert (summary.step, summary.total_steps) == (max(history.steps), 5000)
    assert summary.loss == pytest.approx(history.steps[3000].loss)
    assert summary.picture == history.images[("red", 8, 8, 42, "trained"), 1000].path
    assert 20 <= len(summary.sparkline) <= 60
    assert summary.sparkline == sorted(summary.sparkline, reverse=True), (
        "as 1/step falls, so does its mean"
    )


def test_time_left_is_by_the_clock_of_the_recent_steps(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start(1000)
    run.write_steps(1, 100, 1000)
    run.next_event_t += 40  # pictures are drawn
    run.write_steps(101, 125, 1000)
    with run.hold_lock():
        assert only(tmp_path).left_s == pytest.approx((49 * 2 + 40) / 49 * 875)
        run.write_events(event_types.StageStarted("draw", 4, "pictures"))
        assert only(tmp_path).stage is not None
        run.write_steps(126, 126, 1000)
        assert only(tmp_path).stage is None
    assert only(tmp_path).left_s is None


def test_abandoned_steps_disappear(tmp_path: Path) -> None:
    run = (
        RunFolderWriter(tmp_path / "run")
        .write_start()
        .write_steps(1, 20, loss=lambda step: 1.0)
        .write_image(20)
    )
    run.write_steps(21, 40, loss=lambda step: 9.0).write_image(40)
    known = RunService(Workspace(tmp_path))
    assert max(known.summaries()[0].sparkline) > 4
    run.write_start(resumed=20)
    summary = known.summaries()[0]
    assert (summary.step, summary.loss, summary.sparkline) == (20, None, [1.0] * 20)
    assert [picture.step for picture in known.list_images(summary.id)] == [20]
    (resume,) = known.detail(summary.id).resumes
    assert (resume.step, resume.checkpoint, resume.repeated_steps) == (20, "checkpoint-20", 20)
    assert resume.t == run.next_event_t - 2
    run.write_steps(21, 25).write_start(resumed=25)
    assert [one.repeated_steps for one in known.detail(summary.id).resumes] == [20, 0]
    run.write_start()
    assert (known.summaries()[0].step, known.summaries()[0].sparkline) == (0, [])


def test_the_verdict_is_the_last_one_that_the_present_weights_descend_from(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start().write_steps(1, 40)
    known = RunService(Workspace(tmp_path))
    (summary,) = known.summaries()
    assert known.detail(summary.id).verdict is None
    learning = event_types.VerdictReached(20, "learning", 10, 20, 8, -0.02, 0.004)
    overfitting = event_types.VerdictReached(40, "overfitting", 20, 20, 8, 0.03, 0.005)
    run.write_events(learning, overfitting)
    found = known.detail(summary.id).verdict
    assert found is not None
    assert found.model_dump() == dataclasses.asdict(overfitting)
    run.write_start(resumed=20)
    assert known.detail(summary.id).verdict is None, "it was about steps that were abandoned"


def test_a_torn_line_a_shorter_file_and_another_one(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start().write_steps(1, 10)
    known = RunService(Workspace(tmp_path))
    whole = run.events.read_bytes()
    with run.events.open("ab") as file:
        file.write(b'{"t": 1, "kind": "step", "step": 11')
    assert known.summaries()[0].step == 10
    with run.events.open("ab") as file:
        file.write(b"\n")
    run.write_steps(12, 12)
    assert known.summaries()[0].step == 12
    run.events.write_bytes(whole[: len(whole) // 2])
    assert 0 < known.summaries()[0].step < 10
    run.events.write_bytes(b'{"t": 5, "kind": "noted", "message": "%s"}\n' % (b"x" * len(whole)))
    assert (known.summaries()[0].step, known.detail(known.summaries()[0].id).notes[0][:2]) == (
        0,
        "xx",
    )


@pytest.mark.parametrize(
    "line",
    [
        b"null",
        b"3",
        b"[" * 5000,
        b'"kind"',
        b'{"kind": "step"}',
        b'{"t": 1}',
        b'{"t": 1, "kind": []}',
        b'{"t": 1, "kind": "step", "step": "x", "total": 1, "epoch": 0, "loss": 1,'
        b' "learning_rate": 1,'
        b' "grad_norm": 1, "seconds": 1, "samples": 1}',
        b'{"t": 1, "kind": "run_started", "version": "", "run_dir": "", "model": "", "device": "",'
        b' "total_steps": null, "resumed_step": "3"}',
        b'{"t": 1, "kind": "noted", "message": "\\ud800"}',
        b'{"t": 1, "kind": "noted", "message": "\xff"}',
        b'{"t": 1, "kind": "noted", "message": NaN}',
        b"\0" * 100,
    ],
)
def test_no_line_takes_the_list_down(tmp_path: Path, line: bytes) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start()
    with run.events.open("ab") as file:
        file.write(line + b"\n")
    run.write_steps(1, 3)
    summary = only(tmp_path)
    assert summary.step == 3
    RunService(Workspace(tmp_path)).detail(summary.id).model_dump_json()


@needs_unicode_names
def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    RunFolderWriter(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))).write_start()
    assert json.loads(only(tmp_path).model_dump_json())["name"] == "caf?"


def test_links_in_a_run_folder_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"status": "done", "message": "secret", "learning_rate": 7.0}')
    run = RunFolderWriter(tmp_path / "workspace" / "run").write_start()
    for name in ("exit.json", "config.json"):
        (run.path / name).symlink_to(secret)
    known = RunService(Workspace(tmp_path / "workspace"))
    assert "secret" not in known.detail(known.summaries()[0].id).model_dump_json().replace(
        str(tmp_path), ""
    )


def test_detail(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start()
    run.write_events(event_types.NoticeIssued("a note"), event_types.WarningIssued("look at this"))
    for step, best in ((10, True), (20, True), (30, False)):
        run.write_events(event_types.LossEvaluated(step, "photos", "eval", 1.0, 0.0, 0.0, (), best))
        run.write_checkpoint(step)
    (run.path / "checkpoint-20" / "keep").touch()
    (run.path / "checkpoint-7").mkdir()
    (run.path / "checkpoint-x").mkdir()
    (run.path / "config.json").write_text(
        json.dumps({"learning_rate": 3.0, "seed": 42, "unheard_of": 1})
    )
    (run.path / "pytorch_lora_weights.safetensors").write_bytes(b"1234")
    known = RunService(Workspace(tmp_path))
    detail = known.detail(run_id(run.path))
    assert [(one.step, one.marked, one.best) for one in detail.checkpoints] == [
        (30, False, False),
        (20, True, True),
        (10, False, False),
    ]
    assert detail.checkpoints[0].files == ["manifest.json", "pytorch_lora_weights.safetensors"]
    assert detail.changed == {"learning_rate": 3.0}
    assert [(one.path, one.size_bytes) for one in detail.outputs] == [
        ("pytorch_lora_weights.safetensors", 4)
    ]
    assert (detail.notes, detail.problems, detail.model) == (
        ["a note"],
        ["look at this"],
        "chroma nano",
    )
    assert detail.events_end == run.events.stat().st_size


def test_detail_names_the_processes_of_the_last_start(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "run").write_start()
    known, run_name = RunService(Workspace(tmp_path)), run_id(run.path)
    assert known.detail(run_name).world is None
    world = event_types.RunWorld(4, "zero2", 99)
    run.write_events(event_types.RunStarted("", "", "m", "cpu", 9, 0, world))
    assert known.detail(run_name).model_dump()["world"] == dataclasses.asdict(world)


def test_fifty_long_runs_cost_next_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """25,000 steps each.

    The first looks read within their time, the later ones only ask for sizes.
    """
    long = RunFolderWriter(tmp_path / "output" / "0").write_start(25_000).write_many_steps(25_000)
    for number in range(1, 50):
        folder = tmp_path / "output" / str(number)
        folder.mkdir()
        os.link(long.events, folder / "events.jsonl")
    monkeypatch.setattr(run_finder, "RESCAN_INTERVAL_S", 1000.0)
    parsed: list[bytes] = []
    real = file_reader.parse_record
    monkeypatch.setattr(file_reader, "parse_record", lambda line: parsed.append(line) or real(line))
    known = RunService(Workspace(tmp_path))
    deadline = time.monotonic() + 120
    while not all(run.step == 25_000 for run in known.summaries()):
        assert time.monotonic() < deadline
    readings = long.events.stat().st_size // file_reader.MAX_READ_BYTES + 1
    assert len(parsed) <= 50 * readings * (
        2 * event_summary.MAX_SAMPLED_STEPS + event_summary.SPEED_WINDOW_STEPS + 10
    )
    assert len(parsed) < 50 * 25_000 / 5
    # 2 ms each where nothing else runs.
    assert_quick(lambda: [known.summaries() for _ in range(10)], 0.5)


def test_a_failure_is_told_once_and_not_after_a_successful_resume(tmp_path: Path) -> None:
    """The state and its message tell of it; the list of warnings is for what needs attention."""
    run = RunFolderWriter(tmp_path / "run").write_start()
    run.write_events(event_types.WarningIssued("look"), event_types.RunFailed(0, "no captions", 3))
    known, id = RunService(Workspace(tmp_path)), run_id(run.path)
    assert known.detail(id).problems == ["look"]
    run.write_start().write_steps(1, 2)
    assert known.detail(id).problems == ["look"]


def test_the_documents_and_the_datasets_of_a_run(tmp_path: Path) -> None:
    run = RunFolderWriter(tmp_path / "output" / "run").write_start()
    photos = tmp_path / "datasets" / "photos"
    photos.mkdir(parents=True)
    sets = tmp_path / "sets.json"
    sets.write_text(json.dumps([{"id": "x", "instance_data_dir": str(photos)}]))
    (run.path / "config.json").write_text(json.dumps({"data_backend_config": str(sets)}))
    (run.path / "report.html").write_text("<p>")
    (run.path / "README.md").write_text("# LoRA")
    detail = RunService(Workspace(tmp_path)).detail(run_id(run.path))
    assert [one.path for one in detail.documents] == ["report.html", "README.md"]
    assert detail.datasets == ["photos"]
