"""Every parameter of a network, from its configuration alone; standard library only.

embed.weight · layers.{i}.mixer_norm.weight · layers.{i}.mixers.{kind}.{name} · layers.{i}.ffn_norm.weight
layers.{i}.feed_forward.{name} · norm.weight · head.weight (not when tied)
layers.{i}.mixer_post_norm.weight, layers.{i}.ffn_post_norm.weight where outputs are normalised
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tiercel.mixers.spec import ModuleSpec, Param
from tiercel.model.config import LayerConfig, ModelConfig

_NORM: dict[str, Any] = {"init": "ones", "keep_fp32": True, "decay": False}


def parameters(config: ModelConfig) -> dict[str, Param]:
    """Our name of every parameter → what it is; layers in order."""
    V, D = config.vocab_size, config.width
    table = {"embed.weight": Param(name="weight", shape=(V, D), hf="", gguf="token_embd.weight", init="embedding",
                                   role="embed")}  # fmt: skip
    for i, layer in enumerate(config.layers):
        table |= {f"layers.{i}.{name}": param for name, param in layer_parameters(layer, D)}
    table["norm.weight"] = Param(name="weight", shape=(D,), hf="", gguf="output_norm.weight", **_NORM)
    if not config.tied:
        table["head.weight"] = output_parameter(config)
    return table


def output_parameter(config: ModelConfig) -> Param:
    """The output projection."""
    return Param(name="weight", shape=(config.vocab_size, config.width), hf="", gguf="output.weight", role="output")


@lru_cache(maxsize=1024)
def layer_parameters(layer: LayerConfig, width: int) -> tuple[tuple[str, Param], ...]:
    """Name below the layer and description of every parameter, in the order of the network's modules."""
    norm = Param(name="weight", shape=(width,), hf="", gguf=None, **_NORM)
    norms = [name for name, there in (("norm", layer.pre_norm), ("post_norm", layer.post_norm)) if there]
    found = [(f"mixer_{name}.weight", norm) for name in norms if layer.mixers]
    for mixer in layer.mixers:
        found += [(f"mixers.{mixer.kind}.{p.name}", p) for p in _in_module_order(mixer, width)]
    if layer.feed_forward is not None:
        found += [(f"ffn_{name}.weight", norm) for name in norms]
        found += [(f"feed_forward.{p.name}", p) for p in _in_module_order(layer.feed_forward, width)]
    return tuple(found)


def _in_module_order(spec: ModuleSpec, width: int) -> list[Param]:
    """A module's own tensors come before those of its parts."""
    return sorted(spec.params(width), key=lambda p: "." in p.name)
