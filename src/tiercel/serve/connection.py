"""uvicorn's HTTP connection, with a limit on how long the head of a request may take.

uvicorn waits for ever for who connects and says nothing, and for who sends a header every minute.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def connection(seconds: float) -> type[H11Protocol]:
    """The protocol class for uvicorn's `http`."""

    class Connection(H11Protocol):
        clock: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.clock = self.loop.call_later(seconds, self.late)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:  # the head is complete
                self.stop_clock()
            elif self.clock is None and data:  # the head of the next request has begun
                self.clock = self.loop.call_later(seconds, self.late)

        def connection_lost(self, exc: Exception | None) -> None:
            self.stop_clock()
            super().connection_lost(exc)

        def stop_clock(self) -> None:
            if self.clock is not None:
                self.clock.cancel()
                self.clock = None

        def late(self) -> None:
            self.clock = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.write(LATE)
                self.transport.close()

    return Connection
