#!/usr/bin/env bash
# transformers 5.24.0: after activate_past_recording(), crop(-n) of the cache of a gated-delta hybrid (qwen3_5)
# succeeds: keys, values and the columns of the convolution go back n tokens, the recurrent state does not, and no
# error says so. The next token is computed from a state that has read the removed tokens. The pure short-
# convolution hybrid lfm2, which has no recurrent state, is right after the same call.
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


from transformers import DynamicCache, Lfm2Config
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

size = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
configs = {
    "qwen3_5": Qwen3_5TextConfig(**size, head_dim=8, num_hidden_layers=4, linear_num_key_heads=2,
                                 linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8),
    "lfm2": Lfm2Config(**size, num_hidden_layers=2, layer_types=["conv", "full_attention"]),
}
ids = torch.randint(5, 60, (1, 16))
errors = {}
for name, config in configs.items():
    model = tiny(config)
    with torch.no_grad():
        right = model(ids[:, :11], use_cache=False).logits[:, -1]
        for removed in (0, 6):
            cache = DynamicCache(config=config)
            cache.activate_past_recording()
            for t in range(10 + removed):
                model(ids[:, t : t + 1], use_cache=True, cache=cache, position_ids=torch.tensor([[t]]))
            cache.crop(-removed)
            assert cache.get_seq_length() == 10
            got = model(ids[:, 10:11], use_cache=True, cache=cache, position_ids=torch.tensor([[10]])).logits[:, -1]
            errors[name, removed] = error(got, right)
            print(f"transformers {transformers.__version__}  {name:8s} after crop({-removed}): error of the next token "
                  f"{errors[name, removed]:.1e}")
assert errors["qwen3_5", 0] < 1e-5 and errors["qwen3_5", 6] > 1e-3
assert errors["lfm2", 0] < 1e-5 and errors["lfm2", 6] < 1e-5
PY
