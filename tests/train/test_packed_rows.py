"""Documents in a row are as if each were alone: what is computed, and what is learned from it."""

import pytest
import torch
from torch import Tensor

import tiny
from families import nasty
from tiercel.mixers.attention.varlen import attend_documents
from tiercel.mixers.mamba1.reference import selective_scan_reference
from tiercel.mixers.mamba1.varlen import LinearScan, selective_scan_varlen
from tiercel.mixers.mamba2.chunked import ssd_reference
from tiercel.mixers.mamba2.varlen import ssd_documents
from tiercel.model.varlen import VarlenBatch
from tiercel.weights.load import load

LENGTHS = [[5, 40, 1, 1, 29, 14], [90], [64, 26]]


def starts(lengths: list[list[int]]) -> Tensor:
    flags = torch.zeros(len(lengths), sum(lengths[0]), dtype=torch.bool)
    for row, row_lengths in zip(flags, lengths, strict=True):
        row[torch.tensor([0, *row_lengths[:-1]]).cumsum(0)] = True
    return flags


def both_ways(net, tokens: Tensor, lengths: list[list[int]], **settings):
    """Logits and gradients of rows, and of every document alone."""
    net.train().requires_grad_(True)
    weigh = torch.randn(tokens.numel(), net.config.vocab_size, generator=torch.Generator().manual_seed(3))
    answers = []
    for packed in (True, False):
        net.zero_grad()
        if packed:
            batch = VarlenBatch(starts(lengths), **settings)
            logits = net.head(net.hidden_states(tokens, batch), net.config.logit_scale)
        else:
            documents = [d for row, ls in zip(tokens, lengths, strict=True) for d in row.split(ls)]
            logits = torch.cat([net(d) for d in documents])
        (logits * weigh).sum().backward()
        answers.append((logits.detach(), {name: p.grad.clone() for name, p in net.named_parameters()}))
    return answers


@pytest.mark.parametrize("words", ["attention/-", "mamba2/-", "mamba1/-", "attention+mamba2", tiny.EVERY_KIND])
def test_a_packed_document_is_as_if_alone(words):
    net = tiny.network(words, native=False, window=7)
    net.embed.weight.div_(30)
    tokens = torch.tensor([tiny.ids(90, row) for row in range(3)])
    (packed, packed_grad), (alone, alone_grad) = both_ways(net, tokens, LENGTHS)
    assert (packed - alone).abs().max() < 1e-5
    for name, grad in alone_grad.items():
        assert (packed_grad[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-6, name


def test_two_documents_never_see_each_other():
    net = tiny.network(native=False)
    a, b, c = tiny.ids(30, 1), tiny.ids(33, 2), tiny.ids(33, 3)
    batch = VarlenBatch(starts([[30, 33]]))
    with torch.no_grad():
        first, second = (net.hidden_states(torch.tensor([a + other]), batch) for other in (b, c))
        assert torch.equal(first[:30], second[:30])
        first, second = (
            net.hidden_states(torch.tensor([other + a]), VarlenBatch(starts([[33, 30]]))) for other in (b, c)
        )
        assert torch.equal(first[33:], second[33:])


def test_recomputed_activations_give_the_same_gradients():
    tokens = torch.tensor([tiny.ids(90, row) for row in range(3)])
    net = tiny.network(native=False)
    kept, again = (both_ways(net, tokens, LENGTHS, recompute=r)[0][1] for r in (False, True))
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize(
    "name", ["h1-gate_first", "h1-norm_first", "bamba-biases", "mamba2-groups2", "jamba-experts", "mamba-biases",
             "qwen2-mixed_window"],
)  # fmt: skip
def test_gradients_are_those_of_transformers(name, tmp_path):
    theirs = nasty.make(name, tmp_path)
    net, _, layout = load(tmp_path, dtype="float32")
    net.train().requires_grad_(True)
    tokens = nasty.tokens(70).clamp(min=1)  # theirs lets padding, token 0, learn nothing
    weigh = torch.randn(70, nasty.VOCAB, generator=torch.Generator().manual_seed(4))
    (theirs(tokens[None], use_cache=False).logits[0] * weigh).sum().backward()
    logits = net.head(
        net.hidden_states(tokens[None], VarlenBatch(torch.zeros(1, 70, dtype=torch.bool))), net.config.logit_scale
    )
    (logits * weigh).sum().backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    ours, compared = dict(net.named_parameters()), 0
    for row in layout.rows:
        # forms that only rename: a folded multiplier m turns our gradient into theirs / m
        if isinstance(row.hf, str) and row.hf in grads and row.hf_form is None and isinstance(row.scale, float):
            mine, reference = ours[row.ours].grad * row.scale, grads[row.hf]
            assert (mine - reference).norm() < 2e-4 * reference.norm() + 1e-6, row.ours
            compared += 1
    assert compared >= 8


# ── float64


def wide(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_chunked_scan_has_the_gradients_of_its_formula():
    rows = VarlenBatch(starts([[3, 8, 2], [13]]))
    T, H, P, G, N = 26, 4, 2, 2, 3
    given = [
        wide(T, G, N),
        wide(T, H, P, seed=1),
        wide(T, H, seed=2).exp(),
        -wide(H, seed=3).exp(),
        wide(T, G, N, seed=4),
    ]
    given = [t.requires_grad_() for t in given]
    assert torch.autograd.gradcheck(lambda *g: ssd_documents(*g, None, rows, chunk=4), given)
    C, x, dt, A, B = (t.detach() for t in given)
    y = ssd_documents(C, x, dt, A, B, None, rows, chunk=4)
    spans = [slice(0, 3), slice(3, 11), slice(11, 13), slice(13, 26)]
    alone = [ssd_reference(C[s], x[s], dt[s], A, B[s], torch.zeros(H, N, P))[0] for s in spans]
    assert (y - torch.cat(alone)).abs().max() < 1e-12


def test_the_selective_scan_has_the_gradients_of_its_formula():
    rows = VarlenBatch(starts([[3, 8, 2], [13]]))
    T, I, N = 26, 3, 2
    given = [wide(T, N), wide(T, I, seed=1), wide(T, I, seed=2).exp(), -wide(I, N, seed=3).exp(), wide(T, N, seed=4)]
    given = [t.requires_grad_() for t in given]
    assert torch.autograd.gradcheck(lambda *g: selective_scan_varlen(*g, rows), given)
    C, x, dt, A, B = (t.detach() for t in given)
    spans = [slice(0, 3), slice(3, 11), slice(11, 13), slice(13, 26)]
    alone = [selective_scan_reference(C[s], x[s], dt[s], A, B[s], torch.zeros(N, I))[0] for s in spans]
    assert (selective_scan_varlen(C, x, dt, A, B, rows) - torch.cat(alone)).abs().max() < 1e-12


def test_convolution_and_attention_have_the_gradients_of_their_formulas():
    rows = VarlenBatch(starts([[3, 4], [7]]))
    conv = [wide(14, 3).requires_grad_(), wide(3, 4, seed=1).requires_grad_(), wide(3, seed=2).requires_grad_()]
    assert torch.autograd.gradcheck(rows.conv1d, conv)
    assert torch.autograd.gradcheck(lambda x, w: rows.conv1d(x, w, None), conv[:2])
    assert torch.autograd.gradcheck(lambda x, w: rows.conv1d(x, w, None, silu=False), conv[:2])
    short = VarlenBatch(starts([[1, 1], [2]]))
    assert torch.autograd.gradcheck(lambda x, w: short.conv1d(x[:4], w, None), conv[:2])
    heads = [wide(4, 14, 2, seed=3).requires_grad_(), *(wide(2, 14, 2, seed=s).requires_grad_() for s in (4, 5))]
    assert torch.autograd.gradcheck(lambda q, k, v: attend_documents(q, k, v, rows, scale=0.7, window=3), heads)


@pytest.mark.parametrize("length", [1, 2, 7, 30])
def test_the_scan_of_any_length_is_the_recurrence(length):
    decay, added = wide(2, length, 3).sigmoid(), wide(2, length, 3, seed=1)
    S, states = torch.zeros(2, 3, dtype=torch.float64), []
    for t in range(length):
        S = decay[:, t] * S + added[:, t]
        states.append(S)
    assert (LinearScan.apply(decay, added) - torch.stack(states, 1)).abs().max() < 1e-12


def test_a_compiled_block_has_the_same_gradients():
    tokens, grads = torch.tensor([tiny.ids(12)]), []
    for compiled in (False, True):
        net = tiny.network("attention+mamba2", native=False).train().requires_grad_(True)
        for block in net.layers if compiled else []:
            block.compile(backend="aot_eager")
        net.hidden_states(tokens, VarlenBatch(starts([[5, 7]]))).square().sum().backward()
        grads.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).norm() <= 1e-5 * grad.norm() + 1e-6, name


@pytest.mark.parametrize("window", [None, 7])
def test_attention_by_two_rounded_products_is_attention(window):
    starts_BL = torch.zeros(1, 40, dtype=torch.bool)
    starts_BL[0, 23] = True
    q, k, v, dy = torch.randn(4, 40, 8), torch.randn(2, 40, 8), torch.randn(2, 40, 8), torch.randn(4, 40, 8)
    found = []
    for rounded in (False, True):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            y = attend_documents(*leaves, VarlenBatch(starts_BL), scale=0.3, window=window).float()
        found.append([y, *torch.autograd.grad(y, leaves, dy)])
    for exact, rounded in zip(*found, strict=True):
        assert (exact - rounded).norm() < 0.01 * exact.norm()
