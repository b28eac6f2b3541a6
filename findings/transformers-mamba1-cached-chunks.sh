#!/usr/bin/env bash
# transformers 5.24.0, without the CUDA kernels: a cached call of more than one token is wrong in the Mamba-1
# families (mamba, falcon_mamba, jamba): the scan of the second chunk begins from a zero state while its
# convolution goes on. Mamba-2 families (mamba2, falcon_h1) are right. So these classes cannot be the reference of
# a chunked prefill.
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


from transformers import FalconH1Config, FalconMambaConfig, JambaConfig, Mamba2Config, MambaConfig

size = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2)
attention = dict(intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
configs = {
    "mamba": MambaConfig(**size, state_size=8),
    "falcon_mamba": FalconMambaConfig(**size, state_size=8),
    "jamba": JambaConfig(**size, **attention, attn_layer_period=2, attn_layer_offset=1, num_experts=1, mamba_d_state=8),
    "mamba2": Mamba2Config(**size, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    "falcon_h1": FalconH1Config(**size, **attention, head_dim=8, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8,
                                mamba_d_state=8, mamba_chunk_size=8),
}
ids = torch.randint(5, 60, (1, 24))
for name, config in configs.items():
    model = tiny(config)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        errors = []
        for sizes in ([12] + [1] * 12, [12, 12]):
            cache, at, rows = None, 0, []
            for n in sizes:
                more = {} if "mamba" in name else {"position_ids": torch.arange(at, at + n)[None]}
                out = model(ids[:, at : at + n], use_cache=True, cache=cache, **more)
                cache, at = out.cache, at + n
                rows.append(out.logits)
            errors.append(error(torch.cat(rows, 1), whole))
    print(f"transformers {transformers.__version__}  {name:12s} 12 + 1 + … + 1: {errors[0]:.1e}   12 + 12: {errors[1]:.1e}")
    assert errors[0] < 1e-5
    assert errors[1] > 1e-2 if name in ("mamba", "falcon_mamba", "jamba") else errors[1] < 1e-5
PY
