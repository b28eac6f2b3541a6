"""Gated DeltaNet: linear attention that erases before it writes (Yang et al. 2024, arXiv 2412.06464).

    [q | k | v] = silu(conv(qkv u))             causal, depthwise, J taps, no bias
    g           = A softplus(a u + dt_bias)     log decay, one number per value head;  A = −exp(A_log)
    β           = beta_max σ(b u)
    o           = gated delta rule(q, k, v, g, β)       q and k normalised, q scaled by K^-0.5: `reference.py`
    out( norm(o) · silu(z u) )                  RMS norm over each value head, one weight for all heads

Names agree with transformers `modeling_qwen3_5.py`.
Letters: T tokens of the whole batch, D width, C conv channels, G key heads, H value heads, K and V their widths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiercel.mixers.attention.layer import Attention
from tiercel.mixers.gated_delta.chunked import gated_delta
from tiercel.mixers.gated_delta.config import GatedDeltaConfig
from tiercel.mixers.gated_delta.ops import gated_delta_op
from tiercel.mixers.gated_delta.varlen import gated_delta_varlen
from tiercel.mixers.mamba2.ops import gated_norm_op
from tiercel.mixers.recurrent import RecurrentState
from tiercel.mixers.take_over import OPEN_GATE, pass_through
from tiercel.model.batch import Batch
from tiercel.model.derived import Derived, float32
from tiercel.model.layers import NONE_PRECOMPUTED, Linear, Precomputed, quantizes_input
from tiercel.model.varlen import VarlenBatch
from tiercel.ops.conv1d import conv1d
from tiercel.ops.norm import gated_rms_norm


class GatedDelta(nn.Module):
    def __init__(self, config: GatedDeltaConfig, width: int, eps: float) -> None:
        super().__init__()
        self.config, self.eps = config, config.norm_eps or eps
        H = config.value_heads
        self.qkv = Linear(width, config.channels, bias=False)
        self.z = Linear(width, config.values, bias=False)
        self.b = Linear(width, H, bias=False)
        self.a = Linear(width, H, bias=False)
        self.conv = nn.Parameter(torch.empty(config.channels, config.conv))
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.A_log = nn.Parameter(torch.empty(H))
        self.out_norm = nn.Parameter(torch.empty(config.value_dim))
        self.out = Linear(config.values, width, bias=False)
        self._derived = Derived()

    def forward(
        self,
        u_TD: Tensor,
        batch: Batch | VarlenBatch,
        states: Sequence[RecurrentState | None],
        precomputed: Precomputed = NONE_PRECOMPUTED,
    ) -> Tensor:
        """u: (T, D) → (T, D); every sequence continues its own state.  precomputed: products with u made elsewhere."""
        qkv_TC, z_TI, b_TH, a_TH = (
            precomputed[m] if m in precomputed else m(u_TD) for m in (self.qkv, self.z, self.b, self.a)
        )
        c = self.config
        if not isinstance(batch, VarlenBatch) and batch.native:
            state = states[0]
            assert state is not None
            weight_JC, dt_bias_H, A_H, norm_I = self._derived(
                (self.conv, self.dt_bias, self.A_log, self.out_norm), self._derive
            )
            o_TI = gated_delta_op(batch.backend)(
                batch.metadata_for(state), qkv_TC, b_TH, a_TH, weight_JC, dt_bias_H, A_H, key_heads=c.key_heads,
                key_dim=c.key_dim, value_dim=c.value_dim, chunk=state.chunk, beta_max=c.beta_max, tiled=c.tiled,
            )  # fmt: skip
            norm = gated_norm_op(batch.backend)
            y_TI = norm(o_TI, z_TI, norm_I, self.eps, c.value_heads, False, round=quantizes_input(self.out))
            return self.out(y_TI)
        wide = torch.promote_types(u_TD.dtype, torch.float32)
        g_TH = -self.A_log.to(wide).exp() * F.softplus(a_TH.to(wide) + self.dt_bias.to(wide))
        beta_TH = c.beta_max * b_TH.to(wide).sigmoid()
        if isinstance(batch, VarlenBatch):
            q, k, v = self._heads(batch.conv1d(qkv_TC, self.conv, None))
            o_TI = gated_delta_varlen(q, k, v, g_TH, beta_TH, batch.document_BL, tiled=c.tiled).flatten(1)
        else:
            rows = [
                self._rule(qkv_TC[span], g_TH[span], beta_TH[span], state)
                for span, state in zip(batch.spans, states, strict=True)
            ]
            o_TI = torch.cat(rows)
        weight_I = self.out_norm.to(wide).repeat(c.value_heads)
        return self.out(gated_rms_norm(o_TI, z_TI, weight_I, self.eps, c.value_heads, gate_first=False))

    @torch.no_grad()
    def take_over(self, attention: Attention, one_D: Tensor) -> None:
        """Begin as the attention whose place this takes; see `mixers.take_over`.  Its biases have no place here.

        one_D: a vector whose product with the layer's inputs is about 1.
        """
        self.qkv.weight.copy_(torch.cat([weight for weight, _ in attention.expanded()]))
        self.out.weight.copy_(attention.o.weight)
        pass_through(self.conv)
        gated = attention.config.output_gate
        self.z.weight.copy_(attention.gate.weight if gated else OPEN_GATE * one_D.expand_as(self.z.weight))

    def _derive(self) -> tuple[Tensor | None, ...]:
        """The small parameters as the kernels read them."""
        norm_I = float32(self.out_norm).repeat(self.config.value_heads)
        return float32(self.conv.t()), float32(self.dt_bias), -float32(self.A_log).exp(), norm_I

    def _heads(self, qkv_LC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k (L, G, K), v (L, H, V)."""
        c = self.config
        heads = (c.key_heads, c.key_heads, c.value_heads)
        parts = qkv_LC.split((c.keys, c.keys, c.values), -1)
        q, k, v = (part.unflatten(-1, (count, -1)) for part, count in zip(parts, heads, strict=True))
        return q, k, v

    def _rule(self, qkv_LC: Tensor, g_LH: Tensor, beta_LH: Tensor, state: RecurrentState | None) -> Tensor:
        """One sequence: convolution and rule → o (L, H · V) float32."""
        c = self.config
        window = F.pad(qkv_LC, (0, 0, c.conv - 1, 0)) if state is None else state.window("conv_state", qkv_LC)
        q, k, v = self._heads(F.silu(conv1d(window, self.conv, None)).to(qkv_LC.dtype))
        if state is None:
            S_HKV = torch.zeros(c.value_heads, c.key_dim, c.value_dim, device=q.device)
            o_LHV, _, _ = gated_delta(q, k, v, g_LH, beta_LH, v[:0].float(), S_HKV, chunk=c.chunk, tiled=c.tiled)
            return o_LHV.flatten(1)
        added, earlier = len(q), state.buffers["u"][: state.pending]
        commit = state.committed_pos_after(added) - state.committed_pos
        o_LHV, u_LHV, S_HKV = gated_delta(
            q, state.append("k", k), v, state.append("g", g_LH), beta_LH, earlier, state.buffers["ssm_state"],
            chunk=state.chunk, commit=commit, tiled=c.tiled,
        )  # fmt: skip
        state.append("u", u_LHV)
        state.commit(added, ssm_state=S_HKV)
        return o_LHV.flatten(1)
