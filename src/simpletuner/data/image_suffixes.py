"""Names of image files."""

from __future__ import annotations

# Image suffixes. Formats that cannot be decoded are among them, so that their files are listed as
# rejected instead of being ignored.
IMAGE_SUFFIXES = frozenset(
    {
        ".png",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".avif",
        ".ppm",
        ".pgm",
        ".pnm",
        ".heic",
        ".heif",
        ".jxl",
        ".jp2",
        ".psd",
    }
)
