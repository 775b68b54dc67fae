"""How a file of the user's is sent: never as something that a browser would run."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

from fastapi.responses import FileResponse

from simpletuner.server.refusal import refuse

# Whatever is not here is a download of bytes: HTML and SVG could carry scripts.
TYPES = MappingProxyType(
    {
        ".png": "image/png",
        ".jpg": "image/jpeg",
        ".jpeg": "image/jpeg",
        ".webp": "image/webp",
        ".avif": "image/avif",
        ".json": "text/plain; charset=utf-8",
        ".jsonl": "text/plain; charset=utf-8",
        ".log": "text/plain; charset=utf-8",
        ".txt": "text/plain; charset=utf-8",
    }
)


def sent(path: Path, download: bool = False) -> FileResponse:
    """path: already through `Place`. Ranges and ETag are Starlette's. 404 for what is no ordinary file."""
    if not path.is_file():
        refuse(404, "there is no such file")
    kind = TYPES.get(path.suffix.lower())
    if kind is None or download:
        return FileResponse(path, media_type="application/octet-stream", filename=path.name)
    return FileResponse(path, media_type=kind)
