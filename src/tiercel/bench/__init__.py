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
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from tiercel.bench.models import Files, prepare
from tiercel.bench.peers import PEERS, Engine, Worker, require
from tiercel.errors import RequestError

SHORT_PROMPT = 16  # tokens read before the first one of an answer, where load and first token are timed

Report = Callable[[str, int, int], None]  # (what, done, total)


@dataclass(frozen=True)
class Case:
    """What to measure.

    model: anything `load` takes; with `random`, a named shape (`families.shapes`), a config.json or a pattern file
    prompts: prefill lengths · generate, context: decode so many tokens after so many · batch: rows at once
    random: the recipe of weights made on the spot · write: where to keep these as GGUF · vs: peers, see `peers.py`
    """

    model: str
    prompts: tuple[int, ...] = (512,)
    generate: int = 64
    context: int = 0
    batch: int = 1
    threads: int | None = None
    repeat: int = 5
    dtype: str = "auto"
    random: str | None = None
    write: Path | None = None
    vs: tuple[str, ...] = ()
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("generate", 0), ("context", 0), ("batch", 1), ("repeat", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RequestError(f"{name} must be a whole number from {least}, not {value}")
        if any(length < 0 for length in self.prompts):
            raise RequestError("a prompt has a length from 0 (none is measured)")
        if not self.generate and not any(self.prompts):
            raise RequestError("nothing is left to measure: give --prompt or --generate a number above 0")
        if self.write is not None and (self.random is None or self.write.suffix != ".gguf"):
            raise RequestError("--write keeps random weights (--random) as a file whose name ends in .gguf")
        unknown = [peer for peer in self.vs if peer not in PEERS]
        if unknown:
            raise RequestError(f"no peer {unknown[0]!r}; known: {', '.join(PEERS)}")
        if self.device not in ("cpu", "cuda"):
            raise RequestError(f"a device is cpu or cuda, not {self.device!r}")
        if self.device != "cpu" and "llama.cpp" in self.vs:
            raise RequestError("llama.cpp is measured on the CPU: leave out --device or --vs llama.cpp")
        if self.batch > 1 and "llama.cpp" in self.vs:
            raise RequestError("llama-bench decodes one row at a time: leave out --batch or --vs llama.cpp")

    @property
    def round(self) -> dict[str, Any]:
        """What an engine is asked for."""
        prompts = [length for length in self.prompts if length]
        return {"prompts": prompts, "generate": self.generate, "context": self.context, "batch": self.batch}


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


def cores() -> int:
    """Real cores this process may use: a second thread on a core reads no faster."""
    import os

    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


# ── the result


def _result(case: Case, engines: dict[str, Engine], rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    from tiercel.commands.doctor import cpu_name

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
