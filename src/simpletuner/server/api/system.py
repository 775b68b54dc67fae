"""Routes for system information and for logging in."""

from __future__ import annotations

import platform
import shutil
from importlib import metadata
from pathlib import Path

from fastapi import APIRouter, Request, Response

from simpletuner import __version__
from simpletuner.server import hardware
from simpletuner.server.schemas.system import DiskInfo, LoginRequest, SystemInfo
from simpletuner.server.schemas.usage import MachineUsage
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
def get_system(services: ServicesDep) -> SystemInfo:
    """Return the hardware and the installed versions."""
    workspace = services.workspace
    total, free = hardware.host_memory()
    return SystemInfo(
        version=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        workspace=str(workspace.root),
        roots=[str(root) for root in workspace.extra_roots],
        devices=hardware.list_devices(),
        memory_total_bytes=total,
        memory_free_bytes=free,
        disks=list_disks(workspace.allowed_roots),
        packages=installed_versions(),
    )


@router.get("/system/usage")
def get_usage(services: ServicesDep, since: float = 0.0) -> MachineUsage:
    """Return the load of the machine after `since` (unix seconds), as far as it was recorded."""
    return services.usage.history(since)


def list_disks(folders: tuple[Path, ...]) -> list[DiskInfo]:
    """Return each file system once, named after the first of `folders` that is on it."""
    disks: dict[int, DiskInfo] = {}
    for folder in folders:
        if folder.is_dir():
            usage = shutil.disk_usage(folder)
            disk = DiskInfo(path=str(folder), total_bytes=usage.total, free_bytes=usage.free)
            disks.setdefault(folder.stat().st_dev, disk)
    return list(disks.values())


def installed_versions() -> dict[str, str]:
    """Return package versions from the installed metadata, without importing the packages."""
    versions = {}
    for name in LISTED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@router.post("/login", status_code=204)
async def login(
    request: Request, response: Response, body: LoginRequest, services: ServicesDep
) -> None:
    """Exchange the token, or the one-time login code that the server printed, for a cookie.

    The cookie is HttpOnly, so that no script of the page can read it.
    """
    token_auth = request.app.state.token_auth
    if token_auth is None:
        return
    check_token(request, token_auth, body.token)
    response.set_cookie(
        cookie_name(services.settings),
        token_auth.cookie,
        max_age=YEAR_S,
        httponly=True,
        samesite="strict",
        secure=services.settings.certfile is not None,
        path="/",
    )
