"""The gated delta rule: every form against the float64 recurrence, and the same bits however a text is cut."""

from __future__ import annotations

import itertools

import pytest
import torch

import tiny
from tiercel.mixers.gated_delta.chunked import gated_delta
from tiercel.mixers.gated_delta.config import GatedDeltaConfig
from tiercel.mixers.gated_delta.reference import gated_delta_reference
from tiercel.mixers.gated_delta.varlen import gated_delta_varlen
from tiercel.model.config import LayerConfig, ModelConfig
from tiercel.model.decoder import Decoder
from tiercel.model.initialize import initialize
from tiercel.model.varlen import VarlenBatch
from tiercel.ops.cpu import native

SHAPES = [(1, 1, 8, 8), (2, 6, 16, 24), (3, 3, 20, 40), (2, 4, 32, 64)]  # G, H, K, V


def inputs(shape: tuple[int, int, int, int], length: int, *, slow: bool = False):
    """q, k, v, g, β and a state.  slow: decays near 1, so that nothing is forgotten; else some channels forget all."""
    G, H, K, V = shape
    draw = torch.Generator().manual_seed(length + K)
    q, k = (torch.randn(length, G, K, generator=draw) for _ in range(2))
    v = torch.randn(length, H, V, generator=draw)
    g = -torch.rand(length, H, generator=draw) * (1e-3 if slow else 30.0)
    beta = 2 * torch.rand(length, H, generator=draw)
    return q, k, v, g, beta, torch.randn(H, K, V, generator=draw)


def error(got: torch.Tensor, right: torch.Tensor) -> float:
    return float((got.double() - right).norm() / right.norm())


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 130])
def test_chunks_are_the_recurrence(shape, length: int, slow: bool) -> None:
    q, k, v, g, beta, S = inputs(shape, length, slow=slow)
    right, last = gated_delta_reference(q, k, v, g, beta, S)
    commit = length // 64 * 64
    o, u, committed = gated_delta(q, k, v, g, beta, v[:0], S, chunk=64, commit=commit)
    assert error(o, right) < 2e-6
    if commit:
        assert error(committed, gated_delta_reference(*(x[:commit] for x in (q, k, v, g, beta)), S)[1]) < 2e-6
    else:
        assert torch.equal(committed, S)
    # and from any cut in the open chunk
    cut = commit + (length - commit) // 2
    tail = slice(cut, None)
    if cut < length:
        again, fresh, _ = gated_delta(
            q[tail], k[commit:], v[tail], g[commit:], beta[tail], u[commit:cut], committed, chunk=64
        )
        assert error(again, right[tail]) < 2e-6 and torch.allclose(fresh, u[tail], atol=1e-4)
    assert torch.isfinite(last).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_documents_of_a_row_are_apart(shape) -> None:
    _, H, K, V = shape
    L, starts = 150, torch.zeros(2, 150, dtype=torch.bool)
    starts[0, [0, 1, 64, 100]] = starts[1, [0, 37]] = True
    q, k, v, g, beta, _ = inputs(shape, 2 * L)
    o = gated_delta_varlen(q, k, v, g, beta, VarlenBatch(starts).document_BL)
    for row in range(2):
        edges = [*starts[row].nonzero().flatten().tolist(), L]
        for a, b in itertools.pairwise(edges):
            span = slice(row * L + a, row * L + b)
            right, _ = gated_delta_reference(q[span], k[span], v[span], g[span], beta[span], torch.zeros(H, K, V))
            assert error(o[span], right) < 2e-6


def test_gradients_are_those_of_the_recurrence() -> None:
    q, k, v, g, beta, _ = (x.double() for x in inputs((1, 2, 3, 4), 70))
    leaves = [x.requires_grad_() for x in (q, k, v, g, beta)]
    document = torch.ones(1, 70, dtype=torch.int64)
    weights = torch.randn(70, 2, 4, dtype=torch.double)
    ours = torch.autograd.grad((gated_delta_varlen(*leaves, document) * weights).sum(), leaves)
    right = torch.autograd.grad((gated_delta_reference(*leaves, torch.zeros(2, 3, 4))[0] * weights).sum(), leaves)
    for a, b in zip(ours, right, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("changed", ["beta", "late decay", "head order", "no scale", "no norm"])
def test_a_wrong_rule_is_seen(changed: str) -> None:
    """The comparison above can fail: each is a mistake to be expected."""
    q, k, v, g, beta, S = inputs((2, 4, 16, 24), 40)
    g = g / 30
    right, _ = gated_delta_reference(q, k, v, g, beta, S)
    wrong = {
        "beta": lambda: gated_delta(q, k, v, g, torch.ones_like(beta), v[:0], S, chunk=64),
        "late decay": lambda: gated_delta(q, k, v, g.roll(1, 0), beta, v[:0], S, chunk=64),
        "head order": lambda: gated_delta(q.flip(1), k.flip(1), v, g, beta, v[:0], S, chunk=64),
        "no scale": lambda: (4 * gated_delta(q, k, v, g, beta, v[:0], S, chunk=64)[0],),
        "no norm": lambda: gated_delta(q, k, v, g, beta * k.norm(dim=-1).mean(), v[:0], S, chunk=64),
    }[changed]()
    assert error(wrong[0], right) > 1e-2


def test_tiled_heads_are_the_same_rule_in_another_order() -> None:
    q, k, v, g, beta, S = inputs((2, 6, 16, 24), 70)
    tiled = torch.arange(6).view(2, 3).t().flatten()  # value head j·3 + i becomes i·2 + j
    right = gated_delta_reference(q, k, v, g, beta, S)
    heads = v[:, tiled], g[:, tiled], beta[:, tiled]
    o, last = gated_delta_reference(q, k, *heads, S[tiled], tiled=True)
    assert torch.equal(o, right[0][:, tiled]) and torch.equal(last, right[1][tiled])
    chunks = gated_delta(q, k, *heads, v[:0], S[tiled], chunk=64, tiled=True)[0]
    assert error(chunks, o) < 2e-6
    document = torch.ones(1, 70, dtype=torch.int64)
    rows = gated_delta_varlen(q, k, *heads, document, tiled=True)
    assert error(rows, gated_delta_reference(q, k, *heads, torch.zeros_like(S), tiled=True)[0]) < 2e-6


def network(*, bf16: bool = False, **changes) -> Decoder:
    sizes = dict(key_heads=2, value_heads=4, key_dim=24, value_dim=40, beta_max=2.0) | changes
    layers = (LayerConfig(mixers=(GatedDeltaConfig(**sizes),)),) * 2
    net = Decoder(ModelConfig(vocab_size=300, width=32, layers=layers))
    initialize(net, 0)
    with torch.no_grad():
        net.embed.weight.mul_(30)
        for layer in net.layers:
            layer.mixers["gated_delta"].A_log.uniform_(-4, 2)
    return net.eval().requires_grad_(False)


@pytest.mark.skipif(not native.available, reason="no native kernels in this build")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [{}, {"conv": 3, "key_dim": 16, "value_dim": 64, "tiled": True}, {"chunk": 16, "value_heads": 2}],
)
def test_any_cut_gives_the_same_bits(dtype: torch.dtype, changes) -> None:
    net = network(**changes)
    if dtype == torch.bfloat16:
        net = net.to(dtype)
    whole_words = torch.tensor(tiny.ids(200))
    plain = net(whole_words).float()
    net.pack()
    state = net.new_state()
    whole = net([whole_words], [state])[0]
    close = 2e-4 if dtype == torch.float32 else 0.2
    assert float((whole - plain).abs().max()) < close * float(plain.abs().max())
    for sizes in ([1] * 200, [3] * 66 + [2], [64, 1, 63, 72], [130, 70], [7, 65, 1, 127]):
        state, at, rows = net.new_state(), 0, []
        for n in sizes:
            rows.append(net([whole_words[at : at + n]], [state])[0])
            at += n
        assert torch.equal(torch.cat(rows), whole)


@pytest.mark.skipif(not native.available, reason="no native kernels in this build")
def test_in_company_and_after_a_cut_back() -> None:
    net = network()
    net.pack()
    texts = [torch.tensor(tiny.ids(n, seed=n)) for n in (5, 70, 129)]
    alone = [net([words], [net.new_state()])[0] for words in texts]
    states = [net.new_state() for _ in texts]
    assert all(map(torch.equal, net(texts, states), alone))
    for words, state, right in zip(texts, states, alone, strict=True):
        for back in (1, 3, min(len(words), 64)):
            length = len(words) - back
            if not state.trim(length):
                assert length < state.min_pos
                continue
            assert torch.equal(net([words[length:]], [state])[0], right[length:])
        fork = state.fork()
        more = torch.tensor(tiny.ids(9, seed=1))
        assert torch.equal(net([more], [fork])[0], net([more], [state])[0])
