#!/usr/bin/env bash
# transformers 5.24.0: with an attention mask, a right-padded row of a gated-delta hybrid (qwen3_5) is read with
# its padding zeroed but its decay running: the state that its cache keeps after the prompt has shrunk, and the
# convolution has forgotten its columns. The logits of the real tokens are right, so nothing shows until the
# sequence goes on. Left padding is exact.
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


from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

config = Qwen3_5TextConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, head_dim=8,
                           num_key_value_heads=2, num_hidden_layers=4, linear_num_key_heads=2, linear_num_value_heads=4,
                           linear_key_head_dim=8, linear_value_head_dim=8)
model = tiny(config)
ids, pad = torch.randint(5, 60, (1, 10)), torch.zeros(1, 5, dtype=torch.long)
with torch.no_grad():
    plain = model(ids, use_cache=True)
    state = plain.cache.get_recurrent_state(0) if hasattr(plain.cache, "get_recurrent_state") else None
    found = {}
    for side in ("left", "right"):
        rows = torch.cat((pad, ids) if side == "left" else (ids, pad), 1)
        mask = torch.cat((pad, torch.ones_like(ids)) if side == "left" else (torch.ones_like(ids), pad), 1)
        out = model(rows, attention_mask=mask, use_cache=True)
        logits = out.logits[:, 5:] if side == "left" else out.logits[:, :10]
        kept = out.cache.get_recurrent_state(0)
        kept, whole = (x[0] if isinstance(x, (list, tuple)) else x for x in (kept, state))
        found[side] = error(logits, plain.logits), (kept.norm() / whole.norm()).item()
        print(f"transformers {transformers.__version__}  qwen3_5 {side:5s} padding: logits of the prompt off by {found[side][0]:.1e}, "
              f"norm of the cached state {found[side][1]:.3g} of the unpadded one's")
assert found["left"][0] < 1e-5 and abs(found["left"][1] - 1) < 1e-4
assert found["right"][0] < 1e-5 and found["right"][1] < 0.9
PY
