"""A forward for training: rows (B, L) with conversations packed inside, every one read as if it stood alone.

Attention sees its own conversation only, the convolution takes nothing over a border, and the scan's state starts at
zero there.  The parameters are the network's own; `tests/problems/test_training.py` compares with its own forward.
Letters as in `tiercel.model`; c chunk number, Q tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiercel.model.decoder import Decoder


class Where:
    """doc (B, L): number of the conversation in its row; place (B, L): place in the conversation."""

    def __init__(self, start_BL: Tensor, theta: float, P: int) -> None:
        L = start_BL.shape[1]
        self.doc = start_BL.long().cumsum(1)
        at = torch.arange(L, device=start_BL.device).expand_as(self.doc)
        self.place = at - torch.where(start_BL, at, 0).cummax(1).values
        self.mask = (self.doc[:, None, :, None] == self.doc[:, None, None, :]).tril()
        f = theta ** (-torch.arange(0, P, 2, device=start_BL.device).float() / P)
        angle = self.place.float()[:, None, :, None] * f
        self.cos, self.sin = angle.cos(), angle.sin()


def hidden(network: Decoder, ids_BL: Tensor, start_BL: Tensor) -> Tensor:
    """(B, L, D), normed: what the head reads."""
    first = network.layers[0].mixers["attention"].config
    where = Where(start_BL, first.rope.theta, first.head_dim)
    x = network.embed(ids_BL)
    for block in network.layers:
        h = norm(x, block.mixer_norm)
        x = x + attention(block.mixers["attention"], h, where) + mamba2(block.mixers["mamba2"], h, where)
        ffn, h = block.feed_forward, norm(x, block.ffn_norm)
        x = x + F.linear(F.silu(F.linear(h, ffn.gate.weight)) * F.linear(h, ffn.up.weight), ffn.down.weight)
    return norm(x, network.norm)


def norm(x: Tensor, module: Any) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], module.weight.float(), module.eps)


def attention(m: Any, h: Tensor, where: Where) -> Tensor:
    P = m.config.head_dim
    q, k, v = (F.linear(h, w.weight).unflatten(-1, (-1, P)).transpose(1, 2) for w in (m.q, m.k, m.v))
    q, k = turned(q, where).to(v.dtype), turned(k, where).to(v.dtype)
    repeat = m.config.heads // m.config.kv_heads
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=where.mask, scale=m.scale)
    return F.linear(y.transpose(1, 2).flatten(2), m.o.weight)


def turned(x: Tensor, where: Where) -> Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * where.cos - b * where.sin, b * where.cos + a * where.sin), -1)


def mamba2(m: Any, h: Tensor, where: Where) -> Tensor:
    c = m.config
    z, xBC, dt = F.linear(h, m.in_proj.weight).split((c.inner, c.channels, c.heads), -1)
    mixed = xBC.float() * m.conv[:, -1] + m.conv_bias
    for back in range(1, c.conv):
        before = F.pad(xBC, (0, 0, back, 0))[:, :-back].float()
        mixed = mixed + before * m.conv[:, c.conv - 1 - back] * (where.place >= back).unsqueeze(-1)
    x, B, C = F.silu(mixed).split((c.inner, c.groups * c.state, c.groups * c.state), -1)
    dt = F.softplus(dt.float() + m.dt_bias)
    x = x.unflatten(-1, (c.heads, c.head_dim))
    y = scan(x, dt, -m.A_log.exp(), B, C, where.doc, c.chunk) + m.D.unsqueeze(-1) * x
    y = y.flatten(2) * F.silu(z.float())
    return F.linear(F.rms_norm(y, (c.inner,), m.out_norm, m.eps).to(h.dtype), m.out_proj.weight)


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, doc: Tensor, Q: int) -> Tensor:
    """x (B, L, H, P), dt (B, L, H), B and C (B, L, N) of one group, doc (B, L) → y (B, L, H, P); Q divides L."""
    b, L, H, P = x.shape
    chunks = L // Q
    x, dt, B, C, doc = (t.unflatten(1, (chunks, Q)) for t in (x, dt, B, C, doc))
    a = (dt * A).cumsum(2)  # (b, c, Q, H) log decay from the chunk's start
    same = (doc.unsqueeze(3) == doc.unsqueeze(2)).tril()  # (b, c, Q, Q)
    lag = (a.unsqueeze(3) - a.unsqueeze(2)).masked_fill(~same.unsqueeze(-1), -1e4)  # (b, c, Q, Q, H)
    scores = (C @ B.transpose(2, 3)).float()
    weights = scores.unsqueeze(-1) * lag.exp() * dt.unsqueeze(2)
    y = torch.einsum("bcqkh,bckhp->bcqhp", weights.to(x.dtype), x)
    # what each chunk adds to the state at its end, and what it leaves of the state before it
    last = doc[:, :, -1]
    left = (a[:, :, -1:] - a).exp() * dt * (doc == last.unsqueeze(-1)).unsqueeze(-1)
    added = torch.einsum("bckn,bckhp->bchnp", B, x * left.unsqueeze(-1))
    before = F.pad(last, (1, 0))[:, :-1]  # 0, which no conversation has, before the first
    kept = a[:, :, -1].exp() * (before == last).unsqueeze(-1)
    states, state = [], torch.zeros_like(added[:, 0])
    for i in range(chunks):
        states.append(state)
        state = state * kept[:, i, :, None, None] + added[:, i]
    reach = a.exp() * (doc == before.unsqueeze(-1)).unsqueeze(-1)
    y = y + torch.einsum("bcqn,bchnp->bcqhp", C, torch.stack(states, 1)) * reach.unsqueeze(-1)
    return y.flatten(1, 2)
