"""A made-up mixer, one class and its layer: what a contributor writes, and nothing else.

S_t = a ⊙ S_{t−1} + x_t,  a = exp(−exp(A_log))      x | z = in_proj u;   out_proj(S_t ⊙ sigmoid(z))
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import nn

from tiercel.mixers.spec import Buffer, Cost, MixerSpec, Param, linear


@dataclass(frozen=True, kw_only=True)
class LeakyConfig(MixerSpec):
    """A leaky sum of I channels."""

    kind: ClassVar[str] = "leaky"
    inner: int
    chunk: int = 8

    def params(self, width: int) -> tuple[Param, ...]:
        I = self.inner
        return (
            *linear("in_proj", (2 * I, width), "in_proj", "leaky_in", bias=False, shard="column", parts=(I, I),
                    reads_input=True, lora=True),
            Param(name="A_log", shape=(I,), hf="A_log", gguf="leaky_a", init="A_log", keep_fp32=True, fp32_on_gpu=True,
                  decay=False, shard="column"),
            *linear("out_proj", (width, I), "out_proj", "leaky_out", bias=True, init="residual", shard="row",
                    lora=True),
        )  # fmt: skip

    def buffers(self) -> tuple[Buffer, ...]:
        return (
            Buffer(name="x", shape=(self.inner,), dtype="float32", lifetime="pending"),
            Buffer(name="S", shape=(self.inner,), dtype="float32", lifetime="sequence"),
        )

    def cost(self, tokens: int, context: int) -> Cost:
        return Cost(ops={"scan": tokens * self.inner}, reads={"scan_read": self.inner}, width=3 * self.inner)

    def describe(self) -> str:
        return f"leaky {self.inner} channels"

    def shard(self, size: int) -> Self:
        return replace(self, inner=self._divided("leaky channels", self.inner, size))

    def build(self, width: int, eps: float) -> nn.Module:
        return Leaky(self, width)


class Leaky(nn.Module):
    def __init__(self, config: LeakyConfig, width: int) -> None:
        from tiercel.model.layers import Linear

        super().__init__()
        self.config = config
        self.in_proj = Linear(width, 2 * config.inner, bias=False)
        self.A_log = nn.Parameter(torch.empty(config.inner))
        self.out_proj = Linear(config.inner, width, bias=True)

    def forward(self, u_TD, batch, states):
        x_TI, z_TI = self.in_proj(u_TD).float().chunk(2, -1)
        rows = [self._sum(x_TI[span], state) for span, state in zip(batch.spans, states, strict=True)]
        return self.out_proj((torch.cat(rows) * torch.sigmoid(z_TI)).to(u_TD.dtype))

    def _sum(self, x_LI, state):
        """S after each token (L, I); a state keeps that of its last boundary and the inputs since."""
        a_I = torch.exp(-torch.exp(self.A_log.float()))
        sums = [torch.zeros_like(a_I) if state is None else state.buffers["S"]]
        count, commit = len(x_LI), 0
        if state is not None:
            commit = state.committed_pos_after(count) - state.committed_pos
            x_LI = state.append("x", x_LI)
        for x_I in x_LI:
            sums.append(a_I * sums[-1] + x_I)
        y_LI = torch.stack(sums[-count:])
        if state is not None:
            state.commit(count, S=sums[commit])
        return y_LI
