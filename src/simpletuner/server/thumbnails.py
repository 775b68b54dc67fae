"""Small pictures of large ones, made once."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
from io import BytesIO
from pathlib import Path

from simpletuner.atomic_io import write_atomically
from simpletuner.server.api_errors import abort

THUMBNAIL_WIDTHS_PX = (
    96,
    192,
    384,
    768,
)  # a cache cannot be filled by asking for every width there is
MAX_PIXELS = 200_000_000
MAX_CACHE_BYTES = 512 * 2**20
PRUNE_EVERY = (
    16  # of as many new thumbnails one looks whether the cache is full; a power of two up to 256
)
MAX_CONCURRENT_DECODES = 2  # decoded together: a picture of 200 million pixels takes 0.8 GB
JPEG_QUALITY = 82
BACKGROUND_GREY = (128, 128, 128)


def get_thumbnail(source: Path, width: int, cache: Path) -> bytes:
    """The picture as JPEG, upright, transparency over grey, at most `width` wide and twice that high.

    width: rounded up to LADDER_PX; a smaller picture is not enlarged. cache: a folder that only holds
    thumbnails, made here; entries go by the source's path, time and size. Raises Refused: 404 when there is
    no such file, 415 when it is no picture or a damaged one, 413 above LARGEST_PIXELS (told by its header).
    """
    side = next((rung for rung in THUMBNAIL_WIDTHS_PX if rung >= width), THUMBNAIL_WIDTHS_PX[-1])
    try:
        status = source.stat()
    except OSError:
        abort(404, "there is no such picture")
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
        abort(415, "that is not a regular file")
    said = f"{os.path.realpath(source)}\0{status.st_mtime_ns}\0{status.st_size}\0{side}"
    key = hashlib.sha256(said.encode("utf-8", "surrogateescape"))
    kept = cache / f"{key.hexdigest()}.jpg"
    if kept.is_file():
        return kept.read_bytes()
    cache.mkdir(parents=True, exist_ok=True)
    number = key.digest()[0]
    with (cache / f"lock-{number % MAX_CONCURRENT_DECODES}").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        made = _render_thumbnail(source, side)
    with contextlib.suppress(OSError):  # a full disk: made again another time
        write_atomically(kept, made)
    if number % PRUNE_EVERY == 0:
        prune_cache(cache, MAX_CACHE_BYTES)
    return made


def prune_cache(cache: Path, room_bytes: int) -> None:
    """Remove the oldest thumbnails until three quarters of the room are taken; nothing when all fit."""
    found = []
    with os.scandir(cache) as entries:
        for entry in entries:
            if entry.name.endswith((".jpg", ".tmp")):
                status = entry.stat(follow_symlinks=False)
                found.append((status.st_mtime_ns, entry.path, status.st_size))
    taken = sum(size for _, _, size in found)
    if taken <= room_bytes:
        return
    for _, path, size in sorted(found):
        if taken <= room_bytes * 3 // 4:
            return
        Path(path).unlink(missing_ok=True)
        taken -= size


def _render_thumbnail(source: Path, side: int) -> bytes:
    from PIL import Image, ImageOps, UnidentifiedImageError

    from simpletuner.data.pixels import (
        DECODER_ERRORS,
        IMAGE_FORMATS,
        PIXEL_MODES,
        SIXTEEN_BIT_MODES,
    )

    try:
        with Image.open(source, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                abort(
                    413,
                    f"{image.width}x{image.height} is more than {MAX_PIXELS // 10**6} megapixels",
                )
            if image.mode not in PIXEL_MODES:
                abort(415, f"pixels of kind {image.mode} are not shown; export 8-bit RGB")
            image.draft("RGB", (2 * side, 4 * side))  # JPEG only: decodes an eighth of a large one
            picture = image
            if (
                image.mode in SIXTEEN_BIT_MODES
            ):  # convert("L") would clip everything above 255 to white
                picture = image.convert("I").point(lambda level: level * (1 / 257)).convert("L")
            alpha = picture.has_transparency_data
            if alpha or picture.mode not in ("L", "RGB"):
                picture = picture.convert("RGBA" if alpha else "RGB")
            profile = image.info.get("icc_profile") if picture.mode == image.mode == "RGB" else None
            picture.thumbnail(
                (side * 2, side * 4), Image.Resampling.BOX
            )  # bounds what turning copies
            picture = ImageOps.exif_transpose(picture)
    except UnidentifiedImageError:
        abort(415, "that is not a picture that can be read")
    except DECODER_ERRORS as error:
        abort(415, f"the picture cannot be decoded: {error}")
    picture.thumbnail((side, side * 2), Image.Resampling.LANCZOS)
    if alpha:
        opaque = Image.new("RGB", picture.size, BACKGROUND_GREY)
        opaque.paste(picture, mask=picture.getchannel("A"))
        picture = opaque
    out = BytesIO()
    picture.save(out, "JPEG", quality=JPEG_QUALITY, icc_profile=profile)
    return out.getvalue()
