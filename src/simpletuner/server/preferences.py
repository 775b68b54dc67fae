"""Preferences of a workspace: defaults of new runs, and a token of the model hub.

The token is write-only: it is given to the jobs through their environment and never sent back.
"""

from __future__ import annotations

import json
import os
from typing import Any

from simpletuner.atomic_io import write_atomically
from simpletuner.config.option_catalog import all_options
from simpletuner.server.api_errors import ApiError, abort
from simpletuner.server.config_validation import validate_options
from simpletuner.server.file_reader import read_json_object
from simpletuner.server.schemas.preferences import ServerPreferences
from simpletuner.server.workspace import Workspace

TOKEN_VARIABLE = "HF_TOKEN"  # read by huggingface_hub
MAX_TOKEN_CHARS = 400
# Offered on the page of settings, in this order.
DEFAULT_OPTIONS = (
    "learning_rate",
    "lora_rank",
    "max_train_steps",
    "train_batch_size",
    "resolution",
    "base_model_precision",
    "modelspec_author",
    "report_to",
)


class Preferences:
    """The files preferences.json and hub-token in the server's folder."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._path = workspace.server_dir / "preferences.json"
        self._token_path = workspace.server_dir / "hub-token"

    def read(self) -> ServerPreferences:
        """Return the preferences, without the token."""
        defaults = (read_json_object(self._path) or {}).get("defaults")
        return ServerPreferences(
            has_hub_token=bool(self.hub_token()),
            defaults=defaults if isinstance(defaults, dict) else {},
            default_options=list(DEFAULT_OPTIONS),
        )

    def write_defaults(self, defaults: dict[str, Any]) -> ServerPreferences:
        """Replace the defaults of new runs. Raises ApiError 422 for unknown options or values."""
        for name in defaults:
            if name not in all_options():
                abort(422, "unknown option", name)
        problems, result = validate_options(self._workspace, defaults)
        if problems:
            raise ApiError(422, problems)
        assert result.loaded is not None  # there would be problems otherwise
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, json.dumps({"defaults": defaults}, indent=1) + "\n")
        return self.read()

    def hub_token(self) -> str:
        """Return the stored token, "" if there is none."""
        try:
            return self._token_path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return ""

    def write_hub_token(self, token: str) -> ServerPreferences:
        """Store a token in a file that only its owner can read; "" removes it."""
        if not token.isascii() or not token.isprintable() or len(token) > MAX_TOKEN_CHARS:
            abort(422, "a token is one line of ASCII characters", "token")
        if not token:
            self._token_path.unlink(missing_ok=True)
            return self.read()
        self._token_path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._token_path.with_name(".hub-token.new")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(token + "\n")
        os.replace(temporary, self._token_path)
        return self.read()

    def job_variables(self) -> dict[str, str]:
        """Return the environment variables that jobs get."""
        token = self.hub_token()
        return {TOKEN_VARIABLE: token} if token else {}
