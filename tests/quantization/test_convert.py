"""File to file: the parts of each matrix, everything else byte for byte, in little memory, through
kills.
"""

from __future__ import annotations

import errno
import fcntl
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.errors import CacheError, DiskFull
from simpletuner.events.event_types import Event, NoticeIssued, StageCompleted, StageProgress
from simpletuner.models.weights.tensor_loading import read_stored_tensors
from simpletuner.quantization import convert as module
from simpletuner.quantization.convert import quantize_to_file, quantized_file_path
from simpletuner.quantization.schemes import SCHEMES
from tests.quantization.test_schemes import gaussian

CPU = torch.device("cpu")


def write_checkpoint(folder: Path) -> tuple[Path, set[str]]:
    """Two files, odd sizes, 256 rows (as many as nf4 has levels), tensors that stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    first = {
        "a.to_q.weight": gaussian(256, 320),
        "a.to_q.bias": torch.randn(5).bfloat16(),
        "a.norm.weight": torch.randn(3),
        "count": torch.tensor(7),
    }
    second = {
        "b.weight": gaussian(33, 70),
        "c.weight": gaussian(64, 64, torch.float32),
        "d.bias": torch.ones(1),
    }
    save_file(first, folder / "one.safetensors")
    save_file(second, folder / "two.safetensors")
    return folder, {"a.to_q.weight", "b.weight", "c.weight"}


def converted(
    folder: Path, names: set[str], scheme: str, target: Path, emit: Callable[[Event], None] = print
) -> None:
    source = {
        name: stored
        for file in sorted(folder.iterdir())
        for name, stored in read_stored_tensors(file).items()
    }
    quantize_to_file(source, names, SCHEMES[scheme], target, CPU, emit)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time, and every tensor made safe, so that small files take all turns."""
    monkeypatch.setattr(module, "WEIGHTS_PER_CHUNK", 320 * 7)
    monkeypatch.setattr(module, "SYNC_INTERVAL_BYTES", 1000)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_result_is_what_each_matrix_gives_on_its_own(scheme: str, tmp_path: Path) -> None:
    folder, names = write_checkpoint(tmp_path / "in")
    target = tmp_path / "cache" / "out.safetensors"
    converted(folder, names, scheme, target)
    found = load_file(target)
    source = {name: one for file in folder.iterdir() for name, one in load_file(file).items()}
    for name, tensor in source.items():
        if name not in names:
            assert torch.equal(found.pop(name), tensor)
            continue
        for part, wanted in SCHEMES[scheme].quantize(tensor).items():
            mine = found.pop(f"{name.removesuffix('.weight')}.{part}")
            assert mine.dtype == wanted.dtype
            assert torch.equal(mine.view(torch.uint8), wanted.view(torch.uint8)), (name, part)
    assert not found
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_every_number_lies_at_a_multiple_of_its_width(tmp_path: Path) -> None:
    folder, names = write_checkpoint(tmp_path / "in")
    for scheme in SCHEMES:
        converted(folder, names, scheme, tmp_path / scheme)
        assert all(
            not one.offset % one.dtype.itemsize
            for one in read_stored_tensors(tmp_path / scheme).values()
        )


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from simpletuner.quantization import convert as module
from tests.quantization.test_convert import converted
module.WEIGHTS_PER_CHUNK, module.SYNC_INTERVAL_BYTES = 320 * 7, 1000
real, calls = module._write_at, []
def dying(file, position, content):
    calls.append(position)
    if len(calls) == {at}:
        real(file, position, bytes(content)[: len(content) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    real(file, position, content)
module._write_at = dying
converted(Path({folder!r}), {names!r}, "nf4", Path({target!r}))
"""


@pytest.mark.parametrize("at", [50, 120])
def test_killed_in_the_middle_of_a_write_it_goes_on(tmp_path: Path, at: int) -> None:
    folder, names = write_checkpoint(tmp_path / "in")
    straight, target = tmp_path / "straight", tmp_path / "cache" / "out"
    converted(folder, names, "nf4", straight)
    root = str(Path(__file__).parents[2])
    script = KILLED.format(root=root, at=at, folder=str(folder), names=names, target=str(target))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not target.exists()
    heard: list[Event] = []
    converted(folder, names, "nf4", target, heard.append)
    assert target.read_bytes() == straight.read_bytes()
    said = [event.message for event in heard if isinstance(event, NoticeIssued)]
    if at > 100:
        assert len(said) == 1
        assert int(said[0].split()[-4]) >= 1, said
    else:
        assert said == []


def test_a_partial_file_of_another_layout_is_begun_anew(tmp_path: Path) -> None:
    folder, names = write_checkpoint(tmp_path / "in")
    target = tmp_path / "out"
    target.with_name("out.partial").write_bytes(b"something else entirely" * 1000)
    converted(folder, names, "int4", target)
    converted(folder, names, "int4", tmp_path / "straight")
    assert target.read_bytes() == (tmp_path / "straight").read_bytes()


def test_a_finished_file_is_left_alone(tmp_path: Path) -> None:
    folder, names = write_checkpoint(tmp_path / "in")
    target = tmp_path / "out"
    target.write_bytes(b"done")
    heard: list[Event] = []
    converted(folder, names, "int8", target, heard.append)
    assert target.read_bytes() == b"done"
    assert heard == []


def test_two_at_once_do_the_work_once(tmp_path: Path) -> None:
    folder, names = write_checkpoint(tmp_path / "in")
    target = tmp_path / "out"
    partial = target.with_name("out.partial")
    heard: list[Event] = []
    with partial.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = threading.Thread(
            target=converted, args=(folder, names, "int8", target, heard.append)
        )
        waiting.start()
        while not heard:
            waiting.join(0.01)
        assert "waiting" in str(heard[0])
        target.write_bytes(b"made by the other")
    waiting.join(10)
    assert not waiting.is_alive()
    assert target.read_bytes() == b"made by the other"
    assert len(heard) == 1


def test_no_room_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, names = write_checkpoint(tmp_path / "in")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    with pytest.raises(DiskFull, match="quantized_cache_dir"):
        converted(folder, names, "int8", tmp_path / "cache" / "out")
    assert (tmp_path / "cache" / "out.partial").stat().st_size == 0


def test_a_disk_that_fills_up_on_the_way_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, names = write_checkpoint(tmp_path / "in")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(DiskFull, match="run the same command again to resume"):
        converted(folder, names, "int8", tmp_path / "out")
    monkeypatch.undo()
    converted(folder, names, "int8", tmp_path / "out")
    assert (tmp_path / "out").exists()


LIMITED = """
import errno, resource, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from simpletuner.errors import DiskFull
from simpletuner.quantization import convert as module
from tests.quantization.test_convert import converted
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
module.errno.ENOSPC = errno.EFBIG
try:
    converted(Path({folder!r}), {names!r}, "int8", Path({target!r}))
except DiskFull as error:
    print(error)
"""


@pytest.mark.parametrize("size", [600, 40_000])
def test_a_write_that_is_refused_is_explained_at_any_place(tmp_path: Path, size: int) -> None:
    """What the system refuses beyond a size stands for a full disk."""
    folder, names = write_checkpoint(tmp_path / "in")
    arguments = {"root": str(Path(__file__).parents[2]), "folder": str(folder), "names": names}
    script = LIMITED.format(**arguments, target=str(tmp_path / "out"), size=size)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert "run the same command again to resume" in done.stdout, done.stderr[-500:]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    folder, names = write_checkpoint(tmp_path / "in")
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="quantized_cache_dir"):
        converted(folder, names, "int8", tmp_path / "file" / "cache" / "out")


def test_progress_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MIB", 1024)
    folder, names = write_checkpoint(tmp_path / "in")
    heard: list[Event] = []
    converted(folder, names, "int8", tmp_path / "out", heard.append)
    (done,) = [event for event in heard if isinstance(event, StageCompleted)]
    total = sum(
        one.size_bytes for file in folder.iterdir() for one in read_stored_tensors(file).values()
    )
    assert done.done == total // 1024
    assert all(event.total == done.done for event in heard if isinstance(event, StageProgress))


def test_names_of_files_tell_scheme_and_content(tmp_path: Path) -> None:
    assert quantized_file_path(tmp_path, "chroma", "nf4", "0123456789abcdef0123").name == (
        f"chroma-nf4-{SCHEMES['nf4'].version}-0123456789abcdef.safetensors"
    )


MEASURED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from simpletuner.quantization.schemes import SCHEMES
from tests.quantization.test_convert import converted, gaussian
SCHEMES[{scheme!r}].quantize(gaussian(64, 64))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
converted(Path({folder!r}), {names!r}, {scheme!r}, Path({target!r}))
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("scheme", ["int4", pytest.param("nf4", marks=pytest.mark.slow)])
def test_memory_stays_far_below_the_file(tmp_path: Path, scheme: str) -> None:
    """300 MB of matrices as large as Chroma's; most of the peak is what torch itself takes."""
    weight = gaussian(3072, 3072)
    names = {f"{number}.weight" for number in range(16)}
    (tmp_path / "in").mkdir()
    save_file({name: weight.clone() for name in names}, tmp_path / "in" / "model.safetensors")
    size = (tmp_path / "in" / "model.safetensors").stat().st_size
    arguments = {
        "root": str(Path(__file__).parents[2]),
        "folder": str(tmp_path / "in"),
        "names": names,
    }
    script = MEASURED.format(**arguments, scheme=scheme, target=str(tmp_path / "out"))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    before, after = (int(word) * 1024 for word in done.stdout.splitlines()[-1].split())
    unit = 1 if sys.platform == "linux" else 1024  # macOS counts bytes
    assert size > 300e6
    assert (after - before) / unit < 0.4 * size
