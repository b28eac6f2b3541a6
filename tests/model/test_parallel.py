"""Two processes that share a network give the logits of one: a prompt, and steps from its memory."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tiercel.errors import RequestError
from tiercel.families.pattern import pattern
from tiercel.mixers.gated_delta.config import GatedDeltaConfig
from tiercel.model.decoder import Decoder
from tiercel.model.initialize import initialize
from tiercel.model.tensor_parallel import shard

SIZES = dict(width=24, vocab_size=97, heads=6, kv_heads=2, head_dim=10, ffn_width=40, repeat=2, chunk=16, norm_eps=1e-2)
MAMBA = dict(expand=3.0, mamba_head_dim=9, groups=2, state=7)
LAYERS = {"falcon_h1": "attention+mamba2", "llama": "attention", "mamba2": "mamba2/-", "qwen3_5": "gated_delta"}
DELTA = GatedDeltaConfig(key_heads=2, value_heads=6, key_dim=9, value_dim=10, tiled=True)
IDS = torch.randint(0, 97, (45,), generator=torch.Generator().manual_seed(3))


def network(name, **changes):
    config = pattern(LAYERS[name], **(SIZES | MAMBA | changes))
    layers = [
        dataclasses.replace(
            layer,
            mixers=tuple(
                DELTA
                if m.kind == "gated_delta"
                else dataclasses.replace(m, out_bias=True, **{"qkv_bias" if m.kind == "attention" else "in_bias": True})
                for m in layer.mixers
            ),
            feed_forward=layer.feed_forward and dataclasses.replace(layer.feed_forward, bias=True),
        )
        for layer in config.layers
    ]  # fmt: skip
    net = Decoder(dataclasses.replace(config, layers=tuple(layers)))
    initialize(net, 1)
    with torch.no_grad():
        g = torch.Generator().manual_seed(2)
        for p in net.parameters():
            p += 0.3 * torch.randn(p.shape, generator=g) * p.std(unbiased=False).clamp(min=0.1)
    return net.eval().requires_grad_(False)


def process(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    out = {}
    for name in LAYERS:
        part = shard(network(name), rank, 2)
        state = part.new_state()
        rows = [part(IDS[:30], state), *(part(IDS[i : i + 1], state) for i in range(30, 45))]
        out[name] = torch.cat(rows), part(IDS), sum(p.numel() for p in part.layers.parameters())
    torch.save(out, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_are_as_one(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(process, (port, tmp_path), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name in LAYERS:
        net = network(name)
        expected, whole = net(IDS), sum(p.numel() for p in net.layers.parameters())
        for out in found:
            stepped, read, numbers = out[name]
            torch.testing.assert_close(stepped, expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(read, expected, atol=1e-4, rtol=1e-4)
            assert numbers < 0.6 * whole


@pytest.mark.parametrize(
    "changes, what",
    [(dict(groups=1), "1 groups"), (dict(kv_heads=3), "3 key/value heads"), (dict(ffn_width=41), "MLP")],
)
def test_what_does_not_divide_is_said_in_a_line(changes, what):
    with pytest.raises(RequestError, match=what) as error:
        shard(network("falcon_h1", **changes), 0, 2)
    assert "\n" not in str(error.value)
