"""The machine."""

from __future__ import annotations

from typing import Literal

from simpletuner.server.wire.base import Wire


class Device(Wire):
    name: str
    kind: Literal["cuda", "rocm", "mps", "cpu"]
    memory_total_bytes: int | None
    memory_free_bytes: int | None


class Disk(Wire):
    path: str
    total_bytes: int
    free_bytes: int


class System(Wire):
    version: str
    python: str
    platform: str
    workspace: str
    roots: list[str]
    devices: list[Device]
    memory_total_bytes: int | None
    memory_free_bytes: int | None
    disks: list[Disk]
    packages: dict[str, str]


class Login(Wire):
    token: str
