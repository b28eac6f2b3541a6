"""Responses that end their work when the client hangs up: one JSON object, lines of JSON, server-sent events.

What is being made is cancelled at once (queued, in prefill, or in the middle of the answer).  A reader that takes
nothing for `stall_timeout` is cut off.  An error before the first byte is a response of its own; after it, it is the
stream's last event.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from tiercel.serve.errors import error_body, log, message_of, response_to, status_of, to_json
from tiercel.serve.settings import Settings

Json = dict[str, Any]
Events = AsyncGenerator[Json | str, None]


class WatchedResponse(Response):
    """Runs `_work` while watching the client."""

    def __init__(self, request: Request) -> None:
        self.request, self.status_code = request, 200
        self.settings: Settings = request.app.state.settings
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send, self._scope, self._receive = send, scope, receive
        work = asyncio.create_task(self._work())
        watch = asyncio.create_task(_disconnected(receive))
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

    async def _fail(self, error: Exception) -> None:
        """Answer with an error; before the first byte."""
        await response_to(error, self._scope["path"])(self._scope, self._receive, self._send)

    async def _start(self, media_type: str) -> None:
        headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-store")]
        if ignored := getattr(self.request.state, "ignored", None):
            headers.append((b"x-tiercel-ignored", ", ".join(ignored).encode()))
        await self._put({"type": "http.response.start", "status": self.status_code, "headers": headers})

    async def _write(self, data: bytes, more: bool = True) -> None:
        await self._put({"type": "http.response.body", "body": data, "more_body": more})

    async def _put(self, message: Message) -> None:
        async with asyncio.timeout(self.settings.stall_timeout):
            await self._send(message)


class JSONResponse(WatchedResponse):
    """One JSON object, made by `make`."""

    def __init__(self, request: Request, make: Callable[[], Awaitable[Json]]) -> None:
        super().__init__(request)
        self.make = make

    async def _work(self) -> None:
        try:
            data = to_json(await self.make())
        except Exception as error:
            await self._fail(error)
            return
        await self._start("application/json")
        await self._write(data, more=False)


class NDJSONResponse(WatchedResponse):
    """A stream of JSON objects, one a line (Ollama)."""

    media_type = "application/x-ndjson"
    ping = b""  # what is sent while nothing else comes

    def __init__(self, request: Request, events: Events | AsyncGenerator[Json, None]) -> None:
        super().__init__(request)
        self.events = events

    def frame(self, event: Json | str) -> bytes:
        """The bytes of an event."""
        return to_json(event) + b"\n"

    def error_frame(self, error: Exception) -> bytes:
        """The bytes of an error that ends the stream."""
        return self.frame(error_body(self._scope["path"], status_of(error), message_of(error)))

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
            await self._fail(error)
            return
        await self._start(self.media_type)
        while True:
            await self._write(self.frame(event))
            try:
                event = await self._next()
            except StopAsyncIteration:
                break
            except Exception as error:
                await self._write(self.error_frame(error))
                break
        await self._write(b"", more=False)

    async def _next(self) -> Json | str:
        if not self.ping:
            return await anext(self.events)
        task = asyncio.ensure_future(anext(self.events))
        try:
            while not (await asyncio.wait({task}, timeout=self.settings.ping))[0]:
                await self._write(self.ping)
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(BaseException):
                    await task


class EventSourceResponse(NDJSONResponse):
    """Server-sent events, `data: {…}`; a text is sent as it is."""

    media_type = "text/event-stream"
    ping = b": ping\n\n"

    def frame(self, event: Json | str) -> bytes:
        return b"data: " + (event.encode() if isinstance(event, str) else to_json(event)) + b"\n\n"

    def error_frame(self, error: Exception) -> bytes:
        return super().error_frame(error) + b"data: [DONE]\n\n"


class NamedEventSourceResponse(EventSourceResponse):
    """Server-sent events with their type before them; the last one is the end."""

    def error_frame(self, error: Exception) -> bytes:
        return NDJSONResponse.error_frame(self, error)

    def frame(self, event: Json | str) -> bytes:
        assert isinstance(event, dict)
        return b"event: " + str(event["type"]).encode() + b"\ndata: " + to_json(event) + b"\n\n"


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
