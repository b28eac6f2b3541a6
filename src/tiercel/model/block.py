"""One layer: norm → mixers, summed → residual → norm → feed-forward → residual.

The hybrid idea is the line with `runs`: mixers of different kinds read one normalised input side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

from torch import Tensor, nn

from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.feed_forward.gated_mlp.layer import GatedMLP
from tiercel.feed_forward.moe.layer import MoE
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.attention.layer import Attention
from tiercel.mixers.mamba1.layer import Mamba1
from tiercel.mixers.mamba2.config import Mamba2Config
from tiercel.mixers.mamba2.layer import Mamba2
from tiercel.model.batch import Batch
from tiercel.model.config import LayerConfig, Mixer
from tiercel.model.layers import RMSNorm
from tiercel.model.varlen import VarlenBatch
from tiercel.ops.pointwise import add


def build_mixer(config: Mixer, width: int, eps: float) -> nn.Module:
    if isinstance(config, AttentionConfig):
        return Attention(config, width)
    return Mamba2(config, width, eps) if isinstance(config, Mamba2Config) else Mamba1(config, width, eps)


class Block(nn.Module):
    def __init__(self, config: LayerConfig, width: int, eps: float) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(width, eps)
        self.mixers = nn.ModuleDict({mixer.kind: build_mixer(mixer, width, eps) for mixer in config.mixers})
        self.feed_forward: nn.Module | None = None
        self.joint: Any = None  # on a GPU: `model.placed.MergedLinear` of the matrices that read the normalised input
        if config.feed_forward is not None:
            self.ffn_norm = RMSNorm(width, eps)
            dense = isinstance(config.feed_forward, GatedMLPConfig)
            self.feed_forward = (GatedMLP if dense else MoE)(config.feed_forward, width)  # type: ignore[arg-type]

    def forward(self, x_TD: Tensor, batch: Batch | VarlenBatch, states: Sequence[Sequence[Any]]) -> Tensor:
        """x: (T, D) → (T, D).  memories: for each mixer, what every row remembers (None: nothing)."""
        h_TD = self.mixer_norm(x_TD)
        precomputed = self.joint(h_TD) if self.joint is not None and batch.step and self.joint.holds() else {}
        given = {"precomputed": precomputed} if precomputed else {}
        runs = [partial(mix, h_TD, batch, m, **given) for mix, m in zip(self.mixers.values(), states, strict=True)]
        mixed = batch.side_by_side(runs)
        if self.feed_forward is None:
            return reduce(add, mixed, x_TD)
        x_TD, h_TD = self.ffn_norm.after(x_TD, mixed)
        if batch.step and isinstance(self.feed_forward, GatedMLP) and not self.feed_forward._forward_hooks:
            return self.feed_forward.add_to(x_TD, h_TD)
        return add(x_TD, self.feed_forward(h_TD))
