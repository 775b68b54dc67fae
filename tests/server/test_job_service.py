"""Queueing: frozen configurations, order, one job per run folder, and the loss of files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from simpletuner.config.output_folder import RUN_MARKER
from simpletuner.server.api_errors import ApiError
from simpletuner.server.job_config import run_folder_name
from simpletuner.server.job_folder import JobFolder
from simpletuner.server.schemas.configs import DraftWrite, PromptEntry
from simpletuner.server.schemas.jobs import JobRequest, Queue, QueueWrite
from simpletuner.server.schemas.runs import ResumeRequest
from simpletuner.server.workspace import run_id
from tests.server.queue_harness import FAKE_TRAIN_COMMAND, QueueHarness


@pytest.fixture
def harness(tmp_path: Path) -> QueueHarness:
    return QueueHarness(Path(os.path.realpath(tmp_path)))


def queued(bench: QueueHarness) -> list[str]:
    return [job.id for job in bench.jobs.get_queue().jobs if job.state == "queued"]


def run_folder(bench: QueueHarness, name: str, **config: object) -> Path:
    """As a training that was started by hand leaves one."""
    folder = bench.workspace.output_dir / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"data_backend_config": bench.write_dataset_file(), **config})
    )
    (folder / "events.jsonl").write_text("")
    (folder / "run.lock").write_text("")
    return folder


def test_the_configuration_is_frozen(harness: QueueHarness) -> None:
    id = harness.create_draft("zorbo", learning_rate=1e-4)
    job = harness.jobs.enqueue(JobRequest(draft=id))
    wanted = harness.drafts.get(id).model_dump(include={"name", "config", "datasets", "version"})

    harness.drafts.update(
        id, DraftWrite(**{**wanted, "config": {"model_flavour": "nano", "learning_rate": 9e-4}})
    )
    config = harness.read_job_file(job, "config/config.json")
    folder, workspace = harness.jobs.jobs_dir / job.id, harness.workspace.root
    assert config == {
        "model_flavour": "nano",
        "learning_rate": 1e-4,
        "output_dir": str(workspace / "output" / "zorbo"),
        "data_backend_config": str(folder / "config" / "multidatabackend.json"),
    }
    sets = harness.read_job_file(job, "config/multidatabackend.json")
    assert sets == [{"id": "photos", "instance_data_dir": str(workspace / "datasets" / "photos")}]
    argv = harness.read_job_file(job, "job.json")["argv"]
    assert argv == [*FAKE_TRAIN_COMMAND, "--config", str(folder / "config" / "config.json")]
    assert (job.state, job.run) == ("queued", run_id(workspace / "output" / "zorbo"))
    assert harness.jobs.newest_by_run()[job.run] == job


@pytest.mark.parametrize(
    "name", ["-rf", "--config=x", "$(touch pwned)", "a; b", "x" * 80, "ärger ünd süßes"]
)
def test_names_are_harmless(harness: QueueHarness, name: str) -> None:
    job = harness.enqueue(name)
    argv, run_dir = harness.read_job_file(job, "job.json")["argv"], Path(job.run_dir)
    assert name not in argv
    assert run_dir.parent == harness.workspace.output_dir
    assert run_dir.name == run_folder_name(name)
    assert run_dir.name[0] not in "-."
    assert len(os.fsencode(run_dir.name)) <= 255
    assert not any(character in run_dir.name for character in " ;$(/")


def test_a_folder_outside_is_refused_by_its_option(harness: QueueHarness) -> None:
    for where in ("/etc/zorbo", "../../zorbo", ".", ".simpletuner/jobs/x"):
        with pytest.raises(ApiError) as caught:
            harness.enqueue(output_dir=where)
        assert caught.value.status == 422
        assert {complaint.loc for complaint in caught.value.details} == {"output_dir"}
    outside = harness.create_draft(datasets=[{"id": "photos", "instance_data_dir": "/etc"}])
    with pytest.raises(ApiError):
        harness.jobs.enqueue(JobRequest(draft=outside))
    assert queued(harness) == []


def test_what_the_reader_refuses_is_not_queued(harness: QueueHarness) -> None:
    with pytest.raises(ApiError) as caught:
        harness.enqueue(learning_rate="much")
    assert caught.value.status == 422
    assert caught.value.details[0].loc == "learning_rate"
    assert queued(harness) == []


def test_one_job_for_one_run_folder(harness: QueueHarness) -> None:
    harness.enqueue()
    with pytest.raises(ApiError, match="already has a job that is queued") as caught:
        harness.enqueue()
    assert caught.value.status == 409
    harness.enqueue(output_dir="output/another")
    rehearsal = harness.jobs.enqueue(JobRequest(draft=harness.create_draft(), kind="rehearse"))
    assert (rehearsal.run, rehearsal.run_dir, rehearsal.devices) == ("", "", "cpu")
    assert harness.read_job_file(rehearsal, "job.json")["argv"][-1] == "--rehearse"


def test_order_and_withdrawal(harness: QueueHarness) -> None:
    first, second, third = (harness.enqueue(name).id for name in ("one", "two", "three"))
    assert queued(harness) == [first, second, third]
    harness.jobs.update_queue(QueueWrite(order=[third, first, second]))
    assert queued(harness) == [third, first, second]
    for wrong in ([third, first], [third, first, first], [third, first, "0" * 12]):
        with pytest.raises(ApiError) as caught:
            harness.jobs.update_queue(QueueWrite(order=wrong))
        assert caught.value.status == 409
    harness.jobs.cancel(first)
    assert queued(harness) == [third, second]
    assert [path.name for path in harness.workspace.server_dir.glob("trash/*/job-*")] == [
        f"job-{first}"
    ], "kept in the trash"
    with pytest.raises(ApiError) as caught:
        harness.jobs.cancel(first)
    assert caught.value.status == 404


@pytest.mark.parametrize("id", ["", "..", "../../../etc", "A" * 12, "0" * 13, "0" * 12, "x\0y"])
def test_ids_are_checked(harness: QueueHarness, id: str) -> None:
    for ask in (harness.jobs.get_job, harness.jobs.cancel):
        with pytest.raises(ApiError) as caught:
            ask(id)
        assert caught.value.status == 404
    with pytest.raises(ApiError) as caught:
        harness.jobs.resume(id, ResumeRequest())
    assert caught.value.status == 404


def three_in_another_order(bench: QueueHarness) -> Queue:
    ids = [bench.enqueue(name).id for name in ("one", "two", "three")][::-1]
    bench.jobs.update_queue(QueueWrite(order=ids, paused=True, continue_on_error=True))
    return bench.jobs.get_queue()


def test_the_order_survives_the_loss_of_its_file(harness: QueueHarness) -> None:
    before = three_in_another_order(harness)
    path = harness.workspace.server_dir / "queue.json"
    for content in (None, b"", b"{half", b"nonsense" * 2000, b"\xff\xfe", b"[]"):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        assert harness.jobs.get_queue() == before, "of the server that runs"
        assert harness.restart().jobs.get_queue() == before, "of the next one"
        harness.jobs.update_queue(QueueWrite(paused=True))


def test_the_order_survives_the_loss_of_its_backup(harness: QueueHarness) -> None:
    before = three_in_another_order(harness)
    (harness.workspace.server_dir / "queue.backup.json").unlink()
    assert harness.restart().jobs.get_queue() == before


def test_without_both_files_the_folders_are_enough(harness: QueueHarness) -> None:
    ids = [harness.enqueue(name).id for name in ("one", "two")]
    for file in harness.workspace.server_dir.glob("queue*.json"):
        file.unlink()
    assert queued(harness.restart()) == ids, "in the order in which they came"


def test_a_workspace_with_an_index_of_an_older_version_opens(harness: QueueHarness) -> None:
    before = three_in_another_order(harness)
    (harness.workspace.server_dir / "queue.backup.json").unlink()
    (harness.workspace.server_dir / "index.sqlite").write_bytes(b"SQLite format 3\0")
    assert harness.restart().jobs.get_queue() == before


def test_two_servers_see_each_others_changes(harness: QueueHarness) -> None:
    three_in_another_order(harness)
    other = QueueHarness(harness.workspace.root)
    harness.jobs.update_queue(QueueWrite(paused=False))
    assert other.jobs.get_queue().paused is False
    first = queued(other)[0]
    other.jobs.cancel(first)
    assert first not in queued(harness)
    assert other.jobs.get_queue() == harness.jobs.get_queue()


def test_ended_jobs_are_read_once_and_leave_with_their_folders(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = harness.enqueue()
    folder = harness.jobs.jobs_dir / job.id
    ended = job.model_copy(update={"state": "done", "ended_t": 1.0})
    (folder / "end.json").write_text(ended.model_dump_json())
    read: list[str] = []
    real = JobFolder.read_final_job
    monkeypatch.setattr(
        JobFolder, "read_final_job", lambda self: read.append(self.id) or real(self)
    )
    for _ in range(3):
        assert harness.jobs.get_queue().jobs == [ended]
    assert read == [job.id]
    folder.rename(harness.workspace.root / "elsewhere")
    assert harness.jobs.get_queue().jobs == []


def test_half_a_folder_is_no_job(harness: QueueHarness) -> None:
    job = harness.enqueue()
    for id, content in {"0" * 12: "{", "1" * 12: "{}", "2" * 12: '{"argv": [], "odd": 1}'}.items():
        (harness.jobs.jobs_dir / id).mkdir()
        (harness.jobs.jobs_dir / id / "job.json").write_text(content)
    (harness.jobs.jobs_dir / ("3" * 12)).mkdir()
    assert queued(harness) == [job.id]


def test_resume_of_a_run_that_was_started_by_hand(harness: QueueHarness) -> None:
    folder = run_folder(
        harness,
        "hand",
        output_dir="elsewhere",
        num_train_epochs=3,
        max_train_steps=None,
        webhook_config={"url": "***"},
        resume_from_checkpoint="never",
    )
    job = harness.jobs.resume(run_id(folder), ResumeRequest(max_train_steps=50))
    assert job.message.startswith("webhook_config was omitted: it sends events to a URL")
    config = harness.read_job_file(job, "config/config.json")
    assert config == {
        "output_dir": str(folder),
        "max_train_steps": 50,
        "resume_from_checkpoint": "latest",
        "data_backend_config": str(
            harness.jobs.jobs_dir / job.id / "config" / "multidatabackend.json"
        ),
    }
    (one,) = harness.read_job_file(job, "config/multidatabackend.json")
    assert one["instance_data_dir"] == str(harness.workspace.datasets_dir / "photos")


def test_resume_from_a_checkpoint_by_its_name(harness: QueueHarness) -> None:
    folder = run_folder(harness, "hand")
    (folder / "checkpoint-20").mkdir()
    for wrong in ("checkpoint-21", "..", "../hand/checkpoint-20", "/etc", "checkpoint-20/", ""):
        with pytest.raises(ApiError) as caught:
            harness.jobs.resume(run_id(folder), ResumeRequest(checkpoint=wrong))
        assert [complaint.loc for complaint in caught.value.details] == ["checkpoint"]
    with pytest.raises(ApiError) as caught:
        harness.jobs.resume(run_id(folder), ResumeRequest(max_train_steps=0))
    job = harness.jobs.resume(run_id(folder), ResumeRequest(checkpoint="checkpoint-20"))
    assert (
        harness.read_job_file(job, "config/config.json")["resume_from_checkpoint"]
        == "checkpoint-20"
    )


def test_a_run_that_is_done_needs_more_steps(harness: QueueHarness) -> None:
    folder = run_folder(harness, "hand", max_train_steps=5)
    (folder / "exit.json").write_text(
        json.dumps({"exit_code": 0, "status": "done", "step": 5, "message": "", "t": 9.0})
    )
    for ask in (ResumeRequest(),):
        with pytest.raises(ApiError, match="done at step") as caught:
            harness.jobs.resume(run_id(folder), ask)
    assert caught.value.details[0].loc == "max_train_steps"
    assert harness.jobs.resume(run_id(folder), ResumeRequest(max_train_steps=10)).state == "queued"


def test_a_resume_below_its_checkpoint_is_refused(harness: QueueHarness) -> None:
    folder = run_folder(harness, "hand", max_train_steps=500)
    for step in (200, 400):
        (folder / f"checkpoint-{step}").mkdir()
    for ask in (
        ResumeRequest(max_train_steps=399),
        ResumeRequest(max_train_steps=199, checkpoint="checkpoint-200"),
    ):
        with pytest.raises(ApiError, match="is at step") as caught:
            harness.jobs.resume(run_id(folder), ask)
        assert [complaint.loc for complaint in caught.value.details] == ["max_train_steps"]
    assert queued(harness) == []
    allowed = ResumeRequest(max_train_steps=200, checkpoint="checkpoint-200")
    assert harness.jobs.resume(run_id(folder), allowed).state == "queued"


def test_options_are_frozen_by_their_own_names(harness: QueueHarness) -> None:
    """An alias would clash with the canonical name that the server writes to the file."""
    job = harness.enqueue(**{"--output-dir": "output/other", "network-rank": 8})
    config = harness.read_job_file(job, "config/config.json")
    assert config["output_dir"] == str(harness.workspace.output_dir / "other")
    assert set(config) == {"model_flavour", "lora_rank", "output_dir", "data_backend_config"}


def test_a_config_by_hand_is_not_written_over(harness: QueueHarness) -> None:
    mine = harness.workspace.root / "config" / "fox"
    mine.mkdir(parents=True)
    (mine / "config.json").write_text("{}")
    with pytest.raises(ApiError, match="holds files that no run has written") as caught:
        harness.enqueue(output_dir="config/fox")
    assert [complaint.loc for complaint in caught.value.details] == ["output_dir"]
    (mine / RUN_MARKER).write_text("{}")
    assert harness.enqueue(output_dir="config/fox").state == "queued", "a run's own is"


def test_a_clock_that_went_back_hides_no_job(
    harness: QueueHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_folder(harness, "hand")
    first = harness.jobs.resume(run_id(folder), ResumeRequest())
    path = harness.jobs.jobs_dir / first.id / "end.json"
    path.write_text(
        first.model_copy(update={"state": "stopped", "queued_t": 9e9}).model_dump_json()
    )
    again = harness.jobs.resume(run_id(folder), ResumeRequest())
    assert harness.jobs.newest_by_run()[again.run].id == again.id
    with pytest.raises(ApiError, match="already has a job"):
        harness.jobs.resume(run_id(folder), ResumeRequest())


def test_a_done_run_whose_folder_was_removed_is_gone(harness: QueueHarness) -> None:
    job = harness.enqueue()
    (harness.jobs.jobs_dir / job.id / "end.json").write_text(
        job.model_copy(update={"state": "done", "ended_t": 5.0}).model_dump_json()
    )
    assert harness.runs.summaries() == []


def test_results_of_a_run_are_not_trained_over_unasked(harness: QueueHarness) -> None:
    """Found when the draft is queued, not by a training that has loaded everything."""
    folder = harness.workspace.output_dir / "zorbo"
    folder.mkdir(parents=True)
    (folder / RUN_MARKER).write_text("{}")
    for result in ("checkpoint-20/manifest.json", "pytorch_lora_weights.safetensors"):
        (folder / result).parent.mkdir(parents=True, exist_ok=True)
        (folder / result).write_text("{}")
        for named, loc in (({}, "name"), ({"output_dir": "output/zorbo"}, "output_dir")):
            for resume in ({}, {"resume_from_checkpoint": "latest"}):
                with pytest.raises(ApiError, match="already holds the results of a run") as caught:
                    harness.enqueue(**named, **resume)
                (complaint,) = caught.value.details
                assert (caught.value.status, complaint.loc) == (422, loc)
                assert "to never to move them aside" in complaint.message
                assert "or to checkpoint-20 to resume" in complaint.message
    rehearsal = harness.jobs.enqueue(JobRequest(draft=harness.create_draft(), kind="rehearse"))
    assert rehearsal.state == "queued", "it writes nothing there"
    assert harness.enqueue("zorbo 2").run_dir == f"{folder}-2"
    said = harness.enqueue(resume_from_checkpoint="checkpoint-20")
    assert (
        harness.read_job_file(said, "config/config.json")["resume_from_checkpoint"]
        == "checkpoint-20"
    )
    harness.jobs.cancel(said.id)
    assert harness.enqueue(resume_from_checkpoint="never").run_dir == str(folder)


def test_a_failed_run_without_results_may_be_queued_again(harness: QueueHarness) -> None:
    run_folder(harness, "zorbo")
    assert harness.enqueue().state == "queued"


HOOK = {"url": "https://evil.example/hook"}


@pytest.mark.parametrize("hook", [HOOK, [HOOK], "hooks.json"])
def test_a_run_folder_from_elsewhere_brings_no_hook(harness: QueueHarness, hook: object) -> None:
    """The config.json of a copied folder can contain anything; unsettable options are omitted."""
    folder = run_folder(harness, "copied", webhook_config=hook)
    job = harness.jobs.resume(run_id(folder), ResumeRequest())
    frozen = "".join(path.read_text() for path in (harness.jobs.jobs_dir / job.id).rglob("*.json"))
    assert "webhook" not in frozen
    assert "evil.example" not in frozen
    assert "webhook_config was omitted" in job.message


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
            [
                {
                    "id": "photos",
                    "instance_data_dir": "../datasets/photos",
                    "instance_prompt": "{env:X}",
                }
            ],
            "photos.instance_prompt",
        ),
        (
            {},
            [{"id": "photos", "instance_data_dir": "../datasets/gone"}],
            "photos.instance_data_dir",
        ),
    ],
)
def test_a_run_folder_from_elsewhere_is_read_as_a_draft_is(
    harness: QueueHarness, config: dict[str, object], sets: list[object] | None, loc: str
) -> None:
    folder = run_folder(harness, "copied", **config)
    if sets is not None:
        Path(harness.workspace.root / "config" / "multidatabackend.json").write_text(
            json.dumps(sets)
        )
    with pytest.raises(ApiError) as caught:
        harness.jobs.resume(run_id(folder), ResumeRequest())
    assert [complaint.loc for complaint in caught.value.details] == [loc]
    assert queued(harness) == []


def test_a_pipe_in_the_place_of_the_datasets_is_not_waited_for(harness: QueueHarness) -> None:
    folder = run_folder(harness, "copied")
    file = harness.workspace.root / "config" / "multidatabackend.json"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ApiError, match="there is no such file"):
        harness.jobs.resume(run_id(folder), ResumeRequest())


@pytest.mark.parametrize("state", ["stopped", "failed", "lost", "done"])
def test_a_run_whose_folder_was_removed_is_gone(harness: QueueHarness, state: str) -> None:
    folder = run_folder(harness, "hand")
    job = harness.jobs.resume(run_id(folder), ResumeRequest())
    ended = job.model_copy(update={"state": state, "ended_t": 5.0, "begun": True})
    (harness.jobs.jobs_dir / job.id / "end.json").write_text(ended.model_dump_json())
    assert [run.id for run in harness.runs.summaries()] == [job.run]
    shutil.rmtree(folder)
    harness = harness.restart()
    assert harness.runs.summaries() == []
    with pytest.raises(ApiError, match="no such run"):
        harness.runs.summary(job.run)
    assert harness.enqueue("hand").run == job.run, "its name is free again"


def test_a_training_that_failed_before_it_made_its_folder_is_listed(harness: QueueHarness) -> None:
    job = harness.enqueue()
    failed = job.model_copy(update={"state": "failed", "ended_t": 5.0, "message": "no such device"})
    (harness.jobs.jobs_dir / job.id / "end.json").write_text(failed.model_dump_json())
    (run,) = harness.runs.summaries()
    assert (run.state, run.message, run.begun) == ("failed", "no such device", False)
    harness.jobs.cancel(job.id)
    assert harness.runs.summaries() == harness.jobs.get_queue().jobs == []


def test_a_run_with_a_folder_is_not_withdrawn(harness: QueueHarness) -> None:
    job = harness.jobs.resume(run_id(run_folder(harness, "hand")), ResumeRequest())
    ended = job.model_copy(update={"state": "failed", "ended_t": 5.0, "begun": True})
    (harness.jobs.jobs_dir / job.id / "end.json").write_text(ended.model_dump_json())
    with pytest.raises(ApiError, match="delete that folder"):
        harness.jobs.cancel(job.id)


def test_a_lower_learning_rate_is_possible_on_resume(harness: QueueHarness) -> None:
    """It is what the advice after a loss that is not finite says."""
    folder = run_folder(harness, "hand")
    job = harness.jobs.resume(run_id(folder), ResumeRequest(learning_rate=1e-5))
    config = harness.read_job_file(job, "config/config.json")
    assert (config["learning_rate"], config["resume_with_changes"]) == (1e-5, True)


def test_the_prompts_of_a_draft_are_a_library_of_the_job(harness: QueueHarness) -> None:
    draft = harness.drafts.get(harness.create_draft())
    prompts = [PromptEntry(name="red", prompt="a red zorbo", negative_prompt="blue", seed=3)]
    harness.drafts.update(
        draft.id,
        DraftWrite(**draft.model_dump(exclude={"id", "changed_t", "prompts"}), prompts=prompts),
    )
    job = harness.jobs.enqueue(JobRequest(draft=draft.id))
    assert job.draft == draft.id
    library = Path(harness.read_job_file(job, "config/config.json")["user_prompt_library"])
    entry = {"prompt": "a red zorbo", "negative_prompt": "blue", "seed": 3}
    assert json.loads(library.read_text()) == {"red": entry}
