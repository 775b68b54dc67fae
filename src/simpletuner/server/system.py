"""What the machine is and has, for the page about it."""

from __future__ import annotations

import platform
import shutil
from importlib import metadata
from pathlib import Path

from simpletuner import __version__
from simpletuner.server import hardware
from simpletuner.server.place import Place
from simpletuner.server.wire.system import Disk, System

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
    "numpy",
    "pillow",
    "fastapi",
    "uvicorn",
)


def describe(place: Place) -> System:
    total, free = hardware.memory()
    return System(
        version=__version__, python=platform.python_version(), platform=platform.platform(),
        workspace=str(place.workspace), roots=[str(root) for root in place.roots], devices=hardware.devices(),
        memory_total_bytes=total, memory_free_bytes=free, disks=disks(place.allowed), packages=packages(),
    )  # fmt: skip


def disks(folders: tuple[Path, ...]) -> list[Disk]:
    """Of each file system once, under the first folder on it."""
    found: dict[int, Disk] = {}
    for folder in folders:
        if folder.is_dir():
            room = shutil.disk_usage(folder)
            disk = Disk(path=str(folder), total_bytes=room.total, free_bytes=room.free)
            found.setdefault(folder.stat().st_dev, disk)
    return list(found.values())


def packages() -> dict[str, str]:
    """Versions from the installed files; nothing is imported."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
