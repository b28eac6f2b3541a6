"""The gated short convolution: every form against the float64 sum, and the same bits however a text is cut."""

from __future__ import annotations

import itertools

import pytest
import torch

import tiny
from tiercel.errors import RequestError
from tiercel.mixers.short_conv.config import ShortConvConfig
from tiercel.mixers.short_conv.layer import ShortConv, short_conv_reference
from tiercel.model.batch import Batch
from tiercel.model.config import LayerConfig, ModelConfig
from tiercel.model.decoder import Decoder
from tiercel.model.initialize import initialize
from tiercel.model.varlen import VarlenBatch
from tiercel.ops.cpu import native

WIDTH, CHANNELS = 20, 24
TAPS = [1, 3, 4, 7]


def layer(taps: int, bias: bool) -> ShortConv:
    torch.manual_seed(taps)
    made = ShortConv(ShortConvConfig(channels=CHANNELS, conv=taps, bias=bias), WIDTH).double()
    for p in made.parameters():
        torch.nn.init.normal_(p)
    return made


def right(made: ShortConv, u: torch.Tensor) -> torch.Tensor:
    y = short_conv_reference(*made.in_proj(u).chunk(3, -1), made.conv, made.conv_bias)
    return made.out_proj(y)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("taps", TAPS)
@torch.no_grad()
def test_it_is_the_sum_whole_and_in_documents(taps: int, bias: bool) -> None:
    made, L = layer(taps, bias), 40
    u = torch.randn(2 * L, WIDTH, dtype=torch.double)
    assert error(made(u[:L], Batch([L]), [None]), right(made, u[:L])) < 1e-6  # the sum itself is float32
    starts = torch.zeros(2, L, dtype=torch.bool)
    starts[0, [0, 1, 4, 30]] = starts[1, [0, 37]] = True
    found = made(u, VarlenBatch(starts), [None, None])
    for row in range(2):
        edges = [*starts[row].nonzero().flatten().tolist(), L]
        for a, b in itertools.pairwise(edges):
            span = slice(row * L + a, row * L + b)
            assert error(found[span], right(made, u[span])) < 1e-12


@pytest.mark.parametrize("taps", [3, 7])
def test_gradients_are_those_of_the_sum(taps: int) -> None:
    made = layer(taps, True)
    u = torch.randn(30, WIDTH, dtype=torch.double, requires_grad=True)
    starts, weights = torch.zeros(1, 30, dtype=torch.bool), torch.randn(30, WIDTH, dtype=torch.double)
    leaves = [u, *made.parameters()]
    ours = torch.autograd.grad((made(u, VarlenBatch(starts), [None]) * weights).sum(), leaves)
    expected = torch.autograd.grad((right(made, u) * weights).sum(), leaves)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("changed", ["tap order", "gates swapped", "activation"])
@torch.no_grad()
def test_a_wrong_sum_is_seen(changed: str) -> None:
    B, C, x = torch.randn(3, 40, CHANNELS, dtype=torch.double)
    weight = torch.randn(CHANNELS, 3, dtype=torch.double)
    wrong = {
        "tap order": lambda: short_conv_reference(B, C, x, weight.flip(1), None),
        "gates swapped": lambda: short_conv_reference(C, B, x, weight, None),
        "activation": lambda: (
            C * torch.nn.functional.silu(short_conv_reference(B, torch.ones_like(C), x, weight, None))
        ),
    }[changed]()
    assert error(wrong, short_conv_reference(B, C, x, weight, None)) > 0.1


def network(**changes) -> Decoder:
    spec = ShortConvConfig(**{"channels": 40, "conv": 3} | changes)
    net = Decoder(ModelConfig(vocab_size=300, width=32, layers=(LayerConfig(mixers=(spec,)),) * 2))
    initialize(net, 0)
    with torch.no_grad():
        net.embed.weight.mul_(30)
        for block in net.layers:
            block.mixers["short_conv"].conv.normal_()
    return net.eval().requires_grad_(False)


needs_kernels = pytest.mark.skipif(not native.available, reason="no native kernels in this build")


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"conv": 7, "bias": True}, {"conv": 4, "chunk": 16, "channels": 300}])
def test_any_cut_gives_the_same_bits(dtype: torch.dtype, changes) -> None:
    net = network(**changes).to(dtype)
    words = torch.tensor(tiny.ids(200))
    plain = net(words).float()
    net.pack()
    whole = net([words], [net.new_state()])[0]
    close = 2e-4 if dtype == torch.float32 else 0.2
    assert float((whole - plain).abs().max()) < close * float(plain.abs().max())
    for sizes in ([1] * 200, [3] * 66 + [2], [64, 1, 63, 72], [130, 70], [7, 65, 1, 127]):
        state = net.new_state()
        assert torch.equal(torch.cat([net([piece], [state])[0] for piece in words.split(sizes)]), whole)


@needs_kernels
def test_in_company_and_after_a_cut_back() -> None:
    net = network(conv=7)
    net.pack()
    texts = [torch.tensor(tiny.ids(n, seed=n)) for n in (5, 70, 129)]
    alone = [net([words], [net.new_state()])[0] for words in texts]
    states = [net.new_state() for _ in texts]
    assert all(map(torch.equal, net(texts, states), alone))
    for words, state, expected in zip(texts, states, alone, strict=True):
        for back in (1, 3, min(len(words), 64)):  # a whole chunk of what the last call added can be taken back
            cut, length = state.fork(), len(words) - back
            assert cut.trim(length)
            assert torch.equal(net([words[length:]], [cut])[0], expected[length:])
        fork, more = state.fork(), torch.tensor(tiny.ids(9, seed=1))
        assert torch.equal(net([more], [fork])[0], net([more], [state])[0])


def test_channels_are_split_evenly_or_not_at_all() -> None:
    assert ShortConvConfig(channels=24).shard(3).channels == 8
    with pytest.raises(RequestError, match="24 channels cannot be split over 5"):
        ShortConvConfig(channels=24).shard(5)
