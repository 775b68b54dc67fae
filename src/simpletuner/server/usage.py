"""The load of this machine over time: CPU, memory, disk and GPUs, for the charts.

Values come from /proc and nvidia-smi. What a machine does not report is None, never an estimate:
without /proc there is no CPU load, without nvidia-smi no load of a GPU.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from simpletuner.server import hardware
from simpletuner.server.schemas.usage import GpuUsage, MachineUsage

INTERVAL_S = 10.0  # while a job runs
MIN_INTERVAL_S = 2.0  # while a page asks
ASKED_S = 30.0  # after the last request, samples are still taken
MAX_SAMPLES = 4320  # twelve hours
MAX_POINTS = 600
NO_DISKS = ("loop", "ram", "zram")
SECTOR_BYTES = 512  # of /proc/diskstats, whatever the disk's own are
GPU_FIELDS = ("index", "utilization.gpu", "memory.used", "memory.total", "temperature.gpu")
GPU_QUERY = (
    "nvidia-smi",
    f"--query-gpu={','.join((*GPU_FIELDS, 'power.draw', 'name'))}",
    "--format=csv,noheader,nounits",
)


@dataclass(frozen=True)
class GpuSample:
    """The load of one GPU; None for what it does not report."""

    name: str
    load_percent: float | None
    memory_used_bytes: float | None
    memory_total_bytes: float | None
    temperature_c: float | None
    power_w: float | None


@dataclass(frozen=True)
class Sample:
    """The load at one time. t: unix seconds. disk_*: bytes per second since the sample before."""

    t: float
    cpu_percent: float | None
    memory_used_bytes: int | None
    disk_free_bytes: int | None
    disk_read_bytes_s: float | None
    disk_write_bytes_s: float | None
    gpus: tuple[GpuSample, ...]


class UsageSampler:
    """Takes samples; rates are those since the sample before. folder: on the disk to report."""

    def __init__(
        self, folder: Path, proc: Path = Path("/proc"), disks: Path = Path("/sys/block")
    ) -> None:
        self._folder = folder
        self._proc = proc
        self._disks = disks
        self._cpu: tuple[int, int] | None = None
        self._disk: tuple[float, int, int] | None = None
        self._has_gpu_tool = shutil.which(GPU_QUERY[0]) is not None

    def take(self) -> Sample:
        """Return the load since the sample before."""
        total, free = hardware.host_memory()
        read_s, written_s = self._disk_rates()
        return Sample(
            t=time.time(),
            cpu_percent=self._cpu_percent(),
            memory_used_bytes=None if total is None or free is None else total - free,
            disk_free_bytes=self._disk_free(),
            disk_read_bytes_s=read_s,
            disk_write_bytes_s=written_s,
            gpus=tuple(parse_gpus(hardware.run_tool(GPU_QUERY))) if self._has_gpu_tool else (),
        )

    def _disk_free(self) -> int | None:
        try:
            return shutil.disk_usage(self._folder).free
        except OSError:
            return None

    def _cpu_percent(self) -> float | None:
        """Return the share of all cores that was busy; None for the first sample."""
        before, self._cpu = self._cpu, self._cpu_ticks()
        if before is None or self._cpu is None:
            return None
        total, idle = self._cpu[0] - before[0], self._cpu[1] - before[1]
        return round(100 * (1 - idle / total), 1) if total > 0 else None

    def _cpu_ticks(self) -> tuple[int, int] | None:
        """Return (all, idle) ticks of all cores since the start of the machine."""
        line = next(_lines(self._proc / "stat"), "")
        ticks = [int(word) for word in line.split()[1:9] if word.isdigit()]
        return (sum(ticks), ticks[3] + ticks[4]) if len(ticks) >= 5 else None

    def _disk_rates(self) -> tuple[float | None, float | None]:
        """Return bytes per second that were read and written, on all disks."""
        before, now = self._disk, self._disk_bytes()
        self._disk = None if now is None else (time.monotonic(), *now)
        if before is None or self._disk is None:
            return None, None
        seconds = max(1e-3, self._disk[0] - before[0])
        read, written = ((self._disk[at] - before[at]) / seconds for at in (1, 2))
        return round(max(0.0, read)), round(max(0.0, written))

    def _disk_bytes(self) -> tuple[int, int] | None:
        """Return the bytes read and written by all whole disks, without their partitions."""
        read = written = 0
        rows = [line.split() for line in _lines(self._proc / "diskstats")]
        rows = [row for row in rows if len(row) >= 10 and self._is_whole_disk(row[2])]
        for row in rows:
            read += int(row[5]) * SECTOR_BYTES
            written += int(row[9]) * SECTOR_BYTES
        return (read, written) if rows else None

    def _is_whole_disk(self, name: str) -> bool:
        """Return whether a name is a disk and not a partition, a RAM disk or an image file."""
        return not name.startswith(NO_DISKS) and (self._disks / name).is_dir()


class UsageRecorder:
    """Keeps the samples of the last hours, taken while a job runs or a page asks.

    is_busy: whether a job runs. An idle server without an open page takes none.
    """

    def __init__(self, sampler: UsageSampler, is_busy: Callable[[], bool]) -> None:
        self._sampler = sampler
        self._is_busy = is_busy
        self._samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self._asked_t = -ASKED_S
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="usage", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(INTERVAL_S):
            with contextlib.suppress(OSError):  # folders of jobs come and go
                if time.monotonic() - self._asked_t < ASKED_S or self._is_busy():
                    self._sample(INTERVAL_S / 2)

    def _sample(self, min_interval_s: float) -> None:
        """Take a sample, unless there is a newer one than that."""
        with self._lock:
            if not self._samples or time.time() - self._samples[-1].t >= min_interval_s:
                self._samples.append(self._sampler.take())

    def history(self, since: float = 0.0) -> MachineUsage:
        """Return the samples after `since` (unix seconds), and take one."""
        self._asked_t = time.monotonic()
        self._sample(MIN_INTERVAL_S)
        total, _ = hardware.host_memory()
        samples = [sample for sample in tuple(self._samples) if sample.t > since]
        return to_usage(thin_out(samples, MAX_POINTS), total)


def thin_out(samples: Sequence[Sample], limit: int) -> list[Sample]:
    """Return at most `limit` of the samples, evenly, always with the last one."""
    stride = -(-len(samples) // limit) or 1
    return list(samples[::-1][::stride])[::-1]


def to_usage(samples: Sequence[Sample], memory_total: int | None) -> MachineUsage:
    """Return the samples as columns of equal length."""
    names = max((sample.gpus for sample in samples), key=len, default=())
    return MachineUsage(
        t=[sample.t for sample in samples],
        cpu_percent=[sample.cpu_percent for sample in samples],
        memory_total_bytes=memory_total,
        memory_used_bytes=[sample.memory_used_bytes for sample in samples],
        disk_free_bytes=[sample.disk_free_bytes for sample in samples],
        disk_read_bytes_s=[sample.disk_read_bytes_s for sample in samples],
        disk_write_bytes_s=[sample.disk_write_bytes_s for sample in samples],
        gpus=[_gpu_columns(samples, at, gpu) for at, gpu in enumerate(names)],
    )


def _gpu_columns(samples: Sequence[Sample], at: int, gpu: GpuSample) -> GpuUsage:
    rows = [sample.gpus[at] if at < len(sample.gpus) else None for sample in samples]
    return GpuUsage(
        name=gpu.name,
        memory_total_bytes=gpu.memory_total_bytes,
        load_percent=[None if row is None else row.load_percent for row in rows],
        memory_used_bytes=[None if row is None else row.memory_used_bytes for row in rows],
        temperature_c=[None if row is None else row.temperature_c for row in rows],
        power_w=[None if row is None else row.power_w for row in rows],
    )


def parse_gpus(text: str) -> Iterator[GpuSample]:
    """Yield the GPUs of nvidia-smi's rows: "0, 97, 1024, 143771, 61, 312.50, NVIDIA H200"."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",", len(GPU_FIELDS) + 1)]
        if len(cells) == len(GPU_FIELDS) + 2 and cells[0].isdigit():
            load, used, total, temperature, power = map(_number, cells[1:6])
            yield GpuSample(cells[6], load, _mib(used), _mib(total), temperature, power)


def _number(cell: str) -> float | None:
    """Return a number, None for "[N/A]" and "[Not Supported]"."""
    try:
        return float(cell)
    except ValueError:
        return None


def _mib(value: float | None) -> float | None:
    return None if value is None else value * hardware.MIB


def _lines(path: Path) -> Iterator[str]:
    try:
        return iter(path.read_text(encoding="utf-8", errors="replace").splitlines())
    except OSError:
        return iter(())
