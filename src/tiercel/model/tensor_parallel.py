"""Tensor parallelism: every process of a torch.distributed group holds a share of each layer, and sums what it makes.

    attention   query and key/value heads        mamba2   heads and groups          MLP   its width
    in          split by rows: q, k, v, in_proj (each of z | x | B | C | dt), gate, up; conv, A, D, dt bias, norm
    out         split by columns: o, out_proj, down; the shares are summed, which is the only thing that is sent
    whole       embedding, norms between layers, head

A network of a share is a Decoder like any other, of a smaller configuration: states, slots and snapshots follow.  For
running, not for training: gradients do not pass the sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tiercel.errors import RequestError
from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.feed_forward.gated_mlp.layer import GatedMLP
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.attention.layer import Attention
from tiercel.mixers.mamba2.config import Mamba2Config
from tiercel.mixers.mamba2.layer import Mamba2
from tiercel.model.config import LayerConfig
from tiercel.model.decoder import Decoder
from tiercel.model.layers import Linear, set_weight


class RowParallelLinear(Linear):
    """A share of the columns: y = Σ over the processes of W x, + b."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = super().forward(x, scale).contiguous()
        dist.all_reduce(y)
        return y


def share(network: Decoder, rank: int, size: int) -> Decoder:
    """This process's part of a plain network; its weights are copies.

    RequestError, in one line, where heads, groups or widths do not divide by `size`, or a layer cannot be split.
    """
    config = network.config
    layers = tuple(_layer(layer, size) for layer in config.layers)
    with torch.device("meta"):
        part = Decoder(dataclasses.replace(config, layers=layers))
    for name in ("embed", "norm", "head"):
        _copy(getattr(network, name), getattr(part, name))
    blocks: Any = zip(network.layers, part.layers, strict=True)
    for whole, mine in blocks:
        _copy(whole.mixer_norm, mine.mixer_norm)
        for kind, mixer in whole.mixers.items():
            (_attention if kind == "attention" else _mamba2)(mixer, mine.mixers[kind], rank, size)
        if whole.feed_forward is not None:
            _copy(whole.ffn_norm, mine.ffn_norm)
            _mlp(whole.feed_forward, mine.feed_forward, rank, size)
    part._tie()
    return part.eval().requires_grad_(False)


# ── which sizes


def _divided(what: str, count: int, size: int) -> int:
    if count % size:
        raise RequestError(f"{count} {what} cannot be split over {size} processes")
    return count // size


def _layer(layer: LayerConfig, size: int) -> LayerConfig:
    mixers: list[Any] = []
    for c in layer.mixers:
        if isinstance(c, AttentionConfig):
            heads, kv_heads = _divided("heads", c.heads, size), _divided("key/value heads", c.kv_heads, size)
            mixers.append(dataclasses.replace(c, heads=heads, kv_heads=kv_heads))
        elif isinstance(c, Mamba2Config):
            heads, groups = _divided("Mamba heads", c.heads, size), _divided("groups", c.groups, size)
            mixers.append(dataclasses.replace(c, heads=heads, groups=groups))
        else:
            raise RequestError(f"{c.kind} layers cannot be split over {size} processes yet")
    ffn = layer.feed_forward
    if ffn is not None and not isinstance(ffn, GatedMLPConfig):
        raise RequestError(f"layers of experts cannot be split over {size} processes yet")
    ffn = ffn and dataclasses.replace(ffn, width=_divided("columns of an MLP", ffn.width, size))
    return dataclasses.replace(layer, mixers=tuple(mixers), feed_forward=ffn)


# ── which weights


def _own(t: Tensor, rank: int, size: int, dim: int = 0) -> Tensor:
    return t.chunk(size, dim)[rank]


def _put(module: nn.Module, name: str, value: Tensor | None) -> None:
    if value is not None:
        set_weight(module, name, nn.Parameter(value.detach().clone().contiguous(), requires_grad=False))


def _plain(weight: object) -> Tensor:
    if not isinstance(weight, Tensor):
        raise RequestError("packed weights cannot be split over processes yet: load the model with dtype='bfloat16'")
    return weight


def _copy(whole: nn.Module, mine: nn.Module) -> None:
    for name in ("weight", "bias"):
        if getattr(whole, name, None) is not None:
            _put(mine, name, _plain(getattr(whole, name)))


def _rows(whole: Linear, mine: Linear, rank: int, size: int, runs: Sequence[int] | None = None) -> None:
    """Split by rows; runs: of rows that are split each on its own."""
    for name in ("weight", "bias"):
        t = getattr(whole, name)
        if t is not None:
            parts = _plain(t).split(list(runs or [len(t)]))
            _put(mine, name, torch.cat([_own(part, rank, size) for part in parts]))


def _columns(whole: Linear, owner: nn.Module, name: str, rank: int, size: int) -> None:
    """Split by columns, and summed; the bias is the first process's."""
    weight = _own(_plain(whole.weight), rank, size, 1)
    with torch.device("meta"):
        summed = RowParallelLinear(weight.shape[1], weight.shape[0], bias=whole.bias is not None)
    _put(summed, "weight", weight)
    if whole.bias is not None:
        _put(summed, "bias", whole.bias if rank == 0 else torch.zeros_like(whole.bias))
    setattr(owner, name, summed)


def _attention(whole: Attention, mine: Attention, rank: int, size: int) -> None:
    for name in ("q", "k", "v"):
        _rows(getattr(whole, name), getattr(mine, name), rank, size)
    _columns(whole.o, mine, "o", rank, size)


def _mlp(whole: GatedMLP, mine: GatedMLP, rank: int, size: int) -> None:
    _rows(whole.gate, mine.gate, rank, size)
    _rows(whole.up, mine.up, rank, size)
    _columns(whole.down, mine, "down", rank, size)


def _mamba2(whole: Mamba2, mine: Mamba2, rank: int, size: int) -> None:
    c = whole.config
    channels = [c.inner, c.groups * c.state, c.groups * c.state]
    _rows(whole.in_proj, mine.in_proj, rank, size, [c.inner, *channels, c.heads])
    for name in ("conv", "conv_bias"):
        t = getattr(whole, name)
        if t is not None:
            _put(mine, name, torch.cat([_own(part, rank, size) for part in t.split(channels)]))
    for name in ("dt_bias", "A_log", "D", "out_norm"):
        t = getattr(whole, name)
        _put(mine, name, None if t is None else _own(t, rank, size))
    _columns(whole.out_proj, mine, "out_proj", rank, size)
