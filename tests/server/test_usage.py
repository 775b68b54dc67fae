"""The load of the machine for the charts, from files like those of /proc and from nvidia-smi."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from simpletuner.server import hardware, usage
from simpletuner.server.app import create_app
from simpletuner.server.settings import ServerSettings
from simpletuner.server.usage import Sample, UsageRecorder, UsageSampler, thin_out, to_usage
from simpletuner.server.workspace import Workspace

SMI = (
    "0, 97, 1024, 143771, 61, 312.50, NVIDIA H200\n"
    "1, [N/A], [N/A], [N/A], 40, [Not Supported], Grid, vGPU\n"
    "no devices were found\n"
)


def write_proc(folder: Path, busy: int, idle: int, sectors: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "stat").write_text(f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 1 1 1\n")
    rows = [f"8 {at} {name} 1 0 {sectors} 0 1 0 {2 * sectors} 0" for at, name in enumerate(DISKS)]
    (folder / "diskstats").write_text("\n".join([*rows, "short row"]) + "\n")


DISKS = ("sda", "sda1", "loop0", "ram0")


@pytest.fixture
def sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UsageSampler:
    monkeypatch.setattr(usage.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(hardware, "run_tool", lambda argv: SMI)
    blocks = tmp_path / "block"
    for name in ("sda", "loop0", "ram0"):  # partitions are below their disk
        (blocks / name).mkdir(parents=True)
    return UsageSampler(tmp_path, tmp_path / "proc", blocks)


def test_rates_are_those_since_the_sample_before(
    sampler: UsageSampler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((10.0, 12.0))
    monkeypatch.setattr(usage.time, "monotonic", lambda: next(clock))
    write_proc(tmp_path / "proc", busy=100, idle=100, sectors=1000)
    first = sampler.take()
    assert (first.cpu_percent, first.disk_read_bytes_s) == (None, None)
    write_proc(tmp_path / "proc", busy=175, idle=125, sectors=1400)
    second = sampler.take()
    assert second.cpu_percent == 75.0
    # One disk only, not its partition and not image files: 400 sectors in two seconds.
    assert second.disk_read_bytes_s == 400 * 512 / 2
    assert second.disk_write_bytes_s == 800 * 512 / 2
    assert second.disk_free_bytes is not None
    assert second.disk_free_bytes > 0


def test_what_a_gpu_does_not_report_is_none(sampler: UsageSampler) -> None:
    first, second = sampler.take().gpus
    assert (first.name, first.load_percent, first.temperature_c) == ("NVIDIA H200", 97.0, 61.0)
    assert (first.memory_used_bytes, first.power_w) == (1024 * hardware.MIB, 312.5)
    assert (second.name, second.load_percent, second.power_w) == ("Grid, vGPU", None, None)
    columns = to_usage([sampler.take()], 5)
    assert [gpu.temperature_c for gpu in columns.gpus] == [[61.0], [40.0]]


def test_nothing_is_invented_without_proc_and_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage.shutil, "which", lambda name: None)
    monkeypatch.setattr(hardware, "run_tool", lambda argv: pytest.fail("no tool is there"))
    monkeypatch.setattr(hardware, "host_memory", lambda: (None, None))
    sampler = UsageSampler(tmp_path, tmp_path / "none", tmp_path / "none")
    samples = [sampler.take(), sampler.take()]
    assert {(one.cpu_percent, one.memory_used_bytes, one.disk_read_bytes_s) for one in samples} == {
        (None, None, None)
    }
    assert samples[0].gpus == ()


def test_samples_are_taken_only_when_asked_or_busy(tmp_path: Path) -> None:
    recorder = UsageRecorder(UsageSampler(tmp_path), lambda: False)
    first = recorder.history()
    assert len(first.t) == 1
    assert len(recorder.history().t) == 1  # too soon for another one
    assert recorder.history(since=first.t[-1]).t == []


def test_long_histories_are_thinned_out_up_to_the_last_sample() -> None:
    samples = [Sample(float(at), None, None, None, None, None, ()) for at in range(1000)]
    few = thin_out(samples, 100)
    assert len(few) == 100
    assert few[-1].t == 999.0
    assert thin_out([], 100) == []


def test_the_route(tmp_path: Path) -> None:
    settings = ServerSettings(Workspace(tmp_path.resolve()))
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as client:
        answer = client.get("/api/v1/system/usage").json()
        assert len(answer["t"]) == len(answer["cpu_percent"]) == 1
        later = {"since": answer["t"][-1]}
        assert client.get("/api/v1/system/usage", params=later).json()["t"] == []
