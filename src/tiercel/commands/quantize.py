"""The quantize command: a model becomes a packed file, and what that costs is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tiercel.errors import RequestError
from tiercel.hub import local_models
from tiercel.plan import human_bytes
from tiercel.tokenizer.tokenizer import Tokenizer
from tiercel.weights import importance as importances
from tiercel.weights.checkpoint import Checkpoint, open_checkpoint
from tiercel.weights.fidelity import Report, measure, table
from tiercel.weights.load import load
from tiercel.weights.quantize import quantize
from tiercel.weights.quantized import quantized, recipe_named

LONGEST_TEXT = 64 << 20
Bar = Callable[[str, int, int], None]  # (what, done, total)


def shrink(
    name: str,
    out: Path,
    recipe: str,
    *,
    importance: Path | None,
    save_importance: Path | None,
    text: Path | None,
    progress: Bar,
) -> dict[str, Any]:
    """All of `tiercel quantize`; answers what its --json prints.  text: measure over it."""
    recipe = recipe_named(recipe)
    source = open_checkpoint(local_models.resolve(name, pull=True, progress=progress))
    measured = None if text is None else _tokens(source, text)
    learned = None
    notes: dict[str, Any] = {}
    if importance is not None:
        learned, notes = _importance(source, importance, progress)
        if save_importance is not None:
            importances.save(learned, save_importance)
    elif save_importance is not None:
        raise RequestError("--save-importance keeps what --importance learns from a text; name one")
    by_name = None if learned is None else learned.by_name
    found = quantize(source, out, recipe, importance=by_name, progress=_bar(progress, f"packing {name}"))
    found |= notes
    if measured is not None:
        view = quantized(source, recipe, by_name)
        found["report"] = measure(view, measured, _bar(progress, "comparing")).to_json()
    return found


def _importance(source: Checkpoint, path: Path, progress: Bar) -> tuple[importances.Importance, dict[str, Any]]:
    if path.suffix == ".safetensors":
        learned = importances.read(path, source.layout)
        return learned, {"importance_tokens": learned.tokens}
    tokens = _tokens(source, path)
    network, _, _ = load(source.path, progress=_bar(progress, "loading"))
    learned = importances.gather(network, tokens, _bar(progress, f"reading {path.name}"))
    return learned, {"importance_tokens": learned.tokens, "importance_text_tokens": len(tokens)}


def _tokens(source: Checkpoint, path: Path) -> list[int]:
    """A text file as the model's tokens."""
    tokenizer: Tokenizer | None = source.tokenizer()
    if tokenizer is None:
        raise RequestError(f"{source.path} has no tokenizer, and {path} is a text")
    try:
        if path.stat().st_size > LONGEST_TEXT:
            raise RequestError(f"{path} has more than {LONGEST_TEXT >> 20} MiB; take a part of it")
        return tokenizer.encode(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start})") from error


def _bar(progress: Bar, what: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(what, done, total)


def report_lines(name: str, found: dict[str, Any]) -> Iterator[str]:
    """What was done, in lines for a person."""
    types = ", ".join(f"{count} {type}" for type, count in sorted(found["types"].items(), key=lambda item: -item[1]))
    yield f"{name} is written to {found['out']} as {found['recipe']}: {human_bytes(found['bytes'])} ({types})"
    if found["unpacked"]:
        first, *more = found["unpacked"]
        yield f"kept unpacked: {first}" + (f" and {len(more)} more matrices" if more else "")
    if found["was_packed"]:
        yield f"the source was packed already ({', '.join(found['was_packed'])}): its errors stay, new ones are added"
    if "importance_tokens" in found:
        of = found.get("importance_text_tokens", found["importance_tokens"])
        cut = f" (the text has {of:,}; the rest was left out)" if of > found["importance_tokens"] else ""
        yield f"importance from {found['importance_tokens']:,} tokens{cut}, for {found['importance']} matrices"
    if "report" in found:
        yield ""
        yield from table(Report.from_json(found["report"]))
