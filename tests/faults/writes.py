"""Kills and failing disks at every boundary of every kind of write.

What counts as a boundary: a call that makes a state of the disk durable or visible. A writer is run
again and again, and dies, or gets an error, at its first such call, its second, and so on, until it
gets through.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from simpletuner.cache.tensor_store import TensorStore
from simpletuner.config.output_folder import is_run_folder
from simpletuner.errors import CacheError, DiskFull, SimpleTunerError, StorageError
from simpletuner.events.event_log import EventLog, read_events
from simpletuner.events.event_types import NoticeIssued
from simpletuner.events.sinks import null_emit
from simpletuner.training import checkpoint
from simpletuner.training.own_files import replace_own_file
from simpletuner.training.run_folder import RunFolder
from tests.faults.outcomes import Lost, Tally, WrongCode

BOUNDARIES = ("fsync", "replace", "rename", "mkdir", "open", "unlink", "write")
FAILURES = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)
ALLOWED = (DiskFull, StorageError, CacheError)


@dataclass(frozen=True)
class Writer:
    """prepare: makes the sound state before. write: what is interrupted. check: raises Lost."""

    name: str
    prepare: Callable[[Path], None]
    write: Callable[[Path], None]
    check: Callable[[Path], None]


def tensors(number: int) -> dict[str, torch.Tensor]:
    return {"x": torch.full((64,), float(number))}


def save(root: Path, step: int) -> None:
    snapshot = checkpoint.CheckpointData(step, {"weights": tensors(step)}, {"note": step})
    checkpoint.save_checkpoint(root, snapshot, None, keep=1)


def check_checkpoint(root: Path) -> None:
    with RunFolder(root):
        newest = checkpoint.find_latest_valid(root, null_emit)
    if newest is None:
        raise Lost("no checkpoint is sound any more")
    found = checkpoint.read_tensors(newest)["weights"]["x"]
    if not torch.equal(torch.as_tensor(found), tensors(checkpoint.checkpoint_step(newest))["x"]):
        raise Lost("the weights are others")
    if left := [
        path.name for path in root.glob(".*") if path.name.startswith((".writing", ".removing"))
    ]:
        raise Lost(f"leftovers: {left}")


def prepare_run(root: Path) -> None:
    with RunFolder(root):
        save(root, 1)


def put(root: Path, number: int) -> None:
    with TensorStore(root, "f") as store:
        store.put(f"k{number}", tensors(number))


def check_store(root: Path) -> None:
    with TensorStore(root, "f") as store:
        if "k1" in store.missing_keys(["k1"]) or not torch.equal(
            store.get("k1")["x"], tensors(1)["x"]
        ):
            raise Lost("an entry that was written before is gone")
        if left := list(store.folder.glob("*.tmp")):
            raise Lost(f"leftovers: {left}")


def append(root: Path, message: str) -> None:
    log = EventLog(root / "events.jsonl")
    try:
        log.append(NoticeIssued(message))
    finally:
        log.close()


def check_log(root: Path) -> None:
    append(root, "after")
    told = [record.event for record in read_events(root / "events.jsonl")]
    if told[0] != NoticeIssued("1") or told[-1] != NoticeIssued("after"):
        raise Lost(f"the log reads {told}")


def check_own_file(root: Path) -> None:
    with RunFolder(root):
        pass
    kept = [path.read_text() for path in root.rglob("README.md")]
    if "edited by a person" not in kept or not is_run_folder(root):
        raise Lost(f"the edited card is gone: {kept}")
    if left := list(root.rglob(".*.tmp")):
        raise Lost(f"leftovers: {left}")


def prepare_card(root: Path) -> None:
    with RunFolder(root):
        replace_own_file(root, "README.md", "first")
    (root / "README.md").write_text("edited by a person")


def write_card(root: Path) -> None:
    replace_own_file(root, "README.md", "second")


def make_folder(root: Path) -> None:
    root.mkdir(parents=True)
    append(root, "1")


WRITERS = (
    Writer("checkpoint", prepare_run, lambda root: save(root, 2), check_checkpoint),
    Writer("cache", lambda root: put(root, 1), lambda root: put(root, 2), check_store),
    Writer("event log", make_folder, lambda root: append(root, "2"), check_log),
    Writer("edited card", prepare_card, write_card, check_own_file),
)  # fmt: skip


@contextmanager
def interrupted(at: int, act: Callable[[], None]) -> Iterator[list[int]]:
    """Call `act` instead of the boundary number `at`. Yields a list with the number of calls."""
    calls = [0]

    def wrap(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            calls[0] += 1
            if calls[0] == at:
                act()
            return real(*arguments, **named)

        return call

    patches = [mock.patch.object(os, name, wrap(getattr(os, name))) for name in BOUNDARIES]
    for patch in patches:
        patch.start()
    try:
        yield calls
    finally:
        for patch in patches:
            patch.stop()


def kills(root: Path, limit: int) -> Tally:
    """Each writer dies at each of its boundaries, in a process of its own."""
    tally = Tally("kills at write boundaries")
    for writer in WRITERS:
        for at in range(1, limit + 1):
            folder = root / f"kill-{writer.name}-{at}"
            shutil.rmtree(folder, ignore_errors=True)
            writer.prepare(folder)
            child = os.fork()
            if child == 0:
                with interrupted(at, lambda: os._exit(9)):
                    writer.write(folder)
                os._exit(0)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            tally.try_one(f"{writer.name} at {at}", lambda w=writer, f=folder: w.check(f))
            shutil.rmtree(folder, ignore_errors=True)
            if ended == 0:
                break
    return tally


def failing_disks(root: Path, limit: int) -> Tally:
    """Each writer gets each error at each of its boundaries."""
    tally = Tally("full and failing disks")
    for writer in WRITERS:
        for number in FAILURES:
            for at in range(1, limit + 1):
                folder = root / f"fail-{writer.name}-{number}-{at}"
                shutil.rmtree(folder, ignore_errors=True)
                writer.prepare(folder)
                reached = [0]

                def attempt(
                    w: Writer = writer,
                    f: Path = folder,
                    at: int = at,
                    n: int = number,
                    reached: list[int] = reached,
                ) -> None:
                    def fail() -> None:
                        raise OSError(n, os.strerror(n), "a file")

                    try:
                        with interrupted(at, fail) as calls:
                            w.write(f)
                    except SimpleTunerError as error:
                        if not isinstance(error, ALLOWED):
                            raise WrongCode(f"exit {error.exit_code}: {error}") from error
                    except OSError as error:  # the callers translate it; see cli and run.py
                        if error.errno != n:
                            raise
                    finally:
                        reached[0] = calls[0]
                    w.check(f)

                tally.try_one(f"{writer.name}, {os.strerror(number)} at {at}", attempt)
                shutil.rmtree(folder, ignore_errors=True)
                if reached[0] < at:
                    break
    return tally
