"""The kernels for GPUs equal their references: odd lengths, several groups and head sizes, outputs of NaN."""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="pip install triton")

from ops.triton.conftest import DEVICE
from tiercel.mixers.attention import triton as attention_kernels
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.attention.rotary import rotate
from tiercel.mixers.attention.sdpa import attention_reference
from tiercel.mixers.mamba2 import triton_prefill as ssd_kernels
from tiercel.mixers.mamba2.chunked import ssd_reference
from tiercel.mixers.mamba2.config import Mamba2Config
from tiercel.mixers.mamba2.triton_step import ssd_step
from tiercel.mixers.paged import PagedSlots
from tiercel.mixers.recurrent import RecurrentSlots
from tiercel.model.ragged import Piece, RaggedPlan
from tiercel.ops.norm import gated_rms_norm, rms_norm_reference
from tiercel.ops.pointwise import gate_reference
from tiercel.ops.triton import norm as norm_kernels

F32, BF16 = torch.float32, torch.bfloat16


def rand(*shape, dtype=F32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def whole(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


# ── norms


@pytest.mark.parametrize("D", [1, 5, 64, 96])
@pytest.mark.parametrize("added", [0, 1, 2])
def test_rms_norm_after_a_sum(D, added):
    x, w, more = rand(7, D), rand(D), [rand(7, D) for _ in range(added)]
    if added == 0:
        total, y = x, norm_kernels.rms_norm(x, w, 1e-3)
    else:
        total, y = norm_kernels.add_rms_norm(x, more, w, 1e-3)
    torch.testing.assert_close(total, sum(more, x))
    torch.testing.assert_close(y, rms_norm_reference(sum(more, x), w, 1e-3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("kind", ["gate_first", "norm_first", "none"])
def test_gated_norm(groups, kind):
    T, I = 5, 30
    y, z, w = rand(T, I), rand(T, 2 * I)[:, :I], rand(I)
    got = norm_kernels.gated_norm(y, z, None if kind == "none" else w, 1e-3, groups, kind == "gate_first")
    expected = y * F.silu(z) if kind == "none" else gated_rms_norm(y, z, w, 1e-3, groups, kind == "gate_first")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gate(activation):
    both = rand(3, 2 * 1030)
    g, u = both.chunk(2, 1)
    torch.testing.assert_close(norm_kernels.gate(g, u, activation), gate_reference(g, u, activation))


# ── scan


def inputs(L, H, P, G, N, dt=0.3, decay=1.0):
    xBC = rand(L, H * P + 2 * G * N)
    dts = F.softplus(rand(L, H)) * dt
    return xBC, dts, -decay * torch.rand(H, device=DEVICE) - 0.01, rand(H), rand(H, N, P)


def parts(xBC, H, P, G, N):
    x, B, C = xBC.split((H * P, G * N, G * N), 1)
    return C.unflatten(1, (G, N)), x.unflatten(1, (H, P)), B.unflatten(1, (G, N))


SHAPES = [(1, 1, 1, 1, 1), (5, 2, 3, 1, 4), (70, 6, 5, 3, 7), (130, 4, 24, 2, 16), (300, 2, 8, 1, 70)]


@pytest.mark.parametrize("L, H, P, G, N", SHAPES)
def test_the_scan_of_a_prompt_is_the_recurrence(L, H, P, G, N):
    xBC, dt, A, D, S = inputs(L, H, P, G, N)
    C, x, B = parts(xBC, H, P, G, N)
    expected, _ = ssd_reference(C, x, dt, A, B, S)
    expected = (expected + D.unsqueeze(1) * x).flatten(1)
    for commit, skip in {(0, 0), (L // 64 * 64, L // 3), ((L - 1) // 64 * 64, 0), (L, L - 1)}:
        if L - commit > 256 or (L - commit > 64 and L <= 128):
            continue
        now = S.clone()
        y = ssd_kernels.ssd(xBC, dt, A, D, now, groups=G, skip=skip, commit=commit)
        torch.testing.assert_close(y.double(), expected[skip:], atol=1e-4, rtol=1e-5)
        after = ssd_reference(C[:commit], x[:commit], dt[:commit], A, B[:commit], S)[1] if commit else S.double()
        torch.testing.assert_close(now.double(), after, atol=1e-4, rtol=1e-5)


def test_a_scan_has_the_same_bits_alone_and_in_company():
    H, P, G, N = 2, 8, 1, 16
    xBC, dt, A, D, _ = inputs(330, H, P, G, N)
    pieces = [(0, 70), (70, 300), (300, 330)]
    together = RaggedPlan.exact([Piece(i, 0, b - a, 0, 0) for i, (a, b) in enumerate(pieces)], xBC.device)
    y = ssd_kernels.scan(xBC, dt, A, D, torch.zeros(3, H, N, P, device=DEVICE), together, G)
    for a, b in pieces:
        alone = RaggedPlan.exact([Piece(0, 0, b - a, 0, 0)], xBC.device)
        got = ssd_kernels.scan(xBC[a:b], dt[a:b], A, D, torch.zeros(1, H, N, P, device=DEVICE), alone, G)
        assert torch.equal(got, y[a:b])


@pytest.mark.parametrize("dt, decay", [(100.0, 1000.0), (1e-3, 1e-4), (50.0, 1e-3)])
def test_extreme_decays_stay_finite_and_true(dt, decay):
    xBC, dts, A, D, S = inputs(200, 4, 8, 2, 16, dt, decay)
    C, x, B = parts(xBC, 4, 8, 2, 16)
    expected, _ = ssd_reference(C, x, dts, A, B, S)
    expected = (expected + D.unsqueeze(1) * x).flatten(1)
    y = ssd_kernels.ssd(xBC, dts, A, D, S, groups=2, skip=0, commit=192)
    assert y.isfinite().all() and S.isfinite().all()
    assert ((y - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.parametrize("H, P, G, N", [(2, 3, 1, 4), (3, 40, 3, 7), (4, 16, 2, 70)])
def test_steps_of_several_texts_are_the_recurrence(H, P, G, N):
    """Three slots at different places, one row of nobody; every chunk is committed on the way."""
    c = Mamba2Config(heads=H, head_dim=P, groups=G, state=N, chunk=8)
    memory = RecurrentSlots(c, 3, F32, torch.device(DEVICE))
    for t in (memory["x"], memory["B"], memory["dt"]):
        t.fill_(math.nan)
    A, D, bias = -torch.rand(H, device=DEVICE), rand(H), rand(H)
    length, base = whole(0, 0, 0), whole(0, 0, 0)
    L, texts = 19, {0: [], 2: []}
    streams = {slot: inputs(L, H, P, G, N)[0] for slot in texts}
    raw = {slot: rand(L, H) for slot in texts}
    for i in range(L):
        rows = [0, -1, 2] if i % 3 else [2, -1, -1]  # slot 0 rests now and then
        at = [0 if slot < 0 else int(length[slot]) for slot in rows]
        xBC = torch.stack(
            [rand(streams[0].shape[1]) if s < 0 else streams[s][n] for s, n in zip(rows, at, strict=True)]
        )
        dt = torch.stack([rand(H) if s < 0 else raw[s][n] for s, n in zip(rows, at, strict=True)])
        y = ssd_step(xBC, dt, bias, A, D, memory, whole(*rows), length, base, dt_limit=(0.01, 2.0))
        for row, slot in enumerate(rows):
            if slot >= 0:
                texts[slot].append(y[row])
                base[slot] = length[slot] // 8 * 8
                length[slot] += 1
    for slot, ys in texts.items():
        n = len(ys)
        C, x, B = parts(streams[slot][:n], H, P, G, N)
        dts = F.softplus(raw[slot][:n] + bias).clamp(0.01, 2.0)
        expected, _ = ssd_reference(C, x, dts, A, B, torch.zeros(H, N, P, device=DEVICE))
        torch.testing.assert_close(
            torch.stack(ys).double(), (expected + D.unsqueeze(1) * x).flatten(1), atol=1e-4, rtol=1e-4
        )


# ── attention


@pytest.mark.parametrize("H, K, P, R", [(1, 1, 4, 2), (6, 2, 10, 1), (5, 1, 16, 0)])
@pytest.mark.parametrize("window", [None, 1, 70])
def test_attention_over_pages(H, K, P, R, window):
    """A prompt is remembered in scattered pages, then one token of each of two texts looks at all of its own."""
    c = AttentionConfig(heads=H, kv_heads=K, head_dim=P)
    memory = PagedSlots(c, 12, F32, torch.device(DEVICE))
    memory["k"].fill_(math.nan), memory["v"].fill_(math.nan)
    table = torch.tensor([[7, 2, 9, 4], [0, 0, 0, 0], [3, 8, 1, 0]], dtype=torch.int32, device=DEVICE)
    lengths = {0: 130, 2: 65}
    texts = {}
    for slot, L in lengths.items():
        q, k, v = rand(L + 1, H * P), rand(L + 1, K * P), rand(L + 1, K * P)
        angle = rand(L + 1, R)
        turn = (angle.cos(), angle.sin()) if R else None
        texts[slot] = q, k, v, turn
        places = (
            torch.full((L,), slot, dtype=torch.int32, device=DEVICE),
            torch.arange(L, dtype=torch.int32, device=DEVICE),
        )
        past = None if turn is None else tuple(t[:L].contiguous() for t in turn)
        attention_kernels.store_kv(q[:L], k[:L], v[:L], past, memory, table, *places)
    slots, length = whole(2, -1, 0), whole(130, 0, 65)
    newest = [torch.stack([texts[2][i][65], rand(texts[0][i].shape[1]), texts[0][i][130]]) for i in range(3)]
    turn = None
    if R:
        turn = tuple(torch.stack([texts[2][3][i][65], rand(R), texts[0][3][i][130]]) for i in range(2))
    q = attention_kernels.store_kv(*newest, turn, memory, table, slots, whole(65, 0, 130))
    y = attention_kernels.attention_step(q, memory, table, slots, length, scale=0.4, window=window)
    for row, slot in ((0, 2), (2, 0)):
        q, k, v, turn = texts[slot]
        q, k, v = (t.unflatten(1, (-1, P)).transpose(0, 1) for t in (q, k, v))
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        expected = attention_reference(q[:, -1:], k, v, scale=0.4, window=window)[:, 0].flatten()
        torch.testing.assert_close(y[row].double(), expected, atol=1e-5, rtol=1e-4)
