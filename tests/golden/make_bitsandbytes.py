"""NF4 matrices as bitsandbytes packs, saves and unpacks them, in bitsandbytes.safetensors beside this file.

    python make_bitsandbytes.py         (bitsandbytes 0.50.2, on the CPU; run by hand)

`<name>.weight` and its parts as transformers saves them, and `<name>.expected`: what bitsandbytes makes of them.
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

CASES = {  # shape, double quantization, blocksize, dtype
    "plain": ((24, 128), False, 64, torch.float32),
    "nested": ((40, 512), True, 64, torch.bfloat16),
    "wide blocks": ((24, 256), True, 128, torch.float16),
    "across rows": ((7, 96), True, 64, torch.bfloat16),
    "cut short": ((3, 50), False, 64, torch.float32),
}

tensors = {}
for seed, (name, (shape, nested, blocksize, dtype)) in enumerate(CASES.items()):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)
    packed, state = bnb.quantize_4bit(x, blocksize=blocksize, compress_statistics=nested, quant_type="nf4")
    parts = {f"{name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    tensors |= parts | {f"{name}.weight": packed, f"{name}.expected": bnb.dequantize_4bit(packed, state)}
    tensors |= {f"{name}.original": x}
tensors = {name: x.clone().contiguous() for name, x in tensors.items()}
save_file(tensors, Path(__file__).parent / "bitsandbytes.safetensors")
print({name: list(x.shape) for name, x in tensors.items()})
