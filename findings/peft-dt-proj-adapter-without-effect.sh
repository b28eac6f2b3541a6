#!/usr/bin/env bash
# PEFT 0.21.2 on transformers 5.24.0: a LoRA adapter on dt_proj of a Mamba-1 model (mamba, falcon_mamba) is
# accepted and trained parameters are made, but while it is not merged it changes nothing: the forward multiplies
# with dt_proj.weight itself and never calls the module. The same adapter on x_proj works, and after merging the
# dt_proj one does. So merging an adapter changes its answers.
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
from transformers import FalconMambaConfig, MambaConfig

size = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)
ids = torch.randint(5, 60, (1, 16))
for name, config in {"mamba": MambaConfig(**size), "falcon_mamba": FalconMambaConfig(**size)}.items():
    moved = {}
    for target in ("x_proj", "dt_proj"):
        model = tiny(config)
        with torch.no_grad():
            before = model(ids, use_cache=False).logits
            wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=[target], task_type="CAUSAL_LM"))
            for key, p in wrapped.named_parameters():
                if "lora_" in key:
                    p.normal_(0, 0.5)
            adapted = wrapped(ids, use_cache=False).logits
            merged = wrapped.merge_and_unload()(ids, use_cache=False).logits
        moved[target] = error(adapted, before), error(merged, before)
        print(f"peft {peft.__version__}, transformers {transformers.__version__}  {name:12s} adapter on {target:8s} "
              f"moves the logits by {moved[target][0]:.1e} unmerged, {moved[target][1]:.1e} merged")
    assert moved["x_proj"][0] > 1e-3 and abs(moved["x_proj"][0] - moved["x_proj"][1]) < 1e-4
    assert moved["dt_proj"][0] == 0 and moved["dt_proj"][1] > 1e-3
PY
