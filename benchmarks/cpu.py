"""What the CPU side has to show: every row of the table in README.md, measured here.

    python benchmarks/cpu.py                        all rows: about an hour on two cores, 25 GB of disk
    python benchmarks/cpu.py 0.5b-decode 7b-memory  some of them
    python benchmarks/cpu.py --list                 their names
    python benchmarks/cpu.py --readme               put the table (of the latest results) into README.md

Random weights of true shapes in the types named; SmolLM2 is the real file (`tiercel pull smollm2`).  llama-bench is
found as `tiercel bench` finds it.  All engines take turns; a ratio is the median of ratios of one turn.  Results are
kept in benchmarks/results/cpu.json, each row with its date, machine and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import tiercel
from tiercel.bench.case import SHORT_PROMPT, Case
from tiercel.bench.models import write
from tiercel.bench.peers import LlamaBench, Worker, require
from tiercel.bench.run import cores, run, spread
from tiercel.commands.chat.render import waiting
from tiercel.commands.doctor import cpu_name
from tiercel.families.shapes import SHAPES

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "cpu.json", HERE.parent / "README.md"
NANO_LAYERS = "MEMEM*EMEMEM*"
BEGIN, END = "<!-- benchmarks/cpu.py -->", "<!-- end -->"

Result = dict[str, Any]


@dataclass(frozen=True)
class TableRow:
    """One line: value(result of its case), and what it must reach.  lower: less is better."""

    case: str
    what: str
    value: Callable[[Result], float]
    said: Callable[[Result], str]
    floor: float | None
    goal: Callable[[Result], float] | float | None
    unit: str = "×"
    lower: bool = False

    def cells(self, result: Result) -> list[str]:
        value, goal = self.value(result), self.goal(result) if callable(self.goal) else self.goal
        sign = "≤" if self.lower else "≥"

        def reached(bound: float | None) -> bool:
            return bound is not None and (value <= bound if self.lower else value >= bound)

        def bound(number: float | None) -> str:
            return "" if number is None else f"{sign} {self._text(number)}"

        mark = "goal" if reached(goal) else "floor" if reached(self.floor) else "–" if self.floor or goal else ""
        return [self.what, f"**{self._text(value)}**", self.said(result), bound(self.floor), bound(goal), mark]

    def _text(self, number: float) -> str:
        return f"{number:.0%}" if self.unit == "%" else f"{number:.2f} {self.unit}".rstrip()


def ratio(peer: str, what: str) -> Callable[[Result], float]:
    return lambda r: r["peers"][peer]["ratios"][what]["median"]


def both(peer: str, what: str) -> Callable[[Result], str]:
    """`24.1 and 15.7 tok/s (1.4 – 1.6 ×)`"""

    def text(r: Result) -> str:
        other = r["peers"][peer]
        ours, theirs = (x["decode"] if what == "decode" else x["prefill"][what.split()[1]] for x in (r, other))
        spread = other["ratios"][what]
        return f"{ours['median']:.1f} and {theirs['median']:.1f} tok/s ({spread['min']:.2f} – {spread['max']:.2f} ×)"

    return text


def versus(case: str, peer: str, what: str, label: str, floor: float | None, goal: float | None) -> TableRow:
    return TableRow(case, label, ratio(peer, what), both(peer, what), floor, goal)


P, D, L, T = "prefill 512", "decode", "llama.cpp", "transformers"
ROWS = {
    "7b-prefill": versus("7b", L, P, "Falcon-H1 7B Q4_K_M prefill 512, over llama.cpp", 1.5, 2.5),
    "7b-decode": versus("7b", L, D, "7B Q4_K_M decode, over llama.cpp", 1.0, 1.15),
    "7b-bandwidth": TableRow("7b", "7B Q4_K_M decode: share of the measured read bandwidth", lambda r: r["read_share"],
                        lambda r: f"{r['read_gb_s']:.1f} of {r['bandwidth_gb_s']:.1f} GB/s", None, 0.9, unit="%"),
    "7b-memory": TableRow("7b", "7B Q4_K_M resident memory", lambda r: r["peak_rss_bytes"] / 1e9,
                     lambda r: f"file {r['file_bytes'] / 1e9:.2f}, "
                               f"llama.cpp {r['peers'][L]['peak_rss_bytes'] / 1e9:.2f} GB",
                     5.6, lambda r: 1.1 * r["file_bytes"] / 1e9, unit="GB", lower=True),
    "7b-first-token": TableRow("first-token", "7B Q4_K_M: process start to first token", lambda r: r["ours"]["median"],
                          lambda r: f"llama.cpp {r['theirs']['median']:.2f} s", 15.0,
                          lambda r: r["theirs"]["median"], unit="s", lower=True),
    "0.5b-prefill": versus("0.5b", L, P, "Falcon-H1 0.5B Q4_K_M prefill 512, over llama.cpp", 1.8, 3.0),
    "0.5b-decode": versus("0.5b", L, D, "0.5B Q4_K_M decode, over llama.cpp", 1.2, 1.6),
    "qwen3.5-prefill": versus("qwen3.5", L, P, "Qwen3.5 0.8B Q4_K_M prefill 512, over llama.cpp", 1.8, 2.5),
    "qwen3.5-decode": versus("qwen3.5", L, D, "Qwen3.5 0.8B Q4_K_M decode, over llama.cpp", 1.1, 1.4),
    "qwen3.5-16k": TableRow("qwen3.5-16k", "Qwen3.5 0.8B decode after 16,384 tokens: time over bytes / bandwidth",
                       lambda r: 1 / r["read_share"],
                       lambda r: f"{r['decode_tok_s']:.1f} tok/s, {r['bytes_per_token'] / 1e6:.0f} MB each",
                       1.4, 1.2, lower=True),
    "granite-350m-prefill": versus("granite-350m", L, P, "Granite-4-H-350M prefill 512, over llama.cpp", 1.8, 2.5),
    "granite-350m-decode": versus("granite-350m", L, D, "Granite-4-H-350M Q4_K_M decode, over llama.cpp", 1.1, 1.4),
    "granite-1b-prefill": versus("granite-1b", L, P, "Granite-4-H-1B Q4_K_M prefill 512, over llama.cpp", 1.8, 2.5),
    "granite-1b-decode": versus("granite-1b", L, D, "Granite-4-H-1B Q4_K_M decode, over llama.cpp", 1.1, 1.4),
    "30b-a3b-decode": versus("30b-a3b", L, D, "30B-A3B (Nemotron 3, 12 of its 52 layers) decode, over llama.cpp",
                             None, 1.3),
    "lfm2-prefill": versus("lfm2", L, P, "LFM2-350M Q4_K_M prefill 512, over llama.cpp", 1.8, 2.5),
    "lfm2-decode": versus("lfm2", L, D, "LFM2-350M Q4_K_M decode, over llama.cpp", 1.1, 1.4),
    "smollm2-prefill": versus("smollm2", L, P, "SmolLM2-135M Q4_1 prefill 512, over llama.cpp", 1.5, 3.0),
    "smollm2-decode": versus("smollm2", L, D, "SmolLM2-135M Q4_1 decode, over llama.cpp", 1.0, 1.6),
    "bf16-prefill": versus("bf16", T, P, "0.5B bf16 prefill 512, over transformers", None, None),
    "bf16-decode": versus("bf16", T, D, "0.5B bf16 decode, over transformers", 4.0, 5.0),
    "8-rows": TableRow("8-rows", "0.5B Q4_K_M decode of 8 rows, over one row", lambda r: r["ratio"]["median"],
                  lambda r: f"{r['eight']['median']:.1f} and {r['one']['median']:.1f} tok/s", 3.0, 5.0),
    "16k": TableRow("16k", "0.5B Q4_K_M decode after 16,384 tokens: time over bytes / bandwidth",
               lambda r: 1 / r["read_share"],
               lambda r: f"{r['decode_tok_s']:.1f} tok/s, {r['bytes_per_token'] / 1e6:.0f} MB each",
               1.4, 1.15, lower=True),
}  # fmt: skip


# ── the cases


class Bench:
    """What the cases share: where models are written, once each, and how often to measure."""

    def __init__(self, models: Path, repeat: int, threads: int | None, wanted: set[str]) -> None:
        self.models, self.repeat, self.threads, self.wanted = models, repeat, threads, wanted

    def case(self, model: str, vs: str, name: str) -> Result:
        """Against a peer, and only what the wanted rows need."""
        prefill = (512,) if self.wanted & {f"{name}-prefill", f"{name}-memory"} else (0,)
        rest = self.wanted & {f"{name}-{what}" for what in ("decode", "bandwidth", "memory")}
        return self._run(Case(model, prefill, 64 if rest else 0, vs=(vs,), repeat=self.repeat, threads=self.threads))

    def packed(self, shape: str, recipe: str = "q4_k_m") -> Path:
        return self._written(shape, recipe, f"{shape.replace(':', '-')}-{recipe}.gguf")

    def _written(self, shape: str, recipe: str, name: str) -> Path:
        path = self.models / name
        if not path.exists():
            with waiting(f"writing {name}") as report:
                write(Case(shape, random=recipe), path, report)
        return path

    def _run(self, case: Case) -> Result:
        with waiting(f"measuring {case.model}", unit="rounds") as report:
            return run(case, report)

    def seven(self) -> Result:
        path = self.packed("falcon-h1:7b")
        return self.case(str(path), "llama.cpp", "7b") | {"file_bytes": path.stat().st_size}

    def half(self) -> Result:
        return self.case(str(self.packed("falcon-h1:0.5b")), "llama.cpp", "0.5b")

    def qwen(self) -> Result:
        return self.case(str(self.packed("qwen3.5:0.8b")), "llama.cpp", "qwen3.5")

    def granite_350m(self) -> Result:
        return self.case(str(self.packed("granite-4-h:350m")), "llama.cpp", "granite-350m")

    def granite_1b(self) -> Result:
        return self.case(str(self.packed("granite-4-h:1b")), "llama.cpp", "granite-1b")

    def a3b(self) -> Result:
        """The layers that fit beside a second engine in 16 GB: six of Mamba-2 and attention's two, five of experts."""
        config = self.models / "30b-a3b.json"
        config.write_text(json.dumps(SHAPES["nemotron-3-nano:30b-a3b"] | {"hybrid_override_pattern": NANO_LAYERS}))
        return self.case(str(self._written(str(config), "q4_k_m", "30b-a3b-q4_k_m.gguf")), "llama.cpp", "30b-a3b")

    def lfm2(self) -> Result:
        return self.case(str(self.packed("lfm2:350m")), "llama.cpp", "lfm2")

    def smollm2(self) -> Result:
        return self.case("smollm2", "llama.cpp", "smollm2")

    def bf16(self) -> Result:
        folder = self._written("falcon-h1:0.5b", "bf16", "falcon-h1-0.5b-bf16")
        return self.case(str(folder), "transformers", "bf16")

    def long(self, shape: str = "falcon-h1:0.5b") -> Result:
        path = self.packed(shape)
        return self._run(Case(str(path), (0,), 32, context=16384, repeat=self.repeat, threads=self.threads))

    def rows(self) -> Result:
        """One row and eight, in turn, in one process."""
        order = {"prompts": [], "generate": 64, "context": 0}
        with self._worker("falcon-h1:0.5b") as worker:
            turns = [[worker.round({**order, "batch": b})["decode"] for b in (1, 8)] for _ in range(self.repeat + 1)]
            version = worker.about["version"]
        one, eight = zip(*turns[1:], strict=True)  # the first is not counted
        ratios = [b / a for a, b in zip(one, eight, strict=True)]
        return self._about(version) | {"one": spread(one), "eight": spread(eight), "ratio": spread(ratios)}

    def first_token(self) -> Result:
        """A fresh process each time, files in the page cache, the same short prompt."""
        llama = LlamaBench(self.packed("falcon-h1:7b"), self.threads or cores())
        ours, theirs = [], []
        for _ in range(self.repeat + 1):
            with self._worker("falcon-h1:7b") as worker:
                ours.append(worker.about["process_s"])
                version = worker.about["version"]
            theirs.append(llama.first_token(SHORT_PROMPT))
        both = {"ours": spread(ours[1:]), "theirs": spread(theirs[1:])}
        return self._about(version) | both | {"peers": {"llama.cpp": llama.about}}

    def _worker(self, shape: str) -> Worker:
        path, threads = str(self.packed(shape)), self.threads or cores()
        return Worker({"engine": "tiercel", "threads": threads, "dtype": "auto", "path": path})

    def _about(self, version: str) -> Result:
        return {"machine": cpu_name(), "threads": self.threads or cores(), "date": date.today().isoformat(),
                "version": version, "repeat": self.repeat}  # fmt: skip


CASES: dict[str, Callable[[Bench], Result]] = {
    "7b": Bench.seven,
    "first-token": Bench.first_token,
    "0.5b": Bench.half,
    "qwen3.5": Bench.qwen,
    "qwen3.5-16k": lambda bench: bench.long("qwen3.5:0.8b"),
    "granite-350m": Bench.granite_350m,
    "granite-1b": Bench.granite_1b,
    "30b-a3b": Bench.a3b,
    "lfm2": Bench.lfm2,
    "smollm2": Bench.smollm2,
    "bf16": Bench.bf16,
    "8-rows": Bench.rows,
    "16k": Bench.long,
}
PEERS = {
    "7b": L,
    "first-token": L,
    "0.5b": L,
    "lfm2": L,
    "granite-350m": L,
    "granite-1b": L,
    "30b-a3b": L,
    "qwen3.5": L,
    "smollm2": L,
    "bf16": T,
}


# ── the table


def table(results: dict[str, Result], names: list[str]) -> str:
    lines = ["| | | | floor | goal | reached |", "|---|---:|---|---:|---:|---|"]
    lines += ["| " + " | ".join(ROWS[name].cells(results[name])) + " |" for name in names]
    return "\n".join([*lines, "", *dict.fromkeys(_where(results[name]) for name in names)])


def _where(r: Result) -> str:
    peers = "".join(f", {name} {peer['version']}" for name, peer in r.get("peers", {}).items())
    where = f"{r['machine']}, {r['threads']} thread(s)"
    return f"{where} · tiercel {r['version']}{peers} · {r['date']}, medians of {r['repeat']} rounds in turn  "


def into_readme(text: str) -> None:
    page = README.read_text()
    before, found, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    assert found and ended, f"README.md has no {BEGIN} … {END}"
    README.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="names from --list; all without any")
    parser.add_argument("--list", action="store_true", help="the names of the rows")
    parser.add_argument("--readme", action="store_true", help="measure nothing: the kept results go into README.md")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--models", type=Path, help="keep the written models here, and use what is there")
    args = parser.parse_args()
    if unknown := [name for name in args.rows if name not in ROWS]:
        parser.error(f"no row {unknown[0]!r}; known: {', '.join(ROWS)}")
    if args.list:
        print("\n".join(f"{name:<22}{row.what}" for name, row in ROWS.items()))
        return
    results: dict[str, Result] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.readme:
        into_readme(table(results, [name for name in ROWS if name in results]))
        return
    names = args.rows or list(ROWS)
    for peer in {PEERS[ROWS[name].case] for name in names if ROWS[name].case in PEERS}:
        require(peer)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of this process, which only writes
    with tempfile.TemporaryDirectory(prefix="tiercel-bench-") as scratch:
        models = args.models or Path(scratch)
        models.mkdir(parents=True, exist_ok=True)
        bench = Bench(models, args.repeat, args.threads, set(names))
        for case in dict.fromkeys(ROWS[name].case for name in names):
            results |= dict.fromkeys((name for name in names if ROWS[name].case == case), CASES[case](bench))
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
            print(f"{case} is measured", file=sys.stderr, flush=True)
    print(table(results, names))


if __name__ == "__main__":
    try:
        main()
    except tiercel.TiercelError as error:
        sys.exit(f"Error: {error}")
