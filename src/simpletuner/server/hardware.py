"""Devices and memory, read from the system's own tools, because the server never imports torch."""

from __future__ import annotations

import functools
import json
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simpletuner.server.schemas.system import DeviceInfo

MIB = 1 << 20
TOOL_TIMEOUT_S = 10.0
NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,memory.free",
    "--format=csv,noheader,nounits",
)
ROCM_SMI = ("rocm-smi", "--showproductname", "--showmeminfo", "vram", "--json")
SYSCTL = ("sysctl", "-n", "machdep.cpu.brand_string", "hw.memsize")


def list_devices() -> list[DeviceInfo]:
    """Return all accelerators, or the CPU if there is none."""
    devices = [*parse_nvidia_smi(run_tool(NVIDIA_SMI)), *parse_rocm_smi(run_tool(ROCM_SMI))]
    if not devices and platform.system() == "Darwin" and platform.machine() == "arm64":
        devices = parse_sysctl(run_tool(SYSCTL))
    return devices or [cpu_device()]


@functools.cache
def known_devices() -> tuple[DeviceInfo, ...]:
    """Return list_devices() as it was at the first call: which devices there are never changes."""
    return tuple(list_devices())


def run_tool(argv: tuple[str, ...]) -> str:
    """Run a program and return its stdout, or "" if it is not installed or fails."""
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def parse_nvidia_smi(text: str) -> list[DeviceInfo]:
    """Parse one GPU per line: "NVIDIA H200, 143771, 143000", with sizes in MiB.

    An integrated GPU reports its memory as [N/A].
    """
    rows = [
        [cell.strip() for cell in line.rsplit(",", 2)]
        for line in text.splitlines()
        if line.count(",") >= 2
    ]
    return [
        _device_info(name, "cuda", _mib_to_bytes(total), _mib_to_bytes(free))
        for name, total, free in rows
    ]


def _mib_to_bytes(cell: str) -> int | None:
    return int(cell) * MIB if cell.isdigit() else None


def parse_rocm_smi(text: str) -> list[DeviceInfo]:
    """Parse rocm-smi's JSON: {"card0": {"Card Series": ..., "VRAM Total Memory (B)": "..."}}."""
    try:
        output = json.loads(text) if text else None
    except ValueError:
        output = None
    cards = sorted(output.items()) if isinstance(output, dict) else []
    devices = []
    for key, card in cards:
        if not key.startswith("card"):
            continue
        name = str(card.get("Card Series") or card.get("Card series") or key)
        total, used = (
            str(card.get(f"VRAM Total {word}", "")) for word in ("Memory (B)", "Used Memory (B)")
        )
        size = int(total) if total.isdigit() else None
        free = size - int(used) if size is not None and used.isdigit() else None
        devices.append(_device_info(name, "rocm", size, free))
    return devices


def parse_sysctl(text: str) -> list[DeviceInfo]:
    """Parse sysctl's output on an Apple computer, whose GPU shares the memory of the CPU."""
    lines = text.split("\n")
    total = int(lines[1]) if len(lines) > 1 and lines[1].isdigit() else None
    return [_device_info(lines[0] or "Apple", "mps", total, None)]


def _device_info(name: str, kind: Any, total: int | None, free: int | None) -> DeviceInfo:
    return DeviceInfo(name=name, kind=kind, memory_total_bytes=total, memory_free_bytes=free)


def cpu_device() -> DeviceInfo:
    """Return the CPU as a device, with the host memory."""
    total, free = host_memory()
    names = (
        line.partition(":")[2].strip()
        for line in _read_lines("/proc/cpuinfo")
        if line.startswith("model name")
    )
    return _device_info(next(names, platform.processor() or platform.machine()), "cpu", total, free)


def host_memory() -> tuple[int | None, int | None]:
    """Return the total and free bytes of host memory; in a container, those available to it."""
    rows = dict(line.split(":", 1) for line in _read_lines("/proc/meminfo") if ":" in line)
    sizes = [
        int(rows[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable") if key in rows
    ]
    if len(sizes) < 2:
        cards = parse_sysctl(run_tool(SYSCTL)) if platform.system() == "Darwin" else []
        return (cards[0].memory_total_bytes, None) if cards else (None, None)
    total, free = sizes
    limit, used = (
        next(_read_lines(f"/sys/fs/cgroup/memory.{word}"), "") for word in ("max", "current")
    )
    if limit.isdigit() and used.isdigit() and int(limit) < total:
        total, free = int(limit), min(free, max(0, int(limit) - int(used)))
    return total, free


def _read_lines(path: str) -> Iterator[str]:
    try:
        yield from Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
