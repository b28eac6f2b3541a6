"""Tensor parallelism: every process of a torch.distributed group holds a shard of each layer, and sums its outputs.

    column     rows of the matrix are split: q, k, v, in_proj (each run of it), gate, up; conv, A, D, dt bias, norm
    row        columns of the matrix are split: o, out_proj, down; the outputs are summed, which is all that is sent
    replicate  embedding, norms between layers, head

Which is which says `Param.shard`; the sizes of a shard `ModuleSpec.shard`.  The network of one rank is a Decoder like
any other, of a smaller configuration: states, slots and snapshots follow.  For inference only: gradients do not pass
the sums.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tiercel.errors import RequestError
from tiercel.mixers.spec import ModuleSpec, Param
from tiercel.model.config import LayerConfig
from tiercel.model.decoder import Decoder
from tiercel.model.layers import Linear, set_weight

D = TypeVar("D", bound=Decoder)


class RowParallelLinear(Linear):
    """A shard of the columns: y = Σ over the processes of W x, + b."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = super().forward(x, scale).contiguous()
        dist.all_reduce(y)
        return y


def shard(network: Decoder, rank: int, size: int, decoder: type[D] = Decoder) -> D:  # type: ignore[assignment]
    """This process's part of a plain network, as a `decoder`; its weights are copies.

    Raises:
        RequestError: heads, groups or widths do not divide by `size`, or a layer cannot be split.
    """
    config = network.config
    with torch.device("meta"):
        part = decoder(dataclasses.replace(config, layers=tuple(_layer(layer, size) for layer in config.layers)))
    for name in ("embed", "norm", "head"):
        _copy(getattr(network, name), getattr(part, name))
    blocks: Any = zip(config.layers, network.layers, part.layers, strict=True)
    for layer, whole, mine in blocks:
        for name in ("mixer_norm", "mixer_post_norm", "ffn_norm", "ffn_post_norm"):
            if getattr(whole, name) is not None:
                _copy(getattr(whole, name), getattr(mine, name))
        for spec in layer.mixers:
            _shard_module(spec, config.width, whole.mixers[spec.kind], mine.mixers[spec.kind], rank, size)
        if layer.feed_forward is not None:
            _shard_module(layer.feed_forward, config.width, whole.feed_forward, mine.feed_forward, rank, size)
    part._tie()
    return part.eval().requires_grad_(False)


def _layer(layer: LayerConfig, size: int) -> LayerConfig:
    return dataclasses.replace(
        layer,
        mixers=tuple(mixer.shard(size) for mixer in layer.mixers),
        feed_forward=layer.feed_forward and layer.feed_forward.shard(size),
    )


def _shard_module(spec: ModuleSpec, width: int, whole: nn.Module, mine: nn.Module, rank: int, size: int) -> None:
    """Give one mixer or feed-forward its part of every parameter."""
    params = spec.params(width)
    for name in (p.name.removesuffix(".weight") for p in params if p.shard == "row" and p.name.endswith(".weight")):
        _sum_outputs(mine, name)
    for p in params:
        owner, _, leaf = p.name.rpartition(".")
        weight = getattr(whole.get_submodule(owner), leaf)
        _put(mine.get_submodule(owner), leaf, _part(p, _plain(weight), rank, size))


def _part(p: Param, weight: Tensor, rank: int, size: int) -> Tensor:
    if p.shard == "replicate":
        return weight
    if p.shard == "column":
        runs = weight.split(list(p.parts or [len(weight)]))
        return torch.cat([run.chunk(size)[rank] for run in runs])
    if weight.dim() == 1:  # the bias of summed outputs is the first process's
        return weight if rank == 0 else torch.zeros_like(weight)
    runs = weight.split(list(p.parts or [weight.shape[1]]), 1)
    return torch.cat([run.chunk(size, 1)[rank] for run in runs], 1)


def _sum_outputs(module: nn.Module, name: str) -> None:
    """Replace a Linear by one whose outputs are summed over the processes."""
    owner, _, leaf = name.rpartition(".")
    old: Any = module.get_submodule(name)
    with torch.device("meta"):
        summed = RowParallelLinear(old.in_features, old.out_features, bias=old.bias is not None)
    setattr(module.get_submodule(owner), leaf, summed)


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    set_weight(module, name, nn.Parameter(value.detach().clone().contiguous(), requires_grad=False))


def _plain(weight: object) -> Tensor:
    if not isinstance(weight, Tensor):
        raise RequestError("packed weights cannot be split over processes yet: load the model with dtype='bfloat16'")
    return weight


def _copy(whole: nn.Module, mine: nn.Module) -> None:
    for name in ("weight", "bias"):
        if getattr(whole, name, None) is not None:
            _put(mine, name, _plain(getattr(whole, name)))
