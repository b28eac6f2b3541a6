"""Bytes to a client: whole answers, lines of JSON, server-sent events.

Each response watches its client: when it hangs up, what was being made is cancelled at once (queued, reading the
prompt, or in the middle of the answer).  A reader that takes nothing for `stall_timeout` is cut off.  An error
before the first byte is a response of its own; after it, it is the stream's last event.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tiercel.serve.errors import body, log, message_of, plain, reply_to, status_of

Source = AsyncGenerator[Any, None]


class Reply(Response):
    """Runs `work` while watching the client."""

    def __init__(self, request: Request) -> None:
        self.request, self.status_code = request, 200
        self.settings = request.app.state.settings
        self.background = None
        self.started = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self._send, self._scope, self._receive = send, scope, receive
        work = asyncio.create_task(self._work())
        watch = asyncio.create_task(_hang_up(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)
        if not work.cancelled() and (error := work.exception()):
            if isinstance(error, TimeoutError):  # the reader stalled: what is buffered for it is dropped
                scope.get("extensions", {}).get("tiercel.abort", lambda: None)()
            elif not isinstance(error, OSError):
                raise error

    async def _work(self) -> None:
        raise NotImplementedError

    async def fail(self, error: Exception) -> None:
        """Before the first byte."""
        self.request.state.status = status_of(error)
        await reply_to(error, self._scope["path"])(self._scope, self._receive, self._send)

    async def start(self, media: str) -> None:
        headers = [(b"content-type", media.encode()), (b"cache-control", b"no-store")]
        if ignored := getattr(self.request.state, "ignored", None):
            headers.append((b"x-tiercel-ignored", ", ".join(ignored).encode()))
        self.started = True
        await self._put({"type": "http.response.start", "status": self.status_code, "headers": headers})

    async def write(self, data: bytes, more: bool = True) -> None:
        await self._put({"type": "http.response.body", "body": data, "more_body": more})

    async def _put(self, message: dict[str, Any]) -> None:
        async with asyncio.timeout(self.settings.stall_timeout):
            await self._send(message)


class JSONResponse(Reply):
    """One JSON object, made by `make`."""

    def __init__(self, request: Request, make: Callable[[], Awaitable[Any]]) -> None:
        super().__init__(request)
        self.make = make

    async def _work(self) -> None:
        try:
            value = plain(await self.make())
        except Exception as error:
            await self.fail(error)
            return
        await self.start("application/json")
        await self.write(value, more=False)


class NDJSONResponse(Reply):
    """A stream of JSON objects, one a line (Ollama)."""

    media = "application/x-ndjson"

    def __init__(self, request: Request, events: Source) -> None:
        super().__init__(request)
        self.events = events

    def frame(self, event: Any) -> bytes:
        return plain(event) + b"\n"

    def last_words(self, error: Exception) -> bytes:
        return self.frame(body(False, status_of(error), message_of(error)))

    ping = b""

    async def _work(self) -> None:
        try:
            await self._stream()
        finally:
            await self.events.aclose()

    async def _stream(self) -> None:
        try:
            event = await anext(self.events)
        except StopAsyncIteration:
            log.error("a stream ended before it began")
            return
        except Exception as error:
            await self.fail(error)
            return
        await self.start(self.media)
        while True:
            await self.write(self.frame(event))
            try:
                event = await self._next()
            except StopAsyncIteration:
                break
            except Exception as error:
                await self.write(self.last_words(error))
                break
        await self.write(b"", more=False)

    async def _next(self) -> Any:
        if not self.ping:
            return await anext(self.events)
        task = asyncio.ensure_future(anext(self.events))
        try:
            while not (await asyncio.wait({task}, timeout=self.settings.ping))[0]:
                await self.write(self.ping)
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(BaseException):
                    await task


class EventSourceResponse(NDJSONResponse):
    """Server-sent events, `data: {…}` (OpenAI); ends with [DONE]."""

    media = "text/event-stream"
    ping = b": ping\n\n"

    def frame(self, event: Any) -> bytes:
        return b"data: " + (event.encode() if isinstance(event, str) else plain(event)) + b"\n\n"

    def last_words(self, error: Exception) -> bytes:
        return self.frame(body(True, status_of(error), message_of(error))) + b"data: [DONE]\n\n"


class NamedEvents(EventSourceResponse):
    """Server-sent events with their type before them (OpenAI's Responses)."""

    def frame(self, event: Any) -> bytes:
        return b"event: " + event["type"].encode() + b"\ndata: " + plain(event) + b"\n\n"

    def last_words(self, error: Exception) -> bytes:
        return self.frame({"type": "error", "code": str(status_of(error)), "message": message_of(error),
                           "param": None, "sequence_number": 1 << 30})  # fmt: skip


async def _hang_up(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
