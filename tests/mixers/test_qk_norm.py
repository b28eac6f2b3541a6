"""Norms on the heads of q and k on a device: a prompt and steps give the logits of the plain network."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

from ops.triton.conftest import DEVICE
from tiercel.families.pattern import pattern
from tiercel.model.cuda_graphs import CUDAGraphRunner, prefill
from tiercel.model.decoder import Decoder
from tiercel.model.gpu_layout import fuse
from tiercel.model.initialize import initialize
from tiercel.model.state_cache import StateCache


def normed(mixer):
    return dataclasses.replace(mixer, qk_norm=True) if mixer.kind == "attention" else mixer


@torch.no_grad()
def test_a_prompt_and_steps():
    config = pattern("attention+mamba2 attention", width=64, vocab_size=300, heads=4, kv_heads=2, head_dim=16,
                     mamba_head_dim=16, state=16, chunk=16)  # fmt: skip
    layers = [dataclasses.replace(layer, mixers=tuple(map(normed, layer.mixers))) for layer in config.layers]
    network = Decoder(dataclasses.replace(config, layers=tuple(layers))).eval().requires_grad_(False)
    initialize(network, 1)
    for name, p in network.named_parameters():
        if "norm" in name:
            p.mul_(torch.rand(p.shape) + 0.5)
    network.to(DEVICE)
    ids = torch.randint(0, 300, (25,)).to(DEVICE)
    expected = network(ids)
    fuse(network)
    slots = StateCache(network, 2, 200)
    slot = slots.take()
    got = prefill(network, slots, [slot], [ids[:20]], logits_to_keep=3)
    torch.testing.assert_close(got, expected[17:20], atol=2e-4, rtol=2e-4)
    runner = CUDAGraphRunner(network, slots, (1, 2, 4))
    for i in range(20, 25):
        torch.testing.assert_close(runner.step([slot], ids[i : i + 1])[0], expected[i], atol=2e-4, rtol=2e-4)
