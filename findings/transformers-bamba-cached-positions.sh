#!/usr/bin/env bash
# transformers 5.24.0: a cached call of BambaForCausalLM without position_ids rotates its keys and queries from
# position 0 again, in silence, also when one token is given; `generate` passes positions and is right. falcon_h1,
# whose attention is the same, counts on from the cache.
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


from transformers import BambaConfig, FalconH1Config

size = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=4,
            num_key_value_heads=2, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8)
ids = torch.randint(5, 60, (1, 13))
errors = {}
for name, config in {
    "bamba": BambaConfig(**size, attn_layer_indices=[0, 1]),
    "falcon_h1": FalconH1Config(**size, head_dim=8, mamba_d_ssm=64),
}.items():
    model = tiny(config)
    with torch.no_grad():
        right = model(ids, use_cache=False).logits[:, -1]
        for more in ({}, {"position_ids": torch.tensor([[12]])}):
            cache = model(ids[:, :12], use_cache=True).cache
            got = model(ids[:, 12:], use_cache=True, cache=cache, **more).logits[:, -1]
            errors[name, bool(more)] = error(got, right)
            print(f"transformers {transformers.__version__}  {name:9s} position_ids {'given' if more else 'left out':8s} "
                  f"error {errors[name, bool(more)]:.1e}")
assert errors["bamba", False] > 1e-2 and errors["bamba", True] < 1e-5
assert errors["falcon_h1", False] < 1e-5 and errors["falcon_h1", True] < 1e-5
PY
