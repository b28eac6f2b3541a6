"""Matrices laid out for running are the same matrices, and go back to plain ones for everything else."""

import copy

import pytest
import torch

import tiny
from tiercel.errors import RequestError
from tiercel.model.layers import named_weights, set_weight
from tiercel.ops.cpu import native
from tiercel.ops.qtensor import QTensor

needs_kernels = pytest.mark.skipif(not native.available, reason="no native kernels here")


@pytest.fixture
def network():
    return tiny.network(native=False)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_changes_no_number(network, dtype):
    network.to(dtype)
    plain = {name: p.clone() for name, p in network.named_parameters()}
    network.pack()
    assert network.native and isinstance(network.layers[0].mixers["attention"].q.weight, QTensor)
    assert set(dict(named_weights(network))) == set(plain)
    network.unpack()
    assert not network.native
    assert all(torch.equal(p, plain[name]) for name, p in network.named_parameters())


@needs_kernels
def test_a_packed_network_answers_like_the_plain_one(network):
    tokens = torch.arange(40)
    before = network(tokens)
    network.pack()
    with torch.no_grad():
        torch.testing.assert_close(network(tokens), before, atol=1e-4, rtol=1e-5)


def test_a_tied_head_shares_the_embedding_packed_or_not():
    network = tiny.network("attention", tied=True, native=False)
    for change in (network.pack, network.unpack, network.pack):
        change()
        assert network.head.weight is network.embed.weight


def test_gradients_reach_the_input_of_a_packed_matrix(network):
    linear = network.layers[0].mixers["attention"].o
    x = torch.randn(3, linear.in_features, requires_grad=True)
    (expected,) = torch.autograd.grad(linear(x).square().sum(), x)
    network.pack()
    (got,) = torch.autograd.grad(linear(x).square().sum(), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("leave", [lambda n: n.train(), lambda n: n.double(), lambda n: n.to(torch.bfloat16)])
def test_training_and_conversion_see_plain_matrices(network, leave):
    network.pack()
    leave(network)
    assert not any(isinstance(weight, (QTensor, list)) for _, weight in named_weights(network))


def test_a_copy_is_one_of_its_own(network):
    network.pack()
    tokens, states = torch.tensor([7]), [network.new_state(), network.new_state(), network.new_state()]
    expected = [network(tokens, state) for state in states][-1]
    twin = copy.deepcopy(network)
    assert torch.equal(twin(tokens, twin.new_state()), expected)


@needs_kernels
def test_quantized_matrices_stay_on_the_cpu(network):
    q = QTensor("Q8_0", (300, 32))
    q.put(0, torch.zeros(300, 34, dtype=torch.uint8))
    set_weight(network.embed, "weight", q)
    with pytest.raises(RequestError, match="run on the CPU"):
        network.to("meta")
