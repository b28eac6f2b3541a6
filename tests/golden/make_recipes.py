"""Asks llama.cpp which type it would give every tensor, and writes recipes.json beside this file.  Run by hand.

    python make_recipes.py LLAMA_CPP/build/bin/llama-quantize FOLDER     (llama.cpp of llama-cpp-python 0.3.36)

FOLDER takes a GGUF file of every network in CONFIGS: true proportions, tiny widths, random weights.
recipes.json: network → recipe → {type: our names of the tensors, shortened to the runs "layers.0-3,5"}.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECIPES = """q4_0 q4_1 q5_0 q5_1 q8_0 q2_k q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m q6_k""".split()

_LLAMA = dict(
    model_type="llama", vocab_size=64, hidden_size=256, intermediate_size=512, num_attention_heads=8,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=64, rms_norm_eps=1e-5, hidden_act="silu",
)  # fmt: skip
CONFIGS = {
    "llama": dict(_LLAMA, num_hidden_layers=19, tie_word_embeddings=False),
    "llama tied, few queries": dict(_LLAMA, num_hidden_layers=8, tie_word_embeddings=True, num_key_value_heads=4),
    "llama of odd widths": dict(_LLAMA, num_hidden_layers=6, hidden_size=288, intermediate_size=512,
                                tie_word_embeddings=True),
    "llama of 80 layers": dict(_LLAMA, num_hidden_layers=80, tie_word_embeddings=False),
    "qwen2": dict(_LLAMA, model_type="qwen2", num_hidden_layers=5, intermediate_size=160, tie_word_embeddings=False,
                  num_attention_heads=8, num_key_value_heads=8),
    "mixtral": dict(_LLAMA, model_type="mixtral", num_hidden_layers=9, tie_word_embeddings=False,
                    num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
    "mixtral of four": dict(_LLAMA, model_type="mixtral", num_hidden_layers=9, tie_word_embeddings=False,
                            num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "mamba2": dict(model_type="mamba2", vocab_size=64, hidden_size=256, num_heads=8, head_dim=64, state_size=16,
                   n_groups=1, num_hidden_layers=6, expand=2, conv_kernel=4, use_bias=False, use_conv_bias=True,
                   tie_word_embeddings=False),
    "mamba": dict(model_type="mamba", vocab_size=64, hidden_size=256, intermediate_size=512, state_size=16, expand=2,
                  num_hidden_layers=6, conv_kernel=4, use_bias=False, use_conv_bias=True, time_step_rank=16),
    "falcon-h1": dict(model_type="falcon_h1", vocab_size=64, hidden_size=256, intermediate_size=768, head_dim=64,
                      num_hidden_layers=20, num_attention_heads=8, num_key_value_heads=2, mamba_d_ssm=512,
                      mamba_n_heads=8, mamba_d_head=64, mamba_n_groups=1, mamba_d_state=16, mamba_d_conv=4,
                      mamba_rms_norm=False, tie_word_embeddings=False),
    "jamba": dict(model_type="jamba", vocab_size=64, hidden_size=256, intermediate_size=512, num_attention_heads=8,
                  num_key_value_heads=2, num_hidden_layers=16, attn_layer_period=8, attn_layer_offset=4,
                  expert_layer_period=2, expert_layer_offset=1, num_experts=4, num_experts_per_tok=2,
                  mamba_d_state=16, mamba_d_conv=4, mamba_expand=2, mamba_dt_rank=16, tie_word_embeddings=False),
}  # fmt: skip


def write(name: str, folder: Path) -> tuple[Path, dict[str, str]]:
    """The network as a bf16 GGUF file, and our names by the file's."""
    import torch

    from tiercel.families import from_hf
    from tiercel.weights.export import NetworkSource, export

    layout = from_hf(CONFIGS[name])
    path = folder / f"{name}.gguf"
    export(NetworkSource(fresh_network(layout, torch.bfloat16), layout), path)
    return path, {row.gguf: row.ours for row in layout.rows}


def fresh_network(layout: Any, dtype: Any) -> Any:
    """A network of plain parameters with random weights."""
    import torch

    from tiercel.model.decoder import Decoder
    from tiercel.model.initialize import initialize

    with torch.no_grad():
        network = Decoder(layout.config)
        initialize(network)
    return network.to(dtype).requires_grad_(False)


def ask(program: str, path: Path, recipe: str) -> dict[str, str]:
    """GGUF name → type, of the tensors that would be packed."""
    said = subprocess.run([program, "--dry-run", path, recipe], capture_output=True, text=True)
    lines = re.finditer(r"\] +(\S+) +- \[.*?\], .* -> .*? MiB \((\w+)\)", said.stdout + said.stderr)
    return {line[1]: line[2].upper() for line in lines}


def main(program: str, folder: Path) -> None:
    found: dict[str, dict[str, dict[str, list[str]]]] = {}
    for name in CONFIGS:
        path, ours = write(name, folder)
        for recipe in RECIPES:
            by_type: dict[str, list[str]] = {}
            for tensor, type in ask(program, path, recipe).items():
                if type not in ("F16", "BF16", "F32"):
                    by_type.setdefault(type, []).append(ours[tensor])
            found.setdefault(name, {})[recipe] = {type: shortened(names) for type, names in sorted(by_type.items())}
        print(name, {type: len(names) for type, names in by_type.items()})
    (HERE / "recipes.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")


def shortened(names: list[str]) -> list[str]:
    """layers.0.x, layers.1.x, layers.4.x → "0 1 4 x"."""
    layers: dict[str, list[str]] = {}
    for name in names:
        _, number, rest = name.split(".", 2) if name.startswith("layers.") else ("", "", name)
        layers.setdefault(rest, []).append(number)
    ordered = ((sorted(numbers, key=lambda n: int(n or 0)), rest) for rest, numbers in layers.items())
    return sorted(" ".join([*numbers, rest]).strip() for numbers, rest in ordered)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
