"""The engine on a thread of its own, asyncio in front of it.

    engine = AsyncEngine(Engine(model))
    engine.start()
    async for update in engine.submit(ids, params): ...
    await engine.close(drain=30)

`submit` checks the prompt and returns at once.  Leaving the iterator early ends the request.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import torch

from tiercel.engine.core import Stats
from tiercel.engine.engine import Engine
from tiercel.engine.request import Request, Update
from tiercel.errors import Busy, TiercelError
from tiercel.sampling.params import SamplingParams

MAX_UNREAD_UPDATES = 1024  # of one request: about 256 KiB of a stream
FIRST_UPDATE_SECONDS = 0.003  # that the engine waits at most until a request's first update has reached the client
DELIVERY_ITERATIONS = 8  # event-loop iterations until an update reaches the client (queue, task, waiter)
IDLE_SECONDS = 0.2  # without work, after which the engine prefaults memory

log = logging.getLogger("tiercel.engine")


class Stream:
    """The updates of one request, as an async iterator that ends with the request."""

    def __init__(self, engine: AsyncEngine, request: Request) -> None:
        self.engine, self.request = engine, request
        self._updates: asyncio.Queue[Update] = asyncio.Queue()
        self._open = True
        self.begun = False  # an update was delivered
        self.unfinished = {sequence.index for sequence in request.sequences}  # their last update is to come

    async def __aiter__(self) -> AsyncIterator[Update]:
        try:
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    yield await self.__anext__()
        finally:
            self._abandon()

    async def __anext__(self) -> Update:
        if not self._open:
            raise StopAsyncIteration
        update = await self._updates.get()
        self._open = not update.last
        return update

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cancel()

    async def cancel(self) -> None:
        """End the request; its states are free when this returns.  Nothing happens where it has finished."""
        if not self.request.finished:
            await self.engine.end(self.request)
        self.engine.streams.pop(self.request, None)

    def _abandon(self) -> None:
        """End the request without waiting: the iterator is being closed, perhaps because its task was cancelled."""
        if not self.request.finished:
            self.engine.abandon(self.request)
        self.engine.streams.pop(self.request, None)


class AsyncEngine:
    """An `Engine` on a thread of its own, behind asyncio.

    All methods are for the thread of the event loop that called `start`.  streams: of the requests that run.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.streams: dict[Request, Stream] = {}
        self._abandoned: list[str] = []
        self._calls: deque[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = deque()
        self._awake, self._delivered = threading.Event(), threading.Event()
        self._closing = self._stopped = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(torch.get_num_threads(),), name="engine", daemon=True)
        self._thread.start()

    def submit(self, ids: Sequence[int], params: SamplingParams, **more: Any) -> Stream:
        """Queue a prompt; arguments and errors are those of `Engine.add`.  Raises Busy while the engine shuts down."""
        if self._closing or self._thread is None:
            raise Busy("the engine is shutting down", retry_after=5)
        request = self.engine.add(ids, params, **more)
        stream = self.streams[request] = Stream(self, request)
        self.wake()
        return stream

    async def close(self, drain: float = 0.0) -> None:
        """Refuse new requests, let running ones finish for `drain` seconds, end the rest, and stop the thread."""
        self._closing = True
        end = self._loop_time() + drain
        while self.streams and not self.engine.idle and self._loop_time() < end:
            await asyncio.sleep(0.02)
        for request in list(self.streams):
            if not request.finished:
                self.abandon(request)
        self._stopped = True
        self.wake()
        if self._thread is not None:
            await self._ended.wait()
            self._thread = None
            self._serve_calls()  # those that the thread did not see any more

    @property
    def stats(self) -> Stats:
        """See `Engine.stats`."""
        return self.engine.stats

    async def call(self, work: Callable[[], Any]) -> Any:
        """Return `work()`, run between two steps on the engine's thread, the only one that uses the network."""
        if self._thread is None:
            return work()
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._calls.append((work, done))
        self.wake()
        return await asyncio.wrap_future(done)

    def wake(self) -> None:
        """Let the thread look for work."""
        self._awake.set()

    def abandon(self, request: Request) -> None:
        """End a request before the next step, without waiting for that."""
        self._abandoned.append(request.id)
        self.wake()

    async def end(self, request: Request) -> None:
        """End a request, and wait until that is done; also when the waiting task is cancelled."""
        self.abandon(request)
        await self.call(self._end_abandoned)

    def _loop_time(self) -> float:
        return asyncio.get_running_loop().time()

    def _run(self, threads: int) -> None:
        """Step while there is something to do, else sleep: the engine's thread."""
        torch.set_num_threads(threads)  # OpenMP counts for each thread that calls it
        while True:
            self._awake.clear()
            self._end_abandoned()
            self._serve_calls()
            if not self.engine.idle:
                self._send(self._step())
            elif self._stopped:
                break
            else:
                self._sleep()
        self._call_soon(self._ended.set)

    def _sleep(self) -> None:
        """Wait for work.  After IDLE_SECONDS prefault memory for it: not at once, because a client that just got an
        answer may ask again, or need the cores."""
        if not self._awake.wait(IDLE_SECONDS):
            while self.engine.prefault() and not self._awake.is_set():
                pass
            self._awake.wait()

    def _end_abandoned(self) -> None:
        while self._abandoned:
            self.engine.abort(self._abandoned.pop())

    def _serve_calls(self) -> None:
        while self._calls:
            work, done = self._calls.popleft()
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(work())
                except BaseException as error:
                    done.set_exception(error)

    def _step(self) -> list[Update]:
        try:
            return self.engine.step()
        except Exception as error:  # a bug: clients must not wait for ever because of it
            log.exception("the engine failed")
            return self.engine.fail_all(TiercelError(f"the engine failed ({type(error).__name__}: {error}); try again"))

    def _send(self, updates: list[Update]) -> None:
        """Send updates to the event loop.  The next step waits for a request's first update to be delivered: both
        threads need Python's lock and the cores, and a client waits for that text."""
        self._delivered.clear()
        self._call_soon(self._deliver, updates)
        streams = (self.streams.get(update.request) for update in updates)
        if any(stream is not None and not stream.begun for stream in streams):
            self._delivered.wait(FIRST_UPDATE_SECONDS)

    def _call_soon(self, what: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is gone
            self._loop.call_soon_threadsafe(what, *arguments)

    def _deliver(self, updates: list[Update]) -> None:
        begins = False
        for update in updates:
            stream = self.streams.get(update.request)
            if stream is not None and stream._updates.qsize() >= MAX_UNREAD_UPDATES and update.finish_reason is None:
                self._cut_off(stream)
            elif stream is not None:
                stream._updates.put_nowait(update)
                begins, stream.begun = begins or not stream.begun, True
                (stream.unfinished.add if update.finish_reason is None else stream.unfinished.discard)(update.index)
                if update.last:
                    self.streams.pop(update.request, None)
        if begins:
            self._pass(DELIVERY_ITERATIONS)

    def _pass(self, iterations: int) -> None:
        """Let the tasks that a delivery woke run for some event-loop iterations before the engine goes on."""
        if iterations:
            self._loop.call_soon(self._pass, iterations - 1)
        else:
            self._delivered.set()

    def _cut_off(self, stream: Stream) -> None:
        """End a request whose reader is far behind, so that its unread updates are bounded."""
        request = stream.request
        log.warning("request %s: its reader is %d updates behind; the answer was ended", request.id, MAX_UNREAD_UPDATES)
        error = TiercelError("the answer was ended: it was not read as fast as it came")
        left = sorted(stream.unfinished) or [0]
        for index in left:
            cut = Update(request, index, [], [], None, "error", None, error, last=index == left[-1])
            stream._updates.put_nowait(cut)
        self.streams.pop(request, None)
        self.abandon(request)
