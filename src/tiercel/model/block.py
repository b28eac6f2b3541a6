"""One layer: norm → mixers, summed → residual → norm → feed-forward → residual.

The hybrid idea is the line with `runs`: mixers of different kinds read one normalised input side by side.
Where a layer has post-norms they act on what is added to the residual; without pre-norms the input is read as it is.
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
        norms = [RMSNorm(width, stream_eps) if there else None for there in (config.pre_norm, config.post_norm) * 2]
        if not config.mixers:
            norms[:2] = None, None
        if config.feed_forward is None:
            norms[2:] = None, None
        self.mixer_norm, self.mixer_post_norm = norms[:2]
        self.mixers = nn.ModuleDict({mixer.kind: mixer.build(width, eps) for mixer in config.mixers})
        self.ffn_norm, self.ffn_post_norm = norms[2:]
        self.feed_forward = None if config.feed_forward is None else config.feed_forward.build(width, eps)
        self.joint: MergedLinear | None = None  # on a GPU: of the matrices that multiply the normalised input

    def forward(self, x_TD: Tensor, batch: Batch | VarlenBatch, states: Sequence[Sequence[Any]]) -> Tensor:
        """x: (T, D) → (T, D).  states: for each mixer the state of every row (None: without one)."""
        mixed = self._mixed(x_TD, batch, states) if self.mixers else []
        if self.feed_forward is None:
            return reduce(add, mixed, x_TD)
        if self.ffn_norm is None:
            x_TD = h_TD = reduce(add, mixed, x_TD)
        else:
            x_TD, h_TD = self.ffn_norm.after(x_TD, mixed) if mixed else (x_TD, self.ffn_norm(x_TD))
        if self.ffn_post_norm is not None:
            return add(x_TD, self.ffn_post_norm(self.feed_forward(h_TD)))
        add_to = getattr(self.feed_forward, "add_to", None)  # a product that adds to its input, where there is one
        if batch.step and add_to is not None and not self.feed_forward._forward_hooks:
            added: Tensor = add_to(x_TD, h_TD)
            return added
        return add(x_TD, self.feed_forward(h_TD))

    def _mixed(self, x_TD: Tensor, batch: Batch | VarlenBatch, states: Sequence[Sequence[Any]]) -> Sequence[Tensor]:
        """The mixers' outputs."""
        h_TD = x_TD if self.mixer_norm is None else self.mixer_norm(x_TD)
        joint = None if isinstance(batch, VarlenBatch) else self.joint
        precomputed = joint(h_TD) if joint is not None and joint.holds() else {}
        given = {"precomputed": precomputed} if precomputed else {}
        runs = [partial(mix, h_TD, batch, m, **given) for mix, m in zip(self.mixers.values(), states, strict=True)]
        mixed = batch.side_by_side(runs)
        return mixed if self.mixer_post_norm is None else [self.mixer_post_norm(reduce(add, mixed))]
