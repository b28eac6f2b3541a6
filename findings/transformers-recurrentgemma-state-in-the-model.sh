#!/usr/bin/env bash
# transformers 5.24.0: RecurrentGemma keeps the states of its RG-LRU and convolution in the modules, not in the
# cache object. Two sequences with a cache of their own each therefore share one state: what the second one read
# is what the first one goes on from.
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


from transformers import DynamicCache, RecurrentGemmaConfig

config = RecurrentGemmaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, intermediate_size=96, lru_width=32,
                              num_attention_heads=4, num_key_value_heads=1, attention_window_size=64)
model = tiny(config)
first, second, token = (torch.randint(5, 60, (1, n)) for n in (10, 10, 1))
position = torch.arange(11)[None]
with torch.no_grad():
    right = model(torch.cat((first, token), 1), use_cache=False).logits[:, -1]
    errors = []
    for others in ([], [second]):
        mine = DynamicCache(config=config)
        model(first, use_cache=True, cache=mine, position_ids=position[:, :10])
        for other in others:
            model(other, use_cache=True, cache=DynamicCache(config=config), position_ids=position[:, :10])
        errors.append(error(model(token, use_cache=True, cache=mine, position_ids=position[:, 10:]).logits[:, -1], right))
print(f"transformers {transformers.__version__}  recurrent_gemma, next token of a cached sequence: error {errors[0]:.1e} alone, "
      f"{errors[1]:.1e} after another sequence with another cache")
assert errors[0] < 1e-5 and errors[1] > 1e-2
PY
