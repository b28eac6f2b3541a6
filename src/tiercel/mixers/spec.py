"""What a mixer or a feed-forward is, as data: its parameters, its buffers, its cost.

Standard library only, so `plan` and `show` need no torch.  A mixer is one folder with one subclass of `MixerSpec` (its
config) and one line in `mixers/__init__.py`; everything that lists parameters or buffers is derived from these tables:

    Param    checkpoint and GGUF names, counts, shapes, initial values, fp32 set, weight decay, packing, tensor-parallel
             shards, LoRA targets
    Buffer   allocation on CPU and GPU, kernel descriptors, trim, fork, snapshot, saved files, bytes in `plan`
    Cost     operations and bytes of a step or a prompt, which `plan` adds up
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, Self

if TYPE_CHECKING:
    from torch import nn

Init = Literal["linear", "embedding", "zeros", "ones", "conv", "dt_bias", "A_log"]
Shard = Literal["replicate", "column", "row"]  # Megatron's words: column splits outputs, row splits inputs and sums
Dtype = Literal["model", "float32"]
Lifetime = Literal["page", "pending", "sequence", "scratch"]


@dataclass(frozen=True, kw_only=True)
class Param:
    """One parameter of a mixer or feed-forward.

    name, shape   as in `named_parameters()` of the module: "in_proj.weight", (N, K)
    hf, gguf      default names below the layer ("in_proj.weight"; "ssm_in.weight"); a family may give others.
                  gguf None: GGUF has no place for it
    transforms    named changes of form on the way to a file: hf_form, gguf_forms (`weights/transforms.py`)
    init          how an untrained network draws it
    keep_fp32     norms, convolutions, decays, routers: at least float32 where it matters, never packed
    decay         weight decay applies in training
    shard, parts  how tensor parallelism splits it; parts: runs of rows, each split on its own ([z | x | B | C | dt])
    lora          a LoRA target
    role          its class in quantization recipes and fidelity reports ("attn_v", "ffn_down", "ssm_in", …)
    """

    name: str
    shape: tuple[int, ...]
    hf: str
    gguf: str | None
    hf_form: tuple[str, int] | None = None
    gguf_forms: tuple[tuple[str, int], ...] = ()
    init: Init = "linear"
    keep_fp32: bool = False
    decay: bool = True
    shard: Shard = "replicate"
    parts: tuple[int, ...] = ()
    lora: bool = False
    role: str = "other"

    @property
    def values(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """One tensor that a layer keeps of a sequence.

    lifetime   page      of every token, in pages of the KV cache; shape is that of one token
               pending   of every token since the last committed position; shape is that of one token
               sequence  one for the sequence, as of the committed position
               scratch   one for the sequence, can be recomputed from the others; neither snapshotted nor saved
    history    rows kept before the committed position (a convolution: K − 1); pending buffers only
    token_dim  where the token axis stands in memory: 0 (token, …) or −2 (…, token, last), pending buffers only
    """

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    lifetime: Lifetime
    history: int = 0
    token_dim: Literal[0, -2] = 0

    @property
    def values(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a mixer does besides its matrices, for `plan`.  All counts are of one layer.

    ops      operations by the rate that bounds them: {"attention": …, "scan2": …, "conv": …} (plan/machines.py)
    read     bytes of state and keys read in a step of one row
    width    float32 values per token that lie between its products (working memory, pointwise time)
    """

    ops: dict[str, float] = field(default_factory=dict)
    read: float = 0.0
    width: int = 0


class ModuleSpec(ABC):
    """What mixers and feed-forwards share."""

    kind: ClassVar[str]  # its name in config files: "attention", "mamba2", "gated_mlp"

    @abstractmethod
    def params(self, width: int) -> tuple[Param, ...]:
        """Every parameter, in the module's order; width: of the residual stream."""

    @abstractmethod
    def describe(self) -> str:
        """One line for `tiercel show`: "64 heads of 64, state 128, 1 group"."""

    @abstractmethod
    def shard(self, size: int) -> Self:
        """The spec of one of `size` tensor-parallel ranks.

        Raises:
            RequestError: a size that does not divide what has to be divided, by name.
        """

    @abstractmethod
    def build(self, width: int, eps: float) -> nn.Module:
        """The layer; imports torch."""


class MixerSpec(ModuleSpec):
    """A mixer: attention, a state-space model, a linear attention, a convolution."""

    chunk: int  # tokens after which a recurrent state is committed at the latest; attention has none

    @abstractmethod
    def buffers(self) -> tuple[Buffer, ...]:
        """What is kept of a sequence, in the order in which kernels find it."""

    @abstractmethod
    def cost(self, tokens: int, context: int) -> Cost:
        """Of `tokens` new tokens after `context` earlier ones."""

    @property
    def recurrent(self) -> bool:
        """Whether a state is committed and can be rolled back to the last commit only."""
        return any(b.lifetime in ("sequence", "pending") for b in self.buffers())


class FeedForwardSpec(ModuleSpec):
    """A feed-forward: gated MLP, experts."""

    @abstractmethod
    def cost(self, tokens: int) -> Cost:
        """Of `tokens` tokens, its matrices aside."""


Registry = dict[str, Callable[..., ModuleSpec]]
