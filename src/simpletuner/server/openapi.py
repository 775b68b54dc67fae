"""Writes the OpenAPI document that the page's types are made of: python -m simpletuner.server.openapi"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydantic.json_schema import models_json_schema

from simpletuner.server.app import create_app
from simpletuner.server.schemas.live import FollowRequest, LiveUpdate
from simpletuner.server.settings import ServerSettings
from simpletuner.server.workspace import Workspace

OPENAPI_PATH = Path(__file__).parents[3] / "web" / "openapi.json"


def build_document() -> dict[str, Any]:
    """Of the whole application, and the two messages of the WebSocket, which OpenAPI has no routes for."""
    with tempfile.TemporaryDirectory() as empty:
        found = create_app(ServerSettings(Workspace(Path(empty)))).openapi()
    _, shapes = models_json_schema(
        [(FollowRequest, "validation"), (LiveUpdate, "serialization")],
        ref_template="#/components/schemas/{model}",
    )
    found["components"]["schemas"].update(shapes["$defs"])
    return found


def render_document() -> str:
    return json.dumps(build_document(), indent=1) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else OPENAPI_PATH
    target.write_text(render_document(), encoding="utf-8")
    print(f"wrote {target}")
