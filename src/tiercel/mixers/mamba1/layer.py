"""Mamba-1: selective scan with a decay per channel and state (Gu & Dao 2023, arXiv 2312.00752).

    [x | z]      = in_proj u                         widths I | I
    x            = silu(conv(x))                 causal, depthwise, K taps
    [δ | B | C]  = x_proj x                      widths R | N | N;  Jamba: an RMS norm on each
    dt           = softplus(dt δ + dt_bias)         (I)
    y            = scan(x, dt, A, B, C) + D x    A = −exp(A_log), (I, N)
    out_proj( y · silu(z) )

Letters: T tokens of the whole batch, L of one row, D width, I inner, R dt rank, N state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiercel.mixers.mamba1 import cpu
from tiercel.mixers.mamba1.config import Mamba1Config
from tiercel.mixers.mamba1.reference import selective_scan
from tiercel.mixers.mamba1.varlen import selective_scan_varlen
from tiercel.mixers.recurrent import RecurrentState
from tiercel.model.batch import Batch
from tiercel.model.derived import Derived, float32
from tiercel.model.layers import Linear, RMSNorm
from tiercel.model.varlen import VarlenBatch
from tiercel.ops.conv1d import conv1d
from tiercel.ops.conv1d_varlen import at_least_fp32
from tiercel.ops.cpu.batch import causal_conv1d


class Mamba1(nn.Module):
    def __init__(self, config: Mamba1Config, width: int, eps: float) -> None:
        super().__init__()
        self.config, self.eps = config, eps if config.norm_eps is None else config.norm_eps
        I, R, N = config.inner, config.dt_rank, config.state
        self.in_proj = Linear(width, 2 * I, config.proj_bias)
        self.conv = nn.Parameter(torch.empty(I, config.conv))
        self.conv_bias = nn.Parameter(torch.empty(I)) if config.conv_bias else None
        self.x_proj = Linear(I, R + 2 * N, bias=False)
        self.dt = Linear(R, I, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(I))
        self.A_log = nn.Parameter(torch.empty(I, N))
        self.D = nn.Parameter(torch.empty(I))
        if config.inner_norms and config.norm_weights:
            self.dt_norm, self.B_norm, self.C_norm = (RMSNorm(size, self.eps) for size in (R, N, N))
        self.out_proj = Linear(I, width, config.proj_bias)
        self._derived = Derived()

    def forward(self, u_TD: Tensor, batch: Batch | VarlenBatch, states: Sequence[RecurrentState | None]) -> Tensor:
        """u: (T, D) → (T, D); every row goes on from its own state."""
        if not isinstance(batch, VarlenBatch) and batch.native:
            return self.out_proj(self._natively(u_TD, batch, states))
        x_TI, z_TI = self.in_proj(u_TD).chunk(2, -1)
        if isinstance(batch, VarlenBatch):
            x_TI = batch.conv1d(x_TI, self.conv, self.conv_bias)
            dt_TI, B_TN, C_TN = self._select(x_TI)
            y_TI = selective_scan_varlen(C_TN, x_TI, dt_TI, -self.A_log.exp(), B_TN, batch) + self.D * x_TI
            return self.out_proj(y_TI * F.silu(at_least_fp32(z_TI)))
        windows = [
            F.pad(x_TI[span], (0, 0, self.config.conv - 1, 0))
            if state is None
            else state.window("conv_state", x_TI[span])
            for span, state in zip(batch.spans, states, strict=True)
        ]
        x_TI = F.silu(torch.cat([conv1d(w, self.conv, self.conv_bias) for w in windows])).to(x_TI.dtype)
        dt_TI, B_TN, C_TN = self._select(x_TI)
        A_IN = -self.A_log.float().exp()
        rows = []
        for span, state in zip(batch.spans, states, strict=True):
            C, x, dt, B = C_TN[span], x_TI[span], dt_TI[span], B_TN[span]
            if state is None:
                rows.append(selective_scan(C, x, dt, A_IN, B, torch.zeros_like(A_IN.t()))[0])
            else:
                rows.append(scan(state, C, x, dt, A_IN, B))
        y_TI = torch.cat(rows) + self.D.float() * x_TI
        return self.out_proj(y_TI * F.silu(z_TI.float()))

    def _natively(self, u_TD: Tensor, batch: Batch, states: Sequence[RecurrentState | None]) -> Tensor:
        c, state = self.config, states[0]
        assert state is not None
        parameters = self.conv, self.conv_bias, self.dt_bias, self.A_log, self.D, *self._norm_weights()
        weight_KC, bias_C, dt_bias_I, A_NI, D_I, *norms = self._derived(parameters, self._derive)
        metadata = batch.metadata_for(state)
        xz_TI = self.in_proj(u_TD).float()
        x_TI = causal_conv1d(metadata, xz_TI[:, : c.inner], weight_KC, bias_C)[0]
        dt_TR, B_TN, C_TN = cpu.split_norm(metadata, self.x_proj(x_TI).float(), norms, c.dt_rank, c.state, self.eps)
        dt_TI = self.dt(dt_TR).float()
        return cpu.selective_scan(
            metadata, x_TI, dt_TI, dt_bias_I, B_TN, C_TN, A_NI, D_I, xz_TI, taps=c.conv, chunk=state.chunk
        )

    def _derive(self) -> tuple[Tensor | None, ...]:
        """The small parameters as the kernels read them."""
        bias_C = None if self.conv_bias is None else float32(self.conv_bias)
        norms = [None if weight is None else float32(weight) for weight in self._norm_weights()]
        if self.config.inner_norms and not self.config.norm_weights:
            norms = [torch.ones(size, device=self.D.device) for size in self._selected]
        A_NI = -float32(self.A_log.t()).exp()
        return float32(self.conv.t()), bias_C, float32(self.dt_bias), A_NI, float32(self.D), *norms

    def _norm_weights(self) -> list[Tensor | None]:
        """Of dt, B and C."""
        if not (self.config.inner_norms and self.config.norm_weights):
            return [None] * 3
        return [self.dt_norm.weight, self.B_norm.weight, self.C_norm.weight]

    @property
    def _selected(self) -> tuple[int, int, int]:
        """Widths of dt, B and C after x_proj."""
        return self.config.dt_rank, self.config.state, self.config.state

    def _select(self, x_TI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt (T, I) float32, B and C (T, N), chosen by the input itself."""
        c = self.config
        dt_TR, B_TN, C_TN = self.x_proj(x_TI).split(self._selected, -1)
        if c.inner_norms and c.norm_weights:
            dt_TR, B_TN, C_TN = self.dt_norm(dt_TR), self.B_norm(B_TN), self.C_norm(C_TN)
        elif c.inner_norms:
            dt_TR, B_TN, C_TN = (
                F.rms_norm(t.float(), t.shape[-1:], eps=self.eps).to(t.dtype) for t in (dt_TR, B_TN, C_TN)
            )
        return F.softplus(self.dt(dt_TR).float() + self.dt_bias.float()), B_TN, C_TN


def scan(state: RecurrentState, C_LN: Tensor, x_LI: Tensor, dt_LI: Tensor, A_IN: Tensor, B_LN: Tensor) -> Tensor:
    """Add L tokens to a state and return their outputs (L, I) float32.

    The decay is per channel and state, so there is no chunked form: the newest state is kept too, and after a cut it is
    computed again from the committed one and the pending inputs (no matrix product is repeated).
    """
    added, start = x_LI.shape[0], state.pending
    commit = state.committed_pos_after(added) - state.committed_pos  # the new boundary, counted in pending inputs
    x, dt, B = state.append("x", x_LI), state.append("dt", dt_LI), state.append("B", B_LN)

    def advance(S_NI: Tensor, first: int, last: int) -> Tensor:
        return selective_scan(None, x[first:last], dt[first:last], A_IN, B[first:last], S_NI)[1]

    S_NI, newest_NI = state.buffers["ssm_state"], state.buffers["running"]
    if not state.scratch_valid:
        newest_NI = advance(S_NI, 0, start)
    if 0 < commit <= start:
        S_NI = advance(S_NI, 0, commit)
    middle = max(commit - start, 0)  # the boundary may lie among the new tokens: stop there on the way
    ys = []
    for part in (slice(0, middle), slice(middle, added)):
        if part.start < part.stop:
            y, newest_NI = selective_scan(C_LN[part], x_LI[part], dt_LI[part], A_IN, B_LN[part], newest_NI)
            ys.append(y)
            if part.stop == middle:
                S_NI = newest_NI
    state.commit(added, ssm_state=S_NI, running=newest_NI)
    return torch.cat(ys)
