"""Tar files are read in place: the same samples as from the folder that they were made of."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from simpletuner.config.schema import DataOptions
from simpletuner.data.dataset_file import read_dataset_file
from simpletuner.data.scan import ScanResult, scan_datasets
from simpletuner.data.sources import LocalFile, LocalFolder
from simpletuner.data.tar_source import TarFiles, TarMember
from simpletuner.errors import DataError
from tests.data.unusable_files import encode_image, noise_image

PNG = encode_image(noise_image(), "PNG")
FILES = {
    "0.png": PNG,
    "0.txt": b"first",
    "sub/1.jpg": encode_image(noise_image(), "JPEG"),
    "sub/1.txt": b"second\nor another",
    "sub/2.png": PNG[: len(PNG) // 2],
    "sub/2.txt": b"damaged",
    ".hidden.png": PNG,
    "0.json": b"{}",
}


def write_tar(path: Path, files: dict[str, bytes], prefix: str = "./") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("sub"))
        for name, content in files.items():
            entry = tarfile.TarInfo(prefix + name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def scan(folder: Path, kind: str, name: str) -> ScanResult:
    entry = {"id": "p", "type": kind, "instance_data_dir": name}
    file = folder / "multidatabackend.json"
    file.write_text(json.dumps([entry]), encoding="utf-8")
    options = DataOptions(resolution=64, max_bad_sample_fraction=1)
    found = read_dataset_file(file, options, {})
    return scan_datasets(found.train, options, 0, lambda event: None, alignment_px=64)


def test_a_tar_gives_the_samples_of_its_folder(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars/more/a.tar", FILES)
    for name, content in FILES.items():
        path = tmp_path / "plain/more/a.tar" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    packed, plain = scan(tmp_path, "webdataset", "tars"), scan(tmp_path, "local", "plain")
    assert [item.sample.id for item in packed.samples] == [item.sample.id for item in plain.samples]
    for one, other in zip(packed.samples, plain.samples):
        assert one.sample.captions == other.sample.captions
        assert (one.bucket_px, one.resize_px) == (other.bucket_px, other.resize_px)
        assert one.sample.file.read_bytes(1 << 20) == other.sample.file.read_bytes(1 << 20)
        assert one.sample.file.size_bytes() == other.sample.file.size_bytes()
    assert {item.path for item in packed.rejected} == {item.path for item in plain.rejected}
    assert sum(len(item.sample.captions) for item in packed.samples[:2]) >= 2
    before = os.listdir(tmp_path / "tars/more")
    assert before == ["a.tar"]


def test_a_member_can_be_read_from_any_place(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"x.bin": bytes(range(200)), "y.bin": b"other"})
    (folder,) = TarFiles(LocalFolder(tmp_path)).folders()
    assert folder.inside == "a.tar"
    file = folder.files["x.bin"]
    assert isinstance(file, TarMember)
    with file.open() as stream:
        assert stream.seek(-3, os.SEEK_END) == 197
        assert stream.read() == bytes([197, 198, 199])
        assert stream.read(1) == b""
        stream.seek(10)
        assert stream.read(4) == bytes([10, 11, 12, 13])
        assert stream.tell() == 14
    assert file.address == f"{path}::x.bin"
    assert bytes.fromhex(file.cache_key).decode() == f"{path}::x.bin"
    assert file == TarMember(LocalFile(path), "x.bin", file.offset, 200)
    size, changed, inode = file.stamp()
    write_tar(path, {"x.bin": bytes(200)})
    os.utime(path, ns=(changed + 10**9, changed + 10**9))
    assert file.stamp() != (size, changed, inode)


def test_what_is_no_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 200)
    with pytest.raises(DataError, match=r"a\.tar cannot be read as a tar file"):
        list(TarFiles(LocalFolder(tmp_path)).folders())


def test_a_tar_that_ends_early_rejects_its_last_image(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "tars/a.tar", {"a.png": PNG, "a.txt": b"a", "b.txt": b"b", "b.png": PNG}
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(PNG) + len(PNG) // 2])
    found = scan(tmp_path, "webdataset", "tars")
    assert [item.sample.id for item in found.samples] == ["p/a.tar/a.png"]
    assert [item.path for item in found.rejected] == ["a.tar/b.png"]
