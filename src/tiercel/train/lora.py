"""LoRA and QLoRA (Hu et al. 2021; Dettmers et al. 2023): a small adapter learns, the network stays as it is.

    lora("smollm2", "chats.jsonl", Settings(steps=200, lr=2e-4, out=Path("poet")))
    lora("smollm2", "chats.jsonl", Settings(...), quantize="q4_k_m")          over packed weights

Packed matrices are multiplied by the inference kernels; the backward unpacks them block by block
(`ops.qtensor.Product`); frozen ones of bfloat16 by torch where the CPU multiplies that fast, and the products of
attention and scans between them are rounded alike.  What learns is float32.  `out` is an adapter in PEFT's form, with
the checkpoint's own names.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tiercel.errors import RequestError, TiercelError, UnsupportedError
from tiercel.families.family import Layout
from tiercel.hub import local_models
from tiercel.model.decoder import Decoder
from tiercel.model.parameters import parameters
from tiercel.runtime.atomic import atomic_write
from tiercel.train import start
from tiercel.train.causal_lm import CausalLM, coverage
from tiercel.train.loop import Settings, fit
from tiercel.weights.adapters import CONFIG, FOLDED, TENSORS, folds, largest_rank, linear_rows
from tiercel.weights.checkpoint import parameter_shapes, read_json
from tiercel.weights.load import load


def lora(
    model: str | Path,
    data: str | Path,
    settings: Settings,
    *,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: Sequence[str] = (),
    quantize: str | None = None,
    loss_on: Sequence[str] = ("assistant",),
    held_out: str | Path | None = None,
    rows: int = 1,
    length: int = 512,
    epochs: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train an adapter on the messages of some roles, and write it to settings.out.

    targets: projections by our names ("q") or the checkpoint's ("q_proj"); none: those whose `Param.lora` is set.
    quantize: a recipe such as "q4_k_m" or "nf4".
    Other arguments and the result: as of `sft`; "coverage" is the share that learns.
    """
    start.prepare(settings.out, settings.resume)
    network, tokenizer, layout = load(local_models.resolve(model, pull=True), quantize=quantize)
    torch.manual_seed(seed)
    adapted = adapt(network, layout, rank=rank, alpha=alpha, dropout=dropout, targets=targets, name=str(model))
    documents, batches, evaluation = start.read(
        data, held_out, tokenizer, loss_on, rows=rows, length=length, cut=False, seed=seed
    )
    settings = start.counted_steps(batches, settings, epochs)
    covered = coverage(adapted)
    if not settings.quiet:
        print(f"learning: {covered}", flush=True)
    result = fit(network, batches, settings, held_out=evaluation)
    if settings.out is not None:
        save(adapted, settings.out)
    found = {"documents": len(documents), "left_out": documents.left_out, "coverage": covered}
    return start.report(result, settings.out) | found


def adapt(
    network: Decoder,
    layout: Layout,
    *,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: Sequence[str] = (),
    name: str = "",
) -> Any:
    """Return PEFT's model around the network; only the adapter requires gradients.

    Raises:
        RequestError: a target that matches nothing, or a rank beyond the matrices'.
        UnsupportedError: PEFT is not installed.
    """
    try:
        import peft
    except ImportError:
        raise UnsupportedError("adapters are trained through peft: pip install peft") from None
    if rank < 1:
        raise RequestError(f"the rank must be at least 1, not {rank}")
    modules = matched(layout, targets)
    _check_rank(rank, modules, layout)
    network.requires_grad_(False)
    model = CausalLM(network, layout)
    model.name_or_path = name
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


def _check_rank(rank: int, modules: Sequence[str], layout: Layout) -> None:
    """Refuse a rank that `weights.adapters.read` would refuse, before anything is trained."""
    shapes = parameter_shapes(layout)
    for name, row in linear_rows(layout).items():
        limit = largest_rank(*shapes[row.ours])
        if name.rpartition(".")[2] in modules and row.ours.startswith("layers.") and rank > limit:
            raise RequestError(f"rank {rank} is larger than {name} ({limit}): choose at most that")


def matched(layout: Layout, targets: Sequence[str]) -> list[str]:
    """The checkpoint's names of the targets, those whose `Param.lora` is set where none are named.

    Raises:
        RequestError: a target is in no layer, or the network has none.
    """
    modules, params = linear_rows(layout), parameters(layout.config)
    layers = [name for name, row in modules.items() if row.ours.startswith("layers.")]
    ours = {name: modules[name].ours.removesuffix(".weight").rpartition(".")[2] for name in layers}
    leaf = {name: name.rpartition(".")[2] for name in layers}
    if not targets:
        found = {leaf[name] for name in layers if params[modules[name].ours].lora}
    else:
        found = set()
        for target in targets:
            names = {leaf[name] for name in layers if target in (ours[name], leaf[name])}
            if not names:
                known = ", ".join(sorted({leaf[name] for name in layers if not modules[name].keep_fp32}))
                raise RequestError(f"the target {target!r} matches nothing in this network; it has {known}")
            found |= names
    if not found:
        raise RequestError("none of the targets is in this network")
    return sorted(found)


def save(adapted: Any, out: Path) -> Path:
    """Write the adapter in PEFT's form: each file whole or not at all, the config last.

    Raises TiercelError where a file cannot be written.
    """
    layout: Layout = adapted.get_base_model().layout
    with tempfile.TemporaryDirectory() as made:
        try:
            adapted.save_pretrained(made, save_embedding_layers=False)  # otherwise it asks the hub about the vocabulary
            out.mkdir(parents=True, exist_ok=True)
        except (OSError, SafetensorError) as error:
            raise TiercelError(f"could not write {out}: {error}") from error
        config = read_json(Path(made) / CONFIG)
        if folds(layout):  # values of a GGUF file hold the multipliers, and so does this adapter
            config[FOLDED] = True
        with atomic_write(out / TENSORS) as file:
            file.write((Path(made) / TENSORS).read_bytes())
        with atomic_write(out / CONFIG) as file:
            file.write(json.dumps(config, indent=2, sort_keys=True).encode())
    return out
