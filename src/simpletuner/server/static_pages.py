"""Static pages: the built web UI, or a notice if it is missing, and a list of the API routes."""

from __future__ import annotations

import html
import json
import mimetypes
import os
from pathlib import Path
from typing import Any

from fastapi.responses import HTMLResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from simpletuner.server.settings import ServerSettings

YEAR_S = 365 * 86400
PAGE_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>{title}</title></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""
# Without these flags, pip would reinstall the wheel without pages from its cache.
NOT_BUILT_HTML = """<p>This simpletuner was installed without the web pages. The REST API works; see
<a href="/api/v1/docs">its routes</a>. To build the pages, reinstall from the checkout:</p>
<pre>pip install --force-reinstall --no-deps --no-cache-dir .</pre>
<p>If SIMPLETUNER_SKIP_UI is set, unset it first. The build needs access to an npm registry; it
installs Node itself.</p>"""


class StaticPages:
    """The fallback route: files of the folder `static`, and 404 for unknown paths under /api."""

    def __init__(self, settings: ServerSettings) -> None:
        self.index_path = settings.static_dir / "index.html"
        self.static_files = StaticFiles(directory=settings.static_dir, html=True, check_dir=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send(
                {
                    "type": "websocket.close",
                    "code": 1008,
                    "reason": "the WebSocket is at /api/v1/live",
                }
            )
            return
        if scope["path"].startswith("/api/"):
            raise HTTPException(404, "no such route; GET /api/v1/docs lists all routes")
        if self.index_path.is_file():
            await self._send_file(scope, receive, send)
            return
        page = PAGE_TEMPLATE.format(title="The pages were not built", body=NOT_BUILT_HTML)
        await HTMLResponse(page, 503)(scope, receive, send)

    async def _send_file(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send a built file, compressed if there is a compressed copy that the client accepts.

        The name of a file in assets/ has a hash of its content, so it is never asked for again.
        """
        path = scope["path"].lstrip("/")
        accepted = Headers(scope=scope).get("accept-encoding", "")
        compressed = self.index_path.parent / f"{path or 'index.html'}.gz"
        is_compressed = "gzip" in accepted and _is_inside(compressed, self.index_path.parent)
        media_type = mimetypes.guess_type(path or "index.html")[0] or "application/octet-stream"

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in (200, 206, 304):
                headers = MutableHeaders(scope=message)
                headers["vary"] = "accept-encoding"
                if path.startswith("assets/"):
                    headers["cache-control"] = f"public, max-age={YEAR_S}, immutable"
                if is_compressed and message["status"] == 200:
                    headers["content-encoding"] = "gzip"
                    headers["content-type"] = media_type
            await send(message)

        if is_compressed:
            scope = {**scope, "path": f"/{path or 'index.html'}.gz"}
        await self.static_files(scope, receive, send_with_headers)


def _is_inside(path: Path, folder: Path) -> bool:
    """Return True for an existing file below the folder, without links out of it."""
    if "\0" in str(path):
        return False
    real = Path(os.path.realpath(path))
    return real.is_file() and Path(os.path.realpath(folder)) in real.parents


def render_routes_page(document: dict[str, Any]) -> str:
    """Render the OpenAPI document as HTML without scripts, styles or resources from other hosts."""
    parts = [
        '<p>The machine-readable OpenAPI document: <a href="openapi.json">openapi.json</a>.</p>'
    ]
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            text = html.escape(route.get("description") or route.get("summary", ""))
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{text}</p>")
            details = {
                key: route[key]
                for key in ("parameters", "requestBody", "responses")
                if key in route
            }
            parts.append(_render_details("Parameters and responses", details))
    parts.append("<h2>Schemas</h2>")
    parts += [
        _render_details(name, schema) for name, schema in document["components"]["schemas"].items()
    ]
    return PAGE_TEMPLATE.format(title="simpletuner: routes", body="\n".join(parts))


def _render_details(title: str, content: dict[str, Any]) -> str:
    text = html.escape(json.dumps(content, indent=1))
    return f"<details><summary>{html.escape(title)}</summary><pre>{text}</pre></details>"
