"""`tiercel plan`: a name becomes a forecast, and `run` and `serve` fit themselves to what is free.

a model here          its header says every tensor's type
a published shape     falcon-h1:7b …, in bfloat16 as it is published
config.json, pattern  the same of a shape of one's own
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiercel.errors import DoesNotFit, ModelNotFound, RequestError, TiercelError
from tiercel.families import from_gguf, from_hf
from tiercel.families.family import Layout
from tiercel.families.pattern import read_file
from tiercel.families.shapes import SHAPES, find
from tiercel.hub import local_models
from tiercel.hub.describe import stored_types
from tiercel.hub.download import read_json
from tiercel.model.config import ModelConfig
from tiercel.plan import human_bytes
from tiercel.plan.forecast import CONTEXT_TOKENS, Forecast, forecast, matrices, smaller, transformer_of
from tiercel.plan.machines import PROBE, Machine, from_probe, machine
from tiercel.quant import PACKED_TYPES
from tiercel.runtime.cpu import cores, cpu_name
from tiercel.weights.gguf import GGUFFile

PROBE_S = 120.0
DEFAULT_CONTEXT = 4096  # of a plan, where the model's own is longer
LEAST_CONTEXT = 1024  # that `run` and `serve` go down to
CACHE_SHARE, LARGEST_CACHE = 1 / 4, 4 << 30  # of what weights leave free: for what has been read before


@dataclass(frozen=True)
class Subject:
    """stored: type of each of our parameters, or of all"""

    name: str
    config: ModelConfig
    stored: dict[str, str] | str
    tokenizer: bool = True

    @property
    def packed(self) -> bool:
        kinds = {self.stored} if isinstance(self.stored, str) else set(self.stored.values())
        return bool(kinds & set(PACKED_TYPES))


def subject(name: str) -> Subject:
    """Raises ModelNotFound, FormatError, UnsupportedError."""
    path = Path(name)
    if path.suffix in (".json", ".toml") and path.is_file():
        found = read_json(path) if path.suffix == ".json" else None
        if isinstance(found, dict) and "model_type" in found:
            return Subject(name, from_hf(found).config, "BF16")
        return Subject(name, read_file(path), "F32", tokenizer=False)
    if path.is_dir() and (path / "config.json").is_file():
        return _of_path(name, path)  # a config alone will do
    try:
        local = local_models.find(name)
    except ModelNotFound:
        local = None
    if local is not None:
        return _of_path(name, local.path)
    if (published := find(name)) is not None:
        return Subject(name, from_hf(published).config, "BF16")
    raise ModelNotFound(f"no model and no shape {name!r}; pull it, or choose of {', '.join(SHAPES)}")


def _of_path(name: str, path: Path) -> Subject:
    if path.suffix.lower() == ".gguf":
        with GGUFFile(path) as file:
            layout = from_gguf(file.metadata, file.tensors)
            types = {tensor: entry.type for tensor, entry in file.tensors.items()}
            tokenizer = file.metadata.get("tokenizer.ggml.model", "no_vocab") != "no_vocab"
        return Subject(name, layout.config, _ours(layout, types, gguf=True), tokenizer)
    if path.suffix in (".json", ".toml"):
        return Subject(name, read_file(path), "F32", tokenizer=False)
    config = read_json(path / "config.json")
    layout = from_hf({key: value for key, value in config.items() if key != "quantization_config"})
    types = {}
    for file_ in sorted(path.glob("*.safetensors")):
        types |= stored_types(file_)
    return Subject(name, layout.config, _ours(layout, types) if types else "BF16", (path / "tokenizer.json").is_file())


def _ours(layout: Layout, types: dict[str, str], gguf: bool = False) -> dict[str, str]:
    """Type of each of our parameters, from those of a file's tensors."""
    usual = Counter(types.values()).most_common(1)[0][0] if types else "BF16"
    out = {}
    for row in layout.rows:
        names: Iterable[str | None] = (row.gguf,) if gguf else _hf_names(row)
        out[row.ours] = next((types[name] for name in names if name in types), usual)
    return out


def _hf_names(row: Any) -> list[str]:
    names = list(row.hf) if isinstance(row.hf, tuple) else [row.hf]
    return [*names, *row.aliases, *([row.fused[0]] if row.fused else [])]


# ── machines


def this_machine(kinds: Sequence[str] = (), *, measure: bool = False) -> Machine:
    """This one.  kinds: packings whose speeds are wanted; what is not known yet is measured (some seconds) and kept.

    measure: measure again, and keep what is faster.  Without kinds the speeds stay unknown.
    """
    import psutil

    memory = psutil.virtual_memory()
    name = cpu_name()
    if not kinds:
        return Machine("this", memory.total, memory.available)
    file = local_models.home() / "machine.json"
    key = f"{name}, {_threads()} thread(s), {os.environ.get('TIERCEL_ISA', '')}, probe {PROBE}"
    known = read_json(file) if file.is_file() else {}
    known = known if isinstance(known, dict) else {}
    seconds: dict[str, float] = known.get(key, {})
    missing = [kind for kind in kinds if measure or f"{kind} one" not in seconds]
    if missing:
        for piece, new in _probe(missing).items():
            seconds[piece] = min(new, seconds.get(piece, new))  # what else runs only ever makes it longer
        _keep(file, known | {key: seconds})
    return from_probe("this", memory.total, memory.available, seconds)


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or cores())


def _probe(kinds: Sequence[str]) -> dict[str, float]:
    try:
        output = subprocess.run(
            [sys.executable, "-m", "tiercel.bench.probe", json.dumps(list(kinds))], check=True, capture_output=True,
            text=True, timeout=PROBE_S, env={**os.environ, "OMP_NUM_THREADS": str(_threads())},
        ).stdout  # fmt: skip
        found: dict[str, float] = json.loads(output)
        return found
    except (subprocess.SubprocessError, ValueError) as error:
        raise TiercelError(f"this machine could not be measured ({type(error).__name__}); try --device") from error


def _keep(file: Path, known: dict[str, Any]) -> None:
    from tiercel.runtime.atomic import atomic_write

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as out:
            out.write(json.dumps(known).encode())
    except OSError:  # a home that cannot be written: it is measured again next time
        pass


# ── a plan


def plan(
    name: str,
    *,
    context: int | None = None,
    slots: int = 1,
    quantize: str | None = None,
    dtype: str = "auto",
    device: str = "this",
    measure: bool = False,
) -> dict[str, Any]:
    """The forecast, the same beside it for a Transformer of that size, by length, and what fits where this does not."""
    what = subject(name)
    most = what.config.max_length
    context = min(DEFAULT_CONTEXT, most) if context is None else context
    if not 0 < context <= most:
        raise RequestError(f"a context of {context} is asked for; {name} was made for 1 to {most}")
    held = matrices(what.config, what.stored, dtype, quantize)
    kinds = sorted({m.kind for m in held if not m.keep_fp32 and len(m.shape) > 1} - {"F16"})
    on = this_machine(kinds, measure=measure) if device == "this" else machine(device)
    asked: dict[str, Any] = {"stored": what.stored, "dtype": dtype, "quantize": quantize, "tokenizer": what.tokenizer}

    def of(config: ModelConfig, length: int, slots: int, **changed: Any) -> Forecast:
        return forecast(config, on, context=length, slots=slots, **(asked | changed))

    found = of(what.config, context, slots)
    other = transformer_of(what.config)
    same = _same_precision(what, dtype, quantize)
    lengths = sorted({*CONTEXT_TOKENS, context})
    beside = [
        {"context": n, "model": _short(of(what.config, n, slots)),
         "transformer": _short(forecast(other, on, context=n, slots=slots, tokenizer=what.tokenizer, **same))}
        for n in lengths
    ]  # fmt: skip
    out: dict[str, Any] = {"model": name, "max_context": most} | found.to_dict() | {
        "device_source": on.source, "bandwidth_gb_s": round(on.read / 1e9, 1) or None, "quantize": quantize,
        "transformer": {"parameters": forecast(other, on, context=1, **same).parameters,
                        "layers": len(other.layers)}, "lengths": beside,
    }  # fmt: skip
    if not found.fits:
        out["nearest"] = _nearest(name, what, found, on, asked, device)
    return out


def _same_precision(what: Subject, dtype: str, quantize: str | None) -> dict[str, Any]:
    """For another network: what a file has is one type per tensor, so the type of most of it stands for all."""
    if quantize or dtype != "auto" or isinstance(what.stored, str):
        return {"stored": what.stored if isinstance(what.stored, str) else "BF16", "dtype": dtype, "quantize": quantize}
    held: Counter[str] = Counter()
    for matrix in matrices(what.config, what.stored):
        held[matrix.kind] += 0 if matrix.keep_fp32 else matrix.values
    kind = held.most_common(1)[0][0]
    recipe = {"Q4_K": "q4_k_m", "Q5_K": "q5_k_m", "Q3_K": "q3_k_m"}.get(kind, kind.lower())
    return {"stored": kind} if kind not in PACKED_TYPES else {"quantize": recipe}


def _short(f: Forecast) -> dict[str, Any]:
    return {"total_bytes": f.total_bytes, "cache_bytes": f.cache_bytes, "fits": f.fits,
            "prefill_tok_s": f.prefill_tok_s, "decode_tok_s": f.decode_tok_s}  # fmt: skip


def _nearest(
    name: str, what: Subject, now: Forecast, on: Machine, asked: dict[str, Any], device: str
) -> dict[str, Any] | None:
    """The first setting that fits, and what to type; None when the model is too large whatever one does."""
    dtype = asked["dtype"]
    for setting in smaller(now, asked["quantize"], what.packed):
        changed = {"quantize": setting.quantize, "dtype": "auto" if setting.quantize else dtype}
        f = forecast(what.config, on, context=setting.context, slots=setting.slots, **(asked | changed))
        if f.fits:
            words = setting.words() + (f" --dtype {dtype}" if dtype != "auto" and not setting.quantize else "")
            there = "" if device == "this" else f" --device {device}"
            return {"context": setting.context, "slots": setting.slots, "quantize": setting.quantize,
                    "total_bytes": f.total_bytes, "type": f"tiercel plan {name} {words}{there}"}  # fmt: skip
    return None


# ── what `run` and `serve` do with it


@dataclass(frozen=True)
class Fit:
    """How a model is run here.  states, cache: bytes for running answers and for what has been read before

    context is smaller than `wanted` where that has no room.
    """

    context: int
    wanted: int
    slots: int
    states: int
    cache: int
    line: str


def fit(
    name: str | Path,
    *,
    slots: int = 1,
    context: int | None = None,
    dtype: str = "auto",
    quantize: str | None = None,
) -> Fit:
    """Slots, context and budgets that suit the memory that is free now.

    slots: at most; fewer when they would have no room for a short text each.  context: what must fit, or None for as
    much as the model was made for.  Raises DoesNotFit when not even one short text does.
    """
    what, on = subject(str(name)), this_machine()
    most = what.config.max_length
    if context is not None and not 0 < context <= most:
        raise RequestError(f"a context of {context} is asked for; {name} was made for 1 to {most}")
    asked: dict[str, Any] = {"stored": what.stored, "dtype": dtype, "quantize": quantize, "tokenizer": what.tokenizer}

    def of(length: int, slots: int) -> Forecast:
        return forecast(what.config, on, context=length, slots=slots, cache=0, **asked)

    wanted = context or most
    length = wanted
    while context is None and length > LEAST_CONTEXT and not of(length, 1).fits:
        length //= 2
    one = of(length, 1)
    if not one.fits:
        raise DoesNotFit(_refused(str(name), what, one, on, asked))
    short = min(length, LEAST_CONTEXT)
    count = slots
    while count > 1 and not of(short, count).fits:
        count -= 1
    left = on.free - (one.weights_bytes + one.working_bytes + one.process_bytes)
    cache = min(int(left * CACHE_SHARE), LARGEST_CACHE, left - one.kv_bytes - one.state_bytes)
    states = left - cache
    less = f" of {wanted:,}" if length < wanted else ""
    fewer = f" of {slots}" if count < slots else ""
    answers = f"{count}{fewer} answer{'s' if slots > 1 else ''} at once, " if slots > 1 else ""
    line = (
        f"{Path(name).name}: {human_bytes(one.weights_bytes)} of weights, {answers}context {length:,}{less}, "
        f"{human_bytes(states)} for states, {human_bytes(cache)} for what was read before; "
        f"{human_bytes(on.free)} are free"
    )
    return Fit(length, wanted, count, states, cache, line)


def _refused(name: str, what: Subject, one: Forecast, on: Machine, asked: dict[str, Any]) -> str:
    near = _nearest(name, what, one, on, asked, "this")
    message = f"{name} needs {human_bytes(one.total_bytes)} of memory for one text of {one.context:,} tokens"
    message += f" and {human_bytes(on.free)} are free: "
    if near is None:
        return message + "close something, or choose a smaller model"
    words = [f"--context {near['context']}"] if near["context"] != one.context else []
    words += [f"--quantize {near['quantize']}"] if near["quantize"] != asked["quantize"] else []
    return message + f"with {' '.join(words)} it takes {human_bytes(near['total_bytes'])}"


# ── for people


def table(found: dict[str, Any]) -> str:
    """A plan as lines of two columns, the comparison by length, and the chart."""

    def speed(value: float | None) -> str:
        return "not known" if value is None else f"{value:,.4g} tok/s"

    each = found["slots"] > 1
    rows = [
        ("weights", found["weights_bytes"], f"{found['parameters']:,} parameters in {found['precision']}"),
        ("keys, values", found["kv_bytes"], f"{found['kv_bytes_per_token']:,} bytes per token"),
        ("states", found["state_bytes"], f"{found['state_bytes_per_sequence'] / 2**20:,.1f} MiB committed, "
         f"{found['open_bytes_per_sequence'] / 2**20:,.1f} MiB of open inputs per sequence"),
        ("snapshots", found["snapshots_bytes"], "places to go back to, four per sequence"),
        ("working", found["working_bytes"], "one forward of 512 tokens"),
        ("process", found["process_bytes"], "Python, torch, tokenizer"),
        ("total", found["total_bytes"], f"{human_bytes(found['free_bytes'])} are free: "
         f"{'fits' if found['fits'] else 'does not fit'}"),
    ]  # fmt: skip
    source = f" ({found['device_source']})" if found["device_source"] else ""
    out = [f"{found['model']} on {found['device']}{source}, {found['slots']} × {found['context']:,} tokens"]
    out += [f"  {name:<14}{human_bytes(count):>8}   {words}" for name, count, words in rows]
    out.append(f"  {'prefill':<14}{speed(found['prefill_tok_s'])}, on the way to {found['context']:,} tokens")
    out.append(f"  {'decode':<14}{speed(found['decode_tok_s'])} at {found['context']:,} tokens"
               + (", all sequences together" if each else ""))  # fmt: skip
    if not found["fits"]:
        near = found["nearest"]
        out.append(f"  nearest that fits ({human_bytes(near['total_bytes'])}): {near['type']}" if near
                   else "  no setting of this model fits there; choose a smaller one")  # fmt: skip
    ours, theirs = "this", "Transformer"
    out += ["", f"beside a Transformer of {found['transformer']['parameters']:,} parameters, "
            f"{found['transformer']['layers']} layers as wide, four heads sharing a key",
            f"  {'context':>9}{'cache':>10}{'':>10}{'prefill tok/s':>15}{'':>9}{'decode tok/s':>14}",
            f"  {'':>9}{ours:>10}{theirs:>12}{ours:>11}{theirs:>13}{ours:>10}{theirs:>13}"]  # fmt: skip
    for row in found["lengths"]:
        a, b = row["model"], row["transformer"]
        numbers = [human_bytes(a["cache_bytes"]), human_bytes(b["cache_bytes"])]
        numbers += ["-" if v is None else f"{v:,.3g}" for key in ("prefill_tok_s", "decode_tok_s")
                    for v in (a[key], b[key])]  # fmt: skip
        widths = (10, 12, 11, 13, 10, 13)
        out.append(f"  {row['context']:>9,}" + "".join(f"{n:>{w}}" for n, w in zip(numbers, widths, strict=True)))
    return "\n".join([*out, "", *_chart(found)])


def _chart(found: dict[str, Any]) -> list[str]:
    from tiercel.plan import chart

    bars = []
    for row in found["lengths"]:
        for who, words in (("model", "this"), ("transformer", "Transformer")):
            total = row[who]["total_bytes"]
            bars.append(
                (f"{row['context']:,}" if who == "model" else "", float(total), f"{human_bytes(total)} {words}")
            )
    free = human_bytes(found["free_bytes"])
    head = f"memory against context; ┊ is what {found['device']} has free, {free}"
    return [head, *chart.terminal(bars, limit=float(found["free_bytes"]))]


def plot(found: dict[str, Any]) -> str:
    """Memory against context as one SVG."""
    from tiercel.plan import chart

    series = {
        who: [(float(row["context"]), float(row[key]["total_bytes"])) for row in found["lengths"]]
        for who, key in ((found["model"], "model"), ("a Transformer of that size", "transformer"))
    }
    return chart.lines(
        f"{found['model']}, {found['precision']}, {found['slots']} sequence(s)", series, x="tokens of context",
        y="memory", limit=(f"free on {found['device']}", float(found["free_bytes"])),
        label_x=lambda n: f"{n / 1024:g}K", label_y=human_bytes,
    )  # fmt: skip
