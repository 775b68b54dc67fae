"""The machine, and logging in."""

from __future__ import annotations

import platform
import shutil
from importlib import metadata
from pathlib import Path

from fastapi import APIRouter, Request, Response

from simpletuner import __version__
from simpletuner.server import hardware
from simpletuner.server.schemas.system import DiskInfo, LoginRequest, SystemInfo
from simpletuner.server.security_middleware import check_token, cookie_name
from simpletuner.server.services import ServicesDep

router = APIRouter(prefix="/api/v1", tags=["system"])
YEAR_S = 365 * 86400
LISTED_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "pillow",
    "fastapi",
    "uvicorn",
)


@router.get("/system")
def get_system(home: ServicesDep) -> SystemInfo:
    place, (total, free) = home.workspace, hardware.host_memory()
    return SystemInfo(
        version=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        workspace=str(place.root),
        roots=[str(root) for root in place.extra_roots],
        devices=hardware.list_devices(),
        memory_total_bytes=total,
        memory_free_bytes=free,
        disks=list_disks(place.allowed_roots),
        packages=installed_versions(),
    )


def list_disks(folders: tuple[Path, ...]) -> list[DiskInfo]:
    """Of each file system once, under the first folder on it."""
    found: dict[int, DiskInfo] = {}
    for folder in folders:
        if folder.is_dir():
            room = shutil.disk_usage(folder)
            disk = DiskInfo(path=str(folder), total_bytes=room.total, free_bytes=room.free)
            found.setdefault(folder.stat().st_dev, disk)
    return list(found.values())


def installed_versions() -> dict[str, str]:
    """Versions from the installed files; nothing is imported."""
    found = {}
    for name in LISTED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@router.post("/login", status_code=204)
async def login(request: Request, response: Response, ask: LoginRequest, home: ServicesDep) -> None:
    """The token, or the launch word that the server printed, for a cookie that scripts cannot read."""
    gate = request.app.state.token_auth
    if gate is None:
        return
    check_token(request, gate, ask.token)
    response.set_cookie(
        cookie_name(home.settings),
        gate.cookie,
        max_age=YEAR_S,
        httponly=True,
        samesite="strict",
        path="/",
    )
