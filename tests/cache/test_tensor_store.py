from __future__ import annotations

import errno
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from simpletuner.cache import tensor_store as store_module
from simpletuner.cache.shards import read_shard_entries
from simpletuner.cache.tensor_store import TensorStore
from simpletuner.errors import CacheError, DiskFull
from simpletuner.events.event_types import Event, WarningIssued


def tensor(number: int, size: int = 500) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(number))


def filled(folder: Path, count: int = 20, shard_mib: float = 0.01) -> Path:
    with TensorStore(folder, "f", shard_mib=shard_mib) as store:
        for number in range(count):
            store.put(f"k{number}", {"x": tensor(number)})
    return store.folder


def keys(count: int = 20) -> list[str]:
    return [f"k{number}" for number in range(count)]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]
)
@pytest.mark.parametrize("shape", [(3, 5), (), (0,), (2, 1, 7)])
def test_what_goes_in_comes_out(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = (torch.randn(shape) * 50).to(dtype)
    other = torch.randn(3, 8)[:, ::2]  # not contiguous
    with TensorStore(tmp_path, "f") as store:
        store.put("k", {"a": value, "b": other})
        assert torch.equal(store.get("k")["a"], value)  # before it is on disk
    with TensorStore(tmp_path, "f") as store:
        back = store.get("k")
    assert back["a"].dtype == dtype
    assert torch.equal(back["a"], value)
    assert torch.equal(back["b"], other)


def test_shards_are_plain_safetensors_files(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    found = {}
    for path in shards(folder):
        with safe_open(path, "pt") as file:
            assert file.metadata()["fingerprint"] == "f"
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    assert len(shards(folder)) > 3
    assert found.keys() == {f"k{number}/x" for number in range(20)}
    assert all(torch.equal(found[f"k{number}/x"], tensor(number)) for number in range(20))


def test_missing_is_in_order_and_once(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    with TensorStore(tmp_path, "f") as store:
        assert store.missing_keys(["z", "k1", "a", "z", "k0"]) == ["z", "a"]
        assert store.missing_keys(str(number) for number in range(1200)) == [
            str(number) for number in range(1200)
        ]
        with pytest.raises(KeyError):
            store.get("z")
    with TensorStore(tmp_path, "another fingerprint") as store:
        assert store.missing_keys(["k0"]) == ["k0"]


@pytest.mark.parametrize("damage", ["cut", "cut_header", "longer", "gone"])
def test_shard_with_a_wrong_length_is_named_and_its_keys_are_missing(
    tmp_path: Path, damage: str
) -> None:
    folder = filled(tmp_path)
    bad = shards(folder)[1]
    with safe_open(bad, "pt") as file:
        lost = sorted(name.split("/")[0] for name in file.keys())  # noqa: SIM118
    data = bad.read_bytes()
    if damage == "gone":
        bad.unlink()
    else:
        bad.write_bytes({"cut": data[:-1], "cut_header": data[:5], "longer": data + b"x"}[damage])
    seen: list[Event] = []
    with TensorStore(tmp_path, "f", seen.append) as store:
        assert sorted(store.missing_keys(keys())) == lost
        for key in keys():
            if key not in lost:
                assert torch.equal(store.get(key)["x"], tensor(int(key[1:])))
        for key in lost:
            store.put(key, {"x": tensor(int(key[1:]))})
    assert [type(event) for event in seen] == [WarningIssued]
    assert bad.name in seen[0].message
    assert bad.with_name(bad.name + ".damaged").exists() == (damage != "gone")
    seen.clear()
    with TensorStore(tmp_path, "f", seen.append) as store:
        assert all(torch.equal(store.get(key)["x"], tensor(int(key[1:]))) for key in keys())
    assert seen == []


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def read_offset(path: Path, name: str) -> int:
    return next(entry.offset for entry in read_shard_entries(path) if entry.name == name)


def keys_in(shard: Path) -> set[str]:
    return {entry.name.split("/")[0] for entry in read_shard_entries(shard)}


def test_a_flipped_byte_is_found_at_the_next_start(tmp_path: Path) -> None:
    """The change time of the file says that it must be read again."""
    bad = shards(filled(tmp_path))[0]
    lost = keys_in(bad)
    flip(bad)
    seen: list[Event] = []
    with TensorStore(tmp_path, "f", seen.append) as store:
        assert set(store.missing_keys(keys())) == lost
        for key in set(keys()) - lost:
            assert torch.equal(store.get(key)["x"], tensor(int(key[1:])))
    assert [type(event) for event in seen] == [WarningIssued]


def test_a_shard_that_only_has_another_change_time_is_kept(tmp_path: Path) -> None:
    """As after a copy of the cache; it is verified once."""
    folder = filled(tmp_path)
    for shard in shards(folder):
        os.utime(shard)
    seen: list[Event] = []
    with TensorStore(tmp_path, "f", seen.append) as store:
        assert store.missing_keys(keys()) == []
    assert seen == []


def test_a_flipped_byte_is_found_at_reading(tmp_path: Path) -> None:
    """The disk returns other bits although nobody wrote to the file."""
    bad = shards(filled(tmp_path))[0]
    seen: list[Event] = []
    with TensorStore(tmp_path, "f", seen.append) as store:
        flip(bad)
        assert store.missing_keys(keys()) == []
        victim = max(read_shard_entries(bad), key=lambda entry: entry.offset).name.split("/")[0]
        with pytest.raises(CacheError, match=bad.name):
            store.get(victim)
        lost = store.missing_keys(keys())
        assert victim in lost
        assert len(lost) < 20
        for key in set(keys()) - set(lost):
            assert torch.equal(store.get(key)["x"], tensor(int(key[1:])))
    assert [type(event) for event in seen] == [WarningIssued]


# Statements that change one row as a flipped bit could, each in a way that a reader stumbles over
# elsewhere.
WRONG_ROWS = (
    "UPDATE entries SET dtype = 'F30'",
    "UPDATE entries SET shape = '5,x'",
    "UPDATE entries SET shape = '4000'",
    "UPDATE entries SET length = 2001",
    "UPDATE entries SET offset = offset + 64",
    "UPDATE entries SET offset = -1",
    "UPDATE entries SET crc32 = crc32 + 1",
    "UPDATE entries SET crc32 = 'a'",
    "UPDATE entries SET tensor = 'y'",
    "UPDATE entries SET shard = 'shard-00000-no.safetensors'",
    "UPDATE entries SET shard = CAST(X'FF' AS TEXT)",
    "UPDATE entries SET key = 'k' || key",
    "UPDATE entries SET checksum = 0",
    "UPDATE shards SET bytes = bytes + 1",
    "UPDATE shards SET bytes = 'many'",
    "UPDATE shards SET name = 'x' || name",
    "UPDATE shards SET name = CAST(X'FF' AS TEXT) WHERE name LIKE 'shard-00000%'",
    "DELETE FROM entries",
    "DELETE FROM shards",
    "ALTER TABLE entries RENAME COLUMN dtype TO dtyp",
    "ALTER TABLE shards RENAME TO shard",
)


@pytest.mark.parametrize("statement", WRONG_ROWS)
def test_a_wrong_row_of_the_index_loses_no_tensor(tmp_path: Path, statement: str) -> None:
    folder = filled(tmp_path)
    connection = sqlite3.connect(folder / "index.sqlite")
    connection.execute(statement)
    connection.commit()
    connection.close()
    seen: list[Event] = []
    with TensorStore(tmp_path, "f", seen.append) as store:
        missing = set(store.missing_keys(keys()))
        for key in set(keys()) - missing:
            assert torch.equal(store.get(key)["x"], tensor(int(key[1:])))
        for key in missing:  # encoded again
            store.put(key, {"x": tensor(int(key[1:]))})
    assert not list(folder.glob("shard*.damaged")), "a sound shard was set aside"
    with TensorStore(tmp_path, "f") as store:
        assert all(torch.equal(store.get(key)["x"], tensor(int(key[1:]))) for key in keys())


@pytest.mark.parametrize("name", ["index.sqlite", "shard"])
def test_any_flipped_bit_costs_at_most_its_shard(tmp_path: Path, name: str) -> None:
    """Seeded flips over whole files; everything that is returned is right."""
    folder = filled(tmp_path, 8, 0.004)
    victim = folder / name if name == "index.sqlite" else shards(folder)[0]
    sound = {path: path.read_bytes() for path in (*shards(folder), folder / "index.sqlite")}
    largest = max(len(keys_in(path)) for path in shards(folder))
    generator = random.Random(1)
    for _ in range(60):
        content = bytearray(sound[victim])
        used = [at for at, byte in enumerate(content) if byte] or [0]
        content[generator.choice(used)] ^= 1 << generator.randrange(8)
        for path in folder.iterdir():
            path.unlink()
        for path, data in sound.items():
            path.write_bytes(data)
        victim.write_bytes(content)
        with TensorStore(tmp_path, "f") as store:
            missing = set(store.missing_keys(keys(8)))
            assert name == "index.sqlite" or len(missing) <= largest, "more than the damaged shard"
            for key in set(keys(8)) - missing:
                assert torch.equal(store.get(key)["x"], tensor(int(key[1:])))


@pytest.mark.parametrize("how", ["deleted", "deleted_with_wal_left", "garbage"])
def test_a_lost_index_is_rebuilt_from_the_headers(tmp_path: Path, how: str) -> None:
    folder = filled(tmp_path)
    index = folder / "index.sqlite"
    if how == "deleted_with_wal_left":
        (folder / "index.sqlite-wal").write_bytes(os.urandom(4096))
    if how == "garbage":
        index.write_bytes(os.urandom(5000))
    else:
        index.unlink()
    seen: list[Event] = []
    with TensorStore(tmp_path, "f", seen.append) as store:
        assert store.missing_keys(keys()) == []
        assert all(
            torch.equal(store.get(f"k{number}")["x"], tensor(number)) for number in range(20)
        )
    assert len(seen) == (how == "garbage")


def test_reads_from_many_threads_with_few_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_OPEN_SHARDS", 2)
    filled(tmp_path, 60, 0.004)
    with TensorStore(tmp_path, "f") as store, ThreadPoolExecutor(8) as pool:
        assert len(shards(store.folder)) > 10
        numbers = [number * 7 % 60 for number in range(600)]
        found = pool.map(lambda number: store.get(f"k{number}")["x"], numbers)
        assert all(
            torch.equal(one, tensor(number)) for one, number in zip(found, numbers, strict=True)
        )
        assert len(store._files) <= 2


def test_writing_while_others_read(tmp_path: Path) -> None:
    with TensorStore(tmp_path, "f", shard_mib=0.01) as store, ThreadPoolExecutor(4) as pool:
        arrived = [threading.Event() for _ in range(100)]

        def check(number: int) -> bool:
            arrived[number].wait(20)
            return torch.equal(store.get(f"k{number}")["x"], tensor(number))

        results = [pool.submit(check, number) for number in range(100)]
        for number in range(100):
            store.put(f"k{number}", {"x": tensor(number)})
            arrived[number].set()
        assert all(result.result(20) for result in results)


def test_two_stores_fill_one_folder(tmp_path: Path) -> None:
    with (
        TensorStore(tmp_path, "f", shard_mib=0.01) as one,
        TensorStore(tmp_path, "f", shard_mib=0.01) as other,
    ):
        for number in range(20):
            (one if number % 2 else other).put(f"k{number}", {"x": tensor(number)})
    with TensorStore(tmp_path, "f") as store:
        assert all(torch.equal(store.get(key)["x"], tensor(int(key[1:]))) for key in keys())


def test_unfinished_files_go_unless_their_writer_lives(tmp_path: Path) -> None:
    with TensorStore(tmp_path, "f") as store:
        unfinished = store.folder / "shard-00000-abc.safetensors.tmp"
        unfinished.write_bytes(b"x")
        with TensorStore(tmp_path, "f"):
            assert unfinished.exists()
    with TensorStore(tmp_path, "f"):
        assert not unfinished.exists()


def test_an_index_damaged_inside_is_set_aside_and_rebuilt(tmp_path: Path) -> None:
    folder = filled(tmp_path, 200, 0.05)
    index = folder / "index.sqlite"
    size = index.stat().st_size
    with index.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 4096))  # the first page alone still looks like a database
    seen: list[Event] = []
    with TensorStore(tmp_path, "f", seen.append) as store:
        assert store.missing_keys(keys(200)) == []
    assert "index.sqlite is damaged" in seen[0].message
    assert (folder / "index.sqlite.damaged").exists()


def test_a_change_that_fails_half_way_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(store: TensorStore) -> None:
        def work(index: sqlite3.Connection) -> None:
            index.execute("INSERT INTO shards VALUES ('a', 1, 1, 1)")
            raise OSError("gone")

        store._index.transaction(work)

    with TensorStore(tmp_path, "f") as store:
        with pytest.raises(OSError, match="gone"):
            fail(store)
        assert store._index.query("SELECT * FROM shards") == []
        store.put("a", {"x": tensor(1)})
    with TensorStore(tmp_path, "f") as store:
        assert store.missing_keys(["a"]) == []


def test_a_full_disk_while_the_index_grows_says_so(tmp_path: Path) -> None:
    with TensorStore(tmp_path, "f") as store:
        store._index.query("PRAGMA max_page_count = 1")
        store.put("x" * 100_000, {"x": tensor(1)})
        with pytest.raises(DiskFull, match=r"index\.sqlite"):
            store.flush()
        store._index.query("PRAGMA max_page_count = 1000000")
    with TensorStore(tmp_path, "f") as store:
        assert store.missing_keys(["x" * 100_000]) == []


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=r"cache folder .*file.* is not writable .*cache_dir"):
        TensorStore(tmp_path / "file", "f")


def test_a_file_system_without_locks_still_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(store_module.fcntl, "flock", refuse)
    unfinished = filled(tmp_path) / "shard-00000-abc.safetensors.tmp"
    unfinished.touch()
    with TensorStore(tmp_path, "f") as store:
        assert store.missing_keys(keys()) == []
    assert unfinished.exists()  # it may be another's


def test_a_disk_that_cannot_be_read_is_no_damaged_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)

    def fail(handle: int, buffers: object, offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with TensorStore(tmp_path, "f") as store:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(CacheError, match=r"cannot read .*shard-00000.*Input/output error"):
            store.get("k0")
        monkeypatch.undo()
        assert torch.equal(store.get("k0")["x"], tensor(0))


def test_a_full_disk_says_so_and_leaves_the_rest_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    store = TensorStore(tmp_path, "f")
    store.put("new", {"x": tensor(99)})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="no disk space"):
        store.flush()
    monkeypatch.undo()
    assert not list(store.folder.glob("*.tmp"))
    store.close()  # there is room again
    with TensorStore(tmp_path, "f") as store:
        assert store.missing_keys([*keys(), "new"]) == []


FILLER = """
import sys, torch
from pathlib import Path
from simpletuner.cache.shards import read_shard_entries
from simpletuner.cache.tensor_store import TensorStore
store = TensorStore(Path(sys.argv[1]), "f", shard_mib=0.02)
print("open", flush=True)
for key in store.missing_keys(f"k{n}" for n in range(3000)):
    store.put(key, {"x": torch.randn(500, generator=torch.Generator().manual_seed(int(key[1:])))})
"""


def test_killed_at_any_moment_it_loses_the_open_shard_only(tmp_path: Path) -> None:
    """Each time a few more of 300 shards are complete; the moment within a shard is random."""
    had = 0
    for more in (1, 5, 20):
        goal = len(list(tmp_path.rglob("shard-*.safetensors"))) + more
        process = subprocess.Popen(
            [sys.executable, "-c", FILLER, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        while process.poll() is None and len(list(tmp_path.rglob("shard-*.safetensors"))) < goal:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with TensorStore(tmp_path, "f") as store:
            present = 3000 - len(store.missing_keys(f"k{n}" for n in range(3000)))
            on_disk = sum(1 for path in shards(store.folder) for _ in safe_open(path, "pt").keys())  # noqa: SIM118
            assert present == on_disk
            assert present > had
            assert all(
                torch.equal(store.get(f"k{n}")["x"], tensor(n)) for n in range(0, present, 37)
            )
        had = present


def test_a_process_without_a_shared_index_reads_headers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main process has read every byte; the others would do so again at each start."""
    with TensorStore(tmp_path, "f") as store:
        store.put("a", {"x": torch.arange(5.0)})
    monkeypatch.setattr("simpletuner.cache.tensor_store.verify_shard", None)
    with TensorStore(tmp_path, "f", shares_index=False) as follower:
        assert follower.get("a")["x"].tolist() == [0, 1, 2, 3, 4]
        assert follower.missing_keys(["a", "b"]) == ["b"]


def test_shards_of_other_processes_are_adopted(tmp_path: Path) -> None:
    with (
        TensorStore(tmp_path, "f") as main,
        TensorStore(tmp_path, "f", shares_index=False) as follower,
    ):
        follower.put("a", {"x": torch.ones(2)})
        main.put("b", {"x": torch.zeros(2)})
        for store in (main, follower):
            store.flush()
        for store in (main, follower):
            store.adopt_new_shards()
            assert store.missing_keys(["a", "b"]) == []
