"""A network laid out for a GPU's steps: matrices that read one input lie as one, so one launch multiplies them all.

Their parts stay where they were, as rows of the whole: prompts, exports and fingerprints see nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tiercel.model.attention import Attention
from tiercel.model.layers import Linear, hold
from tiercel.model.mamba2 import Mamba2
from tiercel.ops.linear import linear

if TYPE_CHECKING:
    from tiercel.model.decoder import Decoder


class Joint:
    """Linears without bias that read the same input, and their rows one below the other."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        self.linears = list(linears)
        weights = [m.weight for m in linears]
        if isinstance(weights[0], Tensor):
            self.weight = torch.cat(weights).detach()
            parts = [nn.Parameter(w, requires_grad=False) for w in self.weight.split([len(w) for w in weights])]
        else:
            self.weight = type(weights[0]).joined(weights)
            parts = self.weight.split([w.shape[0] for w in weights])
        for m, part in zip(linears, parts, strict=True):
            hold(m, "weight", part)

    def holds(self) -> bool:
        """Whether the weights are still these rows, and nobody listens to the parts."""
        return all(not m._forward_hooks for m in self.linears)

    def __call__(self, h_TD: Tensor) -> dict[nn.Module, Tensor]:
        widths = [m.weight.shape[0] for m in self.linears]
        return dict(zip(self.linears, linear(h_TD, self.weight).split(widths, -1), strict=True))


def place(network: Decoder) -> None:
    """Join what reads one input, and let norms round where packed matrices follow; weights are on their device."""
    for block in network.layers:
        readers: list[Linear] = []
        for mixer in block.mixers.values():
            if isinstance(mixer, Mamba2):
                readers.append(mixer.in_proj)
            elif isinstance(mixer, Attention):
                readers += [mixer.q, mixer.k, mixer.v]
        alike = [m for m in readers if type(m) is Linear and m.bias is None and _kind(m) == _kind(readers[0])]
        block.joint = Joint(alike) if len(alike) > 1 else None
        block.mixer_norm.feeds_packed = any(_packed(m) for m in readers)
        if block.feed_forward is not None:
            block.ffn_norm.feeds_packed = _packed(getattr(block.feed_forward, "gate", None))
    network.norm.feeds_packed = _packed(network.head)


def _kind(m: Linear) -> object:
    return m.weight.dtype if isinstance(m.weight, Tensor) else m.weight.type


def _packed(m: nn.Module | None) -> bool:
    return getattr(getattr(m, "weight", None), "meets_rounded", False)
