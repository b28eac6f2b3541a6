"""A server under more clients than it has room for, and what is left of them afterwards.

    python benchmarks/overload.py hang-ups    200 clients, 30 % hang up: queued, in the prompt, in the answer
    python benchmarks/overload.py ten-times   ten times the requests that it can answer
    python benchmarks/overload.py drains      SIGTERM with 16 answers in flight, --rounds times

The model is a tiny random one (tests/tiny.py), so that everything but the network is what is tested; `tiercel serve`
is a process of its own.  Each prints one line of JSON; tests/serve/test_overload.py asks them for what must hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
HOST = "127.0.0.1"
TOKENS = 300  # of an answer under overload: ten times the capacity is then little work for whoever says no


@dataclass
class Server:
    process: subprocess.Popen[str]
    port: int
    log: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """/metrics, labels left out."""
        import urllib.request

        text = urllib.request.urlopen(f"http://{HOST}:{self.port}/metrics").read().decode()
        return {m[1]: float(m[2]) for m in re.finditer(r"^(\w+)(?:\{[^}]*\})? (\S+)$", text, re.M)}

    def anonymous(self) -> int:
        """Bytes of memory that are its own, swapped out or not."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return sum(int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("RssAnon", "VmSwap")) << 10  # type: ignore[index]

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def threads(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))


@contextlib.contextmanager
def serving(folder: Path, adapters: dict[str, Path] | None = None, **limits: Any) -> Iterator[Server]:
    """`tiercel serve` of the checkpoint in `folder`, named as the folder, with its adapters."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    words = [word for name, value in limits.items() for word in ("--set", f"{name}={value}")]
    words += [word for name, path in (adapters or {}).items() for word in ("--adapter", f"{name}={path}")]
    process = subprocess.Popen(
        [sys.executable, "-m", "tiercel", "serve", str(folder), "--port", str(port), *words],
        env=os.environ | {"PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1", "TIERCEL_HOME": str(folder / "home")},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    server, lines = Server(process, port), process.stderr
    assert lines is not None
    # its further lines are read, so that the pipe does not fill
    follower = threading.Thread(target=lambda: server.log.extend(lines), daemon=True)
    try:
        if not any("listening" in line for line in lines):
            raise SystemExit("the server did not start")
        follower.start()
        yield server
    finally:
        process.kill()
        process.wait()
        if follower.ident is not None:
            follower.join()
        lines.close()


@dataclass
class Answer:
    status: int
    body: bytes
    first: float  # seconds until the first byte
    whole: bool


async def ask(port: int, path: str, body: dict[str, Any], leave: float | str | None = None) -> Answer | None:
    """One request over a connection of its own.  leave: hang up after so many seconds, or at the "first byte"; None."""
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        began = time.perf_counter()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        if isinstance(leave, float):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1), leave)
            return None
        start = await reader.read(1)
        first = time.perf_counter() - began
        if leave is not None:
            return None
        text = start + await reader.read()
        status = int(text.split(b" ", 2)[1]) if text else 0
        head_, _, rest = text.partition(b"\r\n\r\n")
        whole = rest.endswith(b"0\r\n\r\n") if b"chunked" in head_.lower() else bool(rest)
        return Answer(status, rest, first, whole)
    finally:
        writer.transport.abort() if leave is not None else writer.close()


def question(number: int, tokens: int, stream: bool) -> tuple[str, dict[str, Any]]:
    """Alternately OpenAI's and Ollama's; a prompt of some 20 to 150 tokens, one of forty."""
    text = f"{number % 40} " + "why " * (5 + number % 40)
    if number % 2:
        return "/v1/completions", {"model": "tiny", "prompt": text, "max_tokens": tokens, "ignore_eos": True,
                                   "temperature": 0, "stream": stream}  # fmt: skip
    return "/api/generate", {"model": "tiny", "prompt": text, "raw": True, "stream": stream,
                             "options": {"num_predict": tokens, "temperature": 0}}  # fmt: skip


async def at_rest(server: Server, seconds: float = 30.0) -> dict[str, float]:
    """The figures once nothing runs and all connections but our own are gone."""
    end = time.monotonic() + seconds
    while True:
        now = await asyncio.to_thread(server.figures)
        busy = now["tiercel_requests_in_flight"] + now["tiercel_engine_running"] + now["tiercel_engine_waiting"]
        if not busy or time.monotonic() > end:
            return now
        await asyncio.sleep(0.05)


def words_of(path: str, answer: Answer) -> str:
    """The text of an answer, streamed or not."""
    found = re.findall(rb'"(?:text|response)":"((?:[^"\\]|\\.)*)"', answer.body)
    return "".join(json.loads(b'"' + piece + b'"') for piece in found)


async def hang_ups(folder: Path, rounds: int = 5, clients: int = 200) -> dict[str, Any]:
    rng = random.Random(5)
    with serving(folder, queue=256, queue_contexts=100, cache_bytes=8 << 20) as server:
        solo: dict[tuple[int, int], str] = {}
        wrong, survivors, left = [], 0, 0

        async def visit(number: int) -> None:
            nonlocal survivors, left
            tokens, stream = 20 + 20 * (number % 3), rng.random() < 0.7
            path, body = question(number, tokens, stream)
            leave: float | str | None = None
            if rng.random() < 0.3:
                leave = rng.choice([0.0, 0.002, rng.random() * 0.3, rng.random() * 2.0, "first byte"])
            answer = await ask(server.port, path, body, leave)
            if answer is None:
                left += 1
                return
            survivors += 1
            same = solo.setdefault((number % 40, tokens), words_of(path, answer))
            if answer.status != 200 or not answer.whole or words_of(path, answer) != same:
                wrong.append((number, answer.status, repr(answer.body[-300:])))

        for number in range(120):  # each alone: what the others' answers are compared with
            await ask(server.port, *question(number, 20 + 20 * (number % 3), False))
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(visit(number))
        before = await at_rest(server)
        start = {"memory": server.anonymous(), "descriptors": server.descriptors(), "threads": server.threads()}
        memory = []
        for _ in range(rounds):
            async with asyncio.TaskGroup() as group:
                for number in range(clients):
                    group.create_task(visit(number))
            await at_rest(server)
            memory.append(server.anonymous())
        after = await at_rest(server)
        await asyncio.sleep(0.2)
        return {
            "clients": clients, "rounds": rounds, "survivors": survivors, "hung up": left, "wrong": wrong[:3],
            "running": after["tiercel_engine_running"], "waiting": after["tiercel_engine_waiting"],
            "kv bytes": after["tiercel_engine_kv_bytes"], "in flight": after["tiercel_requests_in_flight"],
            "cache bytes": after["tiercel_engine_cache_bytes"],
            "tasks": after["tiercel_tasks"] - before["tiercel_tasks"],
            "descriptors": server.descriptors() - start["descriptors"],
            "threads": server.threads() - start["threads"],
            "memory MiB": [round(value / 2**20, 1) for value in (start["memory"], *memory)],
        }  # fmt: skip


def quantiles(values: list[float]) -> dict[str, float]:
    """Milliseconds."""
    values = sorted(values)
    return {name: round(values[min(int(share * len(values)), len(values) - 1)] * 1e3, 1)
            for name, share in (("p50", 0.5), ("p99", 0.99), ("p100", 1.0))}  # fmt: skip


async def ten_times(folder: Path, seconds: float = 10.0) -> dict[str, Any]:
    with serving(folder, slots=4, queue=8, cache_bytes=8 << 20) as server:
        await ask(server.port, *question(1, 20, False))
        done = 0

        async def steady(end: float) -> None:
            nonlocal done
            while time.monotonic() < end:
                await ask(server.port, *question(done, TOKENS, False))
                done += 1

        measured = max(seconds / 3, 2.0)
        await asyncio.gather(*(steady(time.monotonic() + measured) for _ in range(8)))
        capacity = done / measured
        answers: list[Answer | None] = []
        start = server.anonymous()

        async def visit(number: int) -> None:
            answers.append(await ask(server.port, *question(number, TOKENS, number % 3 == 0)))

        async with asyncio.TaskGroup() as group:
            begun, number = time.monotonic(), 0
            while time.monotonic() < begun + seconds:  # whoever could not come in time comes at once
                due = int((time.monotonic() - begun) * 10 * capacity)
                while number < due:
                    group.create_task(visit(number))
                    number += 1
                await asyncio.sleep(0.002)
        taken = time.monotonic() - begun
        found = [answer for answer in answers if answer is not None]
        accepted = [answer for answer in found if answer.status == 200]
        refused = [answer for answer in found if answer.status in (429, 503)]
        after = await at_rest(server)
        return {
            "capacity a second": round(capacity, 1), "offered": number, "accepted": len(accepted),
            "accepted a second": round(len(accepted) / taken, 1), "refused": len(refused),
            "other": sorted({answer.status for answer in found} - {200, 429, 503}),
            "complete": sum(answer.whole for answer in accepted), "refusal ms": quantiles([a.first for a in refused]),
            "waiting": after["tiercel_engine_waiting"], "in flight": after["tiercel_requests_in_flight"],
            "memory MiB": [round(value / 2**20, 1) for value in (start, server.anonymous())],
        }  # fmt: skip


async def drain(folder: Path, seconds: float, tokens: int, rng: random.Random) -> dict[str, Any]:
    """SIGTERM with 16 answers in flight.  ends: how each stream ended."""
    with serving(folder, drain=seconds) as server:

        async def visit(number: int) -> str:
            answer = await ask(server.port, *question(number, tokens, True))
            assert answer is not None
            if answer.status == 503 and b"going down" in answer.body:
                return "refused"
            last = answer.body.rstrip(b"0\r\n").splitlines()[-1] if answer.body else b""
            proper = b"[DONE]" in answer.body[-60:] if number % 2 else b'"done":true' in last or b'"error"' in last
            if answer.status != 200 or not answer.whole or not proper:
                return f"broken: {answer.status} {answer.body[-200:]!r}"
            return "cut" if b'"error"' in answer.body[-400:] else "complete"

        tasks = [asyncio.create_task(visit(number)) for number in range(16)]
        while True:
            if (await asyncio.to_thread(server.figures))["tiercel_requests_in_flight"] >= 16:
                break
            if all(task.done() for task in tasks):
                break
            await asyncio.sleep(0.005)
        await asyncio.sleep(rng.random() * 0.1)
        in_flight = sum(not task.done() for task in tasks)
        took = 0.0  # where this process is stopped for a while (somebody else measures), the server was, too
        server.process.send_signal(signal.SIGTERM)
        while (code := server.process.poll()) is None and took < seconds + 15:
            began = time.monotonic()
            await asyncio.sleep(0.02)
            took += min(time.monotonic() - began, 0.25)
        if code is None:
            state = Path(f"/proc/{server.process.pid}/status").read_text().split("State:")[1][:12].strip()
            server.process.send_signal(signal.SIGABRT)  # with PYTHONFAULTHANDLER it says where it hangs
            await asyncio.to_thread(server.process.wait)
            code = f"did not end ({state}): " + "".join(server.log)[-3000:]
        ends = await asyncio.gather(*tasks)
        return {"in flight": in_flight, "ends": ends, "code": code, "seconds": took}


async def drains(folder: Path, rounds: int = 50) -> dict[str, Any]:
    """Every other time the answers are longer than the drain."""
    good, longest, cut, bad, fewest = 0, 0.0, 0, [], 16
    for number in range(rounds):
        short = number % 2 == 0
        limit = 1.0 if short else 20.0
        found = await drain(folder, limit, 480 if short else 120, random.Random(number))
        proper = all(end in ("complete", "cut", "refused") for end in found["ends"])
        in_time = found["seconds"] <= limit + 2.0
        good += proper and found["code"] == 0 and in_time
        if not (proper and found["code"] == 0 and in_time):
            bad.append(found)
        longest = max(longest, found["seconds"] - limit)
        fewest = min(fewest, found["in flight"])
        cut += sum(end != "complete" for end in found["ends"])
    return {"rounds": rounds, "proper": good, "seconds over the drain at most": round(longest, 2),
            "fewest in flight": fewest, "streams cut": cut, "bad": bad[:2]}  # fmt: skip


def main() -> None:
    import tiny

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["hang-ups", "ten-times", "drains"])
    parser.add_argument("--rounds", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "tiny"
        checkpoint.mkdir()
        tiny.checkpoint(checkpoint, template=tiny.TEMPLATE)
        more = {"rounds": options.rounds} if options.rounds and options.what != "ten-times" else {}
        work: Any = {"hang-ups": hang_ups, "ten-times": ten_times, "drains": drains}[options.what]
        print(json.dumps({options.what: asyncio.run(work(checkpoint, **more))}))


if __name__ == "__main__":
    main()
