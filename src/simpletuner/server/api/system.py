"""The machine, and logging in."""

from __future__ import annotations

import platform
import shutil
from importlib import metadata
from pathlib import Path

from fastapi import APIRouter, Request, Response

from simpletuner import __version__
from simpletuner.server import hardware
from simpletuner.server.guard import cookie_name, try_word
from simpletuner.server.home import Here
from simpletuner.server.wire.system import Disk, Login, System

router = APIRouter(prefix="/api/v1", tags=["system"])
YEAR_S = 365 * 86400
PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "pillow", "fastapi", "uvicorn")


@router.get("/system")
def system(home: Here) -> System:
    place, (total, free) = home.place, hardware.memory()
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


@router.post("/login", status_code=204)
async def login(request: Request, response: Response, ask: Login, home: Here) -> None:
    """The token, or the launch word that the server printed, for a cookie that scripts cannot read."""
    gate = request.app.state.gate
    if gate is None:
        return
    try_word(request, gate, ask.token)
    response.set_cookie(
        cookie_name(home.settings), gate.cookie, max_age=YEAR_S, httponly=True, samesite="strict", path="/"
    )
