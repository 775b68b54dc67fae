"""What is known before the start is said before the start: captions, hardware, prompts, folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.server.api_errors import ApiError
from simpletuner.server.dataset_service import DatasetService
from simpletuner.server.job_service import JobService
from simpletuner.server.schemas.jobs import JobRequest
from simpletuner.server.start_checks import StartChecks
from simpletuner.server.step_times import StepTimes
from simpletuner.server.workspace import Workspace
from tests.server.queue_harness import FAKE_TRAIN_COMMAND, QueueHarness, make_device
from tests.server.run_folder_writer import RunFolderWriter

NANO = {"model_flavour": "nano"}
PHOTOS = {"id": "photos", "instance_data_dir": "datasets/photos"}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Three square images of 100 px, of which the last has no caption."""
    folder = tmp_path / "datasets" / "photos"
    folder.mkdir(parents=True)
    for name in ("a", "b", "c"):
        Image.new("RGB", (100, 100)).save(folder / f"{name}.png")
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(f"caption {name}")
    return Workspace(tmp_path.resolve())


def checks(workspace: Workspace, device: str = "cuda") -> StartChecks:
    return StartChecks(workspace, DatasetService(workspace), lambda: [make_device(device)])


def problems(workspace: Workspace, config: dict[str, Any], **fields: Any) -> list[tuple[str, str]]:
    found = checks(workspace).check({**NANO, **config}, [{**PHOTOS, **fields}])
    return [(one.loc, one.message) for one in found.problems]


def test_images_without_a_caption_prevent_the_start(workspace: Workspace) -> None:
    [(loc, message)] = problems(workspace, {})
    assert loc == "photos"
    assert message.startswith("1 image has no caption (c.png).")
    (workspace.datasets_dir / "photos" / "c.txt").write_text("caption c")
    assert problems(workspace, {}) == []


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ({"missing_caption": "empty"}, {}),
        ({"missing_caption": "drop"}, {}),
        ({}, {"caption_strategy": "filename"}),
        ({}, {"caption_strategy": "instanceprompt", "instance_prompt": "a zorbo"}),
        ({}, {"disabled": True}),
    ],
)
def test_captions_that_the_run_does_not_need_are_not_missed(
    workspace: Workspace, config: dict[str, Any], fields: dict[str, Any]
) -> None:
    assert [one for one in problems(workspace, config, **fields) if one[0] == "photos"] == []


def test_a_job_without_captions_is_not_queued(tmp_path: Path) -> None:
    harness = QueueHarness(tmp_path.resolve())
    draft = harness.create_draft()
    (harness.workspace.datasets_dir / "photos" / "a.txt").unlink()
    jobs = JobService(
        harness.workspace,
        harness.runs,
        harness.drafts,
        FAKE_TRAIN_COMMAND,
        checks(harness.workspace).check,
    )
    with pytest.raises(ApiError, match="has no caption"):
        jobs.enqueue(JobRequest(draft=draft))


@pytest.mark.parametrize(
    ("flavour", "device", "found", "warned"),
    [
        ("base", "auto", "cpu", True),
        ("base", "cpu", "cuda", True),
        ("base", "auto", "cuda", False),
        ("hd", "auto", "mps", False),
        ("nano", "auto", "cpu", False),
    ],
)
def test_weeks_on_a_cpu_are_a_warning(
    workspace: Workspace, flavour: str, device: str, found: str, warned: bool
) -> None:
    config = {"model_flavour": flavour, "device": device, "validation_prompt": "a zorbo"}
    warnings = checks(workspace, found).check(config, [PHOTOS]).warnings
    assert [one.loc for one in warnings] == (["model_flavour"] if warned else [])


@pytest.mark.parametrize(
    ("config", "warned"),
    [
        ({}, True),
        ({"validation_prompt": "a zorbo"}, False),
        ({"validation_prompt_library": True}, False),
        ({"validation_disable": True}, False),
    ],
)
def test_no_prompt_is_a_warning_with_captions_to_choose_from(
    workspace: Workspace, config: dict[str, Any], warned: bool
) -> None:
    found = checks(workspace).check({**NANO, **config}, [PHOTOS])
    assert [one.loc for one in found.warnings] == (["validation_prompt"] if warned else [])
    assert found.captions == ["caption a", "caption b"]


def test_the_run_folder_is_the_one_that_the_run_gets(workspace: Workspace) -> None:
    run_dir = lambda config: checks(workspace).check(config, [PHOTOS], "My run!").run_dir  # noqa: E731
    assert run_dir(NANO) == str(workspace.output_dir / "My-run")
    assert run_dir({**NANO, "output_dir": "output/other"}) == str(workspace.output_dir / "other")
    found = checks(workspace).check({"output_dir": "/elsewhere/fox"}, [PHOTOS], "x")
    assert next((one.loc, one.suggestion) for one in found.problems) == ("output_dir", "output/fox")


def test_the_largest_bucket_is_that_of_the_images(workspace: Workspace) -> None:
    config = {**NANO, "resolution": 128, "resolution_type": "pixel"}
    assert checks(workspace).largest_bucket(config, [PHOTOS]) == (128, 128)
    Image.new("RGB", (200, 100)).save(workspace.datasets_dir / "photos" / "wide.png")
    assert checks(workspace).largest_bucket(config, [PHOTOS]) == (256, 128)
    assert checks(workspace).largest_bucket(config, []) is None


def test_the_first_steps_of_a_run_correct_the_estimate(tmp_path: Path) -> None:
    harness = QueueHarness(tmp_path.resolve())
    job = harness.enqueue("measured")
    times = StepTimes(harness.jobs, harness.runs)
    times.record_estimate(job.id, 3.0)
    assert times.correction("nano") == (None, "")
    RunFolderWriter(Path(job.run_dir)).write_start().write_steps(1, 5)  # 1.5 s each
    assert times.correction("nano") == (0.5, "measured")
    assert times.correction("base") == (None, "")
