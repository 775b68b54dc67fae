"""What a server is started with."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from simpletuner.server.place import Place

LOOPBACK = ("127.0.0.1", "localhost", "::1")
STATIC = Path(__file__).with_name("static")
TRAINER = (sys.executable, "-m", "simpletuner", "train")


@dataclass(frozen=True)
class Settings:
    """token: what a client has to show; None lets everybody in who reaches the port, so only on loopback.

    names: by which a proxy reaches this server. max_json_bytes, max_upload_bytes: of one request.
    max_sockets: live connections, of all pages together.
    trainer: the first words of a training's command line. stop_grace_s: how long a training that was asked to
    stop may take to save. static: the built pages.
    """

    place: Place
    host: str = "127.0.0.1"
    port: int = 8001
    token: str | None = None
    names: tuple[str, ...] = ()
    max_json_bytes: int = 1 << 20
    max_upload_bytes: int = 2 << 30
    max_sockets: int = 64
    trainer: tuple[str, ...] = TRAINER
    stop_grace_s: float = 120.0
    static: Path = STATIC

    @property
    def open(self) -> bool:
        """Whether others than programs of this machine reach the port."""
        return self.host not in LOOPBACK or bool(self.names)
