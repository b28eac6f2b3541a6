#!/usr/bin/env bash
# PEFT 0.21.2 with transformers 5.24.0: target_modules="all-linear" is refused on the plain state-space families
# (mamba2, falcon_h1): the matrix in `out_proj` is on PEFT's list of modules that Mamba kernels read around, so
# nothing is adapted at all. Naming in_proj alone works.
# Needs Python 3.11 and a package registry; installs into a temporary folder, exits 0 while the behaviour is as described.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2
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


import peft
from peft import LoraConfig, get_peft_model
from transformers import FalconH1Config, LlamaConfig, Mamba2Config

size = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2)
attention = dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
configs = {
    "llama": LlamaConfig(**size, **attention),
    "mamba2": Mamba2Config(**size, state_size=8, num_heads=8, head_dim=8, n_groups=1),
    "falcon_h1": FalconH1Config(**size, **attention, head_dim=8, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8,
                                mamba_d_state=8),
}
seen = {}
for name, config in configs.items():
    for target in ("all-linear", ["in_proj"] if name != "llama" else ["q_proj"]):
        try:
            wrapped = get_peft_model(tiny(config), LoraConfig(r=2, target_modules=target, task_type="CAUSAL_LM"))
            leaves = sorted({k.split(".lora_A")[0].rpartition(".")[2] for k, _ in wrapped.named_parameters() if "lora_A" in k})
            seen[name, str(target)] = f"adapts {', '.join(leaves)}"
        except ValueError as refused:
            seen[name, str(target)] = f"ValueError: {str(refused).splitlines()[0][:150]}"
        print(f"peft {peft.__version__}  {name:9s} {str(target):12s} {seen[name, str(target)]}")
assert seen["llama", "all-linear"].startswith("adapts")
for name in ("mamba2", "falcon_h1"):
    assert seen[name, "all-linear"].startswith("ValueError") and seen[name, "['in_proj']"] == "adapts in_proj"
PY
