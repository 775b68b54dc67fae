"""Messages about the machine, and the login request."""

from __future__ import annotations

from typing import Literal

from simpletuner.server.schemas.base import ApiModel


class DeviceInfo(ApiModel):
    """A GPU, or the CPU."""

    name: str
    kind: Literal["cuda", "rocm", "mps", "cpu"]
    memory_total_bytes: int | None
    memory_free_bytes: int | None


class DiskInfo(ApiModel):
    """A file system."""

    path: str
    total_bytes: int
    free_bytes: int


class SystemInfo(ApiModel):
    """The hardware, the installed versions and the allowed folders."""

    version: str
    python: str
    platform: str
    workspace: str
    roots: list[str]
    devices: list[DeviceInfo]
    memory_total_bytes: int | None
    memory_free_bytes: int | None
    disks: list[DiskInfo]
    packages: dict[str, str]


class LoginRequest(ApiModel):
    """The token or the one-time login code."""

    token: str
