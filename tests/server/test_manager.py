"""Deleting moves to the trash and can be undone; renaming follows into the drafts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.server.api_errors import ApiError
from simpletuner.server.comparisons import compare_runs
from simpletuner.server.dataset_service import DatasetService
from simpletuner.server.manager import Manager
from simpletuner.server.schemas.configs import DraftWrite
from simpletuner.server.schemas.library import RunLabel
from simpletuner.server.trash import Trash
from simpletuner.server.workspace import PathOutsideWorkspace, run_id
from tests.server.queue_harness import QueueHarness
from tests.server.run_folder_writer import RunFolderWriter


class Furnished:
    """A workspace with a dataset and two runs that have ended."""

    def __init__(self, folder: Path) -> None:
        self.harness = QueueHarness(folder)
        self.workspace = self.harness.workspace
        self.datasets = DatasetService(self.workspace)
        self.trash = Trash(self.workspace)
        self.manager = Manager(
            self.workspace,
            self.trash,
            self.harness.runs,
            self.harness.jobs,
            self.datasets,
            self.harness.drafts,
        )
        photos = self.workspace.datasets_dir / "photos"
        photos.mkdir(parents=True)
        for name in ("a", "b"):
            Image.new("RGB", (64, 64)).save(photos / f"{name}.png")
            (photos / f"{name}.txt").write_text(name)
        self.fox, self.owl = self.run("fox", 0.1, 4), self.run("owl", 0.2, 8)

    def run(self, name: str, rate: float, rank: int) -> str:
        run = RunFolderWriter(self.workspace.output_dir / name).write_start().write_steps(1, 9)
        run.write_image(5)
        run.write_checkpoint(5)
        run.write_exit()
        options = {"learning_rate": rate, "lora_rank": rank, "seed": 1, "output_dir": name}
        (run.path / "config.json").write_text(json.dumps(options))
        return run_id(run.path)


@pytest.fixture
def furnished(tmp_path: Path) -> Furnished:
    return Furnished(tmp_path.resolve())


def names(furnished: Furnished) -> list[str]:
    furnished.harness.runs._finder._due = 0.0  # the search for folders is repeated at once
    return sorted(run.name for run in furnished.harness.runs.summaries())


def test_a_deleted_run_is_restored_whole(furnished: Furnished) -> None:
    folder = furnished.workspace.output_dir / "fox"
    entry = furnished.manager.delete_run(furnished.fox)
    assert (entry.kind, entry.label) == ("run", "fox")
    assert entry.size_bytes > 0
    assert names(furnished) == ["owl"]
    assert furnished.trash.entries() == [entry]
    furnished.manager.restore(entry.id)
    assert names(furnished) == ["fox", "owl"]
    assert (folder / "checkpoint-5" / "manifest.json").exists()
    assert furnished.trash.entries() == []


def test_the_jobs_of_a_run_go_with_it(furnished: Furnished) -> None:
    job = furnished.harness.enqueue("queued")
    with pytest.raises(ApiError, match="remove it from the queue"):
        furnished.manager.delete_run(job.run)
    (furnished.harness.jobs.jobs_dir / job.id / "runner.lock").touch()  # launched, and lost
    assert furnished.harness.job_state(job) == "lost"
    entry = furnished.manager.delete_run(job.run)
    assert not (furnished.harness.jobs.jobs_dir / job.id).exists()
    furnished.manager.restore(entry.id)
    assert furnished.harness.job_state(job) == "lost"


def test_an_active_run_is_not_deleted(furnished: Furnished) -> None:
    run = RunFolderWriter(furnished.workspace.output_dir / "live").write_start()
    furnished.harness.runs._finder._due = 0.0
    with run.hold_lock(), pytest.raises(ApiError, match="stop it"):
        furnished.manager.delete_run(run_id(run.path))


def test_checkpoints_are_deleted_one_by_one(furnished: Furnished) -> None:
    entry = furnished.manager.delete_checkpoint(furnished.fox, "checkpoint-5")
    assert furnished.harness.runs.detail(furnished.fox).checkpoints == []
    furnished.manager.restore(entry.id)
    assert len(furnished.harness.runs.detail(furnished.fox).checkpoints) == 1
    for wrong in ("checkpoint-6", "images"):
        with pytest.raises(ApiError, match="no such checkpoint"):
            furnished.manager.delete_checkpoint(furnished.fox, wrong)
    with pytest.raises(PathOutsideWorkspace):
        furnished.manager.delete_checkpoint(furnished.fox, "../owl")


def test_datasets_and_images(furnished: Furnished, tmp_path: Path) -> None:
    image = furnished.manager.delete_images("photos", ["a.png"])
    assert furnished.datasets.get_info("photos").pictures == 1
    assert not (furnished.workspace.datasets_dir / "photos" / "a.txt").exists()
    furnished.manager.restore(image.id)
    assert furnished.datasets.get_info("photos").captioned == 2
    entry = furnished.manager.delete_dataset("photos")
    assert furnished.datasets.list_datasets() == []
    (furnished.workspace.datasets_dir / "photos").mkdir()
    with pytest.raises(ApiError, match="exists again"):
        furnished.manager.restore(entry.id)
    (furnished.workspace.datasets_dir / "photos").rmdir()
    furnished.manager.restore(entry.id)
    assert furnished.datasets.get_info("photos").pictures == 2


def test_a_folder_elsewhere_is_only_taken_off_the_list(furnished: Furnished) -> None:
    mine = furnished.workspace.root / "mine"
    mine.mkdir()
    Image.new("RGB", (64, 64)).save(mine / "x.png")
    furnished.datasets.create("linked", "mine")
    with pytest.raises(ApiError, match="not of the workspace"):
        furnished.manager.delete_images("linked", ["x.png"])
    entry = furnished.manager.delete_dataset("linked")
    assert (mine / "x.png").exists()
    assert [one.name for one in furnished.datasets.list_datasets()] == ["photos"]
    furnished.manager.restore(entry.id)
    assert [one.name for one in furnished.datasets.list_datasets()] == ["linked", "photos"]


def test_a_dataset_that_a_job_needs_stays(furnished: Furnished) -> None:
    furnished.harness.enqueue("waits")
    for change in (
        lambda: furnished.manager.delete_dataset("photos"),
        lambda: furnished.manager.rename_dataset("photos", "pics"),
    ):
        with pytest.raises(ApiError, match="the run waits uses this dataset and is queued"):
            change()


def test_a_renamed_dataset_is_renamed_in_the_drafts(furnished: Furnished) -> None:
    folder = furnished.workspace.datasets_dir / "photos"
    entry = {"id": "photos", "instance_data_dir": str(folder), "repeats": 2}
    draft = furnished.harness.drafts.create(DraftWrite(name="d", config={}, datasets=[entry]))
    assert furnished.manager.rename_dataset("photos", "pics").pictures == 2
    renamed = {**entry, "id": "pics", "instance_data_dir": str(folder.with_name("pics"))}
    assert furnished.harness.drafts.get(draft.id).datasets == [renamed]
    for wrong in ("../x", ".hidden", ""):
        with pytest.raises(ApiError, match="a name has at most"):
            furnished.manager.rename_dataset("pics", wrong)


def test_labels_are_shown_and_survive(furnished: Furnished) -> None:
    runs = furnished.harness.runs
    runs.labels.write(furnished.fox, RunLabel(name="Best", tags=["style"], archived=True))
    summary = furnished.harness.restart().runs.summary(furnished.fox)
    assert (summary.name, summary.tags, summary.archived) == ("Best", ["style"], True)
    runs.labels.write(furnished.fox, RunLabel())
    assert runs.summary(furnished.fox).name == "fox"


def test_the_trash_leads_nowhere_else(furnished: Furnished, tmp_path: Path) -> None:
    """A record that was changed by hand cannot move files out of the workspace."""
    entry = furnished.manager.delete_images("photos", ["a.png"])
    record = furnished.workspace.server_dir / "trash" / entry.id / "trash.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "paths": ["/etc/passwd-new"]}))
    with pytest.raises(PathOutsideWorkspace):
        furnished.manager.restore(entry.id)
    for id in ("..", "x", "../../datasets", entry.id + "/0"):
        with pytest.raises(ApiError, match="no such entry"):
            furnished.manager.restore(id)
    furnished.trash.empty()
    assert furnished.trash.entries() == []
    assert (furnished.workspace.datasets_dir / "photos" / "b.png").exists()


def test_a_comparison(furnished: Furnished) -> None:
    found = compare_runs(furnished.harness.runs, [furnished.owl, furnished.fox])
    assert [one.summary.name for one in found.runs] == ["owl", "fox"]
    assert {row.name: row.values for row in found.settings} == {
        "learning_rate": [0.2, 0.1],
        "lora_rank": [8, 4],
    }
    [images] = found.images
    assert [[image.step for image in part] for part in images.images] == [[5], [5]]
    assert len(found.runs[0].metrics.step) == 9
    for wrong in ([furnished.fox], [furnished.fox] * 3):
        with pytest.raises(ApiError, match="choose from 2 to 8"):
            compare_runs(furnished.harness.runs, wrong)
    with pytest.raises(ApiError, match="no such run"):
        compare_runs(furnished.harness.runs, [furnished.fox, "0" * 12])
