"""Several models side by side: the same tasks, speed and memory by context, on one page.

    a model        as for `run`
    NAME@ADDRESS   what an OpenAI-compatible address serves under that name, as smollm2@http://127.0.0.1:11434/v1

Everything that is finished is kept in the folder at once: tasks as `evaluate` keeps them, speeds in speed.json.  The
same command goes on where it was interrupted.  What a model cannot do, or an address that died, is one line in its
cells; the others lose nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from tiercel.errors import RequestError, TiercelError
from tiercel.evals.aggregate import Result
from tiercel.evals.answers import Answerer, Ask, Question
from tiercel.evals.run import evaluate
from tiercel.evals.task import Settings, Task
from tiercel.plan import chart

TIMED_TOKENS = 32  # tokens of a timed answer
Report = Callable[[str], None]
Opener = Callable[[str], Answerer]


@dataclass(frozen=True)
class Entrant:
    """One who is compared.  address: None for a model loaded here"""

    name: str
    address: str | None = None

    @property
    def label(self) -> str:
        return self.name if self.address is None else f"{self.name}@{self.address}"


def entrant(text: str) -> Entrant:
    name, at, address = text.partition("@")
    if at and not address.startswith(("http://", "https://")):
        raise RequestError(f"{text!r}: an address is written NAME@http://host:port/v1")
    if not name:
        raise RequestError(f"{text!r} has no model name before the @")
    return Entrant(name, address or None)


def compare(
    names: Sequence[str],
    tasks: Callable[[], Sequence[Task]],
    settings: Settings,
    lengths: Sequence[int],
    out: Path,
    opened: Callable[[Entrant], Answerer],
    report: Report = lambda line: None,
    speed: Callable[[Entrant, int], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Measure what is not there yet; plain data, also in out/comparison.json, .md and .html.

    opened: makes who answers; called once for each, and what it made is let go before the next.
    """
    entrants = [entrant(name) for name in names]
    if len({each.label for each in entrants}) < len(entrants):
        raise RequestError("each model is named once")
    out.mkdir(parents=True, exist_ok=True)
    timed = speed or timed_here
    found = []
    for each in entrants:
        row: dict[str, Any] = {"model": each.label, "scores": {}, "speed": {}, "errors": {}}
        found.append(row)
        _tasks(row, each, list(tasks()), settings, out, opened, report)
        _speeds(row, each, lengths, out / "speed.json", timed, report)
        _write(out, {"models": found})
    return {"models": found}


def _tasks(
    row: dict[str, Any], each: Entrant, tasks: list[Task], settings: Settings, out: Path,
    opened: Callable[[Entrant], Answerer], report: Report,
) -> None:  # fmt: skip
    if not tasks:
        return
    try:
        answerer = opened(each)
    except TiercelError as error:
        row["errors"] = {task.name: str(error) for task in tasks}
        return
    for task in tasks:
        report(f"{each.label}: {task.name}")
        try:
            result = evaluate(answerer, task, settings, under=out / "runs")
        except TiercelError as error:
            row["errors"][task.name] = str(error)
            continue
        row["scores"][task.name] = _score(result)


def _score(result: Result) -> dict[str, Any]:
    return {"score": result.score, "interval": result.interval, "items": result.n_items, "cut": result.cut,
            "errors": result.errors, "generated_tokens": result.generated_tokens, "seconds": result.seconds,
            "chance": result.chance, "title": result.task["title"]}  # fmt: skip


def _speeds(
    row: dict[str, Any], each: Entrant, lengths: Sequence[int], file: Path,
    timed: Callable[[Entrant, int], dict[str, Any]], report: Report,
) -> None:  # fmt: skip
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for length in lengths:
        key = f"{each.label} {length}"
        if key not in kept:
            report(f"{each.label}: speed at {length:,}")
            try:
                kept[key] = timed(each, length)
            except TiercelError as error:
                row["errors"][f"speed at {length}"] = str(error)
                continue
            _keep(file, json.dumps(kept, indent=1))
        row["speed"][str(length)] = kept[key]


def timed_here(each: Entrant, length: int) -> dict[str, Any]:
    """Prefill, decode and peak memory of a model in a process of its own; of an address what its answers show."""
    if each.address is not None:
        return timed_there(each, length)
    from tiercel.bench.peers import Worker
    from tiercel.hub import local_models
    from tiercel.runtime.cpu import cores

    path = str(local_models.resolve(each.name, pull=True))
    with Worker({"engine": "tiercel", "threads": cores(), "dtype": "auto", "path": path}) as worker:
        order = {"prompts": [length], "generate": TIMED_TOKENS, "context": length, "batch": 1}
        turn = worker.round(order)
    return {"prefill_tok_s": turn["prefill"][str(length)], "decode_tok_s": turn["decode"],
            "memory_bytes": turn["peak_rss_bytes"]}  # fmt: skip


def timed_there(each: Entrant, length: int) -> dict[str, Any]:
    """Time two answers to prompts that are in no cache: one of one token, one of TIMED_TOKENS."""
    from tiercel.evals.endpoint import Endpoint

    assert each.address is not None
    there = Endpoint(each.address, each.name)
    seconds: list[float] = []
    made: list[int] = []
    read = 0
    for tokens in (1, TIMED_TOKENS):
        words = f"{time.time_ns()} " + " ".join(str(n % 10) for n in range(length // 2))
        ask = Ask(False, 1, tokens, 0.0, 1.0, 0, 0.0, (), None, 1)
        began = time.perf_counter()
        (answers,) = there.answer([Question(0, words, 0)], ask)
        if answers.error is not None:
            raise answers.error
        seconds.append(time.perf_counter() - began)
        read, made = answers.prompt_tokens, [*made, answers.samples[0].tokens]
    more = made[1] - made[0]
    decode = more / max(seconds[1] - seconds[0], 1e-9) if more > 0 and seconds[1] > seconds[0] else None
    return {"prefill_tok_s": read / seconds[0], "decode_tok_s": decode, "memory_bytes": None}


# ── the page


def _write(out: Path, found: dict[str, Any]) -> None:
    _keep(out / "comparison.json", json.dumps(found, indent=1, ensure_ascii=False))
    _keep(out / "comparison.md", markdown(found))
    _keep(out / "comparison.html", page(found))


def _keep(file: Path, text: str) -> None:
    from tiercel.runtime.atomic import atomic_write

    with atomic_write(file) as to:
        to.write(f"{text}\n".encode())


SPEEDS = {"prefill_tok_s": "prefill, tokens a second", "decode_tok_s": "decode, tokens a second",
          "memory_bytes": "memory"}  # fmt: skip


def tables(found: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """(title, rows): a head, then a model each."""
    from tiercel.plan import human_bytes

    models = found["models"]
    tasks = list(dict.fromkeys(name for m in models for name in (*m["scores"], *m["errors"]) if "speed at" not in name))
    out = []
    if tasks:
        head = ["model", *tasks]
        rows = [[m["model"], *(_cell(m, task) for task in tasks)] for m in models]
        out.append(("scores, % (95 % interval)", [head, *rows]))
    failed = {int(name.split()[-1]) for m in models for name in m["errors"] if name.startswith("speed at")}
    lengths = sorted({int(n) for m in models for n in m["speed"]} | failed)
    for key, title in SPEEDS.items() if lengths else ():
        rows = []
        for m in models:
            values = [m["speed"].get(str(n), {}).get(key) for n in lengths]
            rows.append([m["model"], *("–" if v is None else human_bytes(v) if key == "memory_bytes" else f"{v:,.1f}"
                                       for v in values)])  # fmt: skip
        out.append((f"{title}, by tokens of context", [["model", *(f"{n:,}" for n in lengths)], *rows]))
    failures = [[m["model"], name, why] for m in models for name, why in m["errors"].items()]
    return [*out, *([("not measured", [["model", "what", "why"], *failures])] if failures else [])]


def _cell(model: dict[str, Any], task: str) -> str:
    found = model["scores"].get(task)
    if found is None:
        return "–"
    interval = found["interval"]
    return f"{100 * found['score']:.1f} ({100 * interval['low']:.1f} – {100 * interval['high']:.1f})"


def markdown(found: dict[str, Any]) -> str:
    out = ["# " + " and ".join(m["model"] for m in found["models"])]
    for title, (head, *rows) in tables(found):
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
        lines = [f"| {' | '.join(row)} |" for row in cells]
        out += ["", f"## {title}", "", lines[0], "|---|" + "---:|" * (len(head) - 1), *lines[1:]]
    return "\n".join([*out, ""])


STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:54rem;margin:2rem auto;
padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;margin:.5rem 0 1.5rem;font-size:.92em;display:block;overflow-x:auto}
td,th{padding:.3rem .8rem;border-bottom:1px solid #8884;text-align:right}td:first-child,th:first-child{text-align:left}
svg{width:100%;height:auto;margin:.5rem 0}h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}}"""


def page(found: dict[str, Any]) -> str:
    """One HTML page without anything from elsewhere."""
    title = " and ".join(m["model"] for m in found["models"])
    out = [f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>',
           '<meta name="viewport" content="width=device-width, initial-scale=1">',
           f"<style>{STYLE}</style><h1>{escape(title)}</h1>", *_pictures(found)]  # fmt: skip
    for name, (head, *rows) in tables(found):
        out.append(f"<h2>{escape(name)}</h2><table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>")
        out += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
        out.append("</table>")
    return "\n".join(out)


def _pictures(found: dict[str, Any]) -> list[str]:
    from tiercel.plan import human_bytes

    models, out = found["models"], []
    tasks = list(dict.fromkeys(name for m in models for name in m["scores"]))
    if tasks:
        groups = {task: {m["model"]: m["scores"].get(task, {}).get("score") for m in models} for task in tasks}
        out.append(chart.bars("scores", groups, label=lambda v: f"{100 * v:.1f} %", top=1.0))
    for key, title in SPEEDS.items():
        series = {m["model"]: [(float(n), v[key]) for n, v in sorted(m["speed"].items(), key=lambda item: int(item[0]))
                               if v[key] is not None] for m in models}  # fmt: skip
        series = {name: points for name, points in series.items() if points}
        if series:
            label = human_bytes if key == "memory_bytes" else lambda v: f"{v:,.4g}"
            out.append(chart.lines(title, series, x="tokens of context", y="", label_y=label,
                                   label_x=lambda n: f"{n:,.0f}"))  # fmt: skip
    return out
