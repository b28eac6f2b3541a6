"""A server in this process, on a free port of the loopback address, with a tiny network behind it."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from tiercel.serve.app import Server
from tiercel.serve.service import Service
from tiercel.serve.settings import Settings

THINKS = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|bot|>' }}{{ m.content }}"
    "{% if m.role != 'user' %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|bot|>"
    "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}{% endif %}"
)
CALLS = "{% if tools %}{# <tool_call> #}{% for t in tools %}{{ t.function.name }}{% endfor %}{% endif %}"


@dataclass
class Running:
    """A server that listens.  `ask` is one request over a fresh connection."""

    service: Service
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def raw(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        try:
            connection.putrequest(method, path, skip_host="Host" in headers)
            for name, value in headers.items():
                connection.putheader(name.replace("_", "-"), value)
            if data is not None:
                connection.putheader("Content-Length", str(len(data)))
            connection.endheaders(data)
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        status, _, data = self.raw(method, path, body, **headers)
        return status, json.loads(data or b"null")

    def lines(self, path: str, body: Any) -> list[Any]:
        return [json.loads(line) for line in self.raw("POST", path, body)[2].splitlines()]

    def events(self, path: str, body: Any) -> list[Any]:
        """The data of server-sent events; [DONE] is left out."""
        text = self.raw("POST", path, body)[2].decode()
        data = [line[6:] for block in text.split("\n\n") for line in block.split("\n") if line.startswith("data: ")]
        return [json.loads(item) for item in data if item != "[DONE]"]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders as a user would have them: `tiny`; the template of `thinker` opens a thought, `caller`'s knows tools."""
    folder = tmp_path_factory.mktemp("served")
    found = {}
    for name, template in (("tiny", tiny.TEMPLATE), ("thinker", THINKS), ("caller", tiny.TEMPLATE + CALLS)):
        (folder / name).mkdir()
        found[name] = tiny.checkpoint(folder / name, template=template)
    return found


@pytest.fixture(scope="session")
def start(checkpoints: dict[str, Path]) -> Iterator[Callable[..., Running]]:
    """start(**settings) → Running; all are stopped at the end of the session."""
    stops: list[Callable[[], None]] = []

    def begin(opener: Any = None, **settings: Any) -> Running:
        service = Service(replace(Settings(port=0), **settings), **({"opener": opener} if opener else {}))
        service.models.paths |= checkpoints
        server = Server(service)
        ready: list[int] = []
        up = threading.Event()

        async def life() -> None:
            task = asyncio.ensure_future(server.serve())
            while not server.started and not task.done():
                await asyncio.sleep(0.01)
            ready.append(server.servers[0].sockets[0].getsockname()[1] if server.started else 0)
            up.set()
            await task

        thread = threading.Thread(target=lambda: asyncio.run(life()), daemon=True)
        thread.start()
        assert up.wait(30) and ready[0]

        def end() -> None:
            server.should_exit = True
            thread.join(20)

        stops.append(end)
        return Running(service, ready[0])

    yield begin
    for stop in stops:
        stop()


@pytest.fixture(scope="session")
def server(start: Callable[..., Running]) -> Running:
    return start()
