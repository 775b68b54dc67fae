"""What there is: free memory of the device and of the host, free space on the disks that a run writes to."""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from simpletuner.config.environment import user_cache
from simpletuner.config.schema import RunConfig
from simpletuner.training.device import Device

MEMORY = Path("/proc/meminfo")
CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))


@dataclass(frozen=True)
class Room:
    """Free bytes; None where nobody can say. device: the accelerator's, or the host's again on a CPU."""

    name: str
    device: int | None
    host: int | None


def found(device: Device) -> Room:
    host, free = free_host(), device.hardware.free_bytes()
    return Room(device.hardware.name, host if free is None else free, host)


def free_host() -> int | None:
    """What can be had without swapping, inside a container's limit."""
    sizes = []
    if MEMORY.exists():
        rows = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines() if ":" in line)
        sizes.append(int(rows["MemAvailable"].split()[0]) * 1024)
    limit, used = (path.read_text().strip() if path.exists() else "" for path in CGROUP)
    if limit.isdigit() and used.isdigit():
        sizes.append(int(limit) - int(used))
    if not sizes and "SC_PHYS_PAGES" in os.sysconf_names:
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(sizes, default=None)


def lacking_on_disks(run: RunConfig, needed: Mapping[str, int]) -> list[tuple[Path, int, int]]:
    """(folder, needed, free) of each disk with too little space; needed: as in Prediction.disk.

    What the run folder holds already counts as written: a resumed run replaces its checkpoints.
    """
    output = Path(run.training.output_dir).expanduser()
    there = sum(file.stat().st_size for file in output.glob("checkpoint-*/**/*") if file.is_file())
    quantised = run.model.quantized_cache_dir
    places = {
        "download": Path(constants.HF_HUB_CACHE),
        "quantised base": Path(quantised).expanduser() if quantised else user_cache(),
        "checkpoints": output,
        "result": output,
    }
    disks: dict[int, tuple[Path, int]] = defaultdict(lambda: (Path(), 0))
    for what, size in needed.items():
        place = next(
            folder
            for folder in (places[what].absolute(), *places[what].absolute().parents)
            if folder.exists()
        )
        disk = place.stat().st_dev
        less = there if what == "checkpoints" else 0
        disks[disk] = (places[what], disks[disk][1] + max(0, size - less))
    rows = [(folder, size, shutil.disk_usage(_existing(folder)).free) for folder, size in disks.values()]
    return [row for row in rows if row[1] > row[2]]


def _existing(folder: Path) -> Path:
    return next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
