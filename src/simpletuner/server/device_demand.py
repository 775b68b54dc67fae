"""Refusal of a job that asks for more GPUs than the machine of the server has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from simpletuner.config.environment import copy_process_environment
from simpletuner.events.formatting import count_of
from simpletuner.server.api_errors import abort
from simpletuner.server.job_config import JobConfig
from simpletuner.server.schemas.system import DeviceInfo
from simpletuner.server.supervisor import job_devices


def require_devices(config: JobConfig, devices: Callable[[], Sequence[DeviceInfo]]) -> None:
    """Raise ApiError 422 for a job that could never get its GPUs.

    devices: lists those of this machine; it is called only for a job that asks for several.
    Without a GPU the processes of a job share the CPU, which is not refused.
    """
    count = config.device_count
    if count is None or count < 2 or config.config.get("device") == "cpu":
        return
    usable = len(job_devices(devices(), copy_process_environment()))
    if 0 < usable < count:
        abort(
            422,
            f"num_processes = {count}, but jobs on this machine can use {count_of(usable, 'GPU')}; "
            f"set it to {usable} or less, or to auto",
            "num_processes",
        )
