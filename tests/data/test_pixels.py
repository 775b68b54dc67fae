from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, ImageOps
from PIL.PngImagePlugin import PngImageFile

from simpletuner.config.schema import DataOptions
from simpletuner.data.pixels import load_pixels, read_image_header
from simpletuner.data.rejections import UnusableFile
from simpletuner.data.sample_types import BucketedSample, Sample
from simpletuner.data.sources import LocalFile
from tests.data.unusable_files import noise_image, png_header


def placed(path: Path, size: tuple[int, int]) -> BucketedSample:
    """At its own size: what comes back are the decoded pixels."""
    return BucketedSample(Sample("d/x", "d", LocalFile(path), *size, ("c",)), size, (0, 0), size)


def pixels(
    image: Image.Image, path: Path, background: str = "white", **settings: object
) -> np.ndarray:
    image.save(path, **settings)
    size = read_image_header(LocalFile(path), 100).size_px
    return load_pixels(placed(path, size), DataOptions(alpha_background=background))


def flat(colour: object, mode: str) -> Image.Image:
    return Image.new(mode, (8, 8), colour)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_comes_first(orientation: int, suffix: str, tmp_path: Path) -> None:
    image = noise_image((24, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"quality": 100, "lossless": True} if suffix in ("webp", "jpg") else {}
    found = pixels(image, tmp_path / f"x.{suffix}", exif=exif, **settings)
    with Image.open(tmp_path / f"x.{suffix}") as opened:
        opened.load()
        oracle = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert np.array_equal(found, oracle)
    assert found.shape[:2] == ((24, 16) if orientation >= 5 else (16, 24))


@pytest.mark.parametrize("byteorder", ["<u2", ">u2"])
def test_sixteen_bit_grey_is_scaled(byteorder: str, tmp_path: Path) -> None:
    ramp = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
    for suffix in ("png", "tif"):
        found = pixels(Image.fromarray(ramp.astype(byteorder)), tmp_path / f"x.{suffix}")
        assert np.array_equal(found[..., 0], np.round(ramp / 257).astype(np.uint8))
        assert np.array_equal(found[..., 0], found[..., 2])


def test_transparency_shows_the_background_and_not_the_hidden_colour(tmp_path: Path) -> None:
    clear = flat((255, 0, 0, 0), "RGBA")
    assert (pixels(clear, tmp_path / "a.png") == 255).all()
    assert (pixels(clear, tmp_path / "b.png", "#102030") == (16, 32, 48)).all()
    half = pixels(flat((200, 100, 0, 128), "RGBA"), tmp_path / "c.png", "black")
    assert np.abs(half.astype(int) - (100, 50, 0)).max() <= 1
    assert (pixels(flat((90, 0), "LA"), tmp_path / "d.png", "black") == 0).all()
    palette = flat((9, 9, 9), "RGB").quantize(4)
    assert (pixels(palette, tmp_path / "e.png", transparency=palette.getpixel((0, 0))) == 255).all()
    assert (pixels(flat((1, 2, 3), "RGB"), tmp_path / "f.png", transparency=(1, 2, 3)) == 255).all()


def test_embedded_profile_becomes_srgb(tmp_path: Path) -> None:
    srgb = ImageCms.createProfile("sRGB")
    lab = ImageCms.createProfile("LAB")
    image = noise_image((32, 32))
    same = pixels(image, tmp_path / "s.png", icc_profile=ImageCms.ImageCmsProfile(srgb).tobytes())
    assert np.abs(same.astype(int) - np.asarray(image)).max() <= 1
    assert np.array_equal(pixels(image, tmp_path / "p.png"), np.asarray(image))
    wrong_space = pixels(
        image, tmp_path / "l.png", icc_profile=ImageCms.ImageCmsProfile(lab).tobytes()
    )
    assert np.array_equal(wrong_space, np.asarray(image))
    swapped = gbr_profile(ImageCms.ImageCmsProfile(srgb).tobytes())
    turned = pixels(image, tmp_path / "g.png", icc_profile=swapped)
    expected = ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(io.BytesIO(swapped)), srgb)
    assert np.array_equal(turned, np.asarray(expected))
    assert np.abs(turned.astype(int) - np.asarray(image)).mean() > 20
    alpha = image.convert("RGBA")
    assert np.array_equal(pixels(alpha, tmp_path / "ga.png", icc_profile=swapped), turned)


def gbr_profile(srgb: bytes) -> bytes:
    """sRGB with the red and the blue primary exchanged."""
    return srgb.replace(b"rXYZ", b"tmp_").replace(b"bXYZ", b"rXYZ").replace(b"tmp_", b"bXYZ")


def test_cmyk_and_palette_and_one_bit(tmp_path: Path) -> None:
    cmyk = pixels(flat((0, 255, 255, 0), "CMYK"), tmp_path / "x.jpg", quality=100)
    assert cmyk[0, 0, 0] > 200
    assert cmyk[0, 0, 1] < 40
    assert (pixels(flat(1, "1"), tmp_path / "x.png") == 255).all()
    assert (pixels(flat((7, 8, 9), "RGB").quantize(4), tmp_path / "p.gif") == (7, 8, 9)).all()


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [flat(colour, "RGB") for colour in ((255, 0, 0), (0, 255, 0))]
    for suffix, settings in (("gif", {}), ("webp", {"lossless": True}), ("png", {})):
        path = tmp_path / f"x.{suffix}"
        found = pixels(frames[0], path, save_all=True, append_images=frames[1:], **settings)
        assert read_image_header(LocalFile(path), 100).is_animated
        assert (found == (255, 0, 0)).all()


def test_resize_then_crop(tmp_path: Path) -> None:
    image = noise_image((100, 60))
    image.save(tmp_path / "x.png")
    sample = Sample("d/x", "d", LocalFile(tmp_path / "x.png"), 100, 60, ("c",))
    found = load_pixels(BucketedSample(sample, (107, 64), (9, 0), (64, 64)), DataOptions())
    oracle = image.resize((107, 64), Image.Resampling.LANCZOS).crop((9, 0, 73, 64))
    assert found.dtype == np.uint8
    assert found.flags.writeable
    assert np.array_equal(found, np.asarray(oracle))


def test_truncation_is_never_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    noise_image().save(path)
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(UnusableFile, match="truncated") as error:
        load_pixels(placed(path, (96, 64)), DataOptions())
    assert error.value.reason == "damaged"
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_picture_that_changed_since_the_scan_is_refused(tmp_path: Path) -> None:
    noise_image((64, 64)).save(tmp_path / "x.png")
    with pytest.raises(UnusableFile, match=r"64x64.*96x64"):
        load_pixels(placed(tmp_path / "x.png", (96, 64)), DataOptions())
    with pytest.raises(UnusableFile, match="No such file"):
        load_pixels(placed(tmp_path / "gone.png", (96, 64)), DataOptions())


def test_the_limit_of_pixels_is_ours_alone(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(
        png_header(20000, 20000)
    )  # over Pillow's own limit of 179 megapixels
    assert read_image_header(LocalFile(tmp_path / "x.png"), 400).size_px == (20000, 20000)
    with pytest.raises(UnusableFile, match="400 megapixels"):
        read_image_header(LocalFile(tmp_path / "x.png"), 399)
    with pytest.raises(UnusableFile, match="is 20000x20000, but was 8x8") as error:
        load_pixels(
            placed(tmp_path / "x.png", (8, 8)), DataOptions()
        )  # without decoding 400 megapixels
    assert error.value.reason == "changed"


def test_headers_are_read_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tif"):
        noise_image().save(tmp_path / f"x.{suffix}")

    def refuse(image: Image.Image) -> None:
        raise AssertionError("decoded")

    for kind in (Image.Image, ImageFile.ImageFile):
        monkeypatch.setattr(kind, "load", refuse)
    for path in tmp_path.iterdir():
        assert read_image_header(LocalFile(path), 100).size_px == (96, 64)


@pytest.mark.parametrize(
    "kind", [RuntimeError, MemoryError, AssertionError, KeyError, RecursionError]
)
@pytest.mark.parametrize("where", ["open", "load"])
def test_whatever_a_decoder_raises_rejects_the_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], where: str
) -> None:
    """AVIF raises RuntimeError; which classes other decoders raise is no contract."""
    noise_image().save(tmp_path / "x.png")
    file = LocalFile(tmp_path / "x.png")

    def fail(*arguments: object, **named: object) -> None:
        raise kind

    target = Image if where == "open" else PngImageFile
    monkeypatch.setattr(target, where, fail)
    with pytest.raises(UnusableFile, match=f"cannot be decoded: {kind.__name__}"):
        load_pixels(placed(file.path, (96, 64)), DataOptions())
    if where == "open":
        with pytest.raises(UnusableFile, match=f"cannot be decoded: {kind.__name__}"):
            read_image_header(file, 100)
