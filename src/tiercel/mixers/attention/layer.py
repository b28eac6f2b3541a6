"""Grouped-query attention with rotary positions: the mixer that recalls exactly.

    o( softmax(scale · rot(q) · rot(k)ᵀ) v )        q: H heads, k and v: K heads, K divides H
    o( σ(gate u) · softmax(…) v )                   with an output gate (Qwen3-Next)

Letters: T tokens of the whole batch, D width, H heads, K key/value heads, P head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.attention.ops import attention_op
from tiercel.mixers.attention.rotary import rotate
from tiercel.mixers.attention.sdpa import attention
from tiercel.mixers.attention.varlen import attend_documents
from tiercel.mixers.paged import PagedState
from tiercel.model.batch import Batch
from tiercel.model.layers import NONE_PRECOMPUTED, Linear, Precomputed, RMSNorm, quantizes_input
from tiercel.model.varlen import VarlenBatch
from tiercel.ops.pointwise import gate


class Attention(nn.Module):
    def __init__(self, config: AttentionConfig, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.config = config
        P = config.head_dim
        self.scale = P**-0.5 if config.scale is None else config.scale
        self.q = Linear(width, config.heads * P, config.qkv_bias)
        self.k = Linear(width, config.kv_heads * P, config.qkv_bias)
        self.v = Linear(width, config.kv_heads * P, config.qkv_bias)
        if config.output_gate:
            each = 1 if config.gate_heads else P
            self.gate = Linear(width, config.heads * each, config.qkv_bias and not config.gate_heads)
        self.o = Linear(config.heads * P, width, config.out_bias)
        if config.qk_norm:
            heads = (config.heads, config.kv_heads) if config.norm_all_heads else (1, 1)
            self.q_norm, self.k_norm = (RMSNorm(count * P, eps) for count in heads)

    def forward(
        self,
        h_TD: Tensor,
        batch: Batch | VarlenBatch,
        states: Sequence[PagedState | None],
        precomputed: Precomputed = NONE_PRECOMPUTED,
    ) -> Tensor:
        """h: (T, D) → (T, D); every row attends to its own past.  ready: products with h made elsewhere."""
        if not isinstance(batch, VarlenBatch) and batch.native:
            return self._project(self._natively(h_TD, batch, states, precomputed), h_TD, precomputed)
        P = self.config.head_dim
        q_TI, k_TM = self._normalized(self.q(h_TD), self.k(h_TD))
        q_THP, k_TKP = q_TI.unflatten(-1, (-1, P)), k_TM.unflatten(-1, (-1, P))
        q_HTP, k_KTP = q_THP.transpose(0, 1), k_TKP.transpose(0, 1)
        v_KTP = self.v(h_TD).unflatten(-1, (-1, P)).transpose(0, 1)
        if self.config.rope is not None:
            turned = rotate(torch.cat((q_HTP, k_KTP)), *batch.rotary(self.config.rope, P))
            q_HTP, k_KTP = turned.split((self.config.heads, self.config.kv_heads))
        if isinstance(batch, VarlenBatch):
            y_HTP = attend_documents(q_HTP, k_KTP, v_KTP, batch, scale=self.scale, window=self.config.window)
            return self._project(y_HTP.transpose(0, 1).flatten(1), h_TD, precomputed)
        rows = []
        for span, state in zip(batch.spans, states, strict=True):
            k, v = k_KTP[:, span], v_KTP[:, span]
            if state is not None:
                k, v = state.extend(k, v)
            rows.append(attention(q_HTP[:, span], k, v, scale=self.scale, window=self.config.window))
        y_HTP = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
        return self._project(y_HTP.transpose(0, 1).flatten(1), h_TD, precomputed)

    def _normalized(self, q_TI: Tensor, k_TM: Tensor) -> tuple[Tensor, Tensor]:
        """q and k after their norms, where there are some."""
        if not self.config.qk_norm:
            return q_TI, k_TM
        if self.config.norm_all_heads:
            return self.q_norm(q_TI), self.k_norm(k_TM)
        P = self.config.head_dim
        q_THP, k_TKP = q_TI.unflatten(-1, (-1, P)), k_TM.unflatten(-1, (-1, P))
        return self.q_norm(q_THP).flatten(1), self.k_norm(k_TKP).flatten(1)

    @torch.no_grad()
    def expanded(self) -> list[tuple[Tensor, Tensor]]:
        """Weight (H · P, D) and bias (H · P) of q, k and v, each with H heads; the norms' weights are folded in."""
        c, out = self.config, []
        for name, heads in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads)):
            linear, norm = getattr(self, name), getattr(self, f"{name}_norm", None)
            bias = linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
            both_HPD = torch.cat((linear.weight, bias.unsqueeze(1)), 1).unflatten(0, (heads, c.head_dim))
            if norm is not None:
                both_HPD = both_HPD * norm.weight.view(-1, c.head_dim, 1)
            both_ID = both_HPD.repeat_interleave(c.heads // heads, 0).flatten(0, 1)
            out.append((both_ID[:, :-1], both_ID[:, -1]))
        return out

    def _project(self, y_TI: Tensor, h_TD: Tensor, precomputed: Precomputed) -> Tensor:
        """The output projection, after the gate where there is one."""
        if self.config.output_gate:
            gate_TI = precomputed[self.gate] if self.gate in precomputed else self.gate(h_TD)
            if self.config.gate_heads:
                gate_TI = gate_TI.repeat_interleave(self.config.head_dim, -1)
            y_TI = gate(gate_TI, y_TI, "sigmoid")
        return self.o(y_TI)

    def _natively(
        self, h_TD: Tensor, batch: Batch, states: Sequence[PagedState | None], precomputed: Precomputed
    ) -> Tensor:
        c = self.config
        assert states[0] is not None
        q_TI, k_TM, v_TM = (precomputed[m] if m in precomputed else m(h_TD) for m in (self.q, self.k, self.v))
        q_TI, k_TM = self._normalized(q_TI, k_TM)
        return attention_op(batch.backend)(
            batch.metadata_for(states[0]),
            q_TI,
            k_TM,
            v_TM,
            None if c.rope is None else batch.rotary(c.rope, c.head_dim),
            heads=c.heads,
            kv_heads=c.kv_heads,
            scale=self.scale,
            window=c.window,
            round=quantizes_input(self.o) and not c.output_gate,
        )
