"""The rough preview of images that are being sampled: one file, which the sampling overwrites."""

from __future__ import annotations

from pathlib import Path

from fastapi import Response

from simpletuner.bounded_files import MIB, read_bounded_bytes

# As in validation/sampling_preview.py, which this package does not import.
PREVIEW_FILE = "preview.jpg"
RUN_PREVIEW_FILE = f"images/{PREVIEW_FILE}"


def preview_version(path: Path) -> int | None:
    """Return a number that changes with the preview, None without one."""
    try:
        return path.stat().st_mtime_ns // 1_000_000
    except OSError:
        return None


def make_preview_response(path: Path) -> Response:
    """Return the preview, whose path Workspace must have resolved; 204 where there is none.

    A page may ask for the preview just as sampling ends, which is not an error. The file is read
    whole, because it may be replaced while it is sent.
    """
    try:
        return Response(read_bounded_bytes(path, MIB), media_type="image/jpeg")
    except OSError:
        return Response(status_code=204)
