"""uvicorn's HTTP connection, with limits on how long the head of a request may take, and on chunks of few bytes.

uvicorn alone waits for ever for a client that connects and sends nothing, or one header a minute; and each chunk takes
tens of microseconds of the event loop, whatever is in it: 8 MiB in chunks of a byte would take minutes.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

TIMEOUT_RESPONSE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
MAX_SMALL_CHUNKS = 1000
SMALL_CHUNK_BYTES = 64


class _Parser(h11.Connection):
    """h11's, which refuses a body of more than MAX_SMALL_CHUNKS chunks that have few bytes on average."""

    chunks = chunk_bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunks = self.chunk_bytes = 0
        elif isinstance(event, h11.Data):
            self.chunks += event.chunk_start
            self.chunk_bytes += len(event.data)
            if self.chunks > max(MAX_SMALL_CHUNKS, self.chunk_bytes // SMALL_CHUNK_BYTES):
                raise h11.RemoteProtocolError("too many chunks of too few bytes")
        return event


def connection(seconds: float) -> type[H11Protocol]:
    """The protocol class for uvicorn's `http`."""

    class Connection(H11Protocol):
        timer: asyncio.TimerHandle | None = None

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.conn = _Parser(h11.SERVER, self.config.h11_max_incomplete_event_size or 16 << 10)

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.timer = self.loop.call_later(seconds, self.on_timeout)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:  # the head is complete
                self.stop_timer()
            elif self.timer is None and data:  # the head of the next request has begun
                self.timer = self.loop.call_later(seconds, self.on_timeout)

        def connection_lost(self, exc: Exception | None) -> None:
            self.stop_timer()
            super().connection_lost(exc)

        def stop_timer(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

        def on_timeout(self) -> None:
            self.timer = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.write(TIMEOUT_RESPONSE)
                self.transport.close()

    return Connection
