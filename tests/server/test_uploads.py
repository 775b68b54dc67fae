"""Hostile names, images and archives: only images and captions of the dataset are stored."""

from __future__ import annotations

import io
import os
import stat
import struct
import unicodedata
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simpletuner.server import uploads
from simpletuner.server.api_errors import ApiError
from simpletuner.server.schemas.datasets import RefusedFile
from simpletuner.server.uploads import IncomingUpload, describe_content, safe_name
from simpletuner.server.workspace import Workspace
from tests.data.unusable_files import encode_image, noise_image, png_header
from tests.server.dataset_app import OTHER_PNG, PNG, make_workspace
from tests.unicode_names import needs_unicode_names

LIMIT = 1 << 30
AWAY = [
    "../a.png",
    "/a.png",
    "a/../../b.png",
    "..\\a.png",
    "C:\\a.png",
    "C:a.png",
    "//host/a.png",
    "./a.png",
    "a//b.png",
    "a/./b.png",
    "a\0.png",
    "..",
    ".",
    "",
    "a/",
    ".a.png",
    ".ssh/a.png",
    "a\nb.png",
    "a\x7f.png",
    "con.png",
    "NUL",
    "a/lpt1.txt",
    "a .png/b ",
    " a.png",
    "a.",
    "a\udcff.png",
    "a\u2028.png",
    "a*.png",
    'a".png',
    "x" * 300 + ".png",
    "a/" * 9 + "b.png",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = make_workspace(tmp_path / "w").datasets_dir / "photos"
    made.mkdir(parents=True)
    return made


def here(folder: Path) -> Workspace:
    return Workspace(folder.parents[1])


def send(
    folder: Path, name: str, data: bytes, length: int = 0, limit: int = LIMIT
) -> tuple[list[str], list[RefusedFile]]:
    incoming = IncomingUpload(here(folder), folder, name, length, limit)
    try:
        for start in range(0, len(data), 1000):
            incoming.write(data[start : start + 1000])
        return incoming.finish()
    finally:
        incoming.discard()


def refused(folder: Path, name: str, data: bytes, **settings: int) -> tuple[int, str]:
    before = tree(folder.parents[2])
    with pytest.raises(ApiError) as caught:
        send(folder, name, data, **settings)
    assert tree(folder.parents[2]) == before, "a refused upload leaves nothing"
    return caught.value.status, str(caught.value)


def tree(root: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
        if path.name != uploads.INCOMING_FOLDER
    }


def packed(members: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_pictures_are_saved_whole(folder: Path, kind: str) -> None:
    data = encode_image(noise_image(), kind)
    assert send(folder, f"in/ner/a.{kind.lower()}", data, len(data)) == (
        [f"in/ner/a.{kind.lower()}"],
        [],
    )
    saved = folder / "in" / "ner" / f"a.{kind.lower()}"
    assert saved.read_bytes() == data
    assert stat.S_IMODE(saved.stat().st_mode) & 0o111 == 0
    assert list((folder / uploads.INCOMING_FOLDER).iterdir()) == []


def test_captions_are_utf8(folder: Path) -> None:
    assert send(folder, "a.txt", "नमस्ते".encode()) == (["a.txt"], [])
    assert send(folder, "b.txt", b"\xef\xbb\xbfwith a mark")[0] == ["b.txt"]
    assert refused(folder, "c.txt", "caf\xe9".encode("latin-1"))[0] == 415
    assert refused(folder, "c.txt", "wide".encode("utf-16"))[0] == 415
    assert refused(folder, "c.txt", b"a\0b")[0] == 415
    assert refused(folder, "c.txt", b"x" * (uploads.MAX_CAPTION_BYTES + 1))[0] == 413


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.png", b"<html><script>alert(1)</script></html>"),
        ("a.png", b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"),
        ("a.png", b"GIF89a" + b"\0" * 64),
        ("a.png", b"\x80\x04\x95pickle"),
        ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0"),
        ("a.png", b"P6 1 1 255 abc"),
        ("a.png", b""),
        ("a.png", PNG[:20]),
        ("a.png", b"\x89PNG\r\n\x1a\n" + b"junk" * 9),
        ("a.jpg", b"\xff\xd8\xff\xe0junk"),
        ("a.bmp", b"BM<html>"),
        ("a.png", png_header(20_000, 20_000)),
        ("a.svg", b"<svg/>"),
        ("a.html", PNG),
        ("a.pt", b"\x80\x04"),
        ("a.safetensors", b"{}"),
        ("a.json", b"{}"),
        ("a.png.exe", PNG),
        ("a", PNG),
        ("a.zip", b"no archive"),
        ("a.zip", b""),
        ("a.zip", PNG),
    ],
)
def test_what_is_not_taken(folder: Path, name: str, data: bytes) -> None:
    assert refused(folder, name, data)[0] == 415


@pytest.mark.parametrize("name", AWAY)
def test_names_that_lead_away(folder: Path, name: str) -> None:
    with pytest.raises(ApiError):
        safe_name(name)
    assert refused(folder, name, PNG)[0] == 422


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.text(st.one_of(st.characters(), st.sampled_from("./\\:~ ")), max_size=30))
def test_a_safe_name_stays_inside_and_stays_itself(tmp_path: Path, name: str) -> None:
    try:
        safe = safe_name(name)
    except ApiError:
        return
    assert safe == safe_name(safe) == unicodedata.normalize("NFC", name)
    assert not any(part.startswith(".") for part in PurePosixPath(safe).parts)
    assert Path(os.path.normpath(tmp_path / safe)) == tmp_path / safe
    assert tmp_path in (tmp_path / safe).parents


@needs_unicode_names
def test_spanish_and_hindi_names_arrive_in_one_spelling(folder: Path) -> None:
    name = unicodedata.normalize("NFD", "niño/चित्र ñ.png")
    assert send(folder, name, PNG)[0] == [unicodedata.normalize("NFC", name)]
    assert (folder / unicodedata.normalize("NFC", name)).read_bytes() == PNG


@needs_unicode_names
def test_nothing_is_overwritten(folder: Path) -> None:
    (folder / "a.png").write_bytes(PNG)
    (folder / unicodedata.normalize("NFD", "é.png")).write_bytes(PNG)
    (folder / "b.png").mkdir()
    (folder / "c.png").symlink_to("nowhere.png")
    assert send(folder, "a.png", PNG) == (["a.png"], [])
    assert refused(folder, "a.png", OTHER_PNG)[0] == 409
    assert send(folder, "é.png", PNG)[0] == ["é.png"]
    assert not (folder / "é.png").exists()
    assert refused(folder, "é.png", OTHER_PNG)[0] == 409
    assert refused(folder, "b.png", PNG)[0] == 409
    assert refused(folder, "c.png", PNG)[0] == 409
    assert refused(folder, "a.png/d.png", PNG)[0] == 409
    (folder / "c.png").unlink()
    (folder / "c.png").symlink_to("a.png")
    assert refused(folder, "c.png", PNG)[0] == 409


def test_a_linked_folder_inside_leads_nowhere(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "out").symlink_to(tmp_path / "elsewhere")
    assert refused(folder, "out/a.png", PNG)[0] == 422
    saved, not_saved = send(folder, "a.zip", packed({"out/a.png": PNG, "b.png": PNG}))
    assert (saved, [one.file for one in not_saved]) == (["b.png"], ["out/a.png"])
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_sizes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(folder, "a.png", PNG, length=11, limit=10)[0] == 413
    assert refused(folder, "a.png", PNG, limit=len(PNG) - 1)[0] == 413
    assert refused(folder, "a.png", PNG, length=1 << 60, limit=1 << 61)[0] == 507
    monkeypatch.setattr(uploads, "MIN_FREE_BYTES", 1 << 60)
    assert refused(folder, "a.png", PNG, length=len(PNG))[0] == 507
    assert refused(folder, "a.zip", packed({"a.png": PNG}))[0] == 507


def test_what_a_dead_server_left_is_swept(folder: Path) -> None:
    (folder / uploads.INCOMING_FOLDER).mkdir()
    for name, age_s in (("old", uploads.ABANDONED_AFTER_S + 60), ("new", 60)):
        path = folder / uploads.INCOMING_FOLDER / name
        path.write_bytes(b"half")
        now = path.stat().st_mtime
        os.utime(path, (now - age_s, now - age_s))
    send(folder, "a.png", PNG)
    assert [path.name for path in (folder / uploads.INCOMING_FOLDER).iterdir()] == ["new"]


def test_an_archive(folder: Path) -> None:
    members = {
        "cats/": b"",
        "cats/a.png": PNG,
        "cats/a.txt": b"a cat",
        "c.png": PNG,
        "dogs\\f.png": PNG,
        "cats/deep/b.jpg": encode_image(noise_image(), "JPEG"),
        "inner.zip": packed({"d.png": PNG}),
        "__MACOSX/cats/._a.png": b"junk",
        "cats/.DS_Store": b"junk",
        ".git/x.png": PNG,
        "Thumbs.db": b"junk",
        "readme.md": b"words",
        "cats/e.png": b"<html>",
    }
    saved, not_saved = send(folder, "all.zip", packed(members))
    assert sorted(saved) == ["c.png", "cats/a.png", "cats/a.txt", "cats/deep/b.jpg", "dogs/f.png"]
    assert {one.file for one in not_saved} == {"readme.md", "inner.zip", "cats/e.png"}
    files = {name for name, data in tree(folder).items() if data is not None}
    assert files == set(saved)
    assert (folder / "cats" / "a.txt").read_bytes() == b"a cat"
    again = send(folder, "all.zip", packed(members))
    assert sorted(again[0]) == sorted(saved)


def test_zip_slip(folder: Path) -> None:
    saved, not_saved = send(
        folder,
        "evil.zip",
        packed({**dict.fromkeys([*AWAY[:7], "a/../../../b.png"], PNG), "ok.png": PNG}),
    )
    assert saved == ["ok.png"]
    assert len(not_saved) == 8
    root = folder.parents[2]
    assert {name for name, data in tree(root).items() if data is not None} == {
        "w/datasets/photos/ok.png"
    }


def test_links_devices_encryption_and_odd_compression(folder: Path) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, mode in (
            ("link.png", stat.S_IFLNK),
            ("pipe.png", stat.S_IFIFO),
            ("device.png", stat.S_IFCHR),
        ):
            info = zipfile.ZipInfo(name)
            info.external_attr = (mode | 0o777) << 16
            archive.writestr(info, "/etc/passwd")
        archive.writestr("lzma.png", PNG, zipfile.ZIP_LZMA)
        archive.writestr("secret.png", PNG)
        archive.writestr("strong.png", PNG)
    data = bytearray(out.getvalue())
    for name, flag in ((b"secret.png", 0x1), (b"strong.png", 0x41)):
        at = data.rfind(b"PK\x01\x02", 0, data.rfind(name))
        data[at + 8] |= flag
    saved, not_saved = send(folder, "evil.zip", bytes(data))
    assert saved == []
    reasons = {one.file: one.reason for one in not_saved}
    assert [("link" in reasons[name]) for name in ("link.png", "pipe.png", "device.png")] == [
        True
    ] * 3
    assert "Deflate" in reasons["lzma.png"]
    assert "encrypted" in reasons["secret.png"]
    assert "encrypted" in reasons["strong.png"]


def test_bombs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = b"BM" + b"\0" * (2 << 20)
    assert refused(folder, "one.zip", packed({f"{n}.bmp": zeros for n in range(40)}))[0] == 413
    saved, not_saved = send(folder, "few.zip", packed({"a.bmp": zeros, "a.txt": b"said"}))
    assert (saved, [one.file for one in not_saved]) == (["a.txt"], ["a.bmp"])
    assert "compression ratio" in not_saved[0].reason  # told before it is unpacked
    monkeypatch.setattr(uploads, "MAX_ARCHIVE_MEMBERS", 10)
    assert refused(folder, "many.zip", packed({f"{n}.txt": b"x" for n in range(11)}))[0] == 413
    monkeypatch.setattr(uploads, "MAX_IMAGE_BYTES", 50)
    assert send(folder, "large.zip", packed({"a.png": PNG}))[1][0].reason.startswith(
        "the file is larger"
    )


def test_a_member_that_lies_about_its_size(folder: Path) -> None:
    data = bytearray(packed({"a.txt": b"y" * 5000}))
    struct.pack_into(
        "<I", data, data.rfind(b"PK\x01\x02") + 24, 10
    )  # uncompressed size in the directory
    saved, not_saved = send(folder, "liar.zip", bytes(data))
    assert saved == []
    assert "damaged" in not_saved[0].reason
    assert not (folder / "a.txt").exists()


def test_a_directory_that_would_fill_the_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_ARCHIVE_LISTING_BYTES", 100_000)
    data = packed({f"{n:04}.txt": b"" for n in range(3000)}, zipfile.ZIP_STORED)
    status, why = refused(folder, "wide.zip", data)
    assert status == 415
    assert "too long" in why


def test_many_refusals_are_not_all_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_REFUSED_LISTED", 5)
    not_saved = send(folder, "a.zip", packed({f"{n}.md": b"" for n in range(30)}))[1]
    assert len(not_saved) == 6
    assert not_saved[-1].file == "25 more"


def test_names_that_macos_writes_without_the_flag(folder: Path) -> None:
    data = packed({"ni\u00f1o.png": PNG, "ni\u00f1o.txt": b"a boy"})
    for mark, at in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        for start in [n for n in range(len(data)) if data.startswith(mark, n)]:
            flags = struct.unpack_from("<H", data, start + at)[0] & ~0x800
            data = data[: start + at] + struct.pack("<H", flags) + data[start + at + 2 :]
    assert sorted(send(folder, "mac.zip", data)[0]) == ["ni\u00f1o.png", "ni\u00f1o.txt"]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_archive_is_refused_and_never_a_crash(
    tmp_path: Path, data: st.DataObject
) -> None:
    folder = make_workspace(tmp_path / "w").datasets_dir / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    archive = bytearray(packed({"a/b.png": PNG, "a/b.txt": b"words " * 50, "c.txt": b"x"}))
    for _ in range(data.draw(st.integers(1, 6))):
        archive[data.draw(st.integers(0, len(archive) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(archive)), st.integers(0, len(archive))))
    try:
        saved, _ = send(folder, "a.zip", bytes(archive[:cut]))
    except ApiError:
        return
    for name in saved:
        assert folder in (folder / name).resolve().parents
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and folder not in path.parents
    ]


@needs_unicode_names
def test_names_beyond_ascii_cost_no_look_at_the_whole_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(path: object) -> list[str]:
        assert Path(str(path)).name == uploads.INCOMING_FOLDER, (
            "10,000 pictures would be listed 10,000 times"
        )
        return []

    monkeypatch.setattr(os, "listdir", listed)
    saved, not_saved = send(folder, "a.zip", packed({"चित्र.png": PNG, "é.png": PNG}))
    assert (len(saved), not_saved) == (2, [])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><p>not found</p>", "a web page"),
        (b"GIF89a\1\0", "a GIF"),
        (b"....ftypheic....", "HEIC"),
        (b"plain words", "text, not an image"),
        (b"\0\1\2\xff", "damaged, or not an image"),
        (b"", "empty"),
    ],
)
def test_a_message_names_the_content_and_holds_no_raw_bytes(content: bytes, said: str) -> None:
    message = describe_content(content)
    assert said in message
    assert "\\x" not in message
