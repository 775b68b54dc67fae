"""Which waiting jobs start on which free devices."""

from __future__ import annotations

import random

import pytest

from simpletuner.server.queue_order import MAX_OVERTAKES, DeviceRequest, assign_devices


def test_jobs_start_in_order_on_the_first_free_devices() -> None:
    waiting = [DeviceRequest("a", 2), DeviceRequest("b", 1), DeviceRequest("c", 1)]
    found = assign_devices(waiting, ["0", "3", "5"])
    assert (found.started, found.overtaken) == ({"a": ("0", "3"), "b": ("5",)}, {})


def test_a_later_job_uses_what_would_be_idle() -> None:
    waiting = [DeviceRequest("wide", 4), DeviceRequest("narrow", 1), DeviceRequest("pair", 2)]
    found = assign_devices(waiting, ["0", "1", "2"])
    assert found.started == {"narrow": ("0",), "pair": ("1", "2")}
    assert found.overtaken == {"wide": 2}


@pytest.mark.parametrize("before", range(MAX_OVERTAKES + 1))
def test_a_job_is_overtaken_so_often_and_no_more(before: int) -> None:
    waiting = [DeviceRequest("wide", 9, before), *(DeviceRequest(str(at), 1) for at in range(8))]
    found = assign_devices(waiting, [str(at) for at in range(8)])
    assert len(found.started) == MAX_OVERTAKES - before
    assert found.overtaken.get("wide", before) == MAX_OVERTAKES


def test_each_waiting_job_has_its_own_limit() -> None:
    """The one that has waited longer than the other decides."""
    waiting = [
        DeviceRequest("first", 8, 1),
        DeviceRequest("second", 6, MAX_OVERTAKES - 1),
        DeviceRequest("third", 1),
        DeviceRequest("fourth", 1),
    ]
    found = assign_devices(waiting, ["0", "1"])
    assert found.started == {"third": ("0",)}
    assert found.overtaken == {"first": 2, "second": MAX_OVERTAKES}


@pytest.mark.parametrize("seed", range(20))
def test_wide_jobs_do_not_starve_in_a_busy_queue(seed: int) -> None:
    """A queue that is never empty, on 8 devices: every job starts, few after ones behind it."""
    draw = random.Random(seed)
    devices = [str(at) for at in range(8)]
    waiting: list[DeviceRequest] = []
    running: list[tuple[int, tuple[str, ...]]] = []
    started: list[int] = []
    created = 0
    for now in range(3000):
        running = [(end, names) for end, names in running if end > now]
        while len(waiting) < 6:  # others keep coming
            count = draw.choice([1, 1, 1, 1, 2, 4, 8])
            waiting.append(DeviceRequest(str(created), count))
            created += 1
        busy = {name for _, names in running for name in names}
        found = assign_devices(waiting, [name for name in devices if name not in busy])
        for job, names in found.started.items():
            assert not busy & set(names)
            assert len(names) == next(one.count for one in waiting if one.job == job)
            busy |= set(names)
            running.append((now + draw.randint(1, 30), names))
            started.append(int(job))
        waiting = [
            DeviceRequest(one.job, one.count, found.overtaken.get(one.job, one.overtaken))
            for one in waiting
            if one.job not in found.started
        ]
    assert len(started) > 100
    for at, job in enumerate(started):
        assert sum(other > job for other in started[:at]) <= MAX_OVERTAKES
    assert min(int(one.job) for one in waiting) > created - 20, "none is left behind"
