"""Checkpoints: exact round trips, atomic writes, damage is found, nothing good is lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simpletuner.errors import CheckpointError, DiskFull, StorageError
from simpletuner.events.event_types import CheckpointSetAside, Event
from simpletuner.training import checkpoint
from simpletuner.training.checkpoint import CheckpointData


def load(folder: Path) -> CheckpointData:
    """As a run goes on: verified, then read."""
    checkpoint.verify_checkpoint(folder)
    state = checkpoint.read_state(folder)
    return CheckpointData(state["step"], checkpoint.read_tensors(folder), state)


def snapshot(step: int) -> CheckpointData:
    generator = torch.Generator().manual_seed(step)
    weights = {
        "a.weight": torch.randn(4, 3, generator=generator),
        "b": torch.randn(5, generator=generator).bfloat16(),
    }
    return CheckpointData(
        step,
        {"weights": weights, "optimizer": {"0.exp_avg": weights["a.weight"] * 2}},
        {"note": "é"},
    )


def test_round_trip_is_exact(tmp_path: Path) -> None:
    written = snapshot(7)
    folder = checkpoint.save_checkpoint(tmp_path, written, None, keep=3)
    assert folder.name == "checkpoint-7"
    read = load(folder)
    assert read.step == 7
    assert read.state["note"] == "é"
    for stem, tensors in written.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(read.tensors[stem][name], tensor)
            assert read.tensors[stem][name].dtype == tensor.dtype


def test_extra_files_are_covered_by_the_manifest(tmp_path: Path) -> None:
    folder = checkpoint.save_checkpoint(
        tmp_path, snapshot(1), lambda path: (path / "lora").write_bytes(b"x") and None, keep=1
    )
    assert checkpoint.find_damage(folder) is None
    (folder / "lora").write_bytes(b"y")
    assert "lora" in (checkpoint.find_damage(folder) or "")


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_damage_is_found_and_the_one_before_is_used(tmp_path: Path, name: str, how: str) -> None:
    checkpoint.save_checkpoint(tmp_path, snapshot(1), None, keep=5)
    newest = checkpoint.save_checkpoint(tmp_path, snapshot(2), None, keep=5)
    victim = newest / name
    content = bytearray(victim.read_bytes())
    if how == "flip":
        at = content.index(b"sha256") + 12 if name == "manifest.json" else len(content) // 2
        content[at] ^= 1
        victim.write_bytes(content)
    elif how == "truncate":
        victim.write_bytes(content[: len(content) // 2])
    else:
        victim.unlink()
    told: list[Event] = []
    found = checkpoint.find_latest_valid(tmp_path, told.append)
    assert found is not None
    assert found.name == "checkpoint-1"
    assert isinstance(told[0], CheckpointSetAside)
    assert (tmp_path / "damaged-checkpoint-2").is_dir(), "set aside, not deleted"
    with pytest.raises(CheckpointError):
        load(tmp_path / "damaged-checkpoint-2")


@pytest.mark.parametrize(
    "manifest",
    [
        b'{"files": []}',
        b'{"files": {}}',
        b'{"files": null}',
        b'{"fxles": {}}',
        b"[]",
        b"1",
        b"",
        b"\xff",
        b"[" * 100_000,
        b'{"files": {"state.json": {}, "weights.safetensors": {}}}',
        b'{"files": {"state.json": 1, "weights.safetensors": 2}}',
        b'{"files": {"state.json": {"bytes": "1", "sha256": ""}, "weights.safetensors": {}}}',
    ],
)
def test_a_manifest_of_any_content_is_damage_and_no_exception(
    tmp_path: Path, manifest: bytes
) -> None:
    checkpoint.save_checkpoint(tmp_path, snapshot(1), None, keep=5)
    newest = checkpoint.save_checkpoint(tmp_path, snapshot(2), None, keep=5)
    (newest / "manifest.json").write_bytes(manifest)
    told: list[Event] = []
    found = checkpoint.find_latest_valid(tmp_path, told.append)
    assert found is not None
    assert found.name == "checkpoint-1"
    assert isinstance(told[0], CheckpointSetAside)


@pytest.mark.parametrize("name", ["../state.json", "/etc/passwd", "a/../../b", "", "a\0b"])
def test_a_manifest_names_files_of_its_checkpoint_only(tmp_path: Path, name: str) -> None:
    newest = checkpoint.save_checkpoint(tmp_path, snapshot(2), None, keep=5)
    files = json.loads((newest / "manifest.json").read_text())["files"]
    files[name] = {"bytes": 1, "sha256": "0"}
    (newest / "manifest.json").write_text(json.dumps({"files": files}))
    assert checkpoint.find_damage(newest) is not None


def test_every_single_flipped_bit_of_a_manifest_is_harmless(tmp_path: Path) -> None:
    """Either nothing was lost (white space), or the damage is described; nothing is raised."""
    folder = checkpoint.save_checkpoint(tmp_path, snapshot(2), None, keep=5)
    sound = (folder / "manifest.json").read_bytes()
    found = 0
    for at in range(0, len(sound) * 8, 3):
        content = bytearray(sound)
        content[at // 8] ^= 1 << at % 8
        (folder / "manifest.json").write_bytes(content)
        found += checkpoint.find_damage(folder) is not None
    assert found > len(sound) * 8 / 3 * 0.8


def test_a_checkpoint_that_cannot_be_read_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint.save_checkpoint(tmp_path, snapshot(2), None, keep=5)

    def fail(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "_sha256", fail)
    assert "Input/output error" in (checkpoint.find_damage(folder) or "")


def test_a_checkpoint_that_is_a_link_is_pruned_as_a_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint-1").symlink_to(elsewhere, target_is_directory=True)
    checkpoint.save_checkpoint(run, snapshot(2), None, keep=1)
    assert [path.name for path in checkpoint.list_checkpoints(run)] == ["checkpoint-2"]
    assert (elsewhere / "precious").exists()
    assert not list(run.glob(".removing*"))


def test_leftovers_do_not_count_against_the_free_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover = tmp_path / ".writing-checkpoint-2-999"
    leftover.mkdir()
    monkeypatch.setattr(
        checkpoint, "free_disk_bytes", lambda folder: 10 if leftover.exists() else 1 << 40
    )
    assert checkpoint.save_checkpoint(tmp_path, snapshot(2), None, keep=1).is_dir()


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, DiskFull), (errno.EIO, StorageError), (errno.EROFS, StorageError)],
)
def test_a_failing_disk_is_one_message_with_its_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def fail(path: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, "fsync_path", fail)
    with pytest.raises(kind, match=os.strerror(number)):
        checkpoint.save_checkpoint(tmp_path, snapshot(2), None, keep=1)


def test_oldest_goes_first_and_the_best_stays(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save_checkpoint(tmp_path, snapshot(step), None, keep=2, best=1)
    assert [folder.name for folder in checkpoint.list_checkpoints(tmp_path)] == [
        "checkpoint-5",
        "checkpoint-4",
        "checkpoint-1",
    ]


def test_half_written_folders_are_never_seen(tmp_path: Path) -> None:
    checkpoint.save_checkpoint(tmp_path, snapshot(1), None, keep=2)
    (tmp_path / ".writing-checkpoint-2-999").mkdir()
    assert [folder.name for folder in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-1"]
    checkpoint.save_checkpoint(tmp_path, snapshot(3), None, keep=2)
    assert not list(tmp_path.glob(".writing*"))


def test_no_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save_checkpoint(tmp_path, snapshot(1), None, keep=1)
    monkeypatch.setattr(checkpoint, "free_disk_bytes", lambda folder: 10)
    with pytest.raises(DiskFull, match="earlier checkpoints are not affected"):
        checkpoint.save_checkpoint(tmp_path, snapshot(2), None, keep=1)
    assert checkpoint.find_damage(tmp_path / "checkpoint-1") is None


def test_a_marked_one_is_never_removed(tmp_path: Path) -> None:
    """The mark is a file that the manifest does not know; taking it away gives the folder up again."""
    mark = checkpoint.save_checkpoint(tmp_path, snapshot(1), None, keep=2) / "keep"
    mark.touch()
    for step in (2, 3, 4):
        checkpoint.save_checkpoint(tmp_path, snapshot(step), None, keep=2)
    assert [
        checkpoint.checkpoint_step(folder) for folder in checkpoint.list_checkpoints(tmp_path)
    ] == [
        4,
        3,
        1,
    ]
    assert load(mark.parent).step == 1
    mark.unlink()
    checkpoint.save_checkpoint(tmp_path, snapshot(5), None, keep=2)
    assert [
        checkpoint.checkpoint_step(folder) for folder in checkpoint.list_checkpoints(tmp_path)
    ] == [5, 4]


CRASH = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from simpletuner.training import checkpoint
from test_checkpoint import snapshot

class Dying:
    def __init__(self, limit):
        self.left = limit
    def wrap(self, real):
        def call(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                os._exit(9)
            return real(*args, **kwargs)
        return call

for limit in range(1, 30):
    run_dir = Path(sys.argv[1]) / str(limit)
    run_dir.mkdir()
    checkpoint.save_checkpoint(run_dir, snapshot(1), None, keep=1)
    child = os.fork()
    if child == 0:
        dying = Dying(limit)
        for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir"):
            setattr(os, name, dying.wrap(getattr(os, name)))
        checkpoint.write_tensors = dying.wrap(checkpoint.write_tensors)
        checkpoint.save_checkpoint(run_dir, snapshot(2), None, keep=1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(limit, code, flush=True)
    if code == 0:
        break
"""


def test_a_crash_at_any_write_loses_nothing(tmp_path: Path) -> None:
    """The process dies at the k-th write, sync or rename, for every k; a sound checkpoint is always
    there.
    """
    script = CRASH.format(tests=str(Path(__file__).parent))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=env,
        check=True,
        capture_output=True,
        text=True,
    )
    codes = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert codes[-1] == 0, "the last attempt ran to its end"
    assert codes.count(9) >= 8, "every write was a place to die at"
    steps = []
    for limit in range(1, len(codes) + 1):
        found = checkpoint.find_latest_valid(
            tmp_path / str(limit), lambda event: pytest.fail(f"damaged: {event}")
        )
        assert found is not None
        steps.append(load(found).step)
    assert steps == sorted(steps), "before the rename the old one counts, after it the new one"
    assert steps[0] == 1
    assert steps[-1] == 2


def test_unknown_format_is_refused(tmp_path: Path) -> None:
    folder = checkpoint.save_checkpoint(tmp_path, snapshot(1), None, keep=1)
    state = json.loads((folder / "state.json").read_text())
    state["format"] = 99
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.json"] = {
        "bytes": (folder / "state.json").stat().st_size,
        "sha256": checkpoint._sha256(folder / "state.json"),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="format 99"):
        load(folder)


def test_optimizer_state_survives_as_tensors_and_json() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    for _ in range(3):
        parameter.grad = torch.full((3, 2), 0.3)
        optimizer.step()
    tensors, rest = checkpoint.flatten_optimizer(optimizer.state_dict())
    rest = json.loads(json.dumps(rest))
    fresh = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3, 2))], lr=0.1)
    restored = checkpoint.unflatten_optimizer(tensors, rest, fresh.state_dict())
    fresh.load_state_dict(restored)
    before, after = optimizer.state_dict(), fresh.state_dict()
    assert before["param_groups"] == after["param_groups"]
    for key, value in before["state"][0].items():
        assert torch.equal(after["state"][0][key], value)
