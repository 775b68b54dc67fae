"""The memory and disk space that a run can use on this machine."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants

from simpletuner.config.environment import user_cache_dir
from simpletuner.config.schema import RunConfig
from simpletuner.training.device import ComputeDevice
from simpletuner.training.memory_plan import step_time
from simpletuner.training.memory_plan.host_memory import HOST_RUNTIME_BYTES

MEMINFO_PATH = Path("/proc/meminfo")
CGROUP_PATH = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MachineResources:
    """The device that a run is planned for.

    kind: "cuda", "mps" or "cpu". peak_flops: FLOP/s. device_free_bytes: of the accelerator, or of
    the host where the device is a CPU. Free bytes are None where they are not known.
    """

    name: str
    kind: str
    peak_flops: float
    device_free_bytes: int | None = None
    host_free_bytes: int | None = None

    def for_process(self, local_processes: int) -> MachineResources:
        """Return what one of several processes of a machine has: each its own GPU."""
        if self.kind == "cuda" or self.device_free_bytes is None:
            return self
        return replace(self, device_free_bytes=self.device_free_bytes // local_processes)

    @property
    def available_for_tensors(self) -> int | None:
        """Return the part of the free memory that the tensors of a training may use."""
        runtime = HOST_RUNTIME_BYTES["cpu"] if self.kind == "cpu" else 0
        return None if self.device_free_bytes is None else self.device_free_bytes - runtime


def detect_budget(device: ComputeDevice) -> MachineResources:
    """Return the budget of this machine.

    peak_flops is known by the name of the GPU, measured on a CPU, and else that of REFERENCE_GPU.
    """
    hardware, kind = device.hardware, device.device.type
    peak = (
        step_time.measure_cpu_flops(device.weights_dtype)
        if kind == "cpu"
        else step_time.peak_flops(hardware.name)
    )
    host, free = free_host_bytes(), hardware.free_bytes()
    return MachineResources(
        hardware.name,
        kind,
        peak or reference_budget(kind).peak_flops,
        host if free is None else free,
        host,
    )


def reference_budget(kind: str) -> MachineResources:
    """Return the speed of REFERENCE_GPU, without limits, to plan for a machine that is not here."""
    return MachineResources(
        step_time.REFERENCE_GPU, kind, step_time.PEAK_TFLOPS[step_time.REFERENCE_GPU] * 1e12
    )


def free_host_bytes() -> int | None:
    """Return the memory that is available without swapping, within the limit of a container."""
    sizes = []
    if MEMINFO_PATH.exists():
        rows = dict(
            line.split(":", 1) for line in MEMINFO_PATH.read_text().splitlines() if ":" in line
        )
        sizes.append(int(rows["MemAvailable"].split()[0]) * 1024)
    names = ("memory.max", "memory.current", "memory.stat")
    limit, used, stat = (
        path.read_text() if path.exists() else "" for path in map(CGROUP_PATH.joinpath, names)
    )
    if limit.strip().isdigit() and used:
        rows = dict(line.split() for line in stat.splitlines())
        # Cached pages of files count as used, but are released when a process needs memory.
        cached = sum(int(rows.get(name, 0)) for name in ("active_file", "inactive_file"))
        sizes.append(int(limit) - int(used) + cached)
    if not sizes and "SC_PHYS_PAGES" in os.sysconf_names:
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(sizes, default=None)


def find_disk_shortages(run: RunConfig, needed: Mapping[str, int]) -> list[tuple[Path, int, int]]:
    """Return (folder, needed, free) of each disk with too little space.

    needed: as in MemoryPrediction.disk. Files that exist already are subtracted: a resumed run
    replaces its checkpoints, and a base that was quantised before is read again.
    """
    output = Path(os.path.expanduser(run.training.output_dir))
    checkpoint_bytes = sum(
        file.stat().st_size for file in output.glob("checkpoint-*/**/*") if file.is_file()
    )
    chosen = run.model.quantized_cache_dir
    quantised = Path(os.path.expanduser(chosen)) if chosen else user_cache_dir() / "quantized"
    converted = quantised.glob(f"*-{run.model.base_model_precision}-*")  # complete or partial
    written = {
        "checkpoints": checkpoint_bytes,
        "quantised base": sum(file.stat().st_size for file in converted),
    }
    folders = {
        "download": Path(constants.HF_HUB_CACHE),
        "quantised base": quantised,
        "checkpoints": output,
        "result": output,
    }
    disks: dict[int, tuple[Path, int]] = defaultdict(lambda: (Path(), 0))
    for use, size in needed.items():
        disk = _existing_parent(folders[use]).stat().st_dev
        disks[disk] = (folders[use], disks[disk][1] + max(0, size - written.get(use, 0)))
    rows = [
        (folder, size, shutil.disk_usage(_existing_parent(folder)).free)
        for folder, size in disks.values()
    ]
    return [row for row in rows if row[1] > row[2]]


def _existing_parent(folder: Path) -> Path:
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())
