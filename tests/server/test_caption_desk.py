"""Changes of all captions with a preview and an undo, tags, and captioning jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.server.api_errors import ApiError
from simpletuner.server.caption_desk import CaptionDesk
from simpletuner.server.dataset_service import DatasetService
from simpletuner.server.manager import Manager
from simpletuner.server.schemas.captioning import CaptionEditRequest, CaptioningRequest
from simpletuner.server.trash import Trash
from tests.server.queue_harness import QueueHarness, make_device

CAPTIONS = {"a": "fox, red, den\nfox, snow", "b": "owl, red", "c": ""}


class Bench:
    def __init__(self, folder: Path) -> None:
        self.harness = QueueHarness(folder)
        self.workspace = self.harness.workspace
        self.photos = self.workspace.datasets_dir / "photos"
        self.photos.mkdir(parents=True)
        for name, caption in CAPTIONS.items():
            Image.new("RGB", (64, 64)).save(self.photos / f"{name}.png")
            (self.photos / f"{name}.txt").write_text(caption)
        self.datasets = DatasetService(self.workspace)
        self.trash = Trash(self.workspace)
        jobs = self.harness.jobs
        devices = lambda: [make_device("cpu")]  # noqa: E731
        self.desk = CaptionDesk(
            self.workspace, self.datasets, jobs, self.trash, ("program",), devices
        )
        self.manager = Manager(
            self.workspace,
            self.trash,
            self.harness.runs,
            jobs,
            self.datasets,
            self.harness.drafts,
        )

    def texts(self) -> dict[str, str]:
        return {name: (self.photos / f"{name}.txt").read_text() for name in CAPTIONS}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path.resolve())


@pytest.mark.parametrize(
    ("request_", "after"),
    [
        (
            {"action": "prefix", "text": "zorbo, "},
            {"a": "zorbo, fox, red, den\nzorbo, fox, snow", "b": "zorbo, owl, red"},
        ),
        ({"action": "suffix", "text": ", red"}, {"a": "fox, red, den, red\nfox, snow, red"}),
        ({"action": "replace", "find": "fox", "text": "wolf"}, {"a": "wolf, red, den\nwolf, snow"}),
        ({"action": "remove_tag", "find": "red"}, {"a": "fox, den\nfox, snow", "b": "owl"}),
        ({"action": "replace", "find": "owl, red", "text": ""}, {}),  # a caption never gets empty
    ],
)
def test_captions_change_together_and_back(
    bench: Bench, request_: dict[str, Any], after: dict[str, str]
) -> None:
    preview = bench.desk.edit("photos", CaptionEditRequest(**request_))
    assert bench.texts() == CAPTIONS
    assert (preview.count, preview.trash) == (len(after), None)
    done = bench.desk.edit("photos", CaptionEditRequest(**request_, preview=False))
    assert bench.texts() == {**CAPTIONS, **after}
    assert {change.file: change.after for change in done.examples} == {
        f"{name}.png": text for name, text in after.items()
    }
    again = bench.desk.edit("photos", CaptionEditRequest(**request_, preview=False))
    assert again.count == 0  # a second press adds nothing
    if done.trash is not None:
        bench.manager.restore(done.trash.id)
    assert bench.texts() == CAPTIONS


@pytest.mark.parametrize(
    "request_",
    [
        {"action": "replace", "text": "x"},
        {"action": "prefix"},
        {"action": "prefix", "text": "a\nb"},
        {"action": "suffix", "text": "\0"},
        {"action": "prefix", "text": "x", "files": ["none.png"]},
    ],
)
def test_changes_without_meaning_are_refused(bench: Bench, request_: dict[str, Any]) -> None:
    with pytest.raises(ApiError):
        bench.desk.edit("photos", CaptionEditRequest(**request_, preview=False))
    assert bench.texts() == CAPTIONS


def test_only_the_chosen_images_change(bench: Bench) -> None:
    request = CaptionEditRequest(action="prefix", text="x ", files=["b.png"], preview=False)
    bench.desk.edit("photos", request)
    assert bench.texts() == {**CAPTIONS, "b": "x owl, red"}


def test_the_overview_counts_images_and_not_lines(bench: Bench) -> None:
    found = bench.desk.overview("photos")
    assert {tag.tag: tag.count for tag in found.tags}["red"] == 2
    assert found.captions == 2
    assert (found.shortest_words, found.longest_words) == (2, 5)


def test_captioning_is_a_job_that_is_not_started_twice(bench: Bench) -> None:
    info = bench.desk.captioning_info()
    assert info.suggested == info.models[0].id  # no GPU: the smallest
    request = CaptioningRequest(dataset="photos", model="models/tiny", prompt="--out=/etc")
    (bench.workspace.root / "models" / "tiny").mkdir(parents=True)
    job = bench.desk.start_captioning(request)
    spec = bench.harness.jobs._job_folder(job.id).read_spec()
    assert spec is not None
    assert list(spec.argv) == [
        "program",
        "caption",
        str(bench.photos),
        f"--model={bench.workspace.root / 'models' / 'tiny'}",
        "--prompt=--out=/etc",
        "--max-tokens=160",
    ]
    assert [one.id for one in bench.desk.captioning_info().jobs] == [job.id]
    with pytest.raises(ApiError, match="captioned already"):
        bench.desk.start_captioning(request)
    with pytest.raises(ApiError, match="no such dataset"):
        bench.desk.start_captioning(request.model_copy(update={"dataset": "none"}))


def test_replacing_captions_is_asked_for_and_recorded(bench: Bench) -> None:
    request = CaptioningRequest(dataset="photos", model="a/b", prompt="p", overwrite=True)
    job = bench.desk.start_captioning(request)
    spec = bench.harness.jobs._job_folder(job.id).read_spec()
    assert spec is not None
    assert "--overwrite" in spec.argv
    assert any(word.startswith("--record=") for word in spec.argv)


def test_excluded_images_are_named_to_the_job(bench: Bench) -> None:
    bench.datasets.exclude("photos", ["a.png"], True)
    job = bench.desk.start_captioning(CaptioningRequest(dataset="photos", model="a/b", prompt="p"))
    spec = bench.harness.jobs._job_folder(job.id).read_spec()
    assert spec is not None
    [path] = [word.removeprefix("--exclude=") for word in spec.argv if "--exclude" in word]
    assert json.loads(Path(path).read_text()) == ["a.png"]


@pytest.mark.parametrize("model", ["--config=x", "a b", "", "-x", "x;y"])
def test_a_model_is_a_repository_or_a_folder(model: str) -> None:
    with pytest.raises(ValueError, match="model"):
        CaptioningRequest(dataset="photos", model=model, prompt="p")
