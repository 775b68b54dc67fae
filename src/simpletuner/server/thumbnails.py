"""Thumbnails of images, rendered once and cached."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from simpletuner.atomic_io import write_atomically
from simpletuner.image_decoding import UndecodableImage, decoder_errors
from simpletuner.server.api_errors import ApiError, abort

if TYPE_CHECKING:
    from PIL import Image  # at run time only where a thumbnail is rendered

# A fixed set of widths, so that requests for every possible width cannot fill the cache.
THUMBNAIL_WIDTHS_PX = (96, 192, 384, 768)
MAX_PIXELS = 200_000_000
MAX_CACHE_BYTES = 512 * 2**20
PRUNE_EVERY = 16  # one new thumbnail in 16 checks the cache size; must be a power of two up to 256
MAX_CONCURRENT_DECODES = 2  # decoding an image of 200 megapixels takes 0.8 GB
JPEG_QUALITY = 82
BACKGROUND_GREY = (128, 128, 128)


def get_thumbnail(source: Path, width: int, cache: Path) -> bytes:
    """Return a JPEG of the image, upright, at most `width` px wide and twice that high.

    Transparent parts are shown over grey. width: rounded up to one of THUMBNAIL_WIDTHS_PX; a
    smaller image is not enlarged. cache: a folder for thumbnails only, created if missing; its keys
    are made of the source's path, modification time and size. Raises ApiError: 404 if the file does
    not exist, 415 if it is damaged or not an image, 413 if its header declares more than MAX_PIXELS
    pixels.
    """
    side = next((size for size in THUMBNAIL_WIDTHS_PX if size >= width), THUMBNAIL_WIDTHS_PX[-1])
    try:
        status = source.stat()
    except OSError:
        abort(404, "there is no such image")
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would block
        abort(415, "that is not a regular file")
    identity = f"{os.path.realpath(source)}\0{status.st_mtime_ns}\0{status.st_size}\0{side}"
    key = hashlib.sha256(identity.encode("utf-8", "surrogateescape"))
    cached = cache / f"{key.hexdigest()}.jpg"
    if cached.is_file():
        return cached.read_bytes()
    cache.mkdir(parents=True, exist_ok=True)
    number = key.digest()[0]
    with (cache / f"lock-{number % MAX_CONCURRENT_DECODES}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thumbnail = _render_thumbnail(source, side)
    with contextlib.suppress(OSError):  # on a full disk, render it again next time
        write_atomically(cached, thumbnail)
    if number % PRUNE_EVERY == 0:
        prune_cache(cache, MAX_CACHE_BYTES)
    return thumbnail


def prune_cache(cache: Path, max_bytes: int) -> None:
    """If the cache exceeds `max_bytes`, delete the oldest thumbnails down to 3/4 of that."""
    files = []
    with os.scandir(cache) as entries:
        for entry in entries:
            if entry.name.endswith((".jpg", ".tmp")):
                with contextlib.suppress(FileNotFoundError):  # another thread has renamed it
                    status = entry.stat(follow_symlinks=False)
                    files.append((status.st_mtime_ns, entry.path, status.st_size))
    used_bytes = sum(size for _, _, size in files)
    if used_bytes <= max_bytes:
        return
    for _, path, size in sorted(files):
        if used_bytes <= max_bytes * 3 // 4:
            return
        Path(path).unlink(missing_ok=True)
        used_bytes -= size


def _open_bounded(stream: BinaryIO) -> Image.Image:
    """Open an image; a JPEG XL, whose decoder would read all of it, only after its size."""
    from simpletuner.data.image_plugins import identify_format, open_image
    from simpletuner.data.jxl_header import read_jxl_size

    if identify_format(stream) == "JXL":
        _check_pixel_count(read_jxl_size(stream))
    return open_image(stream)


def _check_pixel_count(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        abort(413, f"{size[0]}x{size[1]} is more than {MAX_PIXELS // 10**6} megapixels")


def _render_thumbnail(source: Path, side: int) -> bytes:
    from PIL import Image, ImageOps

    from simpletuner.data.image_plugins import MissingDecoder
    from simpletuner.data.pixels import PIXEL_MODES, SIXTEEN_BIT_MODES

    try:
        with (
            decoder_errors(ApiError, MissingDecoder),
            source.open("rb") as stream,
            _open_bounded(stream) as image,
        ):
            _check_pixel_count(image.size)
            if image.mode not in PIXEL_MODES:
                abort(415, f"images of mode {image.mode} cannot be shown; export it as 8-bit RGB")
            image.draft(
                "RGB", (2 * side, 4 * side)
            )  # JPEG only: decodes at down to 1/8 of the size
            thumb = image
            if image.mode in SIXTEEN_BIT_MODES:
                # convert("L") would clip every value above 255 to white.
                thumb = image.convert("I").point(lambda level: level * (1 / 257)).convert("L")
            alpha = thumb.has_transparency_data
            if alpha or thumb.mode not in ("L", "RGB"):
                thumb = thumb.convert("RGBA" if alpha else "RGB")
            profile = image.info.get("icc_profile") if thumb.mode == image.mode == "RGB" else None
            # Reduce before rotating, because exif_transpose copies the image.
            thumb.thumbnail((side * 2, side * 4), Image.Resampling.BOX)
            thumb = ImageOps.exif_transpose(thumb)
    except MissingDecoder as error:
        abort(415, str(error))
    except UndecodableImage:
        abort(415, "this file is damaged or not an image")
    thumb.thumbnail((side, side * 2), Image.Resampling.LANCZOS)
    if alpha:
        opaque = Image.new("RGB", thumb.size, BACKGROUND_GREY)
        opaque.paste(thumb, mask=thumb.getchannel("A"))
        thumb = opaque
    out = BytesIO()
    thumb.save(out, "JPEG", quality=JPEG_QUALITY, icc_profile=profile)
    return out.getvalue()
