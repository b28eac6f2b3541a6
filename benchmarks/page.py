"""The chat page in Chromium: frames while an answer streams, and how soon the picker is painted; screenshots.

    python benchmarks/page.py [--bytes 50000] [--rate 5000] [--rounds 3]     frames, and the first paint of the picker
    python benchmarks/page.py --screenshots FOLDER     desktop, phone, dark, reasoning, code, LaTeX, table

The page is the package's own; its server's answers come from this file, at `--rate` characters a second.  Needs
playwright and a Chromium of the system.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from tiercel.serve.page import page

CHUNK_SECONDS = 0.005
MAX_FRAME_MILLISECONDS = 20.0  # a frame of 60 a second takes 16.7
FRAMES = """() => { window.frames_ = []; window.going = true;
  const step = (now) => { window.frames_.push(now); window.going && requestAnimationFrame(step); };
  requestAnimationFrame(step); }"""

TABLE = """| model | parameters | state | tokens/s |
|:--|--:|--:|--:|
| Falcon-H1 | 0.5 B | 9.2 MB | 105.9 |
| Mamba-2 | 1.3 B | 12.6 MB | 61.0 |
| SmolLM2 | 135 M | – | 359.5 |
"""
CODE = '''```python
import torch

def ssd(x_THP, dt_TH, A_H, B_TN, C_TN):
    """The recurrence of Mamba-2, a token at a time."""
    S = torch.zeros(x_THP.shape[1], x_THP.shape[2], B_TN.shape[1])
    for t in range(len(x_THP)):  # the state is all that is kept
        S = S * torch.exp(dt_TH[t] * A_H)[:, None, None] + ...
    return S
```
'''
MATHS = r"""The state follows from the one before, \(S_t = a_t S_{t-1} + b_t x_t^\top\), and the whole is a product:

$$
y_t = \sum_{s=1}^{t} C_t^\top \left( \prod_{r=s+1}^{t} e^{\Delta_r A} \right) B_s \, \Delta_s x_s
\qquad \text{with} \qquad \frac{\partial L}{\partial A} = \int_0^1 \sqrt{1 + x^2} \, dx
$$

So $O(T)$ time and $O(1)$ memory, for $5 or $10 an hour.
"""
PROSE = """A **state-space model** keeps a state of *fixed size*; attention keeps every key and value. See
[the paper](https://arxiv.org/abs/2405.21060) for `ssd`, and:

- the state is *read and written* at each token,
- it is the same after 100 tokens and after 100,000,
  1. which is why memory stays flat,
  2. and why recall from far away is harder.

> A hybrid has some layers of each.
"""
SHOTS = {"code": CODE, "latex": MATHS, "table": "The shapes, measured on one machine:\n\n" + TABLE,
         "reasoning": PROSE, "desktop": "## State-space models\n\n" + PROSE + "\n" + TABLE}  # fmt: skip
QUESTIONS = {"code": "Show me the recurrence", "table": "Compare them"}


def long_answer(size: int) -> str:
    """A text of `size` characters with everything that Markdown has here."""
    text, part = "", 0
    while len(text) < size:
        part += 1
        text += f"## Part {part}\n\n{PROSE}\n{MATHS}\n{CODE}\n{TABLE}\n"
        text += "\n".join(f"{i}. item {i} with `code` and **weight**" for i in range(1, 12)) + "\n\n"
    return text[:size]


class FakeServer:
    """The page's files, and an /api/chat that streams `text`."""

    def __init__(self) -> None:
        self.text, self.thinking, self.rate = "", "", 5000.0
        routes = [Route("/", page.root), Route("/page/{name}", page.file), Route("/api/tags", self.tags),
                  Route("/api/ps", self.ps), Route("/api/show", self.show, methods=["POST"]),
                  Route("/api/chat", self.chat, methods=["POST"])]  # fmt: skip
        self.server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=0, log_level="warning"))

    async def tags(self, request: Request) -> JSONResponse:
        names = [("falcon-h1:latest", "521M"), *((f"model-{i}:latest", "135M") for i in range(99))]
        return JSONResponse({"models": [{"name": name, "details": {"parameter_size": size}} for name, size in names]})

    async def ps(self, request: Request) -> JSONResponse:
        return JSONResponse({"models": [{"name": "falcon-h1:latest", "size": 412e6, "context_length": 16384}]})

    async def show(self, request: Request) -> JSONResponse:
        return JSONResponse({"capabilities": ["completion", "thinking"] if self.thinking else ["completion"],
                             "model_info": {"general.architecture": "falcon-h1"}})  # fmt: skip

    async def chat(self, request: Request) -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            if self.thinking:
                yield self.line({"content": "", "thinking": self.thinking})
            began, sent, clock = asyncio.get_running_loop().time(), 0, asyncio.get_running_loop().time
            while sent < len(self.text):
                await asyncio.sleep(CHUNK_SECONDS)
                until = int((clock() - began) * self.rate) + 1
                yield self.line({"content": self.text[sent:until]})
                sent = until
            yield self.line({"content": ""}, done=True, done_reason="stop", prompt_eval_count=212, cached_tokens=180,
                            eval_count=len(self.text) // 4, eval_duration=int((clock() - began) * 1e9))  # fmt: skip

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    def line(self, message: dict[str, str], **more: Any) -> str:
        return json.dumps({"message": {"role": "assistant", **message}, "done": False} | more) + "\n"

    @contextmanager
    def running(self) -> Iterator[str]:
        thread = threading.Thread(target=self.server.run, daemon=True)
        thread.start()
        while not self.server.started:
            thread.join(0.02)
        yield f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        self.server.should_exit = True
        thread.join(5)


def ask(shown: Any, text: str, timeout: float = 120_000) -> None:
    before = shown.locator(".figures").count()
    shown.fill("#input", text)
    shown.press("#input", "Enter")
    shown.wait_for_function(f"() => document.querySelectorAll('.figures').length > {before}", timeout=timeout)
    shown.wait_for_timeout(400)  # fonts of formulas


def work(watch: Any) -> float:
    """Seconds of CPU that the page's main thread has used."""
    found = {entry["name"]: entry["value"] for entry in watch.send("Performance.getMetrics")["metrics"]}
    return float(found["TaskDuration"])


def report(kind: str, used: float, times: list[float]) -> None:
    gaps = [b - a for a, b in pairwise(times)]
    long = sum(gap > MAX_FRAME_MILLISECONDS for gap in gaps)
    rate = 1000 / statistics.mean(gaps)
    print(f"{kind:15} {used:5.1f} ms {rate:6.1f} /s  {max(gaps):6.1f} ms  {long} of {len(gaps)}", flush=True)


def frames(browser: Any, url: str, server: FakeServer, args: argparse.Namespace) -> None:
    kinds = {"mixed": long_answer(args.bytes),
             "one list": "".join(f"- item {i} of a **long** list\n" for i in range(9999)),
             "one table": "| a | b |\n|---|---|\n" + "".join(f"| {i} | cell `{i}` |\n" for i in range(9999)),
             "one code block": "```python\n" + "print('a line of code')  # and more\n" * 9999,
             "one paragraph": "words and **words** and `more` words, " * 9999}  # fmt: skip
    server.rate = args.rate
    print(
        f"{args.bytes} characters at {args.rate:g} a second; CPU time of the page's thread a frame, frames a second, "
        f"longest frame, frames over {MAX_FRAME_MILLISECONDS:g} ms"
    )
    idle = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    idle.goto(url)
    idle.evaluate(FRAMES)
    idle.wait_for_timeout(3000)
    report("nothing", 0.0, idle.evaluate("() => window.frames_"))
    idle.context.close()
    for kind, text in kinds.items():
        server.text = text[: args.bytes]
        for _ in range(args.rounds):
            shown = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
            shown.goto(url)
            shown.wait_for_function("() => document.querySelector('#model').value")
            watch = shown.context.new_cdp_session(shown)
            watch.send("Performance.enable", {"timeDomain": "threadTicks"})
            before = work(watch)
            shown.evaluate(FRAMES)
            ask(shown, "go", args.bytes / args.rate * 5000 + 30_000)
            times = shown.evaluate("() => { window.going = false; return window.frames_; }")
            report(kind, 1000 * (work(watch) - before) / len(times), times)
            shown.context.close()


def first_paint(browser: Any, url: str, rounds: int) -> None:
    """Milliseconds from the navigation's start until the frame after the picker has its models."""
    script = """() => { const seen = () => { const pick = document.querySelector('#model');
        if (pick?.value) requestAnimationFrame(() => setTimeout(() => { window.painted = performance.now(); }));
        else requestAnimationFrame(seen); }; seen(); }"""
    for kind in ("first visit", "later visit"):
        found = []
        for _ in range(max(rounds, 5)):
            context = browser.new_context()
            if kind == "later visit":
                first = context.new_page()
                first.goto(url)
                first.wait_for_function("() => document.querySelector('#model').value")
                first.close()
            context.add_init_script(f"({script})()")
            shown = context.new_page()
            shown.goto(url)
            shown.wait_for_function("() => window.painted")
            found.append(shown.evaluate("() => window.painted"))
            context.close()
        print(f"picker painted, {kind}: median {statistics.median(found):.0f} ms ({min(found):.0f} – {max(found):.0f})")


def screenshots(browser: Any, url: str, server: FakeServer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    server.rate = 20_000.0
    sizes = {"": {"width": 1280, "height": 800}, "-phone": {"width": 390, "height": 800}}
    for size, viewport in sizes.items():
        for scheme in ("light", "dark"):
            phone = {"is_mobile": bool(size), "has_touch": bool(size)}
            context = browser.new_context(viewport=viewport, color_scheme=scheme, **phone)
            shown = context.new_page()
            shown.goto(url)
            for name, text in SHOTS.items():
                server.text = text
                server.thinking = "They ask about states. I compare both." if name == "reasoning" else ""
                if not size or name in ("desktop", "code"):
                    shown.reload()
                    shown.wait_for_function("() => document.querySelector('#model').value")
                    shown.evaluate("() => document.querySelector('#new').click()")
                    ask(shown, QUESTIONS.get(name, "What is a state-space model?"))
                    if name == "reasoning":
                        shown.evaluate("() => { document.querySelector('details.reasoning').open = true; }")
                    shown.screenshot(path=str(folder / f"{name}{size}-{scheme}.png"))
            shown.evaluate("() => { document.querySelector('#settings').open = true; }")
            shown.screenshot(path=str(folder / f"settings{size}-{scheme}.png"))
            context.close()
    print(f"screenshots in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=50_000)
    parser.add_argument("--rate", type=float, default=5000.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--screenshots", type=Path)
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    server = FakeServer()
    with server.running() as url, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        if args.screenshots:
            screenshots(browser, url, server, args.screenshots)
        else:
            first_paint(browser, url, args.rounds)
            frames(browser, url, server, args)
        browser.close()


if __name__ == "__main__":
    main()
