"""Messages about the load of the machine."""

from __future__ import annotations

from simpletuner.server.schemas.base import ApiModel


class GpuUsage(ApiModel):
    """One GPU over time: columns of the same length as `t`; None for what it does not report."""

    name: str
    memory_total_bytes: float | None
    load_percent: list[float | None]
    memory_used_bytes: list[float | None]
    temperature_c: list[float | None]
    power_w: list[float | None]


class MachineUsage(ApiModel):
    """The load of the machine over time, as columns of equal length.

    t: unix seconds. cpu_percent: of all cores together. disk_free_bytes: on the disk of the
    workspace; disk_read_bytes_s, disk_write_bytes_s: bytes per second on all disks. gpus: empty
    where nvidia-smi reports none.
    """

    t: list[float]
    cpu_percent: list[float | None]
    memory_total_bytes: int | None
    memory_used_bytes: list[int | None]
    disk_free_bytes: list[int | None]
    disk_read_bytes_s: list[float | None]
    disk_write_bytes_s: list[float | None]
    gpus: list[GpuUsage]
