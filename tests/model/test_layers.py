"""Matrices laid out for running are the same matrices, and go back to plain ones for everything else."""

import pytest
import torch

import tiny
from tiercel.model.layers import packs


@pytest.fixture
def network():
    net = tiny.network()
    if not packs(net.layers[0].mixers["attention"].q.weight):
        pytest.skip("this machine has no blocked layout")
    return net


def test_packing_changes_no_number(network):
    tokens = torch.arange(40)
    plain = {name: p.clone() for name, p in network.named_parameters()}
    before = network(tokens)
    network.pack()
    assert network.layers[0].mixers["attention"].q.weight.is_mkldnn and not network.embed.weight.is_mkldnn
    with torch.no_grad():
        torch.testing.assert_close(network(tokens), before, atol=1e-4, rtol=1e-5)
    assert {name: tuple(p.shape) for name, p in network.named_parameters()} == {
        n: tuple(p.shape) for n, p in plain.items()
    }
    network.unpack()
    assert all(torch.equal(p, plain[name]) for name, p in network.named_parameters())


def test_gradients_reach_the_input_of_a_packed_matrix(network):
    linear = network.layers[2].feed_forward.router
    x = torch.randn(3, 32, requires_grad=True)
    (expected,) = torch.autograd.grad(linear(x).square().sum(), x)
    linear.pack()
    (got,) = torch.autograd.grad(linear(x).square().sum(), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("leave", [lambda n: n.train(), lambda n: n.double(), lambda n: n.to(torch.bfloat16)])
def test_training_and_conversion_see_plain_matrices(network, leave):
    network.pack()
    leave(network)
    assert not any(p.is_mkldnn for p in network.parameters())
