"""`tiercel serve`: the application and its server.

    SecurityMiddleware (who may call) → RequestMiddleware (drain, request ids, errors, metrics) → routes

On SIGTERM the server stops listening, refuses new requests, lets running ones continue for `drain` seconds, and ends
the rest with an error event; a second signal ends them at once.  The process then exits without joining its threads:
one may be in the middle of a download or of loading a model.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import secrets
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tiercel.errors import RequestError, TiercelError
from tiercel.hub import local_models
from tiercel.runtime.atomic import remove_leftovers
from tiercel.runtime.exit import hard_exit
from tiercel.serve.connection import connection
from tiercel.serve.errors import APIError, error_response, log, response_to
from tiercel.serve.routes import routes
from tiercel.serve.security import SecurityMiddleware
from tiercel.serve.service import Service
from tiercel.serve.settings import Settings

CLOSE_SECONDS = 5.0  # for the engines to end their step and stop, after the drain
SWITCH_SECONDS = 0.0002  # 5 ms by default: as long as a response waits for the engine's thread at every turn


class RequestMiddleware:
    """ASGI middleware: every request gets an id, every error a body, every response is counted."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        id, started = secrets.token_hex(8), False
        cycle = getattr(send, "__self__", None)  # uvicorn's: a stalled connection is dropped through it
        if transport := getattr(cycle, "transport", None):
            scope.setdefault("extensions", {})["tiercel.abort"] = transport.abort

        async def out(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
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
            if not started:
                await error_response(scope["path"], error.status_code, error.detail)(scope, receive, out)
        except Exception as error:
            if started:
                log.error("an error in the middle of a response", exc_info=error)
                return
            await response_to(error, scope["path"])(scope, receive, out)


def make_app(service: Service) -> ASGIApp:
    """The ASGI application."""

    @contextlib.asynccontextmanager
    async def life(app: Starlette) -> Any:
        await asyncio.to_thread(remove_leftovers, local_models.home() / "blobs")
        service.models.start()
        yield
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await service.models.close()
        except TimeoutError:
            log.warning("an engine did not stop within %g s", CLOSE_SECONDS)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        texts = {404: "there is no such route", 405: "this method is not allowed here"}
        response = error_response(
            request.scope["path"], error.status_code, texts.get(error.status_code, error.detail),
            code={404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code),
        )  # fmt: skip
        if allow := (error.headers or {}).get("Allow"):
            response.headers["allow"] = allow
        return response

    async def refused(request: Request, error: Exception) -> Response:
        return response_to(error, request.scope["path"])

    handlers: Any = {HTTPException: http_error, TiercelError: refused, Exception: refused}
    app = Starlette(routes=routes(), lifespan=life, exception_handlers=handlers)
    app.state.service, app.state.settings = service, service.settings
    app.router.redirect_slashes = False
    return SecurityMiddleware(RequestMiddleware(app, service), service.settings)


class Server(uvicorn.Server):
    """uvicorn with a drain."""

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

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals start the drain, and the process ends with code 0 after it."""
        loop = asyncio.get_running_loop()
        caught = (signal.SIGINT, signal.SIGTERM)
        try:
            for number in caught:
                loop.add_signal_handler(number, self.shut_down)
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
        except SystemExit:  # what uvicorn raises where the port is taken
            self.should_exit = True
            return
        host, port = self.service.settings.host, self.servers[0].sockets[0].getsockname()[1]
        where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        log.info("listening on %s (chat there; OpenAI's API at %s/v1, Ollama's at %s/api)", where, where, where)

    def shut_down(self) -> None:
        """Start the drain; the second time, end it."""
        if self.should_exit:
            self.force_exit = True
            self.service.expire()
            return
        self.service.draining = self.should_exit = True
        loop = asyncio.get_running_loop()
        loop.call_later(self.service.settings.drain, self.service.expire)


def run(settings: Settings, names: list[str], adapters: dict[str, Path] | None = None) -> None:
    """Serve until a signal comes.

    Args:
        names: models to load first; a file is served under its own name.
        adapters: name → folder; each is served as `MODEL:NAME` beside the first model.
    Raises:
        RequestError, TiercelError: the address cannot be listened on.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    sys.setswitchinterval(SWITCH_SECONDS)
    service = Service(settings)
    asyncio.run(_run(service, names, adapters or {}))


async def _run(service: Service, names: list[str], adapters: dict[str, Path]) -> None:
    if adapters and not names:
        raise RequestError("--adapter needs a model to put it on: tiercel serve MODEL --adapter NAME=FOLDER")
    for name, folder in adapters.items():
        base = served_name(service, names[0])
        adapted = f"{base.split(':')[0]}:{name}"
        service.models.adapters[adapted] = base, folder
        (await service.models.lease(adapted)).release()
    for name in names:
        lease = await service.models.lease(served_name(service, name))
        service.models.pinned.add(lease.loaded.name)
        lease.release()
    server = Server(service)
    gc.collect()
    gc.freeze()  # what is here now stays: a collection that looks through it stops every thread for 0.1 s
    await server.serve()
    if not server.started:
        raise TiercelError(
            f"{service.settings.host}:{service.settings.port} cannot be listened on: another server is there, or the "
            "address is not this machine's; choose another with --port"
        )
    hard_exit()  # asyncio would wait for the threads of `to_thread`, and taking torch to pieces takes seconds


def served_name(service: Service, name: str) -> str:
    """The name under which a model of the command line is served."""
    import re

    from tiercel.hub import local_models

    path = Path(name).expanduser()
    if not (local_models.is_path(name) or (path.exists() and local_models.short_name(name) is None)):
        return name
    resolved = local_models.resolve(name)
    short = re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower() if path.is_file() else path.resolve().name.lower())
    short = short.strip("-._")[:64] or "model"
    service.models.paths[short] = resolved
    return short
