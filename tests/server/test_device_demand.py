"""A job that asks for more GPUs than there are is refused when it is queued."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from simpletuner.server.api_errors import ApiError
from simpletuner.server.device_demand import require_devices
from simpletuner.server.job_service import JobService
from simpletuner.server.schemas.jobs import JobRequest
from simpletuner.server.schemas.system import DeviceInfo
from tests.server.queue_harness import FAKE_TRAIN_COMMAND, QueueHarness, make_device


def make_jobs(harness: QueueHarness, *kinds: str) -> JobService:
    """The jobs of a machine with these devices."""
    devices = [make_device(kind) for kind in kinds]
    require = partial(require_devices, devices=lambda: devices)
    return JobService(
        harness.workspace,
        harness.runs,
        harness.drafts,
        FAKE_TRAIN_COMMAND,
        require_devices=require,
    )


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> QueueHarness:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return QueueHarness(tmp_path.resolve())


@pytest.mark.parametrize(
    ("visible", "processes", "usable"), [(None, 3, "2 GPUs"), ("1", 2, "1 GPU;")]
)
def test_too_many_gpus(
    harness: QueueHarness,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    processes: int,
    usable: str,
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    jobs = make_jobs(harness, "cuda", "cuda")
    draft = harness.create_draft(num_processes=processes)
    with pytest.raises(ApiError, match=usable) as refused:
        jobs.enqueue(JobRequest(draft=draft))
    assert refused.value.status == 422
    assert [one.loc for one in refused.value.details] == ["num_processes"]
    assert jobs.get_queue().jobs == [], "nothing is left that would wait without end"
    assert jobs.enqueue(JobRequest(draft=draft, kind="rehearse")).state == "queued"


@pytest.mark.parametrize(
    ("kinds", "config"),
    [
        (("cuda", "cuda"), {"num_processes": 2}),
        (("cuda", "cuda"), {"num_processes": "auto"}),
        (("cuda", "cuda"), {"num_processes": 4, "device": "cpu"}),
        (("cpu",), {"num_processes": 4}),
    ],
)
def test_what_a_machine_can_do(
    harness: QueueHarness, kinds: tuple[str, ...], config: dict[str, object]
) -> None:
    draft = harness.create_draft(**config)
    assert make_jobs(harness, *kinds).enqueue(JobRequest(draft=draft)).state == "queued"


def test_devices_are_only_listed_for_several(harness: QueueHarness) -> None:
    def list_devices() -> list[DeviceInfo]:
        raise AssertionError("nvidia-smi takes seconds")

    require = partial(require_devices, devices=list_devices)
    jobs = JobService(
        harness.workspace,
        harness.runs,
        harness.drafts,
        FAKE_TRAIN_COMMAND,
        require_devices=require,
    )
    assert jobs.enqueue(JobRequest(draft=harness.create_draft())).state == "queued"
