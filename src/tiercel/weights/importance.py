"""How much the inputs of every matrix count: the mean of their squares over a text, channel by channel.

    y = W x,  W off by Δ:   E‖Δ x‖² ≈ Σ_ij Δ_ij² · E[x_j²]

so E[x_j²] is the weight of the squared errors in column j (llama.cpp calls the collection an imatrix).  It is
gathered by running the network over the text in windows, and kept as a small safetensors file: one float32 vector
per matrix, under our parameter names, and how many tokens it rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tiercel.errors import FormatError, RequestError
from tiercel.families.family import Layout
from tiercel.model.decoder import Decoder
from tiercel.model.layers import Linear
from tiercel.model.parameters import parameters
from tiercel.weights.checkpoint import parameter_shapes
from tiercel.weights.safetensors import open_safetensors, write_safetensors_file
from tiercel.weights.stored import OutTensor

WINDOW = 512
KEPT = 64  # tokens of a window that reach the output projection: logits are large
MAX_TOKENS = 65_536
TOKENS = "tiercel.importance.tokens"


@dataclass
class Importance:
    """by_name: our matrix → (n) float32 · tokens: how many were read."""

    by_name: dict[str, Tensor]
    tokens: int


def gather(network: Decoder, tokens: Sequence[int], progress: Callable[[int, int], None] | None = None) -> Importance:
    """Run over the tokens, at most MOST_TOKENS, in independent windows."""
    if len(tokens) < 2:
        raise RequestError("an importance needs a text of some length")
    ids = torch.tensor(tokens[:MAX_TOKENS], dtype=torch.long)
    sums: dict[str, tuple[Tensor, int]] = {}
    window = min(WINDOW, network.config.max_length)
    with _listening(network, sums), torch.no_grad():
        for start in range(0, len(ids), window):
            network(ids[start : start + window], logits_to_keep=KEPT)
            if progress is not None:
                progress(min(start + window, len(ids)), len(ids))
    return Importance({name: (total / count).float() for name, (total, count) in sums.items()}, len(ids))


@contextmanager
def _listening(network: Decoder, sums: dict[str, tuple[Tensor, int]]) -> Iterator[None]:
    """While this lasts, every matrix adds the squares of its inputs to `sums`, in float64, and counts them."""

    def hear(names: list[str]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2)
            squares = x.float().square().sum(0, dtype=torch.float64)
            for name in names:
                total, count = sums.get(name, (0, 0))
                sums[name] = (total + squares, count + len(x))

        return hook

    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, Linear):
            known = "embed.weight" if name == "head" and network.config.tied else f"{name}.weight"
            hooks.append(module.register_forward_pre_hook(hear([known])))
    # of stacked experts the layer's input stands for what each sees; `down` goes without
    for name, param in parameters(network.config).items():
        if len(param.shape) == 3 and param.reads_input:
            layer = network.get_submodule(name.rpartition(".")[0])
            hooks.append(layer.register_forward_pre_hook(hear([name])))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def save(importance: Importance, path: Path) -> None:
    tensors = [OutTensor(name, tuple(x.shape), "F32", _rows(x)) for name, x in importance.by_name.items()]
    write_safetensors_file(path, tensors, {TOKENS: str(importance.tokens)})


def _rows(x: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, stop: x[start:stop]


def read(path: Path, layout: Layout) -> Importance:
    """A saved importance for this network; FormatError when it belongs to another one."""
    folder = open_safetensors(path)
    tokens = folder.metadata.get(TOKENS, "")
    if not tokens.isascii() or not tokens.isdigit():
        raise FormatError(f"{path} is no importance file: its metadata has no {TOKENS}")
    shapes = parameter_shapes(layout)
    for name, tensor in folder.tensors.items():
        if tensor.type != "F32" or tensor.shape != shapes.get(name, ())[-1:]:
            raise FormatError(f"{path}: {name!r:.80} of {list(tensor.shape)} belongs to another network")
    found = {name: tensor.rows() for name, tensor in folder.tensors.items()}
    bad = next((name for name, x in found.items() if not bool((x >= 0).all()) or not bool(x.isfinite().all())), None)
    if bad is not None:
        raise FormatError(f"{path}: {bad!r} must hold finite numbers from 0")
    return Importance(found, int(tokens[:18]))
