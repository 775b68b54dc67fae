"""JPEG XL and HEIC: read like other images where their decoder is installed, else named with it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simpletuner.config.schema import DataOptions
from simpletuner.data import image_plugins
from simpletuner.data.jxl_header import read_jxl_size
from simpletuner.data.pixels import load_pixels, read_image_header
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.sample_types import BucketedSample, Sample
from simpletuner.data.sources import LocalFile

SIZE = (72, 40)
JXL_START = bytes.fromhex("ff0a fa1f 0f91")
HEIC_START = b"\x00\x00\x00\x1cftypmif1\x00\x00\x00\x00mif1heicmiaf" + b"\x00" * 40
AVIF_START = b"\x00\x00\x00\x1cftypmif1\x00\x00\x00\x00mif1avifmiaf" + b"\x00" * 40


def ramp(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    """A smooth image, whose corners differ, so that a turned one is noticed."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8)).convert(mode)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(kind: str, image: Image.Image | None = None, **settings: object) -> Path:
        pytest.importorskip({"JXL": "pillow_jxl", "HEIF": "pillow_heif"}[kind])
        assert image_plugins.load_decoder(kind)
        path = tmp_path / f"image.{kind.lower()}"
        (image or ramp()).save(path, kind, **settings)
        return path

    return write


def read(path: Path, size: tuple[int, int]) -> np.ndarray:
    sample = Sample("d/x", "d", LocalFile(path), *size, ("c",))
    return load_pixels(BucketedSample(sample, size, (0, 0), size), DataOptions())


@pytest.mark.parametrize("kind", ["JXL", "HEIF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_an_image_is_read_like_others(kind: str, mode: str, save: Callable[..., Path]) -> None:
    best = {"JXL": {"lossless": True}, "HEIF": {"quality": 100, "chroma": 444}}[kind]
    path = save(kind, ramp(mode), **best)
    assert read_image_header(LocalFile(path), 100).size_px == SIZE
    expected = np.asarray(ramp(mode).convert("RGB")).astype(int)
    assert np.abs(read(path, SIZE).astype(int) - expected).max() <= 6


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_packed_jpeg_is_upright(
    orientation: int, tmp_path: Path, save: Callable[..., Path]
) -> None:
    """The decoder gives a packed JPEG as it was, with its orientation beside it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    ramp().save(tmp_path / "x.jpg", exif=exif, quality=95)
    plain = LocalFile(tmp_path / "x.jpg")
    size = SIZE[::-1] if orientation >= 5 else SIZE
    with Image.open(plain.path) as jpeg:
        path = save("JXL", jpeg, lossless_jpeg=True)
    assert read_image_header(LocalFile(path), 100).size_px == size
    assert np.array_equal(read(path, size), read(plain.path, size))


@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_a_turned_heic_is_upright(orientation: int, save: Callable[..., Path]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save("HEIF", exif=exif.tobytes(), quality=95)
    size = SIZE[::-1] if orientation >= 5 else SIZE
    assert read_image_header(LocalFile(path), 100).size_px == size
    turns = {1: None, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
    turn = turns[orientation]
    expected = np.asarray(ramp() if turn is None else ramp().transpose(turn)).astype(int)
    assert np.abs(read(path, size).astype(int) - expected).max() <= 12


@pytest.mark.parametrize(
    "size", [(8, 8), (256, 256), (640, 480), (1200, 1000), (3, 1000), (999, 7)]
)
@pytest.mark.parametrize("container", [False, True])
def test_the_size_is_that_of_the_decoder(
    size: tuple[int, int], container: bool, save: Callable[..., Path]
) -> None:
    path = save("JXL", Image.new("L", size), effort=1, use_container=container)
    with path.open("rb") as stream:
        assert read_jxl_size(stream) == size
        assert stream.tell() == 0


def test_a_huge_image_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2^30 x 2^30: a small height and a ratio of one would be 5 bits; here both have 30."""
    pytest.importorskip("pillow_jxl")
    bits = 0 | (3 << 1) | ((2**30 - 1) << 3) | (1 << 33)  # its own size; ratio 1
    path = tmp_path / "bomb.jxl"
    path.write_bytes(b"\xff\x0a" + bits.to_bytes(12, "little"))
    monkeypatch.setattr(image_plugins, "open_image", None)
    with pytest.raises(UnusableFile, match="max_image_megapixels") as caught:
        read_image_header(LocalFile(path), 100)
    assert caught.value.reason == "too_many_pixels"


def test_a_file_that_changed_is_refused_before_it_is_decoded(save: Callable[..., Path]) -> None:
    path = save("JXL")
    with pytest.raises(UnusableFile, match="but was 40x40 when"):
        read(path, (40, 40))


@pytest.mark.parametrize(
    ("start", "kind", "words"),
    [
        (JXL_START, "JXL", "JPEG XL needs a decoder: pip install 'simpletuner[jxl]'"),
        (b"\x00\x00\x00\x0cJXL \x0d\x0a\x87\x0a", "JXL", "simpletuner[jxl]"),
        (HEIC_START, "HEIF", "HEIC needs a decoder: pip install 'simpletuner[heic]'"),
        (AVIF_START, "AVIF", "AVIF needs a decoder: pip install 'pillow>=11.3'"),
    ],
)
def test_a_missing_decoder_is_named(
    start: bytes, kind: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_plugins, "IMAGE_FORMATS", ("PNG", "JPEG"))
    assert image_plugins.identify_format(io.BytesIO(start)) == kind
    for name in ("pillow_jxl", "pillow_heif"):
        monkeypatch.setitem(sys.modules, name, None)
    image_plugins.load_decoder.cache_clear()
    path = tmp_path / "x.jpg"
    path.write_bytes(start)
    try:
        with pytest.raises(UnusableFile) as caught:
            read_image_header(LocalFile(path), 100)
    finally:
        image_plugins.load_decoder.cache_clear()
    assert caught.value.reason == "no_decoder"
    assert words in str(caught.value)


@pytest.mark.parametrize("start", [b"", b"\x89PNG\r\n", b"\x00\x00\x00\x1cftypisom" + b"\x00" * 40])
def test_other_files_are_left_to_pillow(start: bytes) -> None:
    assert image_plugins.identify_format(io.BytesIO(start)) is None
    if "AVIF" in image_plugins.IMAGE_FORMATS:
        assert image_plugins.identify_format(io.BytesIO(AVIF_START)) is None


@pytest.mark.parametrize("cut", [3, 12, 30, 200])
@pytest.mark.parametrize("kind", ["JXL", "HEIF"])
def test_a_damaged_file_is_named(kind: str, cut: int, save: Callable[..., Path]) -> None:
    path = save(kind)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UnusableFile) as caught:
        read(path, SIZE)
    assert caught.value.reason in ("damaged", "not_an_image")
