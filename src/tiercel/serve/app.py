"""`tiercel serve`: the routes, and a life from the first listen to the last answer.

    Guard (who may call) → Desk (drain, request ids, errors, counting) → routes

On SIGTERM the server stops listening, refuses what still comes, lets running answers go on for `drain` seconds, and
ends the rest with an error event of their own; a second signal ends at once.  The process then leaves without waiting
for anybody: a thread may be in the middle of a download or of loading a model.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tiercel.errors import RequestError, TiercelError
from tiercel.runtime.exit import leave
from tiercel.serve import library, ollama, openai, openapi, page, responses
from tiercel.serve.connection import connection
from tiercel.serve.errors import BUSY, APIError, log, plain, reply, reply_to
from tiercel.serve.generation import Running
from tiercel.serve.metrics import Metrics
from tiercel.serve.models import Lease, Models, Opener, open_model
from tiercel.serve.security import SecurityMiddleware
from tiercel.serve.settings import Settings

CLOSING = 5.0  # seconds for the engines to end their step and stop, after the drain


class Service:
    """What the routes share."""

    def __init__(self, settings: Settings, opener: Opener = open_model) -> None:
        self.settings = settings
        self.models = Models(settings, opener)
        self.metrics = Metrics()
        self.running: set[Running] = set()
        self.admitted = 0
        self.draining = False  # nobody new is let in
        self.over: APIError | None = None  # and why nobody may go on

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """A place in the queue; raises Refusal at once when there is none."""
        if self.admitted >= self.settings.slots + self.settings.queue:
            raise APIError(503, BUSY, code="busy", retry=1)
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    @contextlib.asynccontextmanager
    async def lease(self, name: str, keep_alive: float | None = None) -> AsyncIterator[Lease]:
        """A place in the queue and a model, as long as one is inside.  Raises what `admit` and `Models.lease` do."""
        with self.admit():
            lease = await self.models.lease(name)
            try:
                yield lease
            finally:
                lease.release(keep_alive)

    def expire(self) -> None:
        """End all answers, and those whose prompt is still being made ready when they begin."""
        self.over = APIError(503, "the server is going down; the answer was cut short", code="shutdown")
        for running in list(self.running):
            running.expire(self.over)


class RequestMiddleware:
    """ASGI middleware: every request gets an id, every error a body, every response is counted."""

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        id, begun = secrets.token_hex(8), False
        cycle = getattr(send, "__self__", None)  # uvicorn's: a stalled connection is dropped through it
        if transport := getattr(cycle, "transport", None):
            scope.setdefault("extensions", {})["tiercel.abort"] = transport.abort

        async def out(message: Any) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                route = getattr(scope.get("route"), "path", "other")
                self.service.metrics.requests.labels(route, str(message["status"])).inc()
                message["headers"] = [*message.get("headers", []), (b"x-request-id", id.encode())]
            await send(message)

        try:
            if self.service.draining and scope["path"] != "/health":
                raise APIError(503, "the server is going down", retry=5)
            await self.app(scope, receive, out)
        except (ClientDisconnect, ConnectionError):
            return
        except HTTPException as error:
            if not begun:
                await reply(scope["path"], error.status_code, error.detail)(scope, receive, out)
        except Exception as error:
            if begun:
                log.error("an error in the middle of a response", exc_info=error)
                return
            await reply_to(error, scope["path"])(scope, receive, out)


async def health(request: Request) -> Response:
    service: Service = request.app.state.service
    status = "draining" if service.draining else "ok"
    return Response(
        plain({"status": status, "server": "tiercel"}), 503 if service.draining else 200, media_type="application/json"
    )


async def metrics(request: Request) -> Response:
    service: Service = request.app.state.service
    return Response(service.metrics.text(service), media_type="text/plain; version=0.0.4; charset=utf-8")


def routes() -> list[Route]:
    """Path, function, methods: one line each.  `openapi.py` describes the same table."""
    table: list[tuple[str, Any, list[str]]] = [
        ("/", page.root, ["GET", "HEAD"]),
        ("/page/{name}", page.file, ["GET"]),
        ("/health", health, ["GET"]),
        ("/metrics", metrics, ["GET"]),
        ("/openapi.json", openapi.document, ["GET"]),
        ("/api/version", ollama.version, ["GET", "HEAD"]),
        ("/api/tags", ollama.tags, ["GET", "HEAD"]),
        ("/api/ps", ollama.ps, ["GET"]),
        ("/api/generate", ollama.generate, ["POST"]),
        ("/api/chat", ollama.chat, ["POST"]),
        ("/api/embed", ollama.embed_, ["POST"]),
        ("/api/embeddings", ollama.embeddings, ["POST"]),
        ("/api/show", library.show, ["POST"]),
        ("/api/pull", library.pull, ["POST"]),
        ("/api/push", library.push, ["POST"]),
        ("/api/create", library.create, ["POST"]),
        ("/api/copy", library.copy, ["POST"]),
        ("/api/delete", library.delete, ["DELETE"]),
        ("/api/blobs/{digest}", library.blob, ["HEAD", "POST"]),
        ("/v1/chat/completions", openai.chat_completions, ["POST"]),
        ("/v1/completions", openai.completions, ["POST"]),
        ("/v1/embeddings", openai.embeddings, ["POST"]),
        ("/v1/responses", responses.responses, ["POST"]),
        ("/v1/models", openai.models, ["GET"]),
        ("/v1/models/{model:path}", openai.model, ["GET"]),
    ]
    return [Route(path, function, methods=methods) for path, function, methods in table]


def make_app(service: Service) -> Any:
    """The ASGI application."""

    @contextlib.asynccontextmanager
    async def life(app: Starlette) -> Any:
        service.models.start()
        yield
        try:
            async with asyncio.timeout(CLOSING):
                await service.models.close()
        except TimeoutError:
            log.warning("an engine did not stop within %g s", CLOSING)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        words = {404: "there is no such route", 405: "this method is not allowed here"}
        response = reply(request.scope["path"], error.status_code, words.get(error.status_code, error.detail))
        if allow := (error.headers or {}).get("Allow"):
            response.headers["allow"] = allow
        return response

    async def refused(request: Request, error: Exception) -> Response:
        return reply_to(error, request.scope["path"])

    handlers: Any = {HTTPException: http_error, TiercelError: refused, Exception: refused}
    app = Starlette(routes=routes(), lifespan=life, exception_handlers=handlers)
    app.state.service, app.state.settings = service, service.settings
    app.router.redirect_slashes = False
    return SecurityMiddleware(RequestMiddleware(app, service), service.settings)


class Server(uvicorn.Server):
    """uvicorn with our way of going down."""

    def __init__(self, service: Service, app: Any = None) -> None:
        settings = service.settings
        super().__init__(uvicorn.Config(
            app or make_app(service), host=settings.host, port=settings.port, log_level="warning", access_log=False,
            http=connection(settings.head_timeout), ws="none", lifespan="on", server_header=False, date_header=True,
            proxy_headers=False,
            h11_max_incomplete_event_size=settings.header_bytes + 4096, limit_concurrency=settings.connections,
            timeout_graceful_shutdown=int(settings.drain) + 2, timeout_keep_alive=60,
        ))  # fmt: skip
        self.service = service
        self._drain: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals start the drain, and the process ends with code 0 after it."""
        loop = asyncio.get_running_loop()
        caught = (signal.SIGINT, signal.SIGTERM)
        try:
            for number in caught:
                loop.add_signal_handler(number, self.go_down)
        except (NotImplementedError, RuntimeError, ValueError):  # another system, or a thread of a test
            yield
            return
        try:
            yield
        finally:
            for number in caught:
                loop.remove_signal_handler(number)

    async def startup(self, sockets: Any = None) -> None:
        try:
            await super().startup(sockets)
        except SystemExit:  # uvicorn's way to say that the port is taken
            self.should_exit = True
            return
        host, port = self.service.settings.host, self.servers[0].sockets[0].getsockname()[1]
        where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        log.info("listening on %s (chat there; OpenAI's API at %s/v1, Ollama's at %s/api)", where, where, where)

    def go_down(self) -> None:
        if self.should_exit:
            self.force_exit = True
            self.service.expire()
            return
        self.service.draining = self.should_exit = True
        loop = asyncio.get_running_loop()
        loop.call_later(self.service.settings.drain, self.service.expire)


def run(settings: Settings, names: list[str], adapters: dict[str, Path] | None = None) -> None:
    """Serve until a signal comes.  names: models to load first; files of one's own get the name of their file.
    adapters: name → folder; the first model wears each under its own name, a colon and that name."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    sys.setswitchinterval(0.0002)  # 5 ms by default: so long an answer waits for the engine's thread at every turn
    service = Service(settings)
    asyncio.run(_run(service, names, adapters or {}))


async def _run(service: Service, names: list[str], adapters: dict[str, Path]) -> None:
    if adapters and not names:
        raise RequestError("--adapter needs a model to put it on: tiercel serve MODEL --adapter NAME=FOLDER")
    for name, folder in adapters.items():
        base = served_name(service, names[0])
        wearing = f"{base.split(':')[0]}:{name}"
        service.models.adapters[wearing] = base, folder
        (await service.models.lease(wearing)).release()
    for name in names:
        lease = await service.models.lease(served_name(service, name))
        service.models.pinned.add(lease.loaded.name)
        lease.release()
    server = Server(service)
    await server.serve()
    if not server.started:
        raise TiercelError(
            f"{service.settings.host}:{service.settings.port} cannot be listened on: another server is there, or the "
            "address is not this machine's; choose another with --port"
        )
    leave()  # asyncio would wait for the threads of `to_thread`, and taking torch to pieces takes seconds


def served_name(service: Service, name: str) -> str:
    """The name under which a model of the command line is asked for."""
    import re

    from tiercel.hub import hub

    path = Path(name).expanduser()
    if not (hub.is_path(name) or (path.exists() and hub.short_name(name) is None)):
        return name
    resolved = hub.resolve(name)
    short = re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower() if path.is_file() else path.resolve().name.lower())
    short = short.strip("-._")[:64] or "model"
    service.models.paths[short] = resolved
    return short
