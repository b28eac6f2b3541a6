"""A network laid out for a GPU's steps: matrices that read one input lie as one, so one launch multiplies them all.

Their parts stay where they were, as rows of the whole: prompts, exports and fingerprints do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from tiercel.errors import RequestError
from tiercel.mixers.spec import ModuleSpec
from tiercel.model.layers import Linear, set_weight
from tiercel.model.merged_linear import MergedLinear
from tiercel.model.parameters import parameters
from tiercel.ops import triton
from tiercel.ops.qtensor import QTensor

if TYPE_CHECKING:
    from tiercel.model.block import Block
    from tiercel.model.decoder import Decoder


def to_device(network: Decoder, device: str | torch.device, *, fp8: bool = False) -> None:
    """Put a network on a GPU to be run: packed matrices in the planes of its kernels, the rest in bfloat16 (float32
    where the matrices are).  fp8: matrices of the layers that are not packed become e4m3.  RequestError where there is
    no such GPU."""
    if not triton.there or not torch.cuda.is_available():
        what = "a GPU that PyTorch sees" if triton.there else "triton: pip install triton"
        raise RequestError(f"device {str(device)!r} needs {what}")
    from tiercel.ops.triton.linear import in_fp8, on_device

    network.unpack()
    plain = (
        torch.float32 if network.embed.weight.dtype == torch.float32 and not _any_packed(network) else torch.bfloat16
    )
    exact = {name for name, param in parameters(network.config).items() if param.fp32_on_gpu}
    for path, module in network.named_modules():
        for name, value in [*vars(module).items(), *module._parameters.items()]:
            if isinstance(value, QTensor):
                moved: Any = on_device(value, device)
                held = moved if isinstance(moved, QTensor) else nn.Parameter(moved, requires_grad=False)
                set_weight(module, name, held)
            elif isinstance(value, list) and value and isinstance(value[0], QTensor):
                raise RequestError("packed experts have no kernels for GPUs yet: load the model with dtype='bfloat16'")
            elif isinstance(value, nn.Parameter):
                kind = torch.float32 if f"{path}.{name}" in exact else plain
                there = value.detach().to(device, kind)
                matrix = in_fp8(there) if fp8 and _of_a_layer(path, module) and name == "weight" else there
                held = matrix if isinstance(matrix, QTensor) else nn.Parameter(matrix, requires_grad=False)
                set_weight(module, name, held)
    network._tie()
    network.layout_version += 1


def _of_a_layer(path: str, module: nn.Module) -> bool:
    return path.startswith("layers.") and type(module) is Linear


def _any_packed(network: Decoder) -> bool:
    return any(isinstance(value, QTensor) for module in network.modules() for value in vars(module).values())


def fuse(network: Decoder) -> None:
    """Join what reads one input, and let norms round where packed matrices follow; weights are on their device."""
    width = network.config.width
    for config, block in zip(network.config.layers, cast("Sequence[Block]", network.layers), strict=True):
        readers = [m for spec in config.mixers for m in _readers(block.mixers[spec.kind], spec, width)]
        alike = [m for m in readers if type(m) is Linear and m.bias is None and _kind(m) == _kind(readers[0])]
        block.joint = MergedLinear(alike) if len(alike) > 1 else None
        if block.mixer_norm is not None:
            block.mixer_norm.feeds_packed = any(_packed(m) for m in readers)
        if block.ffn_norm is not None and block.feed_forward is not None and config.feed_forward is not None:
            block.ffn_norm.feeds_packed = any(map(_packed, _readers(block.feed_forward, config.feed_forward, width)))
    network.norm.feeds_packed = _packed(network.head)


def _readers(module: nn.Module, spec: ModuleSpec, width: int) -> list[Linear]:
    """Its Linears that multiply the layer's input."""
    names = [p.name.removesuffix(".weight") for p in spec.params(width) if p.reads_input and p.name.endswith(".weight")]
    return [cast(Linear, module.get_submodule(name)) for name in names]


def _kind(m: Linear) -> object:
    return m.weight.dtype if isinstance(m.weight, Tensor) else m.weight.type


def _packed(m: nn.Module) -> bool:
    return getattr(getattr(m, "weight", None), "takes_q8", False)
