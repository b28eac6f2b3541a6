"""A request that the engine is answering, under the time limits of the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from tiercel.serve.errors import BUSY, APIError
from tiercel.serve.settings import Settings

if TYPE_CHECKING:
    from tiercel.engine.loop import Stream
    from tiercel.engine.request import Update


class RunningRequest:
    """The updates of a stream, ended by a time limit or from outside (`expire`, when the server shuts down)."""

    def __init__(self, stream: Stream, settings: Settings) -> None:
        self.stream, self.settings = stream, settings
        self.deadline = time.monotonic() + settings.total_timeout
        self.reason: APIError | None = None
        self._timeout: asyncio.Timeout | None = None

    def expire(self, reason: APIError) -> None:
        """End it at once; `updates` raises the reason."""
        self.reason = reason
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(asyncio.get_running_loop().time())

    async def updates(self) -> AsyncIterator[Update]:
        """Updates as they come.  Raises APIError 503 or 504 when a limit passes."""
        first, queue_deadline = True, time.monotonic() + self.settings.queue_timeout
        while True:
            limit = self.settings.first_token_timeout if first else self.settings.token_timeout
            queued = first and self.stream.request.started is None
            if queued:
                limit = min(limit, max(queue_deadline - time.monotonic(), 0.0))
            limit = min(limit, max(self.deadline - time.monotonic(), 0.0))
            if self.reason is not None:
                raise self.reason
            try:
                async with asyncio.timeout(limit) as self._timeout:
                    update = await anext(self.stream)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if self.reason is not None:
                    raise self.reason from None
                if queued and self.stream.request.started is not None:
                    continue  # it was started meanwhile
                if queued and time.monotonic() >= queue_deadline:
                    raise APIError(503, BUSY, code="busy", retry=5) from None
                over = time.monotonic() >= self.deadline
                what = "the answer took too long" if over else "no token came" + (" yet" if first else "")
                raise APIError(504, f"{what}; it was ended after {limit:g} s", code="timeout") from None
            finally:
                self._timeout = None
            first = False
            yield update
