"""The run folder: all that is known about a run, and the only channel to its process.

config.json     every option of the run, resolved
events.jsonl    everything that happened (append-only)
train.log       the same as text
checkpoint-500/ images/ report.html and, at the end, the weights
run.lock        locked by the process that trains here; its content is only information
exit.json       how the last process ended
.simpletuner-run.json   the marker: this folder belongs to a run; written before anything else
earlier-1/      what an earlier run left, and files that were edited and would be replaced
control/        a file named stop, save or validate is a request to the running process;
                prompts.json holds validation prompts that a user edited while the run trains
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from simpletuner.atomic_io import write_atomically
from simpletuner.bounded_files import read_bounded_text
from simpletuner.config.output_folder import describe_foreign_folder, foreign_entries
from simpletuner.errors import ConfigError, RunLocked, storage_error
from simpletuner.training.leftovers import remove_all_leftovers
from simpletuner.training.own_files import (
    list_own_entries,
    list_results,
    move_to_earlier,
    replace_own_file,
    write_marker,
)

CONTROL_REQUESTS = ("stop", "save", "validate")
EDITED_PROMPTS = "control/prompts.json"  # kept when the run is resumed
LOCK_RETRY_S = 0.5
LOCK_UNSUPPORTED_ERRNOS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def replace_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Replace a folder so that the old one is removed only when the new one is complete.

    `write` gets the folder to write to. The caller must hold the run lock.
    """
    work = target.with_name(f".writing-{target.name}")
    old = target.with_name(f".replaced-{target.name}")
    if old.exists() and not target.exists():
        old.rename(target)  # a process was killed between the two renames below
    for leftover in (work, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write(work)
    if target.exists():
        target.rename(old)
    work.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _lock_file(descriptor: int) -> None:
    """Lock the file; raises OSError when another process holds the lock.

    It is tried for a moment, because a process that only looks holds the lock for an instant.
    """
    deadline = time.monotonic() + LOCK_RETRY_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


class RunFolder:
    """The folder of a run; `with RunFolder(path) as folder` takes and releases its lock.

    Raises ConfigError for a folder that holds anything else than a run, before anything is written;
    RunLocked when another process trains there, and DiskFull or StorageError when the folder cannot
    be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events_path = path / "events.jsonl"
        self.log_path = path / "train.log"
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        try:
            entries = foreign_entries(self.path)
            if entries:
                raise ConfigError(describe_foreign_folder(self.path, entries))
            self.path.mkdir(parents=True, exist_ok=True)
            write_marker(self.path)
            (self.path / "control").mkdir(exist_ok=True)
            probe = os.open(self.path / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            problem = f"output_dir = {self.path} cannot be written to ({error.filename})"
            raise storage_error(problem, error) from error
        try:
            _lock_file(probe)
        except OSError as error:
            if error.errno in LOCK_UNSUPPORTED_ERRNOS:
                os.close(probe)
                raise ConfigError(
                    f"output_dir = {self.path} is on a file system without file locks "
                    f"({error.strerror}), so two runs could destroy each other's results; choose "
                    "a folder on a local disk or on a file system with locks"
                ) from error
            holder = os.read(probe, 200).decode("utf-8", "replace").strip()
            os.close(probe)
            raise RunLocked(
                f"{self.path} is in use by another run ({holder or 'unknown process'}); "
                "wait for it, stop it, or choose another output_dir"
            ) from error
        self._lock = probe
        remove_all_leftovers(self.path)
        with contextlib.suppress(OSError):  # only information; other writes report a full disk
            os.ftruncate(probe, 0)
            os.write(
                probe,
                f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode(),
            )
        try:
            # Requests to an earlier process would stop this one at once.
            for name in CONTROL_REQUESTS:
                (self.path / "control" / name).unlink(missing_ok=True)
            (self.path / "exit.json").unlink(missing_ok=True)
        except OSError as error:
            self.__exit__(None, None, None)
            raise storage_error(f"{error.filename} cannot be removed", error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def read_lock_holder(self) -> str:
        """Return the content of run.lock, which names the process that trains; "" without one."""
        try:
            return (self.path / "run.lock").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def write_config(self, resolved: dict[str, object]) -> None:
        """Write config.json; one that was edited since the last process is moved to earlier-N/."""
        content = json.dumps(resolved, indent=2, ensure_ascii=False) + "\n"
        replace_own_file(self.path, "config.json", content)

    def write_exit_status(self, exit_code: int, status: str, step: int, message: str = "") -> None:
        record = {"exit_code": exit_code, "status": status, "step": step, "message": message}
        write_atomically(self.path / "exit.json", json.dumps({**record, "t": time.time()}) + "\n")

    def consume_control_request(self, name: str) -> bool:
        """Return whether the request was made, and remove it."""
        request = self.path / "control" / name
        if not request.is_file():
            return False
        try:
            # Removed before it is obeyed: a stop that stays would end the next start too.
            request.unlink(missing_ok=True)
        except OSError as error:  # it would be repeated after every step
            raise storage_error(f"{request} cannot be removed", error) from error
        return True

    def read_edited_prompts(self) -> str | None:
        """Return the text of the validation prompts that a user edited; None without any.

        Raises ConfigError for a file that cannot be read.
        """
        try:
            return read_bounded_text(self.path / EDITED_PROMPTS)
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.path / EDITED_PROMPTS} cannot be read: {error}") from error

    def discard_edited_prompts(self) -> None:
        """Remove prompts that were edited in an earlier run of this folder."""
        try:
            (self.path / EDITED_PROMPTS).unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(f"{error.filename} cannot be removed", error) from error

    def set_aside_earlier_results(self) -> Path | None:
        """Move the results of an earlier run into earlier-N/, but not the caches.

        Files that a person has added to the folder stay where they are. Returns the new folder, or
        None when there was nothing to move.
        """
        earlier = list_own_entries(self.path)
        has_results = list_results(self.path) or any("checkpoint-" in path.name for path in earlier)
        return self.set_aside(earlier) if has_results else None

    def set_aside(self, entries: Sequence[Path]) -> Path:
        """Move entries of this folder into a new earlier-N/, and return it."""
        return move_to_earlier(self.path, entries)


class FollowerRunFolder(RunFolder):
    """The run folder as the other processes of a run see it: they read it and write nothing."""

    def __enter__(self) -> FollowerRunFolder:
        return self

    def write_config(self, resolved: dict[str, object]) -> None:
        """Leave it to the main process."""

    def write_exit_status(self, exit_code: int, status: str, step: int, message: str = "") -> None:
        """Leave it to the main process."""

    def consume_control_request(self, name: str) -> bool:
        """Leave requests to the main process; the loop passes them on."""
        return False

    def discard_edited_prompts(self) -> None:
        """Leave it to the main process."""

    def set_aside_earlier_results(self) -> Path | None:
        """Leave it to the main process."""
        return None
