"""The gated delta rule's kernels against the float64 recurrence: prompts in pieces, in company, then step by step."""

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

from ops.triton.conftest import DEVICE
from tiercel.mixers.gated_delta.config import GatedDeltaConfig
from tiercel.mixers.gated_delta.reference import gated_delta_reference
from tiercel.mixers.gated_delta.triton_prefill import gated_delta_prefill
from tiercel.mixers.gated_delta.triton_step import gated_delta_step
from tiercel.mixers.recurrent import RecurrentSlots
from tiercel.model.ragged import Piece, RaggedPlan
from tiercel.ops.conv1d import conv1d_reference

SHAPES = [(1, 1, 8, 8), (2, 4, 16, 24), (1, 3, 40, 20)]  # G, H, K, V


class Layer:
    """Random parameters and inputs of a few sequences, and their states in slots."""

    def __init__(self, shape, lengths, chunk, *, slow=False, tiled=False):
        G, H, K, V = shape
        self.config = GatedDeltaConfig(
            key_heads=G, value_heads=H, key_dim=K, value_dim=V, conv=3, beta_max=2.0, chunk=chunk
        )
        self.tiled = tiled
        draw = torch.Generator().manual_seed(sum(lengths) + K)
        C = self.config.channels
        self.weight = torch.randn(3, C, generator=draw).to(DEVICE)
        self.dt_bias = torch.randn(H, generator=draw).to(DEVICE)
        self.A = (-torch.rand(H, generator=draw) * (1e-3 if slow else 20)).to(DEVICE)
        self.inputs = [torch.randn(n, C + 2 * H, generator=draw).to(DEVICE) for n in lengths]
        self.slots = RecurrentSlots(self.config, len(lengths) + 1, torch.float32, torch.device(DEVICE))
        for name, t in self.slots.buffers.items():
            t.fill_(torch.nan if name != "ssm_state" else 7.0)  # a slot may hold anything
        self.length, self.base = [0] * len(lengths), [0] * len(lengths)

    def expected(self, i):
        """Outputs (L, H · V) of a whole sequence."""
        G, H, K, V = (self.config.key_heads, self.config.value_heads, self.config.key_dim, self.config.value_dim)
        C, x = self.config.channels, self.inputs[i].double().cpu()
        qkv = torch.nn.functional.pad(x[:, :C], (0, 0, 2, 0))
        qkv = torch.nn.functional.silu(conv1d_reference(qkv, self.weight.t().double().cpu(), None))
        q, k, v = qkv.split((G * K, G * K, H * V), 1)
        g = self.A.double().cpu() * torch.nn.functional.softplus(x[:, C + H :] + self.dt_bias.double().cpu())
        heads = torch.arange(H) % G if self.tiled else torch.arange(H) // (H // G)
        q, k = q.unflatten(1, (G, K))[:, heads], k.unflatten(1, (G, K))[:, heads]
        o, _ = gated_delta_reference(
            q, k, v.unflatten(1, (H, V)), g, 2 * x[:, C : C + H].sigmoid(),
            torch.zeros(H, K, V),
        )  # fmt: skip
        return o.flatten(1)

    def _parts(self, x):
        return x.split((self.config.channels, self.config.value_heads, self.config.value_heads), 1)

    def read(self, counts):
        """The next tokens of each sequence, in one forward; none where the count is 0."""
        pieces, new = [], []
        for i, n in enumerate(counts):
            if n:
                end = self.length[i] + n
                next_ = max(self.base[i], (end - 1) // self.slots.chunk * self.slots.chunk)
                pieces.append(Piece(i, self.length[i], end, self.base[i], next_))
                new.append(self.inputs[i][self.length[i] : end])
                self.length[i], self.base[i] = end, next_
        plan = RaggedPlan.exact(pieces, torch.device(DEVICE))
        o = gated_delta_prefill(
            *self._parts(torch.cat(new)),
            self.weight,
            self.dt_bias,
            self.A,
            self.slots,
            plan,
            beta_max=2.0,
            tiled=self.tiled,
        )
        return o.split([len(x) for x in new])

    def step(self, numbers):
        """One token more of some sequences; −1: none."""
        whole = [torch.tensor(values, dtype=torch.int32, device=DEVICE) for values in (numbers, self.length, self.base)]
        new = torch.stack([self.inputs[i][self.length[i]] for i in numbers])
        o = gated_delta_step(
            *self._parts(new), self.weight, self.dt_bias, self.A, self.slots, *whole, beta_max=2.0, tiled=self.tiled
        )
        for i in numbers:
            if i >= 0:
                self.base[i] = max(self.base[i], self.length[i] // self.slots.chunk * self.slots.chunk)
                self.length[i] += 1
        return o


def error(got, right):
    return float((got.double().cpu() - right).norm() / right.norm())


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_in_pieces_are_the_recurrence(shape, slow):
    layer = Layer(shape, (150, 90), 16, slow=slow)
    outputs = [[], []]
    for counts in ((70, 1), (3, 64), (77, 25)):
        for i, o in enumerate(layer.read(counts)):
            outputs[i].append(o)
    for i in range(2):
        assert error(torch.cat(outputs[i]), layer.expected(i)) < 1e-5


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_steps_after_a_prompt_are_the_recurrence(shape, tiled):
    layer = Layer(shape, (60, 45), 16, slow=True, tiled=tiled)
    first = layer.read((37, 16))
    steps = [layer.step([1, 0, -1]) for _ in range(23)]
    assert all(not o[2].any() for o in steps)
    for i, row in ((0, 1), (1, 0)):
        got = torch.cat([first[i], torch.stack([o[row] for o in steps])])
        assert error(got, layer.expected(i)[: len(got)]) < 1e-5


def test_repeated_keys_stay_exact():
    """Powers of the matrix that is inverted would exceed float32 here."""
    layer = Layer((1, 1, 16, 16), (130,), 64, slow=True)
    x = layer.inputs[0]
    x[:, 16:32] = x[:1, 16:32]  # one key
    x[:, 48:49] = 9.0  # β near its most
    assert error(layer.read((130,))[0], layer.expected(0)) < 1e-4


def test_a_sequence_has_the_same_bits_alone_and_in_company():
    alone, together = (Layer((2, 4, 16, 24), (70, 50), 16) for _ in range(2))
    a = [*alone.read((70, 0)), *alone.read((0, 50))]
    b = together.read((70, 50))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
