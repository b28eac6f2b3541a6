"""What a run begins with and ends with: a network whose weights want gradients, and a folder that anyone can load."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tiercel.errors import RequestError
from tiercel.families import from_hf
from tiercel.families.family import Layout
from tiercel.families.pattern import PATTERN, read_file
from tiercel.families.pattern import rows as pattern_rows
from tiercel.hub import local_models
from tiercel.model.decoder import Decoder
from tiercel.model.initialize import initialize
from tiercel.plan import check_fits, parameter_count
from tiercel.quant import PACKED_TYPES
from tiercel.tokenizer.tokenizer import Tokenizer
from tiercel.train import parallel
from tiercel.train.checkpoint import complete
from tiercel.train.data import Batches, Documents, Rows, read_documents
from tiercel.train.loop import Result, Settings
from tiercel.weights.checkpoint import open_checkpoint, read_json
from tiercel.weights.export import NetworkSource, export
from tiercel.weights.load import load

Start = tuple[Decoder, Tokenizer | None, Layout]
Evaluation = Callable[[], Iterator[Rows]]  # all of the held-out batches, anew at every call


def open_network(config: str | Path, tokenizer_path: str | Path | None = None, *, seed: int = 0) -> Start:
    """Fresh weights for a pattern file or a config.json; a checkpoint's (folder, .gguf, short name) as they are.

    Float32, to be trained.  RequestError for packed weights, or a tokenizer with more tokens than the network.
    """
    path = Path(config)
    if path.suffix in (".json", ".toml") and path.is_file():
        network, tokenizer, layout = _fresh(path, seed)
    else:
        network, tokenizer, layout = _stored(local_models.resolve(config, pull=True))
    if tokenizer_path is not None:
        path = Path(tokenizer_path)
        folder = path if path.is_dir() else path.parent
        tokenizer = Tokenizer.from_folder(folder)
        if tokenizer is None:
            raise RequestError(f"--tokenizer {tokenizer_path}: {Tokenizer.why_none(folder)}")
    if tokenizer is not None and tokenizer.vocab_size > network.config.vocab_size:
        raise RequestError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the network {network.config.vocab_size}: "
            "raise vocab_size in the config"
        )
    return network.train().requires_grad_(True), tokenizer, layout


def _fresh(path: Path, seed: int) -> Start:
    found = read_json(path) if path.suffix == ".json" else None
    if isinstance(found, dict) and found.get("model_type", "tiercel") != "tiercel":
        layout = from_hf(found)
    else:
        model = read_file(path)
        layout = Layout(PATTERN, model, pattern_rows(model))
    check_fits(16 * parameter_count(layout.config), "training with AdamW in float32")
    network = Decoder(layout.config)
    initialize(network, seed)
    return network, Tokenizer.from_folder(path.parent), layout


def _stored(path: Path) -> Start:
    checkpoint = open_checkpoint(path)
    packed = {checkpoint.stored(row) for row in checkpoint.layout.rows} & set(PACKED_TYPES)
    if packed:
        raise RequestError(
            f"{path} is packed ({sorted(packed)[0]}) and full training cannot change packed weights: "
            "train an adapter with `tiercel train lora`, or start from its unpacked form"
        )
    check_fits(16 * parameter_count(checkpoint.layout.config), "training with AdamW in float32")
    return load(path, dtype="float32")


def prepare(out: Path | None, resume: bool) -> None:
    """RequestError where a run would go over another's checkpoints."""
    if out is not None and not resume and complete(out / "checkpoints"):
        raise RequestError(f"{out} holds a run already: go on with --resume, or choose another --out")


def read(
    data: str | Path,
    held_out: str | Path | None,
    tokenizer: Tokenizer | None,
    learn: Sequence[str],
    *,
    rows: int,
    length: int,
    cut: bool,
    seed: int,
) -> tuple[Documents, Batches, Evaluation | None]:
    """The documents of a file, an endless stream of batches of them, and the batches of what is held out.

    cut: whether documents longer than `length` are cut into pieces, or left out and counted.
    """
    documents, others = (
        None if file is None else read_documents(file, tokenizer, learn=learn).fit_rows(length, cut=cut)
        for file in (data, held_out)
    )
    assert documents is not None
    batches = Batches(documents, rows=rows, length=length, seed=seed)
    return documents, batches, None if others is None else evaluation(others, rows, length)


def counted_steps(batches: Batches, settings: Settings, epochs: float | None) -> Settings:
    """Return the settings with the steps of `epochs`."""
    if epochs is None:
        return settings
    return replace(settings, steps=max(1, round(epochs * batches.per_epoch / settings.accumulate)))


def evaluation(documents: Documents, rows: int, length: int) -> Evaluation:
    return lambda: Batches(documents, rows=rows, length=length, shuffle=False).once()


def finish(network: Decoder, tokenizer: Tokenizer | None, layout: Layout, out: Path) -> None:
    """The folder: config.json, model.safetensors, the tokenizer; and the curves, where matplotlib is there."""
    network = parallel.gathered(network)
    if not parallel.ranks().first:
        return
    network.eval().to("cpu")
    with torch.no_grad():
        export(NetworkSource(network, layout, tokenizer), out)
    from tiercel.train.plot import plot

    with contextlib.suppress(RequestError):  # no matplotlib, no picture
        plot(out / "log.jsonl", out / "curves.png")


def report(result: Result, out: Path | None) -> dict[str, object]:
    """What the command prints."""
    return {
        "out": None if out is None else str(out),
        "steps": result.step,
        "loss": result.loss,
        "eval_loss": result.eval_loss,
        "tokens": result.tokens,
        "seconds": round(result.seconds, 3),
    }
