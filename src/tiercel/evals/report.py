"""Reports of a run: `summary` for the terminal, `save` as report.json, report.md and report.html.

The page is one file with its pictures as inline SVG; it loads nothing and runs nothing.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiercel.evals import plots
from tiercel.evals.aggregate import Result
from tiercel.evals.statistics import wilson
from tiercel.runtime.atomic import atomic_write

MAX_SHOWN_TRANSCRIPTS = 200  # transcripts in the page; all of them are in items.jsonl
MAX_SHOWN_CHARS = 6000  # characters of one text in the page


def save(result: Result, folder: Path | None = None) -> Path:
    """Write the three reports, each whole or not at all; the page's path."""
    folder = folder or result.folder
    assert folder is not None, "a run that is kept nowhere has no place for a report"
    texts = {
        "report.json": json.dumps(result.to_dict(items=False), ensure_ascii=False, indent=1) + "\n",
        "report.md": markdown(result),
        "report.html": page(result),
    }
    for name, text in texts.items():
        with atomic_write(folder / name) as file:
            file.write(text.encode("utf-8", "replace"))
    return folder / "report.html"


def summary(result: Result) -> str:
    """A few lines for the terminal."""
    lines = [f"{result.model['name']} on {result.task['title']}: {percent(result.score)} {_between(result)}"]
    lines += [f"  {name:<11} {value}" for name, value in facts(result) if name in TERMINAL_ROWS]
    if result.folder is not None:
        lines.append(f"  {'report':<11} {result.folder / 'report.html'}")
    return "\n".join(lines)


TERMINAL_ROWS = ("metric", "vote", "asked", "also", "baselines", "cut", "no answer", "not asked", "spent")


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _between(result: Result) -> str:
    interval = result.interval
    return f"(95 %: {100 * interval['low']:.1f} to {100 * interval['high']:.1f}, {interval['method']})"


def facts(result: Result) -> list[tuple[str, str]]:
    """Everything but the items, as lines of name and text."""
    s, per = result.settings, result.n_samples // max(result.n_items, 1)
    total, lengths = result.task["items"], result.generated_tokens > 0
    asked = f"{result.n_items} items"
    if result.n_items < total:
        asked = f"{result.n_items} of {total} items (drawn with seed {s['seed']})"
    if result.settings["choices"] == "likelihood":
        how = f"likelihood of the given continuations, plain text, {s['shots']} shots"
    else:
        asked += f", {per} sample{'s' if per != 1 else ''} each"
        form = "chat template" if s["chat"] else "plain text"
        how = (
            f"{form}, {s['shots']} shots, temperature {s['temperature']:g}, top-p {s['top_p']:g}, top-k {s['top_k']}, "
        )
        how += f"min-p {s['min_p']:g}, {s['max_tokens']} tokens, seed {s['seed']}"
    further = {name: value for name, value in result.metrics.items() if name != result.metric}
    also = ", ".join(f"{name} {percent(value) if value <= 1 and name != 'perplexity' else f'{value:.3f}'}"
                     for name, value in further.items())  # fmt: skip
    baselines = [] if result.chance is None else [f"chance {percent(result.chance)}"]
    if result.majority is not None:
        baselines.append(f"always {result.majority['answer']} {percent(result.majority['score'])}")
    model = {name: value for name, value in result.model.items() if name != "name"}
    lines = [
        ("metric", result.metric),
        ("vote", _vote(result)),
        ("asked", asked),
        ("how", how),
        ("also", also),
        ("baselines", ", ".join(baselines)),
        ("cut", f"{result.cut} of {result.n_samples} outputs ended by the token budget" if lengths else ""),
        ("no answer", f"{result.unanswered} outputs without an answer" if result.unanswered else ""),
        ("not asked", f"{result.errors} items do not fit the context and count as wrong" if result.errors else ""),
        ("spent", f"{result.generated_tokens} tokens written, {result.prompt_tokens} read "
                  f"({result.cached_tokens} of them reused), {result.seconds:.1f} s"
                  + (f"; {result.beyond_tokens} more by answers given up when a vote was decided"
                     if result.beyond_tokens else "")),
        ("model", ", ".join(f"{name} {value}" for name, value in model.items())),
        ("data", "; ".join(f"{d['file']} ({d['rows']} rows, sha256 {d['sha256']})" for d in result.task["data"])),
        ("versions", ", ".join(f"{name} {value}" for name, value in result.versions.items())),
    ]  # fmt: skip
    return [(name, text) for name, text in lines if text]


def _vote(result: Result) -> str:
    """What was voted on, and what it left out."""
    if "vote" not in result.settings:
        return ""
    s = result.settings["vote"]
    held = [record["vote"] for record in result.items if "vote" in record]
    line = f"{s['k']} answers a question at most, {result.n_samples / max(result.n_items, 1):.1f} counted on average"
    if s["method"] != "majority":
        line += f", weight {s['weight']}, window {s['window']}"
    if sum(vote["stopped"] for vote in held):
        line += f", {sum(vote['stopped'] for vote in held)} stopped early"
    if s["consensus"]:
        line += f", {sum(vote['consensus'] for vote in held)} of {len(held)} ended by consensus"
    return line


def _ways(result: Result) -> list[tuple[str, float, float, float]]:
    """(name, share, low, high): a single answer, and every way to count the votes."""
    if "vote" not in result.settings:
        return []
    names = {name for record in result.items for name in record.get("scores", ())}
    return [(name, value, *wilson(value * result.n_items, result.n_items))
            for name, value in result.metrics.items() if name in names]  # fmt: skip


def markdown(result: Result) -> str:
    out = [f"# {_md(result.model['name'])} on {_md(result.task['title'])}", "",
           f"**{percent(result.score)}** {_between(result)}", "", "| | |", "|---|---|"]  # fmt: skip
    out += [f"| {name} | {_md(text)} |" for name, text in facts(result)]
    if ways := _ways(result):
        out += ["", "| the same answers, counted by | right | 95 % |", "|---|---:|---:|"]
        out += [f"| {_md(name)} | {percent(value)} | {100 * low:.1f} – {100 * high:.1f} |"
                for name, value, low, high in ways]  # fmt: skip
    if result.groups:
        out += ["", "| group | items | score |", "|---|---:|---:|"]
        out += [f"| {_md(name)} | {int(group['items'])} | {percent(group['score'])} |"
                for name, group in result.groups.items()]  # fmt: skip
    return "\n".join(out) + "\n"


def _md(text: str) -> str:
    return html.escape(str(text), quote=False).replace("|", "\\|").replace("\n", " ")


# ── the page ──

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #667; --paper: #fff; --line: #d8dce2; --good: #1d7f5f;
        --bad: #c2553b; --mark: #3866b0; --soft: #f4f6f8 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --dim: #9aa3ad; --paper: #15181c; --line: #333a42;
        --good: #4fbf95; --bad: #e2806a; --mark: #7ba6ec; --soft: #1d2126 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 860px;
       margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem }
.score { font-size: 3rem; font-weight: 650; line-height: 1.1; margin: .5rem 0 0 } .dim { color: var(--dim) }
table { border-collapse: collapse; width: 100% } td { padding: .25rem .6rem .25rem 0; vertical-align: top;
       border-top: 1px solid var(--line); overflow-wrap: anywhere }
td:first-child { color: var(--dim); white-space: nowrap }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif } svg text { fill: var(--ink) }
svg .dim { fill: var(--dim) } svg .good { fill: var(--good) } svg .bad { fill: var(--bad) }
svg .mark { fill: var(--mark) }
svg .line { stroke: var(--line) } svg .whisker { stroke: var(--ink); stroke-width: 1.5 }
details { border-top: 1px solid var(--line); padding: .3rem 0 } summary { cursor: pointer; overflow-wrap: anywhere }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); padding: .6rem; border-radius: 6px;
      font: 12.5px/1.45 ui-monospace, monospace; margin: .4rem 0 }
.right { color: var(--good) } .wrong { color: var(--bad) }
"""


def page(result: Result) -> str:
    e = html.escape
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{e(result.model['name'])} on {e(result.task['title'])}</title><style>{STYLE}</style>",
        f"<h1>{e(result.model['name'])} on {e(result.task['title'])}</h1>",
        f"<p class=score>{percent(result.score)}</p><p class=dim>{e(result.metric)} {e(_between(result))}</p>",
        plots.score(result.score, result.interval, _baselines(result)),
    ]
    if ways := _ways(result):
        parts += ["<h2>The same answers, counted by</h2>", plots.bars(ways)]
    if result.groups:
        rows = []
        for name, group in result.groups.items():
            low, high = wilson(group["score"] * group["items"], int(group["items"]))
            rows.append((f"{name} ({int(group['items'])})", group["score"], low, high))
        parts += ["<h2>By group, with 95 % Wilson intervals</h2>", plots.bars(rows)]
    lengths = [(s["tokens"], bool(s["correct"])) for r in result.items for s in r.get("samples", ())]
    if lengths:
        parts += ["<h2>Tokens of an output</h2>", plots.lengths(lengths, result.settings["max_tokens"])]
    picks = [(r["picks"][result.metric], int(r["gold"])) for r in result.items if result.metric in r.get("picks", {})]
    if picks:
        parts += ["<h2>What was chosen, and what was right</h2>", plots.picks(picks)]
    rows_ = "".join(f"<tr><td>{e(name)}<td>{e(text)}" for name, text in facts(result))
    parts += [f"<h2>How it was measured</h2><table>{rows_}</table>", _transcripts(result.items)]
    return "\n".join(parts) + "\n"


def _baselines(result: Result) -> list[tuple[str, float]]:
    found = [] if result.chance is None else [("chance", result.chance)]
    if result.majority is not None:
        found.append((f"always {result.majority['answer']}", result.majority["score"]))
    return found


def _transcripts(items: Sequence[dict[str, Any]]) -> str:
    shown = items[:MAX_SHOWN_TRANSCRIPTS]
    more = (
        f"; the other {len(items) - MAX_SHOWN_TRANSCRIPTS} are in items.jsonl"
        if len(items) > MAX_SHOWN_TRANSCRIPTS
        else ""
    )
    out = [f"<h2>Transcripts</h2><p class=dim>{len(shown)} of {len(items)}{more}</p>"]
    for record in shown:
        verdict = "right" if record["score"] == 1 else "wrong" if record["score"] == 0 else ""
        out.append(f"<details><summary><span class='{verdict}'>{percent(record['score'])}</span> "
                   f"{html.escape(record['id'])} <span class=dim>right: {_short(record['gold'], 80)}</span></summary>"
                   f"{_prompt(record['prompt'])}{_answers(record)}</details>")  # fmt: skip
    return "\n".join(out)


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, str):
        return f"<pre>{_short(prompt)}</pre>"
    return "".join(f"<p class=dim>{html.escape(m['role'])}</p><pre>{_short(m['content'])}</pre>" for m in prompt)


def _answers(record: dict[str, Any]) -> str:
    if "error" in record:
        return f"<p class=wrong>{html.escape(record['error'])}</p>"
    if "samples" not in record:
        rows = zip(record["continuations"], record["logprobs"], strict=True)
        return "<table>" + "".join(f"<tr><td>{value:.3f}<td>{_short(text)}" for text, value in rows) + "</table>"
    out = []
    for number, sample in enumerate(record["samples"], 1):
        verdict = "right" if sample["correct"] else "wrong"
        answer = "none" if sample["answer"] is None else _short(sample["answer"], 200)
        cut = ", cut" if sample["finish_reason"] == "length" else ""
        note = f", {_short(sample['note'], 200)}" if sample.get("note") else ""
        out.append(f"<p><span class={verdict}>{verdict}</span> <span class=dim>sample {number}, {sample['tokens']} "
                   f"tokens{cut}{note}; answer: {answer}</span></p>")  # fmt: skip
        if sample["thinking"]:
            out.append(f"<p class=dim>reasoning</p><pre class=dim>{_short(sample['thinking'])}</pre>")
        out.append(f"<pre>{_short(sample['text'])}</pre>")
    return "".join(out)


def _short(text: str, most: int = MAX_SHOWN_CHARS) -> str:
    """Escaped, its middle left out where it is long."""
    if len(text) > most:
        text = f"{text[: most // 2]} … {len(text) - most} characters left out … {text[-most // 2 :]}"
    return html.escape(text)
