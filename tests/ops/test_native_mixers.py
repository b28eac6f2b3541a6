"""The native mixers equal their float64 references, and a token's numbers are its own.

Bit for bit the same whatever the thread count, whoever shares the batch, and however a text was cut into calls; on
every instruction set this machine has.  Outputs, caches and scratch are full of NaN before they are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tiercel.mixers import paged
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.attention.rope import RopeConfig
from tiercel.mixers.attention.rotary import frequencies, rotate
from tiercel.mixers.attention.sdpa import attention_reference
from tiercel.mixers.mamba1.config import Mamba1Config
from tiercel.mixers.mamba1.reference import selective_scan_reference
from tiercel.mixers.mamba2.chunked import ssd_reference
from tiercel.mixers.mamba2.config import Mamba2Config
from tiercel.model import pages
from tiercel.model import state as state_module
from tiercel.model.batch import Batch
from tiercel.model.state import State
from tiercel.ops.conv1d import conv1d_reference
from tiercel.ops.cpu import native
from tiercel.ops.norm import gated_rms_norm
from tiercel.runtime import allocator as pool
from tiercel.runtime.allocator import CachingAllocator

pytestmark = pytest.mark.skipif(not native.available, reason="the native extension was not built, or is not wanted")

if native.available:
    from tiercel.mixers.attention import cpu as attention_cpu
    from tiercel.mixers.mamba1 import cpu as mamba1_cpu
    from tiercel.mixers.mamba2 import cpu as mamba2_cpu
    from tiercel.ops.cpu.batch import causal_conv1d

ISAS = native.extension.available() if native.available else []
CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One instruction set; memory that must be written before it is read."""
    before, threads = native.extension.isa(), native.extension.threads()
    native.extension.choose(request.param)
    monkeypatch.setattr(native, "empty", lambda *shape: torch.full(shape, math.nan))
    monkeypatch.setattr(pool, "poison", True)
    yield request.param
    native.extension.choose(before)
    native.extension.set_threads(threads)


def spoil_scratch() -> None:
    """Leave NaN in every thread's scratch: an attention over nothing else."""
    config = AttentionConfig(heads=16, kv_heads=2, head_dim=256)
    q, k = torch.full((64, 4096), math.nan), torch.full((64, 512), math.nan)
    Attention(config).step([State([[config]], F32, CPU, "", CachingAllocator())], [64], q, k, k)


class Attention:
    """The op, as `step(states, lengths, q, k, v)`."""

    def __init__(self, config: AttentionConfig) -> None:
        self.config = config

    def step(self, states: Sequence[State], lengths: Sequence[int], *inputs: Tensor) -> Tensor:
        c = self.config
        batch = Batch(lengths, states)
        for state, length in zip(states, lengths, strict=True):
            state.reserve(length)
        part = states[0].layers[0][0]
        turn = None if c.rope is None else batch.rotary(c.rope, c.head_dim)
        y = attention_cpu.attention(
            batch.metadata_for(part), *inputs, turn, heads=c.heads, kv_heads=c.kv_heads, scale=0.3, window=c.window
        )  # fmt: skip
        return _grown(states, lengths, y)

    def inputs(self, tokens: int, seed: int = 0) -> tuple[Tensor, ...]:
        c, g = self.config, torch.Generator().manual_seed(seed)
        return tuple(torch.randn(tokens, n * c.head_dim, generator=g) for n in (c.heads, c.kv_heads, c.kv_heads))

    def reference(self, dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c = self.config
        q, k, v = (t.unflatten(-1, (-1, c.head_dim)).transpose(0, 1) for t in (q, k, v))
        if c.rope is not None:
            f, scale = frequencies(c.rope, c.head_dim)
            angle = torch.outer(torch.arange(q.shape[1]).float(), f)
            turn = angle.cos() * scale, angle.sin() * scale
            q, k = rotate(q, *turn), rotate(k, *turn)
        y = attention_reference(q, k.to(dtype), v.to(dtype), scale=0.3, window=c.window)
        return y.transpose(0, 1).flatten(1)


class Mamba2:
    """Convolution, dt and scan, as `step(states, lengths, z | xBC | dt)`."""

    def __init__(self, config: Mamba2Config) -> None:
        self.config = c = config
        g = torch.Generator().manual_seed(3)
        r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        self.weight, self.bias = r(c.conv, c.channels), r(c.channels) if c.conv_bias else None
        self.dt_bias, self.A, self.D = r(c.heads), -torch.rand(c.heads, generator=g) - 0.01, r(c.heads)

    def step(self, states: Sequence[State], lengths: Sequence[int], zxBCdt: Tensor) -> Tensor:
        c, part, batch = self.config, states[0].layers[0][0], Batch(lengths, states)
        y = mamba2_cpu.mamba2(
            batch.metadata_for(part), zxBCdt, self.weight, self.bias, self.dt_bias, self.A, self.D,
            head_dim=c.head_dim, groups=c.groups, state=c.state, chunk=part.chunk, dt_limit=c.dt_limit,
        )  # fmt: skip
        return _grown(states, lengths, y)

    def inputs(self, tokens: int, seed: int = 0) -> tuple[Tensor, ...]:
        c = self.config
        width = c.inner + c.channels + c.heads
        return (torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)),)

    def parts(self, dtype: torch.dtype, zxBCdt: Tensor) -> tuple[Tensor, ...]:
        """C, x, dt, A, B of the recurrence, float64."""
        c = self.config
        _, xBC, dt = zxBCdt.split((c.inner, c.channels, c.heads), -1)
        window = F.pad(xBC.to(dtype).double(), (0, 0, c.conv - 1, 0))
        xBC = F.silu(conv1d_reference(window, self.weight.t(), self.bias)).to(dtype).double()
        x, B, C = xBC.split((c.inner, c.groups * c.state, c.groups * c.state), -1)
        dt = F.softplus(dt.double() + self.dt_bias).clamp(*c.dt_limit)
        groups = lambda t: t.unflatten(-1, (c.groups, -1))  # noqa: E731
        return groups(C), x.unflatten(-1, (c.heads, -1)), dt, self.A.double(), groups(B)

    def reference(self, dtype: torch.dtype, zxBCdt: Tensor) -> Tensor:
        c = self.config
        C, x, dt, A, B = self.parts(dtype, zxBCdt)
        y, _ = ssd_reference(C, x, dt, A, B, torch.zeros(c.heads, c.state, c.head_dim))
        return (y + self.D.double().unsqueeze(-1) * x).flatten(1)


class Mamba1:
    """Convolution, choice and scan, as `step(states, lengths, x | z, x_proj's δ | B | C for each token)`."""

    def __init__(self, config: Mamba1Config) -> None:
        self.config = c = config
        g = torch.Generator().manual_seed(3)
        r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
        self.weight, self.bias = r(c.conv, c.inner), r(c.inner) if c.conv_bias else None
        self.A, self.D, self.dt_bias = -torch.rand(c.state, c.inner, generator=g) - 0.01, r(c.inner), r(c.inner) - 2
        self.norms = (r(c.inner), r(c.state), r(c.state)) if c.inner_norms else (None, None, None)

    def step(self, states: Sequence[State], lengths: Sequence[int], xz: Tensor, chosen: Tensor) -> Tensor:
        c, part, batch = self.config, states[0].layers[0][0], Batch(lengths, states)
        texts = batch.metadata_for(part)
        x = causal_conv1d(texts, xz[:, : c.inner], self.weight, self.bias)[0]
        dt, B, C = mamba1_cpu.split_norm(texts, chosen, self.norms, c.inner, c.state, 1e-3)
        y = mamba1_cpu.selective_scan(
            texts, x, dt, self.dt_bias, B, C, self.A, self.D, xz, taps=c.conv, chunk=part.chunk
        )  # fmt: skip
        return _grown(states, lengths, y)

    def inputs(self, tokens: int, seed: int = 0) -> tuple[Tensor, ...]:
        c, g = self.config, torch.Generator().manual_seed(seed)
        widths = 2 * c.inner, c.inner + 2 * c.state
        return tuple(torch.randn(tokens, width, generator=g) for width in widths)

    def reference(self, dtype: torch.dtype, xz: Tensor, chosen: Tensor) -> Tensor:
        c = self.config
        x, z = xz.double().chunk(2, -1)
        window = F.pad(x.to(dtype).double(), (0, 0, c.conv - 1, 0))
        x = F.silu(conv1d_reference(window, self.weight.t(), self.bias)).to(dtype).double()
        parts = chosen.double().split((c.inner, c.state, c.state), -1)
        dt, B, C = (
            p if w is None else p * torch.rsqrt(p.square().mean(-1, keepdim=True) + 1e-3) * w
            for p, w in zip(parts, self.norms, strict=True)
        )
        S = torch.zeros(c.state, c.inner)
        dt = F.softplus(dt + self.dt_bias)
        y, _ = selective_scan_reference(C, x, dt, self.A.t(), B.to(dtype).double(), S)
        return (y + self.D * x) * F.silu(z)


def _grown(states: Sequence[State], lengths: Sequence[int], y: Tensor) -> Tensor:
    for state, length in zip(states, lengths, strict=True):
        state.length += length
    return y


def fresh(op: Any, dtype: torch.dtype) -> State:
    return State([[op.config]], dtype, CPU, "", CachingAllocator())


def play(op: Any, dtype: torch.dtype, inputs: Sequence[Tensor], cuts: Sequence[int], threads: int = 1) -> Tensor:
    """One text in calls of so many tokens."""
    spoil_scratch()
    native.extension.set_threads(threads)
    state, ys, start = fresh(op, dtype), [], 0
    for n in cuts:
        ys.append(op.step([state], [n], *(t[start : start + n].contiguous() for t in inputs)))
        start += n
    return torch.cat(ys)


def cut(tokens: int, sizes: Sequence[int]) -> list[int]:
    """Calls of these sizes, over and over."""
    out: list[int] = []
    while sum(out) < tokens:
        out.append(min(sizes[len(out) % len(sizes)], tokens - sum(out)))
    return out


def close(y: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert y.isfinite().all()
    error = ((y.double() - expected).norm() / expected.norm()).item()
    assert error < (2e-6 if dtype == F32 else 4e-3)


ROPE = RopeConfig(theta=1000.0)
OPS: dict[str, tuple[Callable[[], Any], int]] = {
    "attention": (lambda: Attention(AttentionConfig(heads=4, kv_heads=2, head_dim=64, rope=ROPE)), 300),
    "attention 24, odd group": (lambda: Attention(AttentionConfig(heads=6, kv_heads=2, head_dim=24, rope=ROPE)), 130),
    "attention 80, one head": (lambda: Attention(AttentionConfig(heads=1, kv_heads=1, head_dim=80)), 70),
    "attention 128, eight to one": (
        lambda: Attention(AttentionConfig(heads=8, kv_heads=1, head_dim=128, rope=RopeConfig(fraction=0.25))), 40),
    "attention, window": (
        lambda: Attention(AttentionConfig(heads=3, kv_heads=3, head_dim=18, rope=ROPE, window=37)), 200),
    "attention, window of one": (lambda: Attention(AttentionConfig(heads=2, kv_heads=1, head_dim=16, window=1)), 50),
    "mamba2": (lambda: Mamba2(Mamba2Config(heads=4, head_dim=64, state=128, chunk=128)), 300),
    "mamba2 24, two groups": (
        lambda: Mamba2(Mamba2Config(heads=6, head_dim=24, state=16, groups=2, conv=3, chunk=24)), 130),
    "mamba2 80, three groups": (
        lambda: Mamba2(Mamba2Config(heads=9, head_dim=80, state=20, groups=3, conv=2, chunk=7, conv_bias=False)), 60),
    "mamba2 128, state 256": (
        lambda: Mamba2(Mamba2Config(heads=2, head_dim=128, state=256, chunk=40, dt_limit=(0.1, 0.9))), 100),
    "mamba2, heads of one": (lambda: Mamba2(Mamba2Config(heads=20, head_dim=1, state=1, chunk=1)), 12),
    "mamba1": (lambda: Mamba1(Mamba1Config(inner=80, state=16, dt_rank=3, chunk=32)), 150),
    "mamba1, inner norms": (
        lambda: Mamba1(
            Mamba1Config(inner=37, state=5, dt_rank=3, conv=3, chunk=9, inner_norms=True, conv_bias=False)), 60),
}  # fmt: skip
NAMES = list(OPS)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", NAMES)
def test_the_op_is_its_reference(name: str, dtype: torch.dtype) -> None:
    op, tokens = OPS[name][0](), OPS[name][1]
    inputs = op.inputs(tokens)
    close(play(op, dtype, inputs, [tokens]), op.reference(dtype, *inputs), dtype)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_cuts_or_threads(name: str, dtype: torch.dtype) -> None:
    op, tokens = OPS[name][0](), OPS[name][1]
    inputs = op.inputs(tokens, seed=1)
    whole = play(op, dtype, inputs, [tokens])
    for sizes, threads in (([1], 1), ([1], 2), ([3], 2), ([7, 1, 1, 40], 3), ([31, 2], 1), ([tokens], 3), ([9, 1], 2)):
        assert torch.equal(play(op, dtype, inputs, cut(tokens, sizes), threads), whole), (sizes, threads)


@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_batch_mates(name: str) -> None:
    op, tokens = OPS[name][0](), OPS[name][1]
    rows = [op.inputs(n, seed=n) for n in (tokens, tokens // 2, 1)]
    alone = [play(op, BF16, row, [len(row[0])]) for row in rows]
    native.extension.set_threads(2)
    states, done = [fresh(op, BF16) for _ in rows], [0, 0, 0]
    got: list[list[Tensor]] = [[], [], []]
    for sizes in ([5, 1, 1], [1, 3, 0], [tokens, tokens, 0]):
        lengths = [min(n, len(row[0]) - d) for n, row, d in zip(sizes, rows, done, strict=True)]
        there = [i for i, n in enumerate(lengths) if n > 0]
        parts = [[t[done[i] : done[i] + lengths[i]] for t in rows[i]] for i in there]
        y = op.step(
            [states[i] for i in there], [lengths[i] for i in there], *(torch.cat(p) for p in zip(*parts, strict=True))
        )
        for i, part in zip(there, y.split([lengths[i] for i in there]), strict=True):
            got[i].append(part)
            done[i] += lengths[i]
    for parts_of_row, expected in zip(got, alone, strict=True):
        assert torch.equal(torch.cat(parts_of_row), expected)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("mamba")])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_trimmed_state_goes_on_as_if_nothing_had_been_there(name: str, dtype: torch.dtype) -> None:
    op, tokens = OPS[name][0](), OPS[name][1]
    inputs, wrong = op.inputs(tokens, seed=1), op.inputs(tokens, seed=2)
    whole = play(op, dtype, inputs, [tokens])
    native.extension.set_threads(2)
    state, start = fresh(op, dtype), 0
    for n in cut(tokens, [1, 5, 2, 11]):
        y = op.step([state], [n], *(t[start : start + n].contiguous() for t in inputs))
        assert torch.equal(y, whole[start : start + n])
        start += n
        drafted = min(op.config.chunk, 6)
        op.step([state], [drafted], *(t[:drafted].contiguous() for t in wrong))
        assert state.trim(start)


def test_the_committed_state_is_the_recurrences() -> None:
    op = Mamba2(Mamba2Config(heads=4, head_dim=24, state=16, groups=2, chunk=16))
    inputs = op.inputs(100)
    state = fresh(op, F32)
    for start in range(0, 100, 10):
        op.step([state], [10], inputs[0][start : start + 10])
        part = state.layers[0][0]
        base = part.committed_pos
        assert base == max(0, start // 16 * 16)
        if base:
            C, x, dt, A, B = op.parts(F32, inputs[0])
            expected = ssd_reference(C[:base], x[:base], dt[:base], A, B[:base], torch.zeros(4, 16, 24))[1]
            torch.testing.assert_close(part.buffers["ssm_state"].double(), expected, atol=1e-5, rtol=1e-5)
        open_ = state.length - base
        torch.testing.assert_close(
            part.buffers["x"][:open_].double(), op.parts(F32, inputs[0])[1][base : base + open_], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("window", [None, 1500])
def test_long_texts_in_segments_have_the_same_bits(window: int | None) -> None:
    """Beyond one segment: a prompt's queries take all segments, a step's go to several threads."""
    op = Attention(AttentionConfig(heads=4, kv_heads=2, head_dim=16, rope=ROPE, window=window))
    tokens = 2 * state_module.SEGMENT + 300
    inputs = op.inputs(tokens)
    whole = play(op, BF16, inputs, [tokens], threads=2)
    steps = play(op, BF16, inputs, [tokens - 23, 1, 1, 8, 1, 3, 9], threads=3)
    assert torch.equal(steps, whole)
    last = [t[-1:] for t in inputs]
    state = fresh(op, BF16)
    op.step([state], [tokens - 1], *(t[:-1] for t in inputs))
    close(op.step([state], [1], *last), op.reference(BF16, *inputs)[-1:], BF16)


def test_kernels_and_states_agree_on_sizes() -> None:
    constants = native.extension
    sizes = paged.TILE, pages.PAGE, state_module.SEGMENT, state_module.SPLIT
    assert sizes == (constants.KEYS, constants.PAGE, constants.SEGMENT, constants.SPLIT)


@pytest.mark.parametrize("start", [0, 5, 100_000])
def test_angles_are_as_true_as_torchs(start: int) -> None:
    op = Attention(AttentionConfig(heads=1, kv_heads=1, head_dim=64, rope=ROPE))
    state = fresh(op, F32)
    state.length = start
    cos, sin = Batch([9], [state]).rotary(RopeConfig(theta=500.0, scaling="yarn", factor=4.0, original_length=64), 64)
    f, scale = frequencies(RopeConfig(theta=500.0, scaling="yarn", factor=4.0, original_length=64), 64)
    angle = torch.outer(torch.arange(start, start + 9).float(), f).double()
    torch.testing.assert_close(cos.double(), angle.cos() * scale, atol=2e-7, rtol=0)
    torch.testing.assert_close(sin.double(), angle.sin() * scale, atol=2e-7, rtol=0)


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("tokens, width, groups", [(1, 16, 1), (3, 72, 3), (17, 160, 2), (5, 50, 1)])
def test_the_gated_norm_is_its_reference(tokens: int, width: int, groups: int, gate_first: bool) -> None:
    y, z, w = torch.randn(tokens, width), torch.randn(tokens, width + 13), torch.randn(width)
    got = native.gated_norm(y, z, w, 1e-4, groups, gate_first)
    expected = gated_rms_norm(y.double(), z[:, :width].double(), w.double(), 1e-4, groups, gate_first)
    torch.testing.assert_close(got, expected.float(), atol=1e-6, rtol=1e-5)
    plain = native.gated_norm(y, z, None, 1e-4, groups, gate_first)
    torch.testing.assert_close(plain, y * F.silu(z[:, :width]), atol=1e-6, rtol=1e-5)


def test_extreme_inputs_of_softplus_stay_true() -> None:
    """Through a scan of one token: S = softplus(dt) x B."""
    op = Mamba2(Mamba2Config(heads=16, head_dim=1, state=1, conv=1, chunk=8, conv_bias=False))
    dt = torch.tensor(
        [-1e4, -100.0, -88.0, -50.0, -20.0, -5.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 5.0, 20.0, 88.0, 1e4, 3e38]
    )
    op.weight.fill_(1.0), op.D.zero_(), op.dt_bias.zero_()
    inputs = torch.ones(1, 16 + op.config.channels + 16)
    inputs[0, -16:] = dt
    state = fresh(op, F32)
    op.step([state], [1], inputs)
    expected = F.softplus(dt.double())
    torch.testing.assert_close(state.layers[0][0].buffers["dt"][0].double(), expected, atol=1e-37, rtol=1e-6)
