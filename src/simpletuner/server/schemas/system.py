"""The machine."""

from __future__ import annotations

from typing import Literal

from simpletuner.server.schemas.base import ApiModel


class DeviceInfo(ApiModel):
    name: str
    kind: Literal["cuda", "rocm", "mps", "cpu"]
    memory_total_bytes: int | None
    memory_free_bytes: int | None


class DiskInfo(ApiModel):
    path: str
    total_bytes: int
    free_bytes: int


class SystemInfo(ApiModel):
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
    token: str
