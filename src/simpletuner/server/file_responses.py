"""Responses with a user's file, never with a media type that a browser would execute."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from fastapi.responses import FileResponse

from simpletuner.server.api_errors import abort

# Every other suffix is sent as a download, because HTML and SVG can contain scripts.
INLINE_MEDIA_TYPES = MappingProxyType(
    {f".{kind}": f"image/{kind}" for kind in ("png", "jpeg", "webp", "avif")}
    | {".jpg": "image/jpeg"}
    | dict.fromkeys((".json", ".jsonl", ".log", ".txt"), "text/plain; charset=utf-8")
)


def make_file_response(path: Path, name: str | None = None) -> FileResponse:
    """Return a response with the file at `path`, which Workspace must have resolved before.

    name: download the file under this name. Starlette handles ranges and ETags. Raises ApiError 404
    unless `path` is a regular file.
    """
    if not path.is_file():
        abort(404, "there is no such file")
    kind = INLINE_MEDIA_TYPES.get(path.suffix.lower())
    if kind is None or name is not None:
        return FileResponse(path, media_type="application/octet-stream", filename=name or path.name)
    return FileResponse(path, media_type=kind)
