"""One layer: norm → mixers, summed → residual → norm → feed-forward → residual.

The hybrid idea is the line with `runs`: mixers of different kinds read one normalised input side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

from torch import Tensor, nn

from tiercel.model.batch import Batch
from tiercel.model.config import LayerConfig
from tiercel.model.layers import RMSNorm
from tiercel.model.merged_linear import MergedLinear
from tiercel.model.varlen import VarlenBatch
from tiercel.ops.pointwise import add


class Block(nn.Module):
    def __init__(self, config: LayerConfig, width: int, eps: float, stream_eps: float) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(width, stream_eps) if config.mixers else None
        self.mixers = nn.ModuleDict({mixer.kind: mixer.build(width, eps) for mixer in config.mixers})
        self.feed_forward: nn.Module | None = None
        self.joint: MergedLinear | None = None  # on a GPU: of the matrices that multiply the normalised input
        if config.feed_forward is not None:
            self.ffn_norm = RMSNorm(width, stream_eps)
            self.feed_forward = config.feed_forward.build(width, eps)

    def forward(self, x_TD: Tensor, batch: Batch | VarlenBatch, states: Sequence[Sequence[Any]]) -> Tensor:
        """x: (T, D) → (T, D).  states: for each mixer the state of every row (None: without one)."""
        mixed = self._mixed(x_TD, batch, states) if self.mixer_norm is not None else []
        if self.feed_forward is None:
            return reduce(add, mixed, x_TD)
        x_TD, h_TD = self.ffn_norm.after(x_TD, mixed) if mixed else (x_TD, self.ffn_norm(x_TD))
        add_to = getattr(self.feed_forward, "add_to", None)  # a product that adds to its input, where there is one
        if batch.step and add_to is not None and not self.feed_forward._forward_hooks:
            added: Tensor = add_to(x_TD, h_TD)
            return added
        return add(x_TD, self.feed_forward(h_TD))

    def _mixed(self, x_TD: Tensor, batch: Batch | VarlenBatch, states: Sequence[Sequence[Any]]) -> Sequence[Tensor]:
        """The mixers' outputs."""
        assert self.mixer_norm is not None
        h_TD = self.mixer_norm(x_TD)
        joint = None if isinstance(batch, VarlenBatch) else self.joint
        precomputed = joint(h_TD) if joint is not None and joint.holds() else {}
        given = {"precomputed": precomputed} if precomputed else {}
        runs = [partial(mix, h_TD, batch, m, **given) for mix, m in zip(self.mixers.values(), states, strict=True)]
        return batch.side_by_side(runs)
