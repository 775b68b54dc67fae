"""The run folder: one process at a time, an honest exit record, nothing overwritten."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.config.output_folder import RUN_MARKER
from simpletuner.errors import RunLocked, StorageError
from simpletuner.training import run_folder
from simpletuner.training.own_files import write_marker
from simpletuner.training.run_folder import RunFolder, replace_folder

HOLD = """
import sys, time
from pathlib import Path
from simpletuner.training.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunLocked, match=f"process {holder.pid}"), RunFolder(tmp_path):
            pytest.fail("locked twice")
    finally:
        holder.kill()
        holder.wait()
    with RunFolder(tmp_path):
        assert (tmp_path / "control").is_dir()


def test_a_reader_who_looks_at_the_lock_stops_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "LOCK_RETRY_S", 120)
    with RunFolder(tmp_path):
        pass
    reader = os.open(tmp_path / "run.lock", os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_SH | fcntl.LOCK_NB)
    timer = threading.Timer(0.1, os.close, [reader])
    timer.start()
    with RunFolder(tmp_path):
        timer.join()


def test_exit_record_belongs_to_the_last_process(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        folder.write_exit_status(75, "stopped", 12, "why")
    record = json.loads((tmp_path / "exit.json").read_text())
    assert (record["exit_code"], record["status"], record["step"]) == (75, "stopped", 12)
    with RunFolder(tmp_path):
        assert not (tmp_path / "exit.json").exists(), "a running process has not ended"


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match="cannot be written to"),
        RunFolder(tmp_path / "file" / "run"),
    ):
        pytest.fail("opened")


@pytest.mark.parametrize("name", ["run.lock", "exit.json", "control/stop"])
def test_a_folder_where_a_file_should_be_is_one_message(tmp_path: Path, name: str) -> None:
    write_marker(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(StorageError, match=name.split("/")[-1]), RunFolder(tmp_path):
        pytest.fail("opened")
    with contextlib.suppress(StorageError), RunFolder(tmp_path):
        pass  # the lock was released


def test_a_file_or_a_dangling_link_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_marker(tmp_path / "a")
    (tmp_path / "a" / "control").touch()
    (tmp_path / "b").symlink_to(tmp_path / "nowhere")
    for name in ("a", "b"):
        with pytest.raises(StorageError, match="a file has the name of this folder"):
            RunFolder(tmp_path / name).__enter__()


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    names = (
        ".validation-0.12.tmp",
        "images/.sheet.12.tmp",
        "images/step-000002/.validation-0-64x64.12.tmp",
        ".pytorch_lora_weights.safetensors.12.tmp",
        ".rejected.jsonl.12-34.tmp",
        ".writing-checkpoint-4-12/state.json",
        ".removing-checkpoint-2/state.json",
        ".writing-transformer/config.json",
        ".replaced-transformer/config.json",
    )
    write_marker(tmp_path)
    for name in (*names, "notes.tmp.txt", ".hidden", "transformer/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with RunFolder(tmp_path):
        left = {
            path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
        }
    own = {RUN_MARKER, "run.lock"}
    assert left == {"notes.tmp.txt", ".hidden", "transformer/config.json"} | own


def test_a_folder_put_aside_without_a_successor_gets_its_name_back(tmp_path: Path) -> None:
    (tmp_path / ".replaced-transformer").mkdir()
    with RunFolder(tmp_path):
        assert (tmp_path / "transformer").is_dir()


def test_requests_are_taken_once(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as folder:
        assert not folder.consume_control_request("save")
        (tmp_path / "control" / "save").write_text("")
        assert folder.consume_control_request("save")
        assert not folder.consume_control_request("save")


def test_earlier_results_are_moved_not_lost(tmp_path: Path) -> None:
    write_marker(tmp_path)
    (tmp_path / "thesis.txt").touch()
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "weights").write_text("w")
    (tmp_path / "cache").mkdir()
    with RunFolder(tmp_path) as folder:
        moved = folder.set_aside_earlier_results()
        assert moved == tmp_path / "earlier-1"
        assert (moved / "checkpoint-5" / "weights").read_text() == "w"
        assert (tmp_path / "cache").is_dir()
        assert (tmp_path / "thesis.txt").exists(), "a file of the user stays"
        assert folder.set_aside_earlier_results() is None


@pytest.mark.parametrize("dies_at", [1, 2, 3])
def test_a_replaced_folder_is_never_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    """Killed while writing, before and between the renames: the earlier weights are there
    afterwards.
    """
    target = tmp_path / "transformer"

    def writes(content: str) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            folder.mkdir()
            (folder / "weights").write_text(content)

        return write

    replace_folder(target, writes("old"))
    calls = []
    real = Path.rename

    def rename(self: Path, other: Path) -> Path:
        calls.append(self)
        if len(calls) == dies_at - 1:
            raise KeyboardInterrupt
        return real(self, other)

    def dying(folder: Path) -> None:
        writes("half")(folder)
        if dies_at == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            replace_folder(target, dying)
    kept = target if target.exists() else tmp_path / ".replaced-transformer"
    assert (kept / "weights").read_text() == "old"
    replace_folder(target, writes("new"))
    assert (target / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]
