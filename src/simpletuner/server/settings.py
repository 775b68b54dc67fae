"""The settings of a server."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from simpletuner.server.workspace import Workspace

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
STATIC_DIR = Path(__file__).with_name("static")
TOOL_COMMAND = (sys.executable, "-m", "simpletuner")
TRAIN_COMMAND = (sys.executable, "-m", "simpletuner", "train")


@dataclass(frozen=True)
class ServerSettings:
    """The settings of a server, fixed when it starts.

    token: the secret that clients must present; None admits every client that reaches the port,
    which is allowed on loopback only. allowed_hosts: further host names under which a proxy reaches
    this server. max_json_bytes, max_upload_bytes: limits of one request body. max_sockets: limit of
    live connections of all pages together. train_command: the start of a training's command line;
    tool_command: that of other commands.
    stop_grace_s: seconds that a training gets to save its checkpoint when it is stopped.
    static_dir: the built pages. certfile, keyfile: PEM files for HTTPS, None for HTTP.
    """

    workspace: Workspace
    host: str = "127.0.0.1"
    port: int = 8001
    token: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    max_json_bytes: int = 1 << 20
    max_upload_bytes: int = 2 << 30
    max_sockets: int = 64
    train_command: tuple[str, ...] = TRAIN_COMMAND
    tool_command: tuple[str, ...] = TOOL_COMMAND
    stop_grace_s: float = 120.0
    static_dir: Path = STATIC_DIR
    certfile: Path | None = None
    keyfile: Path | None = None

    @property
    def is_public(self) -> bool:
        """True if other machines can reach the server."""
        return self.host not in LOOPBACK_HOSTS or bool(self.allowed_hosts)
