"""Experts and their routers: kernels beside torch beside the definition, one token and one expert at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tiercel import quant
from tiercel.errors import FormatError
from tiercel.feed_forward.moe.config import MoEConfig
from tiercel.model.layers import pack
from tiercel.ops.cpu import native
from tiercel.ops.moe import moe, moe_reference, route, routed
from tiercel.ops.qtensor import QStack, QTensor

ROUTERS = {
    "mixtral": MoEConfig(width=3, experts=5, active=2),
    "jamba": MoEConfig(width=3, experts=7, active=7, renormalize=False),
    "nemotron": MoEConfig(width=3, experts=24, active=5, scores="sigmoid", correction=True, groups=4, active_groups=2,
                          renormalize_eps=0.3, scale=2.5),
    "one_group": MoEConfig(width=3, experts=130, active=9, scores="sigmoid", correction=True, renormalize=False),
}  # fmt: skip


def by_hand(scores: list[float], c: MoEConfig, correction: list[float]) -> dict[int, float]:
    """Weights by expert of one token, as `ops.moe` says it."""
    if c.scores == "softmax":
        total = math.fsum(math.exp(s) for s in scores)
        s = [math.exp(x) / total for x in scores]
    else:
        s = [1 / (1 + math.exp(-x)) for x in scores]
    choice = {e: s[e] + correction[e] for e in range(c.experts)}
    each = c.experts // c.groups
    if c.groups > 1:
        groups = [sum(sorted(choice[e] for e in range(g * each, g * each + each))[-2:]) for g in range(c.groups)]
        kept = sorted(range(c.groups), key=lambda g: -groups[g])[: c.active_groups]
        choice = {e: v for e, v in choice.items() if e // each in kept}
    chosen = sorted(choice, key=lambda e: -choice[e])[: c.active]
    total = sum(s[e] for e in chosen) + c.renormalize_eps if c.renormalize else 1.0
    return {e: s[e] / total * c.scale for e in chosen}


@pytest.mark.parametrize("name", ROUTERS)
def test_routers_follow_their_definition(name):
    c = ROUTERS[name]
    scores, correction = 2 * torch.randn(50, c.experts), torch.randn(c.experts) if c.correction else None
    with torch.no_grad():
        found = [route(scores, c, correction)]
        if native.available:
            weights, chosen = native.route(scores, c, correction)
            found.append((weights, chosen.view(torch.int32).long()))
    for t, row in enumerate(scores.double().tolist()):
        expected = by_hand(row, c, [0.0] * c.experts if correction is None else correction.double().tolist())
        for weights, chosen in found:
            got = dict(zip(chosen[t].tolist(), weights[t].tolist(), strict=True))
            assert got == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_what_a_router_leaves_out_is_seen():
    c, correction = ROUTERS["nemotron"], torch.randn(24)
    scores = torch.randn(40, 24)
    right = route(scores, c, correction)
    for wrong in (
        route(scores, c),
        route(scores, replace(c, groups=1, active_groups=1), correction),
        route(scores, replace(c, renormalize_eps=0.0), correction),
        route(scores, replace(c, scale=1.0), correction),
        route(scores, replace(c, scores="softmax"), correction),
    ):
        assert not torch.equal(right[1], wrong[1]) or not torch.allclose(right[0], wrong[0])


@pytest.mark.parametrize(
    "wrong",
    [dict(groups=5), dict(groups=4, active_groups=5), dict(groups=4, active=7, active_groups=1), dict(groups=24),
     dict(scores="tanh"), dict(shared_gate=True), dict(activation="relu3"), dict(scale=0.0),
     dict(renormalize_eps=-1.0)],
)  # fmt: skip
def test_routers_that_cannot_be_are_refused(wrong):
    with pytest.raises(FormatError):
        MoEConfig(**{"width": 3, "experts": 24, "active": 2} | wrong)


def stack(type: str, x_ENK: torch.Tensor) -> QStack:
    """Every matrix packed."""
    out = QStack(QTensor(type, tuple(x.shape)) for x in x_ENK)
    for q, x in zip(out, x_ENK, strict=True):
        q.put(0, quant.quantize(type, x))
    return out


@pytest.mark.parametrize("gated, activation", [(True, "silu"), (False, "relu2")])
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q5_1", "Q4_K"])
def test_experts_are_the_sum_of_their_products(kind, gated, activation):
    """In kernels and in torch; a token's output does not depend on the tokens beside it, to the bit."""
    E, F, D = 6, *{"F32": (50, 41), "BF16": (50, 41), "Q4_K": (256, 512)}.get(kind, (96, 64))
    c = MoEConfig(width=F, experts=E, active=2, activation=activation, gated=gated)
    with torch.no_grad():
        plain = torch.randn(E, F, D) / D**0.5, torch.randn(E, F, D) / D**0.5, torch.randn(E, D, F) / F**0.5
        if kind in ("F32", "BF16"):
            plain = [x.to(torch.bfloat16 if kind == "BF16" else torch.float32) for x in plain]
            packed = [pack(x) or x for x in plain]
        else:
            packed = [stack(kind, x) for x in plain]
            plain = [torch.stack([q.numbers() for q in x]) for x in packed]
        if not gated:
            plain[0] = packed[0] = None
        x, scores = torch.randn(230, D), torch.randn(230, E)
        scores[:, 3] -= 9.0  # an expert that few tokens see, and one that all do
        scores[:, 1] += 9.0
        got = routed(x, scores, c, None, *packed, activation)
        expected = moe_reference(x[:20], *route(scores[:20], c), *plain, activation)
        close = {"F32": 1e-5, "BF16": 1e-2}.get(kind, 3e-2)
        assert (got[:20] - expected).norm() < close * expected.norm()
        if kind == "F32":
            torch.testing.assert_close(got, moe(x, *route(scores, c), *plain, activation), atol=1e-5, rtol=1e-5)
        for rows in (slice(0, 1), slice(5, 9), slice(100, 117)):
            assert torch.equal(routed(x[rows], scores[rows], c, None, *packed, activation), got[rows])


def test_gate_and_up_may_be_packed_differently():
    c = MoEConfig(width=64, experts=3, active=2)
    with torch.no_grad():
        stacks = [stack("Q4_0", torch.randn(3, 64, 32)), stack("Q6_K", torch.randn(3, 64, 256)), None]
        stacks = [stack("Q4_K", torch.randn(3, 64, 256)), stacks[1], stack("Q8_0", torch.randn(3, 256, 64))]
        x, scores = torch.randn(9, 256) / 16, torch.randn(9, 3)
        expected = moe_reference(x, *route(scores, c), *(torch.stack([q.numbers() for q in s]) for s in stacks), "silu")
        got = routed(x, scores, c, None, *stacks, "silu")
        assert (got - expected).norm() < 3e-2 * expected.norm()
