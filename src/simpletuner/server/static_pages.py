"""What a browser loads: the built pages, or why there are none; and the list of routes for people."""

from __future__ import annotations

import html
import json
from typing import Any

from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from simpletuner.server.settings import ServerSettings

PAGE_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>{title}</title></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""
# A wheel that was built without pages may wait in pip's cache: without these flags it would come back.
NOT_BUILT_HTML = """<p>This simpletuner was installed without its pages. The REST interface works:
<a href="/api/v1/docs">its routes</a>. To have the pages, install again from the checkout:</p>
<pre>pip install --force-reinstall --no-deps --no-cache-dir .</pre>
<p>If SIMPLETUNER_SKIP_UI is set, unset it first. Building needs an npm registry; Node comes by itself.</p>"""


class StaticPages:
    """The last route: files of the folder `static`, never anything under /api."""

    def __init__(self, settings: ServerSettings) -> None:
        self.index_path = settings.static_dir / "index.html"
        self.static_files = StaticFiles(directory=settings.static_dir, html=True, check_dir=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send(
                {
                    "type": "websocket.close",
                    "code": 1008,
                    "reason": "the live channel is /api/v1/live",
                }
            )
            return
        if scope["path"].startswith("/api/"):
            raise HTTPException(404, "no such route; GET /api/v1/docs lists them")
        if self.index_path.is_file():
            await self.static_files(scope, receive, send)
            return
        page = PAGE_TEMPLATE.format(title="The pages were not built", body=NOT_BUILT_HTML)
        await HTMLResponse(page, 503)(scope, receive, send)


def render_routes_page(document: dict[str, Any]) -> str:
    """The OpenAPI document for people: no script, no style, nothing from another host."""
    parts = ['<p>As a document for programs: <a href="openapi.json">openapi.json</a>.</p>']
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            text = html.escape(route.get("description") or route.get("summary", ""))
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{text}</p>")
            told = {
                key: route[key]
                for key in ("parameters", "requestBody", "responses")
                if key in route
            }
            parts.append(_render_details("Takes and answers", told))
    parts.append("<h2>Shapes</h2>")
    parts += [
        _render_details(name, shape) for name, shape in document["components"]["schemas"].items()
    ]
    return PAGE_TEMPLATE.format(title="simpletuner: routes", body="\n".join(parts))


def _render_details(title: str, shape: dict[str, Any]) -> str:
    text = html.escape(json.dumps(shape, indent=1))
    return f"<details><summary>{html.escape(title)}</summary><pre>{text}</pre></details>"
