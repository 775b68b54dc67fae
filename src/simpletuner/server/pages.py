"""What a browser loads: the built pages, or why there are none; and the list of routes for people."""

from __future__ import annotations

import html
import json
from typing import Any

from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from simpletuner.server.settings import Settings

FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>{title}</title></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""
# A wheel that was built without pages may wait in pip's cache: without these flags it would come back.
NOT_BUILT = """<p>This simpletuner was installed without its pages. The REST interface works:
<a href="/api/v1/docs">its routes</a>. To have the pages, install again from the checkout:</p>
<pre>pip install --force-reinstall --no-deps --no-cache-dir .</pre>
<p>If SIMPLETUNER_SKIP_UI is set, unset it first. Building needs an npm registry; Node comes by itself.</p>"""


class Pages:
    """The last route: files of the folder `static`, never anything under /api."""

    def __init__(self, settings: Settings) -> None:
        self.index = settings.static / "index.html"
        self.files = StaticFiles(directory=settings.static, html=True, check_dir=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send(
                {"type": "websocket.close", "code": 1008, "reason": "the live channel is /api/v1/live"}
            )
            return
        if scope["path"].startswith("/api/"):
            raise HTTPException(404, "no such route; GET /api/v1/docs lists them")
        if self.index.is_file():
            await self.files(scope, receive, send)
            return
        page = FRAME.format(title="The pages were not built", body=NOT_BUILT)
        await HTMLResponse(page, 503)(scope, receive, send)


def routes_page(document: dict[str, Any]) -> str:
    """The OpenAPI document for people: no script, no style, nothing from another host."""
    parts = ['<p>As a document for programs: <a href="openapi.json">openapi.json</a>.</p>']
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            text = html.escape(route.get("description") or route.get("summary", ""))
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{text}</p>")
            asked = [_parameter(one) for one in route.get("parameters", [])]
            taken = route.get("requestBody", {}).get("content", {})
            asked += [
                f"body: {_shape(one.get('schema', {}))} as {html.escape(kind)}" for kind, one in taken.items()
            ]
            answers = [f"{status}: {_answer(one)}" for status, one in route["responses"].items()]
            parts.append("<ul>" + "".join(f"<li>{line}</li>" for line in [*asked, *answers]) + "</ul>")
    parts.append("<h2>Shapes</h2>")
    for name, shape in document["components"]["schemas"].items():
        name, text = html.escape(name), html.escape(json.dumps(shape, indent=1))
        parts.append(f'<details id="{name}"><summary>{name}</summary><pre>{text}</pre></details>')
    return FRAME.format(title="simpletuner: routes", body="\n".join(parts))


def _parameter(one: dict[str, Any]) -> str:
    need = "" if one.get("required") else ", optional"
    return f"{one['in']} <code>{html.escape(one['name'])}</code>: {_shape(one['schema'])}{need}"


def _answer(one: dict[str, Any]) -> str:
    return (
        " or ".join(_shape(content.get("schema", {})) for content in one.get("content", {}).values())
        or "nothing"
    )


def _shape(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = html.escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "items" in schema:
        return f"list of {_shape(schema['items'])}"
    if "anyOf" in schema:
        return " or ".join(_shape(one) for one in schema["anyOf"])
    return html.escape(str(schema.get("type", "anything")))
