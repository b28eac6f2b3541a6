"""A server for hours under mixed requests: what memory, descriptors and threads do.

    python benchmarks/soak.py run --hours 8       serve a tiny model and ask; a line of JSON every half minute in --log
    python benchmarks/soak.py report              the slopes of what was logged, as JSON, and a plot in --plot

`run` continues the log of an earlier run in a new segment (a new server); --requests ends it earlier.  The requests:
all dialects, streamed and not, conversations that grow, an adapter beside its base, embeddings, forms, tools, prompts
that are too long, bodies that are wrong, and 15 % hang-ups (at once, in the queue, in the prompt, in the answer).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from overload import HOST, Server, at_rest, serving

ROOT = Path(__file__).parents[1]
SAMPLE_SECONDS = 30.0
CLIENTS = 6
SETTLED_SECONDS = 1800.0  # of a segment: caches fill before that
Made = tuple[str, str, Any]


def models(folder: Path) -> tuple[Path, Path]:
    """A tiny checkpoint and an adapter for it."""
    import torch

    import tiny  # ty: ignore
    from tiercel.train.lora import adapt, save
    from tiercel.weights import load as weights

    calls = "{% if tools %}{# <tool_call> #}{% for t in tools %}{{ t.function.name }}{% endfor %}{% endif %}"
    base = tiny.checkpoint(folder, template=tiny.TEMPLATE + calls)
    network, _, layout = weights.load(base)
    torch.manual_seed(3)
    adapted = adapt(network, layout, rank=2)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if ".lora_B" in name:
                p.normal_()
    return base, save(adapted, folder / "poet")


class Client:
    """One of the clients: a conversation that grows, and whatever else comes to its mind."""

    def __init__(self, number: int, seed: int) -> None:
        self.random, self.number = random.Random(f"{seed} {number}"), number
        self.talk: list[dict[str, str]] = []
        self.response = ""

    def text(self, words: int) -> str:
        return " ".join(self.random.choice(("why", "so", "the", "end", "is", "né", "日本")) for _ in range(words))

    def request(self) -> Made:
        """Method, path, body."""
        draw, model = self.random.random(), self.random.choice(("soak", "soak", "soak:poet"))
        stream, few = self.random.random() < 0.5, self.random.randrange(1, 24)
        openai = {"model": model, "max_tokens": few, "stream": stream}
        if draw < 0.25:
            if len(self.talk) > 12:
                self.talk = []
            self.talk.append({"role": "user", "content": self.text(6)})
            return "POST", "/v1/chat/completions", openai | {"messages": self.talk}
        if draw < 0.35:
            n = self.random.choice((1, 1, 2, 4))
            return "POST", "/v1/completions", openai | {"prompt": self.text(20), "n": n, "logprobs": 2}
        if draw < 0.42:
            prior = {"previous_response_id": self.response} if self.response else {}
            return "POST", "/v1/responses", {"model": "soak", "input": self.text(4), "max_output_tokens": few} | prior
        if draw < 0.52:
            said = [{"role": "user", "content": self.text(9)}]
            return "POST", "/v1/messages", openai | {"messages": said}
        if draw < 0.64:
            options = {"num_predict": few, "seed": self.random.randrange(9)}
            said = [{"role": "user", "content": self.text(9)}]
            return "POST", "/api/chat", {"model": model, "messages": said, "stream": stream, "options": options}
        if draw < 0.72:
            return "POST", "/api/generate", {"model": model, "prompt": self.text(9), "options": {"num_predict": few}}
        if draw < 0.78:
            return "POST", "/v1/embeddings", {"model": model, "input": [self.text(5), self.text(9)]}
        if draw < 0.82:
            schema = {"type": "object", "properties": {self.text(1): {"type": "integer"}}}
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            said = [{"role": "user", "content": "{}"}]
            return "POST", "/v1/chat/completions", openai | {"messages": said, "response_format": form}
        if draw < 0.86:
            tool = {"type": "function", "function": {"name": f"f{few}", "parameters": {"type": "object"}}}
            said = [{"role": "user", "content": self.text(3)}]
            return "POST", "/v1/chat/completions", openai | {"messages": said, "tools": [tool]}
        if draw < 0.93:
            wrong: list[Made] = [
                ("POST", "/v1/chat/completions", {"model": "soak", "messages": [{"role": 1}]}),
                ("POST", "/v1/completions", {"model": "soak", "prompt": [{}] * 500}),
                ("POST", "/v1/completions", {"model": "soak", "prompt": "long " * 900}),
                ("POST", "/v1/completions", {"model": "absent", "prompt": "x"}),
                ("POST", "/api/chat", b"{" * 300),
                ("POST", "/v1/messages", {"model": "soak"}),
                ("GET", "/v1/nowhere", None),
            ]
            return self.random.choice(wrong)
        shown = [("GET", "/v1/models", None), ("GET", "/api/tags", None), ("GET", "/api/ps", None),
                 ("GET", "/metrics", None), ("POST", "/api/show", {"model": "soak"}), ("GET", "/health", None),
                 ("POST", "/v1/messages/count_tokens", {"model": "soak", "messages": [
                     {"role": "user", "content": self.text(30)}]})]  # fmt: skip
        return self.random.choice(shown)

    async def ask(self, port: int, seen: Counter[str], times: list[float]) -> None:
        """One request, counted by its status; `hung up` where this client left."""
        method, path, body = self.request()
        data = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
        leave = self.random.choice((0.0, 0.002, 0.01, 0.03)) if self.random.random() < 0.15 else None
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection(HOST, port)
        try:
            head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            if leave is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1), leave)
                seen["hung up"] += 1
                return
            answer = await reader.read()
        finally:
            writer.transport.abort() if leave is not None else writer.close()
        status = answer[9:12].decode("latin-1") or "none"
        seen[status] += 1
        times.append(time.perf_counter() - began)
        if path == "/v1/responses":
            found = answer.find(b'"id":"resp_')
            self.response = answer[found + 6 : answer.index(b'"', found + 6)].decode() if found >= 0 else ""
        if status[0] == "5" and status != "503":
            print(method, path, data[:300], answer[-400:], file=sys.stderr)


def children(pid: int) -> list[int]:
    """The server's own child processes (templates)."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(each) for each in found] or [int(p.name) for p in Path("/proc").glob("[0-9]*") if _parent(p) == pid]


def _parent(process: Path) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    return 0


async def run(hours: float, requests: int, log: Path, seed: int) -> None:
    """A segment of the soak."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    segment = max((line["segment"] for line in lines), default=-1) + 1
    before = sum(line["requests"] for line in lines)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "soak"
        base.mkdir()
        base, adapter = models(base)
        with serving(base, adapters={"poet": adapter}, slots=4, cache_bytes=16 << 20, queue=32) as server:
            await _drive(server, hours, requests - before, log, segment, seed + segment)


async def _drive(server: Server, hours: float, requests: int, log: Path, segment: int, seed: int) -> None:
    began, seen, total = time.time(), Counter[str](), 0
    times: list[float] = []
    stop = False

    async def client(number: int) -> None:
        one = Client(number, seed)
        while not stop:
            try:
                await one.ask(server.port, seen, times)
            except OSError as error:
                seen[type(error).__name__] += 1
                await asyncio.sleep(0.05)

    tasks = [asyncio.ensure_future(client(number)) for number in range(CLIENTS)]
    while not stop:
        await asyncio.sleep(SAMPLE_SECONDS)
        stop = time.time() - began > hours * 3600 or total + sum(seen.values()) >= requests
        if stop:
            await asyncio.gather(*tasks)
            await at_rest(server)
        counts, taken = dict(seen), sorted(times) or [0.0]
        seen.clear()
        times.clear()
        total += sum(counts.values())
        line = {
            "segment": segment, "at": round(time.time()), "seconds": round(time.time() - began),
            "requests": sum(counts.values()), "answers": counts, "memory": server.anonymous(),
            "descriptors": server.descriptors(), "threads": server.threads(),
            "children": len(children(server.process.pid)), "p50": round(taken[len(taken) // 2], 4),
            "p99": round(taken[len(taken) * 99 // 100], 4),
        }  # fmt: skip
        if server.process.poll() is not None:
            stop, line["died"] = True, server.process.returncode
        with log.open("a") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares, per hour."""
    if len(points) < 3:
        return float("nan")
    x0, y0 = sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
    spread = sum((x - x0) ** 2 for x, _ in points)
    return 3600 * sum((x - x0) * (y - y0) for x, y in points) / spread


def report(log: Path, plot: Path | None) -> dict[str, Any]:
    """Totals, and of each segment the slopes after its first half hour."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    segments = []
    for number in sorted({line["segment"] for line in lines}):
        of = [line for line in lines if line["segment"] == number]
        late = [line for line in of if line["seconds"] >= SETTLED_SECONDS]
        slopes = {name: round(slope([(line["seconds"], line[name] / unit) for line in late]), 3)
                  for name, unit in (("memory", 1 << 20), ("descriptors", 1), ("threads", 1))}  # fmt: skip
        segments.append({"hours": round(of[-1]["seconds"] / 3600, 2), "requests": sum(line["requests"] for line in of),
                         "per hour after the first half hour": slopes,
                         "MiB": [line["memory"] >> 20 for line in (of[0], *late[:1], of[-1])]})  # fmt: skip
    answers = sum((Counter(line["answers"]) for line in lines), Counter())
    if plot is not None:
        _draw(lines, plot)
    return {"hours": round(sum(each["hours"] for each in segments), 2), "requests": sum(answers.values()),
            "answers": dict(answers), "segments": segments}  # fmt: skip


def _draw(lines: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "soak"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, 1, figsize=(7, 6), sharex=True, layout="constrained")
    offset = 0.0
    for number in sorted({line["segment"] for line in lines}):
        of = [line for line in lines if line["segment"] == number]
        hours = [offset + line["seconds"] / 3600 for line in of]
        axes[0].plot(hours, [line["memory"] / (1 << 20) for line in of], color="C0")
        axes[1].plot(hours, [line["descriptors"] for line in of], color="C0", label="descriptors" if not number else "")
        axes[1].plot(hours, [line["threads"] for line in of], color="C1", label="threads" if not number else "")
        axes[2].plot(hours, [line["p50"] * 1000 for line in of], color="C0", label="p50" if not number else "")
        axes[2].plot(hours, [line["p99"] * 1000 for line in of], color="C1", label="p99" if not number else "")
        offset = hours[-1]
    axes[0].set_ylabel("RssAnon + VmSwap, MiB")
    axes[1].legend()
    axes[2].set(ylabel="an answer, ms", xlabel="hours", yscale="log")
    axes[2].legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--hours", type=float, default=8.0)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--log", type=Path, default=ROOT / "docs" / "assets" / "soak.jsonl")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "assets" / "soak.svg")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.what == "run":
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        asyncio.run(run(options.hours, options.requests, options.log, options.seed))
    print(json.dumps(report(options.log, options.plot)))


if __name__ == "__main__":
    main()
