"""Thumbnails: upright, small, made once, and never a way to fill a disk or a memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.server.api_errors import ApiError
from simpletuner.server.thumbnails import (
    BACKGROUND_GREY,
    THUMBNAIL_WIDTHS_PX,
    get_thumbnail,
    prune_cache,
)
from tests.data.unusable_files import encode_image, flip_byte, noise_image, png_header

RED, BLUE = (200, 20, 20), (20, 20, 200)


def shown(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data))
    assert image.format == "JPEG"
    return image.convert("RGB")


def close(image: Image.Image, at: tuple[int, int], colour: tuple[int, ...], off: int = 12) -> bool:
    seen = image.getpixel(at)
    assert isinstance(seen, tuple)
    return all(abs(one - other) <= off for one, other in zip(seen, colour))


def two_halves(size: tuple[int, int]) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image


@pytest.mark.parametrize(
    ("asked", "got"), [(1, 96), (96, 96), (97, 192), (300, 384), (768, 768), (9999, 768), (-5, 96)]
)
def test_widths_come_from_the_ladder(tmp_path: Path, asked: int, got: int) -> None:
    noise_image((2000, 1000)).save(tmp_path / "a.png")
    assert shown(get_thumbnail(tmp_path / "a.png", asked, tmp_path / "cache")).size == (
        got,
        got // 2,
    )


def test_a_small_picture_is_not_enlarged_and_a_tower_is_bounded(tmp_path: Path) -> None:
    noise_image((40, 30)).save(tmp_path / "small.png")
    noise_image((100, 3000)).save(tmp_path / "tower.png")
    assert shown(get_thumbnail(tmp_path / "small.png", 384, tmp_path / "cache")).size == (40, 30)
    assert max(shown(get_thumbnail(tmp_path / "tower.png", 96, tmp_path / "cache")).size) == 192


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_turns_the_picture(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: the left side becomes the top
    two_halves((800, 400)).save(tmp_path / "turned", kind, exif=exif)
    image = shown(get_thumbnail(tmp_path / "turned", 96, tmp_path / "cache"))
    assert image.size == (96, 192)
    assert close(image, (48, 20), RED)
    assert close(image, (48, 170), BLUE)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_lies_over_grey(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0)).convert("RGBA" if mode == "RGBA" else "LA")
    image.save(tmp_path / "clear.png") if mode != "PA" else image.convert("RGBA").quantize(4).save(
        tmp_path / "clear.png"
    )
    assert close(
        shown(get_thumbnail(tmp_path / "clear.png", 96, tmp_path / "cache")),
        (32, 32),
        BACKGROUND_GREY,
    )


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    Image.new("I;16", (32, 32), 32768).save(tmp_path / "grey.png")
    assert close(
        shown(get_thumbnail(tmp_path / "grey.png", 96, tmp_path / "cache")),
        (16, 16),
        (127, 127, 127),
        2,
    )


def test_cmyk_is_converted(tmp_path: Path) -> None:
    noise_image((64, 64)).convert("CMYK").save(tmp_path / "ink.jpg")
    assert shown(get_thumbnail(tmp_path / "ink.jpg", 96, tmp_path / "cache")).size == (64, 64)


BAD: dict[str, tuple[bytes, int]] = {
    "empty": (b"", 415),
    "html": (b"<html><script>alert(1)</script>", 415),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415),
    "truncated jpeg": (encode_image(noise_image(), "JPEG")[:900], 415),
    "bent png": (flip_byte(encode_image(noise_image(), "PNG"), 3000), 415),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415),
    "bomb": (png_header(20_000, 10_001), 413),
    "larger bomb": (png_header(2**31 - 1, 2**31 - 1), 413),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_and_leave_nothing(tmp_path: Path, name: str) -> None:
    data, status = BAD[name]
    (tmp_path / "bad.jpg").write_bytes(data)
    with pytest.raises(ApiError) as caught:
        get_thumbnail(tmp_path / "bad.jpg", 96, tmp_path / "cache")
    assert caught.value.status == status
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith("lock")]


def test_no_file_and_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name, status in (("pipe.png", 415), (".", 415), ("none.png", 404)):
        with pytest.raises(ApiError) as caught:
            get_thumbnail(tmp_path / name, 96, tmp_path / "cache")
        assert caught.value.status == status


def test_made_once_and_again_when_the_file_changes(tmp_path: Path) -> None:
    source, cache = tmp_path / "a.png", tmp_path / "cache"
    two_halves((64, 64)).save(source)
    first = get_thumbnail(source, 96, cache)
    (kept,) = cache.glob("*.jpg")
    kept.write_bytes(b"from the cache")
    assert get_thumbnail(source, 96, cache) == b"from the cache"
    status = source.stat()
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert get_thumbnail(source, 96, cache) == first
    assert len(THUMBNAIL_WIDTHS_PX) == 4


def test_the_oldest_are_removed_when_the_room_is_full(tmp_path: Path) -> None:
    for age in range(20):
        path = tmp_path / f"{age:02}.jpg"
        path.write_bytes(b"x" * 100)
        os.utime(path, ns=(age, age))
    prune_cache(tmp_path, 2000)
    assert len(list(tmp_path.iterdir())) == 20
    prune_cache(tmp_path, 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{age:02}.jpg" for age in range(13, 20)
    ]


def test_a_file_that_another_thread_has_just_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.jpg", "b.jpg.1-2.tmp"):
        (tmp_path / name).write_bytes(b"x" * 100)
    listing = os.scandir

    @contextlib.contextmanager
    def renamed_meanwhile(folder: Path) -> Iterator[list[os.DirEntry[str]]]:
        with listing(folder) as entries:
            found = list(entries)
        (tmp_path / "b.jpg.1-2.tmp").rename(tmp_path / "b.jpg")
        yield found

    monkeypatch.setattr(os, "scandir", renamed_meanwhile)
    prune_cache(tmp_path, 50)
    assert not (tmp_path / "a.jpg").exists()


def test_new_thumbnails_see_to_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simpletuner.server.thumbnails.MAX_CACHE_BYTES", 4000)
    # Otherwise a hash of the temporary path decides after which thumbnails the cache is pruned.
    monkeypatch.setattr("simpletuner.server.thumbnails.PRUNE_EVERY", 1)
    data = encode_image(Image.new("RGB", (8, 8)), "PNG")
    for number in range(64):
        (tmp_path / f"{number}.png").write_bytes(data)
        size = len(get_thumbnail(tmp_path / f"{number}.png", 96, tmp_path / "cache"))
    assert 0 < len(list((tmp_path / "cache").glob("*.jpg"))) <= 4000 // size < 64
