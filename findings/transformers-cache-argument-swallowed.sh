#!/usr/bin/env bash
# transformers 5.24.0: the argument that takes a cache is called `cache`, with ONE older name kept per family:
# `cache_params` in mamba and mamba2, `past_key_values` in falcon_h1 and bamba. The other older name is accepted
# by **kwargs and dropped without an error: the token is then computed as if it were the first of its sequence.
# Code that serves pure and hybrid state-space models by one call gets a wrong answer from one of the two.
# Needs Python 3.11 and a package registry; installs into a temporary folder, exits 0 while the behaviour is as described.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
cd "$work"
TRANSFORMERS_VERBOSITY=critical HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PY'
import torch
import transformers
from transformers import AutoModelForCausalLM

torch.manual_seed(0)


def tiny(config):
    """A network with random weights everywhere, norms and decays too."""
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2 if p.ndim > 1 else p + torch.randn_like(p) * 0.1)
    return model


def error(got, right):
    return ((got - right).norm() / right.norm()).item()


from transformers import BambaConfig, FalconH1Config, Mamba2Config, MambaConfig

size = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2)
attention = dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
mamba2 = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8)
configs = {
    "mamba": MambaConfig(**size, state_size=8),
    "mamba2": Mamba2Config(**size, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    "falcon_h1": FalconH1Config(**size, **attention, **mamba2, head_dim=8, mamba_d_ssm=64),
    "bamba": BambaConfig(**size, **attention, **mamba2, attn_layer_indices=[1]),
}
ids = torch.randint(5, 60, (1, 13))
seen = {}
for name, config in configs.items():
    model = tiny(config)
    with torch.no_grad():
        whole, alone = model(ids, use_cache=False).logits[:, -1], model(ids[:, -1:], use_cache=False).logits[:, -1]
        for argument in ("cache", "past_key_values", "cache_params"):
            cache = model(ids[:, :12], use_cache=True).cache
            more = {} if name.startswith("mamba") else {"position_ids": torch.tensor([[12]])}
            got = model(ids[:, 12:], use_cache=True, **more, **{argument: cache}).logits[:, -1]
            seen[name, argument] = (
                "continues" if error(got, whole) < 1e-4 else "dropped" if error(got, alone) < 1e-4 else "other"
            )
            print(f"transformers {transformers.__version__}  {name:9s} {argument:15s} {seen[name, argument]}")
for name in configs:
    pure = name.startswith("mamba")
    assert seen[name, "cache"] == "continues"
    assert seen[name, "cache_params"] == ("continues" if pure else "dropped")
    assert seen[name, "past_key_values"] == ("dropped" if pure else "continues")
PY
