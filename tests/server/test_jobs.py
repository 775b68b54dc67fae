"""Queueing: frozen configurations, order, one job per run folder; an index that may be lost at any time."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from simpletuner.server.frozen import folder_name
from simpletuner.server.index import Index, Order, journal_mode
from simpletuner.server.place import run_id
from simpletuner.server.refusal import Refused
from simpletuner.server.wire.configs import DraftWrite
from simpletuner.server.wire.jobs import JobAsk, Queue, QueueWrite
from simpletuner.server.wire.runs import ResumeAsk
from tests.server.bench import TRAINER, Bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(Path(os.path.realpath(tmp_path)))


def queued(bench: Bench) -> list[str]:
    return [job.id for job in bench.jobs.queue().jobs if job.state == "queued"]


def run_folder(bench: Bench, name: str, **config: object) -> Path:
    """As a training that was started by hand leaves one."""
    folder = bench.place.outputs / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"data_backend_config": bench.by_hand(), **config}))
    (folder / "events.jsonl").write_text("")
    (folder / "run.lock").write_text("")
    return folder


def test_the_configuration_is_frozen(bench: Bench) -> None:
    id = bench.draft("zorbo", learning_rate=1e-4)
    job = bench.jobs.enqueue(JobAsk(draft=id))
    wanted = bench.drafts.get(id).model_dump(include={"name", "config", "datasets", "version"})

    bench.drafts.write(
        id, DraftWrite(**{**wanted, "config": {"model_flavour": "nano", "learning_rate": 9e-4}})
    )
    config = bench.file(job, "config/config.json")
    folder, workspace = bench.jobs.folder / job.id, bench.place.workspace
    assert config == {
        "model_flavour": "nano",
        "learning_rate": 1e-4,
        "output_dir": str(workspace / "output" / "zorbo"),
        "data_backend_config": str(folder / "config" / "multidatabackend.json"),
    }
    sets = bench.file(job, "config/multidatabackend.json")
    assert sets == [{"id": "photos", "instance_data_dir": str(workspace / "datasets" / "photos")}]
    argv = bench.file(job, "job.json")["argv"]
    assert argv == [*TRAINER, "--config", str(folder / "config" / "config.json")]
    assert (job.state, job.run) == ("queued", run_id(workspace / "output" / "zorbo"))
    assert bench.jobs.by_run()[job.run] == job


@pytest.mark.parametrize("name", ["-rf", "--config=x", "$(touch pwned)", "a; b", "x" * 80, "ärger ünd süßes"])
def test_names_are_harmless(bench: Bench, name: str) -> None:
    job = bench.enqueue(name)
    argv, run_dir = bench.file(job, "job.json")["argv"], Path(job.run_dir)
    assert name not in argv
    assert run_dir.parent == bench.place.outputs
    assert run_dir.name == folder_name(name)
    assert run_dir.name[0] not in "-."
    assert len(os.fsencode(run_dir.name)) <= 255
    assert not any(character in run_dir.name for character in " ;$(/")


def test_a_folder_outside_is_refused_by_its_option(bench: Bench) -> None:
    for where in ("/etc/zorbo", "../../zorbo", ".", ".simpletuner/jobs/x"):
        with pytest.raises(Refused) as caught:
            bench.enqueue(output_dir=where)
        assert caught.value.status == 422
        assert {complaint.loc for complaint in caught.value.complaints} == {"output_dir"}
    outside = bench.draft(datasets=[{"id": "photos", "instance_data_dir": "/etc"}])
    with pytest.raises(Refused):
        bench.jobs.enqueue(JobAsk(draft=outside))
    assert queued(bench) == []


def test_what_the_reader_refuses_is_not_queued(bench: Bench) -> None:
    with pytest.raises(Refused) as caught:
        bench.enqueue(learning_rate="much")
    assert caught.value.status == 422
    assert caught.value.complaints[0].loc == "learning_rate"
    assert queued(bench) == []


def test_one_job_for_one_run_folder(bench: Bench) -> None:
    bench.enqueue()
    with pytest.raises(Refused, match="already has a job that is queued") as caught:
        bench.enqueue()
    assert caught.value.status == 409
    bench.enqueue(output_dir="output/another")
    rehearsal = bench.jobs.enqueue(JobAsk(draft=bench.draft(), kind="rehearse"))
    assert (rehearsal.run, rehearsal.run_dir, rehearsal.devices) == ("", "", "cpu")
    assert bench.file(rehearsal, "job.json")["argv"][-1] == "--rehearse"


def test_order_and_withdrawal(bench: Bench) -> None:
    first, second, third = (bench.enqueue(name).id for name in ("one", "two", "three"))
    assert queued(bench) == [first, second, third]
    bench.jobs.arrange(QueueWrite(order=[third, first, second]))
    assert queued(bench) == [third, first, second]
    for wrong in ([third, first], [third, first, first], [third, first, "0" * 12]):
        with pytest.raises(Refused) as caught:
            bench.jobs.arrange(QueueWrite(order=wrong))
        assert caught.value.status == 409
    bench.jobs.withdraw(first)
    assert queued(bench) == [third, second]
    assert [path.name for path in bench.place.own.glob("trash/*/job-*")] == [f"job-{first}"], (
        "kept in the trash"
    )
    with pytest.raises(Refused) as caught:
        bench.jobs.withdraw(first)
    assert caught.value.status == 404


@pytest.mark.parametrize("id", ["", "..", "../../../etc", "A" * 12, "0" * 13, "0" * 12, "x\0y"])
def test_ids_are_checked(bench: Bench, id: str) -> None:
    for ask in (bench.jobs.job, bench.jobs.withdraw):
        with pytest.raises(Refused) as caught:
            ask(id)
        assert caught.value.status == 404
    with pytest.raises(Refused) as caught:
        bench.jobs.resume(id, ResumeAsk())
    assert caught.value.status == 404


def three_in_another_order(bench: Bench) -> Queue:
    ids = [bench.enqueue(name).id for name in ("one", "two", "three")][::-1]
    bench.jobs.arrange(QueueWrite(order=ids, paused=True, continue_on_error=True))
    return bench.jobs.queue()


@pytest.mark.parametrize("harm", ["deleted", "emptied", "overwritten", "torn", "another version"])
def test_the_index_is_made_again(bench: Bench, harm: str) -> None:
    before, path = three_in_another_order(bench), bench.place.own / "index.sqlite"
    bench.jobs.index.close()
    content = path.read_bytes()
    if harm == "another version":
        with sqlite3.connect(path) as index:
            index.execute("PRAGMA user_version = 7")
        index.close()
    elif harm == "deleted":
        path.unlink()
    else:
        harms = {"emptied": b"", "overwritten": b"nonsense" * 2000, "torn": content[: len(content) // 2]}
        path.write_bytes(harms[harm])
    assert bench.restarted().jobs.queue() == before


def test_a_server_that_runs_makes_its_index_again(bench: Bench) -> None:
    before = three_in_another_order(bench)
    for file in bench.place.own.glob("index.sqlite*"):
        file.unlink()
    assert bench.jobs.queue() == before
    bench.jobs.arrange(QueueWrite(paused=False))
    assert bench.jobs.queue().paused is False
    assert Bench(bench.place.workspace).jobs.queue() == bench.jobs.queue()


def test_a_lost_second_home_is_no_loss_either(bench: Bench) -> None:
    ids = [bench.enqueue(name).id for name in ("one", "two")][::-1]
    bench.jobs.arrange(QueueWrite(order=ids, paused=True))
    for content in (None, "{half"):
        (bench.place.own / "queue.json").unlink()
        if content:
            (bench.place.own / "queue.json").write_text(content)
        assert queued(bench.restarted()) == ids
        bench.jobs.arrange(QueueWrite(paused=True))


def test_without_both_the_folders_are_enough(bench: Bench) -> None:
    ids = [bench.enqueue(name).id for name in ("one", "two")]
    for file in bench.place.own.glob("index.sqlite*"):
        file.unlink()
    (bench.place.own / "queue.json").unlink()
    assert queued(bench.restarted()) == ids, "in the order in which they came"


def test_half_a_folder_is_no_job(bench: Bench) -> None:
    job = bench.enqueue()
    for id, content in {"0" * 12: "{", "1" * 12: "{}", "2" * 12: '{"argv": [], "odd": 1}'}.items():
        (bench.jobs.folder / id).mkdir()
        (bench.jobs.folder / id / "job.json").write_text(content)
    (bench.jobs.folder / ("3" * 12)).mkdir()
    assert queued(bench) == [job.id]


def test_write_ahead_only_on_local_disks(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    rows = ("/ ext4", "/net nfs4", "/share cifs", "/cloud fuse.mfs", "/with\\040space xfs", "/odd newfs")
    lines = (f"2{at} 1 8:1 / {row.split()[0]} rw - {row.split()[1]} dev rw" for at, row in enumerate(rows))
    mounts.write_text("\n".join(lines) + "\n")
    assert journal_mode(Path("/home/a"), mounts) == "WAL"
    assert journal_mode(Path("/with space/a"), mounts) == "WAL"
    for folder in ("/net/a", "/share", "/cloud/x/y", "/odd"):
        assert journal_mode(Path(folder), mounts) == "DELETE", folder
    assert journal_mode(tmp_path, tmp_path / "none") == "DELETE"
    index = Index(tmp_path)
    index.write_order(Order(("a",)))
    with sqlite3.connect(tmp_path / "index.sqlite") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone()[0].upper() == journal_mode(tmp_path)
    connection.close()


def test_resume_of_a_run_that_was_started_by_hand(bench: Bench) -> None:
    folder = run_folder(
        bench, "hand", output_dir="elsewhere", num_train_epochs=3, max_train_steps=None,
        webhook_config={"url": "***"}, resume_from_checkpoint="never",
    )  # fmt: skip
    job = bench.jobs.resume(run_id(folder), ResumeAsk(max_train_steps=50))
    assert job.message.startswith("webhook_config is left out: it sends what happens to an address")
    config = bench.file(job, "config/config.json")
    assert config == {
        "output_dir": str(folder), "max_train_steps": 50, "resume_from_checkpoint": "latest",
        "data_backend_config": str(bench.jobs.folder / job.id / "config" / "multidatabackend.json"),
    }  # fmt: skip
    (one,) = bench.file(job, "config/multidatabackend.json")
    assert one["instance_data_dir"] == str(bench.place.datasets / "photos")


def test_resume_from_a_checkpoint_by_its_name(bench: Bench) -> None:
    folder = run_folder(bench, "hand")
    (folder / "checkpoint-20").mkdir()
    for wrong in ("checkpoint-21", "..", "../hand/checkpoint-20", "/etc", "checkpoint-20/", ""):
        with pytest.raises(Refused) as caught:
            bench.jobs.resume(run_id(folder), ResumeAsk(checkpoint=wrong))
        assert [complaint.loc for complaint in caught.value.complaints] == ["checkpoint"]
    with pytest.raises(Refused) as caught:
        bench.jobs.resume(run_id(folder), ResumeAsk(max_train_steps=0))
    job = bench.jobs.resume(run_id(folder), ResumeAsk(checkpoint="checkpoint-20"))
    assert bench.file(job, "config/config.json")["resume_from_checkpoint"] == "checkpoint-20"


def test_a_run_that_is_done_needs_more_steps(bench: Bench) -> None:
    folder = run_folder(bench, "hand", max_train_steps=5)
    (folder / "exit.json").write_text(
        json.dumps({"exit_code": 0, "status": "done", "step": 5, "message": "", "t": 9.0})
    )
    for ask in (ResumeAsk(),):
        with pytest.raises(Refused, match="done at step") as caught:
            bench.jobs.resume(run_id(folder), ask)
    assert caught.value.complaints[0].loc == "max_train_steps"
    assert bench.jobs.resume(run_id(folder), ResumeAsk(max_train_steps=10)).state == "queued"


def test_a_resume_below_its_checkpoint_is_refused(bench: Bench) -> None:
    folder = run_folder(bench, "hand", max_train_steps=500)
    for step in (200, 400):
        (folder / f"checkpoint-{step}").mkdir()
    for ask in (
        ResumeAsk(max_train_steps=399),
        ResumeAsk(max_train_steps=199, checkpoint="checkpoint-200"),
    ):
        with pytest.raises(Refused, match="is at step") as caught:
            bench.jobs.resume(run_id(folder), ask)
        assert [complaint.loc for complaint in caught.value.complaints] == ["max_train_steps"]
    assert queued(bench) == []
    allowed = ResumeAsk(max_train_steps=200, checkpoint="checkpoint-200")
    assert bench.jobs.resume(run_id(folder), allowed).state == "queued"


def test_options_are_frozen_by_their_own_names(bench: Bench) -> None:
    """Another spelling would meet the server's own word for it in the file, and be refused there."""
    job = bench.enqueue(**{"--output-dir": "output/other", "network-rank": 8})
    config = bench.file(job, "config/config.json")
    assert config["output_dir"] == str(bench.place.outputs / "other")
    assert set(config) == {"model_flavour", "lora_rank", "output_dir", "data_backend_config"}


def test_a_config_by_hand_is_not_written_over(bench: Bench) -> None:
    mine = bench.place.workspace / "config" / "fox"
    mine.mkdir(parents=True)
    (mine / "config.json").write_text("{}")
    with pytest.raises(Refused, match="is no run") as caught:
        bench.enqueue(output_dir="config/fox")
    assert [complaint.loc for complaint in caught.value.complaints] == ["output_dir"]
    (mine / "run.lock").write_text("")
    assert bench.enqueue(output_dir="config/fox").state == "queued", "a run's own is"


def test_a_clock_that_went_back_hides_no_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(bench, "hand")
    first = bench.jobs.resume(run_id(folder), ResumeAsk())
    path = bench.jobs.folder / first.id / "end.json"
    path.write_text(first.model_copy(update={"state": "stopped", "queued_t": 9e9}).model_dump_json())
    again = bench.jobs.resume(run_id(folder), ResumeAsk())
    assert bench.jobs.by_run()[again.run].id == again.id
    with pytest.raises(Refused, match="already has a job"):
        bench.jobs.resume(run_id(folder), ResumeAsk())


def test_a_done_run_whose_folder_was_removed_is_gone(bench: Bench) -> None:
    job = bench.enqueue()
    (bench.jobs.folder / job.id / "end.json").write_text(
        job.model_copy(update={"state": "done", "ended_t": 5.0}).model_dump_json()
    )
    assert bench.runs.summaries() == []


def test_results_of_a_run_are_not_trained_over_unasked(bench: Bench) -> None:
    """Found when the draft is queued, not by a training that has loaded everything."""
    folder = bench.place.outputs / "zorbo"
    for result in ("checkpoint-20/manifest.json", "pytorch_lora_weights.safetensors"):
        (folder / result).parent.mkdir(parents=True, exist_ok=True)
        (folder / result).write_text("{}")
        for named, loc in (({}, "name"), ({"output_dir": "output/zorbo"}, "output_dir")):
            for resume in ({}, {"resume_from_checkpoint": "latest"}):
                with pytest.raises(Refused, match="holds the results of a run already") as caught:
                    bench.enqueue(**named, **resume)
                (complaint,) = caught.value.complaints
                assert (caught.value.status, complaint.loc) == (422, loc)
                assert "never moves them aside" in complaint.message
                assert "checkpoint-20 goes on" in complaint.message
    rehearsal = bench.jobs.enqueue(JobAsk(draft=bench.draft(), kind="rehearse"))
    assert rehearsal.state == "queued", "it writes nothing there"
    assert bench.enqueue("zorbo 2").run_dir == f"{folder}-2"
    said = bench.enqueue(resume_from_checkpoint="checkpoint-20")
    assert bench.file(said, "config/config.json")["resume_from_checkpoint"] == "checkpoint-20"
    bench.jobs.withdraw(said.id)
    assert bench.enqueue(resume_from_checkpoint="never").run_dir == str(folder)


def test_a_failed_run_without_results_may_be_queued_again(bench: Bench) -> None:
    run_folder(bench, "zorbo")
    assert bench.enqueue().state == "queued"


HOOK = {"url": "https://evil.example/hook"}


@pytest.mark.parametrize("hook", [HOOK, [HOOK], "hooks.json"])
def test_a_run_folder_from_elsewhere_brings_no_hook(bench: Bench, hook: object) -> None:
    """Copied in, its config.json may say anything: nothing that no page can set is taken from it."""
    folder = run_folder(bench, "copied", webhook_config=hook)
    job = bench.jobs.resume(run_id(folder), ResumeAsk())
    frozen = "".join(path.read_text() for path in (bench.jobs.folder / job.id).rglob("*.json"))
    assert "webhook" not in frozen
    assert "evil.example" not in frozen
    assert "webhook_config is left out" in job.message


@pytest.mark.parametrize(
    ("config", "sets", "loc"),
    [
        ({"cache_dir": "/etc/simpletuner"}, None, "cache_dir"),
        ({"pretrained_model_name_or_path": "/etc"}, None, "pretrained_model_name_or_path"),
        ({"instance_prompt": "{env:HF_TOKEN}"}, None, "instance_prompt"),
        ({"data_backend_config": "/etc/passwd"}, None, "data_backend_config"),
        ({}, [{"id": "photos", "instance_data_dir": "/etc"}], "photos.instance_data_dir"),
        (
            {},
            [{"id": "photos", "instance_data_dir": "../datasets/photos", "instance_prompt": "{env:X}"}],
            "photos.instance_prompt",
        ),
        ({}, [{"id": "photos", "instance_data_dir": "../datasets/gone"}], "photos.instance_data_dir"),
    ],
)
def test_a_run_folder_from_elsewhere_is_read_as_a_draft_is(
    bench: Bench, config: dict[str, object], sets: list[object] | None, loc: str
) -> None:
    folder = run_folder(bench, "copied", **config)
    if sets is not None:
        Path(bench.place.workspace / "config" / "multidatabackend.json").write_text(json.dumps(sets))
    with pytest.raises(Refused) as caught:
        bench.jobs.resume(run_id(folder), ResumeAsk())
    assert [complaint.loc for complaint in caught.value.complaints] == [loc]
    assert queued(bench) == []


def test_a_pipe_in_the_place_of_the_datasets_is_not_waited_for(bench: Bench) -> None:
    folder = run_folder(bench, "copied")
    file = bench.place.workspace / "config" / "multidatabackend.json"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(Refused, match="there is no such file"):
        bench.jobs.resume(run_id(folder), ResumeAsk())


@pytest.mark.parametrize("state", ["stopped", "failed", "lost", "done"])
def test_a_run_whose_folder_was_removed_is_gone(bench: Bench, state: str) -> None:
    folder = run_folder(bench, "hand")
    job = bench.jobs.resume(run_id(folder), ResumeAsk())
    ended = job.model_copy(update={"state": state, "ended_t": 5.0, "begun": True})
    (bench.jobs.folder / job.id / "end.json").write_text(ended.model_dump_json())
    assert [run.id for run in bench.runs.summaries()] == [job.run]
    shutil.rmtree(folder)
    bench = bench.restarted()
    assert bench.runs.summaries() == []
    with pytest.raises(Refused, match="no such run"):
        bench.runs.summary(job.run)
    assert bench.enqueue("hand").run == job.run, "its name is free again"


def test_a_training_that_failed_before_it_made_its_folder_is_listed(bench: Bench) -> None:
    job = bench.enqueue()
    failed = job.model_copy(update={"state": "failed", "ended_t": 5.0, "message": "no such device"})
    (bench.jobs.folder / job.id / "end.json").write_text(failed.model_dump_json())
    (run,) = bench.runs.summaries()
    assert (run.state, run.message, run.begun) == ("failed", "no such device", False)
    bench.jobs.withdraw(job.id)
    assert bench.runs.summaries() == bench.jobs.queue().jobs == []


def test_a_run_with_a_folder_is_not_withdrawn(bench: Bench) -> None:
    job = bench.jobs.resume(run_id(run_folder(bench, "hand")), ResumeAsk())
    ended = job.model_copy(update={"state": "failed", "ended_t": 5.0, "begun": True})
    (bench.jobs.folder / job.id / "end.json").write_text(ended.model_dump_json())
    with pytest.raises(Refused, match="remove the run folder"):
        bench.jobs.withdraw(job.id)
