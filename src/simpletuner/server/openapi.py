"""Write the OpenAPI document, from which the TypeScript types of the pages are generated.

Run it as `python -m simpletuner.server.openapi`.
"""

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
    """Build the document of all routes, plus the two messages of the WebSocket.

    OpenAPI does not describe WebSocket routes, so their schemas are added by hand.
    """
    with tempfile.TemporaryDirectory() as empty:
        document = create_app(ServerSettings(Workspace(Path(empty)))).openapi()
    _, schemas = models_json_schema(
        [(FollowRequest, "validation"), (LiveUpdate, "serialization")],
        ref_template="#/components/schemas/{model}",
    )
    document["components"]["schemas"].update(schemas["$defs"])
    return document


def render_document() -> str:
    """Return the document as JSON text."""
    return json.dumps(build_document(), indent=1) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else OPENAPI_PATH
    target.write_text(render_document(), encoding="utf-8")
    print(f"wrote {target}")
