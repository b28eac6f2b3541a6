"""R12: the worst bodies of the size limit, at every field of every route, are refused while others are served."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tiercel.serve.openapi import TABLE
from tiercel.serve.settings import Settings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
LIMIT = Settings.body_bytes
BODIES = {path: model for path, _, _, model, *_ in TABLE if model is not None}
SAID = [{"role": "user", "content": "hi"}]
NEEDED = {"messages": SAID, "prompt": "hi", "input": "hi", "stream": False, "max_tokens": 1, "max_output_tokens": 1,
          "options": {"num_predict": 1}}  # fmt: skip
FILLS = {  # kind → beginning, what is repeated, end
    "integers": ("[", "1,", "1]"), "lists": ("[", "[],", "[]]"), "objects": ("[", '{"a":1},', "{}]"),
    "strings": ("[", '"a",', '"b"]'), "floats": ("[", "1e-300,", "1]"), "long integers": ("[", "9" * 400 + ",", "1]"),
    "prose": ('"', "a, b: [c] ", '"'), "escapes": ('"', "\\n", '"'), "digits": ('"', "1", '"'),
    "quotes": ('"', '\\"', '"'),
    "messages": ("[", '{"role":"user","content":"a"},', '{"role":"user","content":"a"}]'),
    "parts": ('[{"role":"user","content":[', '{"type":"text","text":"a"},', '{"type":"text","text":"b"}]}]'),
    "nesting": ("", '{"a":[', ""), "tools": ("[", '{"type":"function","function":{"name":"a"}},', "{}]"),
}  # fmt: skip


def body(route: str, field: str, kind: str, size: int) -> bytes:
    """A body of `size` bytes whose `field` holds as much of a kind as there is room for."""
    fields = BODIES[route].model_fields
    base = {"model": "tiny"} | {name: value for name, value in NEEDED.items() if name in fields and name != field}
    base.pop(field, None)
    head = json.dumps(base)[:-1] + f', "{field}": '
    if kind == "keys":
        names = ",".join(f'"{number:x}":1' for number in range((size - len(head)) // 11))
        return f"{head}{{{names}}}}}".encode()
    begin, unit, end = FILLS[kind]
    room = size - len(head) - len(begin) - len(end) - 1
    return f"{head}{begin}{unit * (room // len(unit))}{end}}}".encode()


def every() -> list[tuple[str, str, str]]:
    return [(route, field, kind) for route, model in BODIES.items() for field in [*model.model_fields, "unknown"]
            for kind in [*FILLS, "keys"]]  # fmt: skip


@pytest.fixture(scope="module")
def process(checkpoints) -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("overload", Path(__file__).parents[2] / "benchmarks" / "overload.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["overload"] = module
    spec.loader.exec_module(module)
    with module.serving(checkpoints["tiny"], slots=2, queue=8) as server:
        yield server


async def request(port: int, method: str, path: str, data: bytes = b"") -> tuple[int, float]:
    """Status, seconds."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    began = time.perf_counter()
    try:
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        with contextlib.suppress(ConnectionError):
            writer.write(f"{head}Connection: close\r\n\r\n".encode() + data)
            await writer.drain()
        answer = b""
        with contextlib.suppress(ConnectionError):
            answer = await reader.read()
        return int(answer[9:12] or b"0"), time.perf_counter() - began
    finally:
        writer.close()


async def storm(port: int, chosen: list[tuple[str, str, str]]) -> tuple[list[float], list[Any]]:
    """The seconds of /health meanwhile, and what was answered with 5xx or not at all."""
    healths: list[float] = []
    wrong: list[Any] = []
    done = asyncio.Event()

    async def health() -> None:
        while not done.is_set():
            status, seconds = await request(port, "GET", "/health")
            assert status == 200
            healths.append(seconds)
            await asyncio.sleep(0.004)

    watcher = asyncio.ensure_future(health())
    for route, field, kind in chosen:
        data = await asyncio.to_thread(body, route, field, kind, LIMIT)
        method = "DELETE" if route == "/api/delete" else "POST"
        status, _ = await request(port, method, route, data)
        if not 200 <= status < 500:
            wrong.append((route, field, kind, status))
    done.set()
    await watcher
    return sorted(healths), wrong


def test_the_worst_bodies_are_refused_and_health_is_answered_meanwhile(process, cases, figure):
    chosen = every()
    random.Random(3).shuffle(chosen)
    chosen = chosen[: cases(10, len(chosen))]
    before = process.anonymous()
    healths, wrong = asyncio.run(storm(process.port, chosen))
    grown = (process.anonymous() - before) >> 20
    assert not wrong and len(healths) > len(chosen)
    assert grown < 256, "what a body took is given back"
    p50, p99 = (1000 * healths[len(healths) * part // 100] for part in (50, 99))
    load = os.getloadavg()[0]
    figure("R12", f"{len(chosen)} bodies of 8 MiB, {len(BODIES)} routes: all answered or refused, memory +{grown} MiB; "
           f"/health p50 {p50:.1f} ms, p99 {p99:.1f} ms of {len(healths)}, load average {load:.0f}")  # fmt: skip


EDGES = [
    -(1 << 63),
    -1,
    0,
    1,
    1 << 31,
    1 << 63,
    1 << 64,
    1.5,
    1e308,
    -1e308,
    True,
    None,
    "",
    "x",
    [],
    [1],
    {},
    {"a": 1},
]


def test_every_number_of_every_field_is_answered_or_refused(server, cases, figure):
    grid = [(route, field, value) for route, model in BODIES.items() for field in model.model_fields for value in EDGES]
    random.Random(4).shuffle(grid)
    changing = ("/api/pull", "/api/delete", "/api/create", "/api/copy", "/api/push")
    grid = [each for each in grid if each[0] not in changing]
    seen: dict[int, int] = {}
    for route, field, value in grid[: cases(250, len(grid))]:
        fields = BODIES[route].model_fields
        given = {"model": "tiny"} | {name: each for name, each in NEEDED.items() if name in fields} | {field: value}
        status = server.raw("POST", route, given)[0]
        assert status < 500 or (field == "model" and status == 503), (route, field, value, status)
        seen[status] = seen.get(status, 0) + 1
    figure("R12", f"boundary grid: {sum(seen.values())} requests, by status {dict(sorted(seen.items()))}")
