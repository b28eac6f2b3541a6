"""How fast a model is on this machine, alone or beside a peer: `tiercel bench`.

Every engine has a process of its own, which loads once and then measures a round whenever it is asked.  Rounds are
taken in turn (memory, ours, theirs, memory, ours, …), so that a busy moment of the machine meets all of them, and
ratios are those of one round.

    prefill    N tokens into an empty state, read as `generate.prefill` reads them
    decode     G steps after C tokens of context; fixed tokens and no sampling, as llama-bench does
    memory     a buffer far larger than the caches, read with all threads: the limit of decode (`traffic.py`)

This process imports no torch unless it has to write a model for a peer.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

from tiercel.bench.case import Case, Report
from tiercel.bench.models import Files, prepare
from tiercel.bench.peers import PEERS, Engine, Worker, require
from tiercel.runtime.cpu import cores, cpu_name


def run(case: Case, report: Report = lambda what, done, total: None) -> dict[str, Any]:
    """Measure; raises TiercelError when the model or a peer cannot be had."""
    for peer in case.vs:
        require(peer)
    with tempfile.TemporaryDirectory(prefix="tiercel-bench-") as scratch, ExitStack() as stack:
        files = prepare(case, Path(scratch), report)
        engines: dict[str, Engine] = {
            name: stack.enter_context(engine) for name, engine in _engines(case, files, report)
        }
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
        for turn in range(case.repeat):
            for i, (name, engine) in enumerate(engines.items()):
                report(f"measuring {name}", turn * len(engines) + i, case.repeat * len(engines))
                rounds[name].append(engine.round(case.round))
        return _result(case, engines, rounds)


def _engines(case: Case, files: Files, report: Report) -> Any:
    threads = case.threads or cores()
    yield "memory", Worker({"engine": "memory", "threads": threads, "device": case.device})
    report(f"loading {case.model}", 0, 0)
    longest = max(*case.prompts, case.context + case.generate) + 8
    ours = Worker(
        {
            "engine": "tiercel", "threads": threads, "dtype": case.dtype, "device": case.device, "rows": case.batch,
            "longest": longest, **files.ours,
        }
    )  # fmt: skip
    ours.round({**case.round, "generate": min(case.generate, 2)})  # once without counting
    yield "tiercel", ours
    for peer in case.vs:
        report(f"loading {peer}", 0, 0)
        yield peer, PEERS[peer](files, threads, case)


# ── the result


def _result(case: Case, engines: dict[str, Engine], rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:

    ours, about = rounds["tiercel"], engines["tiercel"].about
    bandwidth = statistics.median(turn["bandwidth_gb_s"] for turn in rounds["memory"])
    out: dict[str, Any] = {
        "model": case.model,
        "random": case.random,
        "machine": cpu_name(),
        "device": case.device,
        "threads": case.threads or cores(),
        "date": date.today().isoformat(),
        "repeat": case.repeat,
        "batch": case.batch,
        "context": case.context,
        **{k: about[k] for k in ("version", "architecture", "parameters", "load_s", "first_token_s", "process_s")},
        "peak_rss_bytes": max(turn["peak_rss_bytes"] for turn in ours),
        "weights_bytes": about["weights_bytes"],
        "bandwidth_gb_s": round(bandwidth, 2),
        "prefill_tok_s": None,
        "decode_tok_s": None,
        **_speeds(ours),
    }
    if case.generate:
        step, speed = ours[0]["bytes_per_step"], out["decode_tok_s"] / case.batch
        share = [t["decode"] / case.batch * step / m["bandwidth_gb_s"] / 1e9
                 for t, m in zip(ours, rounds["memory"], strict=True)]  # fmt: skip
        out |= {"bytes_per_token": step // case.batch, "read_gb_s": round(step * speed / 1e9, 2),
                "read_share": round(statistics.median(share), 3)}  # fmt: skip
    if "product_tflops" in rounds["memory"][0]:
        product = statistics.median(turn["product_tflops"] for turn in rounds["memory"])
        out |= {"device_name": engines["memory"].about["device_name"], "product_tflops": round(product, 1),
                "peak_device_bytes": max(turn["peak_device_bytes"] for turn in ours),
                "product_share": {n: round(2e-12 * out["parameters"] * own["median"] / product, 3)
                                  for n, own in out["prefill"].items()}}  # fmt: skip
    if case.vs:
        out["peers"] = {peer: _beside(ours, rounds[peer], engines[peer].about) for peer in case.vs}
    return out


def _speeds(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians, with what they are medians of."""
    prefill = {n: spread([turn["prefill"][n] for turn in rounds]) for n in rounds[0]["prefill"]}
    out: dict[str, Any] = {"prefill": prefill}
    if prefill:
        out["prefill_tok_s"] = next(iter(prefill.values()))["median"]
    if rounds[0].get("decode"):
        out["decode"] = spread([turn["decode"] for turn in rounds])
        out["decode_tok_s"] = out["decode"]["median"]
    return out


def _beside(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    """A peer's own figures, and ours over theirs round by round."""
    pairs = list(zip(ours, theirs, strict=True))
    ratios: dict[str, Any] = {f"prefill {n}": spread([a["prefill"][n] / b["prefill"][n] for a, b in pairs])
                              for n in theirs[0]["prefill"]}  # fmt: skip
    if theirs[0].get("decode"):
        ratios["decode"] = spread([a["decode"] / b["decode"] for a, b in pairs])
    memory = max(turn["peak_rss_bytes"] for turn in theirs)
    return {**about, **_speeds(theirs), "peak_rss_bytes": memory, "ratios": ratios}


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3),
            "max": round(max(values), 3), "runs": [round(value, 3) for value in values]}  # fmt: skip
