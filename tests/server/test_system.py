"""What the machine says of itself, read from the words of its tools as they were recorded."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from simpletuner.server import hardware
from simpletuner.server.api import system
from simpletuner.server.app import create_app
from simpletuner.server.hardware import MIB
from simpletuner.server.schemas.system import SystemInfo
from simpletuner.server.settings import ServerSettings
from simpletuner.server.workspace import Workspace


def test_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "run_tool", lambda words: "")
    (tmp_path / "more").mkdir()
    place = Workspace(tmp_path, (tmp_path / "more", tmp_path / "gone"))
    client = TestClient(create_app(ServerSettings(place)), base_url="http://localhost:8001")
    told = SystemInfo.model_validate(client.get("/api/v1/system").json())
    assert told.workspace == str(tmp_path)
    assert told.roots == [str(tmp_path / "more"), str(tmp_path / "gone")]
    assert told.packages["fastapi"] == metadata.version("fastapi")
    assert [disk.path for disk in told.disks] == [str(tmp_path)], "one file system is told once"
    assert told.disks[0].total_bytes > told.disks[0].free_bytes > 0


def test_nvidia() -> None:
    text = "NVIDIA H200, 143771, 143167\nNVIDIA A, B, 24564, 20000\nNVIDIA GB10, [N/A], [N/A]\n"
    first, second, third = hardware.parse_nvidia_smi(text)
    assert (first.name, first.kind) == ("NVIDIA H200", "cuda")
    assert (first.memory_total_bytes, first.memory_free_bytes) == (143771 * MIB, 143167 * MIB)
    assert second.name == "NVIDIA A, B"
    assert (third.memory_total_bytes, third.memory_free_bytes) == (None, None)


@pytest.mark.parametrize(
    "text", ["", "No devices were found", "NVIDIA-SMI has failed, it could not"]
)
def test_nvidia_without_a_card(text: str) -> None:
    assert hardware.parse_nvidia_smi(text) == []


def test_rocm() -> None:
    cards = {
        "card0": {
            "VRAM Total Memory (B)": "25753026560",
            "VRAM Total Used Memory (B)": "27111424",
            "Card Series": "Radeon RX 7900 XTX",
        },
        "card1": {"VRAM Total Memory (B)": "not known", "Card series": "Radeon"},
        "system": {"Driver version": "6.10"},
    }
    first, second = hardware.parse_rocm_smi(json.dumps(cards))
    assert (first.name, first.kind, first.memory_total_bytes) == (
        "Radeon RX 7900 XTX",
        "rocm",
        25753026560,
    )
    assert first.memory_free_bytes == 25753026560 - 27111424
    assert (second.name, second.memory_total_bytes) == ("Radeon", None)


@pytest.mark.parametrize("text", ["", "ERROR: no amdgpu", "[]", "{}"])
def test_rocm_without_a_card(text: str) -> None:
    assert hardware.parse_rocm_smi(text) == []


def test_apple() -> None:
    (device,) = hardware.parse_sysctl("Apple M3 Max\n68719476736\n")
    assert (device.name, device.kind, device.memory_total_bytes) == (
        "Apple M3 Max",
        "mps",
        64 << 30,
    )
    assert hardware.parse_sysctl("")[0].memory_total_bytes is None


def test_the_processor_stands_in_where_there_is_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "run_tool", lambda words: "")
    (device,) = hardware.list_devices()
    assert device.kind in ("cpu", "mps")
    assert device.name


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' files")
@pytest.mark.parametrize(
    ("limit", "used", "total_gib", "free_gib"),
    [
        ("max", "5", 32, 20),
        ("8589934592", "3221225472", 8, 5),
        ("8589934592", "9999999999", 8, 0),
        ("", "", 32, 20),
    ],
)
def test_a_container_has_what_it_may_use(
    monkeypatch: pytest.MonkeyPatch, limit: str, used: str, total_gib: int, free_gib: int
) -> None:
    files = {
        "/proc/meminfo": f"MemTotal: {32 << 20} kB\nMemFree: 1 kB\nMemAvailable: {20 << 20} kB\n",
        "/sys/fs/cgroup/memory.max": limit,
        "/sys/fs/cgroup/memory.current": used,
    }
    monkeypatch.setattr(hardware, "_read_lines", lambda path: iter(files[path].splitlines()))
    assert hardware.host_memory() == (total_gib << 30, free_gib << 30)


def test_a_tool_that_is_not_there_or_fails_says_nothing() -> None:
    assert hardware.run_tool(("no-such-program-anywhere",)) == ""
    assert hardware.run_tool((sys.executable, "-c", "print('x'); raise SystemExit(3)")) == ""
    assert hardware.run_tool((sys.executable, "-c", "print('x')")) == "x\n"


def test_packages_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "LISTED_PACKAGES", ("fastapi", "no-such-package-anywhere"))
    assert list(system.installed_versions()) == ["fastapi"]
