"""How a file of the user's is sent: never as something that a browser would run."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from fastapi.responses import FileResponse

from simpletuner.server.api_errors import abort

# Whatever is not here is a download of bytes: HTML and SVG could carry scripts.
INLINE_MEDIA_TYPES = MappingProxyType(
    {f".{kind}": f"image/{kind}" for kind in ("png", "jpeg", "webp", "avif")}
    | {".jpg": "image/jpeg"}
    | dict.fromkeys((".json", ".jsonl", ".log", ".txt"), "text/plain; charset=utf-8")
)


def make_file_response(path: Path, name: str | None = None) -> FileResponse:
    """path: already through `Place`. name: to save it under, whatever it is. Ranges and ETag are Starlette's.
    404 for what is no ordinary file.
    """
    if not path.is_file():
        abort(404, "there is no such file")
    kind = INLINE_MEDIA_TYPES.get(path.suffix.lower())
    if kind is None or name is not None:
        return FileResponse(path, media_type="application/octet-stream", filename=name or path.name)
    return FileResponse(path, media_type=kind)
