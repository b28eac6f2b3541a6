#!/usr/bin/env bash
# transformers 5.24.0: from_pretrained(dtype=torch.bfloat16) rounds A_log and dt_bias of Mamba-2 and gated-delta
# models (mamba2, falcon_h1, qwen3_5) to bfloat16 although the file holds float32 and the config says
# mamba_ssm_dtype float32, which is stored and never read. minimax rounds its decay tables, which are persistent
# buffers and no weights, as well. A decay rate exp(A_log) is then off by up to 0.8 %, which after 1,000 tokens
# changes what a slow head keeps.
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


import tempfile

from transformers import FalconH1Config, Mamba2Config, MiniMaxConfig
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

size = dict(vocab_size=64, hidden_size=32)
attention = dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
configs = {
    "mamba2": Mamba2Config(**size, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=1),
    "falcon_h1": FalconH1Config(**size, **attention, num_hidden_layers=2, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8,
                                mamba_d_state=8),
    "qwen3_5": Qwen3_5TextConfig(**size, **attention, num_hidden_layers=4, linear_num_key_heads=2,
                                 linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
                                 mamba_ssm_dtype="float32"),
    "minimax": MiniMaxConfig(**size, **attention, num_hidden_layers=2, num_local_experts=2, num_experts_per_tok=1,
                             layer_types=["linear_attention", "full_attention"], block_size=8),
}
for name, config in configs.items():
    model = tiny(config).float()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    wanted = ("A_log", "dt_bias", "slope_rate", "query_decay", "key_decay", "diagonal_decay")
    for key, value in (*loaded.named_parameters(), *loaded.named_buffers()):
        leaf = key.rpartition(".")[2]
        if leaf in wanted and ".0." in key:
            off = (value.float() - before[key]).abs().max().item()
            print(f"transformers {transformers.__version__}  {name:9s} {leaf:14s} {value.dtype}  largest rounding {off:.1e}")
            assert value.dtype == torch.bfloat16 and off > 0
PY
