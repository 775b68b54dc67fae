"""What a server is started with."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from simpletuner.server.workspace import Workspace

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
STATIC_DIR = Path(__file__).with_name("static")
TRAIN_COMMAND = (sys.executable, "-m", "simpletuner", "train")


@dataclass(frozen=True)
class ServerSettings:
    """token: what a client has to show; None lets everybody in who reaches the port, so only on loopback.

    names: by which a proxy reaches this server. max_json_bytes, max_upload_bytes: of one request.
    max_sockets: live connections, of all pages together.
    trainer: the first words of a training's command line. stop_grace_s: how long a training that was asked to
    stop may take to save. static: the built pages.
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
    stop_grace_s: float = 120.0
    static_dir: Path = STATIC_DIR

    @property
    def is_public(self) -> bool:
        """Whether others than programs of this machine reach the port."""
        return self.host not in LOOPBACK_HOSTS or bool(self.allowed_hosts)
