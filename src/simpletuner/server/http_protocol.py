"""The HTTP connection of the server: uvicorn's, with a deadline for headers and a client limit.

uvicorn has no setting for either: its keep-alive timeout only runs between two requests, and its
limit of connections counts all clients together, so that one client that sends half a header on
each of them keeps everyone else out. An ASGI middleware sees a request only after its headers are
complete, which is too late; hence this subclass of the connection itself. A body has its deadline
in security_middleware.py.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_TIMEOUT_S = 10.0
MAX_CONNECTIONS_PER_CLIENT = 128


class ConnectionCounter:
    """Open connections by client address."""

    def __init__(self, limit: int = MAX_CONNECTIONS_PER_CLIENT) -> None:
        self.limit = limit
        self.by_address: Counter[str] = Counter()

    def is_full(self, address: str) -> bool:
        return self.by_address[address] > self.limit


def make_protocol(
    counter: ConnectionCounter, header_timeout_s: float = HEADER_TIMEOUT_S
) -> type[asyncio.Protocol]:
    """Return the class of the connections of one server, for uvicorn.Config(http=...)."""

    class BoundedProtocol(H11Protocol):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self._header_deadline: asyncio.TimerHandle | None = None
            self._counted = ""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._counted = self.client[0] if self.client else "local"
            counter.by_address[self._counted] += 1
            if counter.is_full(self._counted):
                transport.abort()
            self._update_deadline()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_counting()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._update_deadline()

        def handle_websocket_upgrade(self, event: h11.Request) -> None:
            # The connection gets another protocol now; live connections have a limit of their own.
            self._stop_counting()
            super().handle_websocket_upgrade(event)

        def _update_deadline(self) -> None:
            """Run the timer from the first byte of a header, or the connection, to its last."""
            waits = self.conn.their_state is h11.IDLE and bool(self._counted)
            if waits and self._header_deadline is None:
                self._header_deadline = self.loop.call_later(header_timeout_s, self._expire)
            elif not waits and self._header_deadline is not None:
                self._header_deadline.cancel()
                self._header_deadline = None

        def _expire(self) -> None:
            if not self.transport.is_closing():
                self.transport.abort()

        def _stop_counting(self) -> None:
            if self._header_deadline is not None:
                self._header_deadline.cancel()
                self._header_deadline = None
            if self._counted:
                counter.by_address[self._counted] -= 1
                counter.by_address += Counter()  # removes addresses without connections
                self._counted = ""

    return BoundedProtocol
