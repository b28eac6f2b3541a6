"""Mamba-2: the mixer with constant memory and linear time (Dao & Gu 2024, arXiv 2405.21060).

    [z | x B C | dt] = in_proj u                widths I | I, G·N, G·N | H,   I = H · P
    [x B C]  = silu(conv([x B C]))              causal, depthwise, K taps
    dt       = softplus(dt + dt_bias)           clamped to dt_limit
    y        = ssd(x, dt, A, B, C) + D x        A = −exp(A_log), one number per head
    out_proj( norm(y · silu(z)) )                    or norm(y) · silu(z), or y · silu(z): config.gated_norm

Names agree with state-spaces/mamba `modules/mamba2.py`; unlike there, one forward serves a whole prompt, a
chunk of it and one step, and B and C have any number of groups in all of them.
Letters: T tokens of the whole batch, L of one row, D width, I inner, H heads, P head dim, G groups, N state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiercel.mixers.attention.layer import Attention
from tiercel.mixers.mamba2.chunked import ssd
from tiercel.mixers.mamba2.config import Mamba2Config
from tiercel.mixers.mamba2.ops import gated_norm_op, mamba2_op
from tiercel.mixers.mamba2.varlen import CHUNK, ssd_documents
from tiercel.mixers.recurrent import RecurrentState
from tiercel.mixers.take_over import OPEN_GATE, pass_through
from tiercel.model.batch import Batch
from tiercel.model.derived import Derived, float32
from tiercel.model.layers import NONE_PRECOMPUTED, Linear, Precomputed, quantizes_input
from tiercel.model.varlen import VarlenBatch
from tiercel.ops.conv1d import conv1d
from tiercel.ops.norm import gated_rms_norm
from tiercel.ops.pointwise import gate


class Mamba2(nn.Module):
    def __init__(self, config: Mamba2Config, width: int, eps: float) -> None:
        super().__init__()
        self.config, self.eps = config, eps
        self.in_proj = Linear(width, config.inner + config.channels + config.heads, config.in_bias)
        self.conv = nn.Parameter(torch.empty(config.channels, config.conv))
        self.conv_bias = nn.Parameter(torch.empty(config.channels)) if config.conv_bias else None
        self.dt_bias = nn.Parameter(torch.empty(config.heads))
        self.A_log = nn.Parameter(torch.empty(config.heads))
        self.D = nn.Parameter(torch.empty(config.heads))
        self.out_norm = nn.Parameter(torch.empty(config.inner)) if config.gated_norm != "none" else None
        self._derived = Derived()
        self.out_proj = Linear(config.inner, width, config.out_bias)

    def forward(
        self,
        u_TD: Tensor,
        batch: Batch | VarlenBatch,
        states: Sequence[RecurrentState | None],
        precomputed: Precomputed = NONE_PRECOMPUTED,
    ) -> Tensor:
        """u: (T, D) → (T, D); every row goes on from its own state.  ready: products with u made elsewhere."""
        if not isinstance(batch, VarlenBatch) and batch.native:
            return self.out_proj(self._natively(u_TD, batch, states, precomputed))
        c = self.config
        z_TI, xBC_TC, dt_TH = self.in_proj(u_TD).split((c.inner, c.channels, c.heads), -1)
        dt_TH = F.softplus(dt_TH.float() + self.dt_bias.float()).clamp(*c.dt_limit)
        A_H = -self.A_log.float().exp()
        if isinstance(batch, VarlenBatch):
            y_TI = self._packed(xBC_TC, dt_TH, A_H, batch)
        else:
            rows = [
                self._scan(xBC_TC[span], dt_TH[span], A_H, state)
                for span, state in zip(batch.spans, states, strict=True)
            ]
            y_TI = rows[0] if len(rows) == 1 else torch.cat(rows)
        if self.out_norm is None:
            learns = isinstance(batch, VarlenBatch) and z_TI.device.type == "cpu"  # then `Gate` widens what it has to
            y_TI = gate(z_TI if learns else z_TI.float(), y_TI, "silu")
        else:
            y_TI = gated_rms_norm(y_TI, z_TI, self.out_norm, self.eps, c.groups, c.gated_norm == "gate_first")
        return self.out_proj(y_TI)

    def _natively(
        self, u_TD: Tensor, batch: Batch, states: Sequence[RecurrentState | None], precomputed: Precomputed
    ) -> Tensor:
        c, state = self.config, states[0]
        assert state is not None
        parameters = self.conv, self.conv_bias, self.dt_bias, self.A_log, self.D, self.out_norm
        weight_KC, bias_C, dt_bias_H, A_H, D_H, norm_I = self._derived(parameters, self._derive)
        zxBCdt_TD = precomputed[self.in_proj] if self.in_proj in precomputed else self.in_proj(u_TD)
        y_TI = mamba2_op(batch.backend)(
            batch.metadata_for(state), zxBCdt_TD, weight_KC, bias_C, dt_bias_H, A_H, D_H,
            head_dim=c.head_dim, groups=c.groups, state=c.state, chunk=state.chunk, dt_limit=c.dt_limit,
        )  # fmt: skip
        gate_first = c.gated_norm == "gate_first"
        return gated_norm_op(batch.backend)(
            y_TI, zxBCdt_TD, norm_I, self.eps, c.groups, gate_first, round=quantizes_input(self.out_proj)
        )

    def _derive(self) -> tuple[Tensor | None, ...]:
        """The small parameters as the kernels read them."""
        bias_C = None if self.conv_bias is None else float32(self.conv_bias)
        norm_I = None if self.out_norm is None else float32(self.out_norm)
        A_H = -float32(self.A_log).exp()
        return float32(self.conv.t()), bias_C, float32(self.dt_bias), A_H, float32(self.D), norm_I

    @torch.no_grad()
    def take_over(self, attention: Attention, one_D: Tensor) -> None:
        """Begin as the attention whose place this takes; see `mixers.take_over`.

        one_D: a vector whose product with the layer's inputs is about 1.
        """
        c = self.config
        (q_ID, q_I), (k_ID, k_I), (v_ID, v_I) = attention.expanded()
        gated = attention.config.output_gate
        z_ID = attention.gate.weight if gated else OPEN_GATE * one_D.expand(c.inner, -1)
        self.in_proj.weight[: -c.heads].copy_(torch.cat((z_ID, v_ID, k_ID, q_ID)))
        if self.in_proj.bias is not None:
            z_I = attention.gate.bias if gated else torch.zeros_like(q_I)
            self.in_proj.bias[: -c.heads].copy_(torch.cat((z_I, v_I, k_I, q_I)))
        self.out_proj.weight.copy_(attention.o.weight)
        if self.out_proj.bias is not None:
            self.out_proj.bias.copy_(attention.o.bias)
        pass_through(self.conv)
        self.D.zero_()

    def _packed(self, xBC_TC: Tensor, dt_TH: Tensor, A_H: Tensor, batch: VarlenBatch) -> Tensor:
        """All rows at once, for training → y (T, I), float32 at least."""
        c = self.config
        x_THP, B_TGN, C_TGN = self._parts(batch.conv1d(xBC_TC, self.conv, self.conv_bias))
        chunk = min(c.chunk, CHUNK if c.state <= CHUNK else 2 * CHUNK)
        return ssd_documents(C_TGN, x_THP, dt_TH, A_H, B_TGN, self.D, batch, chunk=chunk).flatten(1)

    def _parts(self, xBC_LC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (L, H, P), B and C (L, G, N)."""
        c = self.config
        x_LI, B_LM, C_LM = xBC_LC.split((c.inner, c.groups * c.state, c.groups * c.state), -1)
        B_LGN, C_LGN = B_LM.unflatten(-1, (c.groups, -1)), C_LM.unflatten(-1, (c.groups, -1))
        return x_LI.unflatten(-1, (c.heads, c.head_dim)), B_LGN, C_LGN

    def _scan(self, xBC_LC: Tensor, dt_LH: Tensor, A_H: Tensor, state: RecurrentState | None) -> Tensor:
        """One row: convolution and scan → y (L, I) float32."""
        c = self.config
        window_TC = F.pad(xBC_LC, (0, 0, c.conv - 1, 0)) if state is None else state.window("conv_state", xBC_LC)
        xBC_LC = F.silu(conv1d(window_TC, self.conv, self.conv_bias)).to(xBC_LC.dtype)
        x_LHP, B_LGN, C_LGN = self._parts(xBC_LC)
        if state is None:
            S_HNP = torch.zeros(c.heads, c.state, c.head_dim, device=x_LHP.device)
            y_LHP, _ = ssd(C_LGN, x_LHP, dt_LH, A_H, B_LGN, S_HNP, chunk=c.chunk)
        else:
            added = len(x_LHP)
            commit, S_HNP = state.committed_pos_after(added) - state.committed_pos, state.buffers["ssm_state"]
            x, dt, B = state.append("x", x_LHP), state.append("dt", dt_LH), state.append("B", B_LGN)
            y_LHP, S_HNP = ssd(C_LGN, x, dt, A_H, B, S_HNP, chunk=state.chunk, commit=commit)
            state.commit(added, ssm_state=S_HNP)
        return (y_LHP + self.D.float().unsqueeze(-1) * x_LHP).flatten(1)
