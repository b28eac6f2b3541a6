"""What a mixer or a feed-forward is, as data: its parameters, its buffers, its cost.

Standard library only, so `plan` and `show` need no torch.  A mixer is one folder with one subclass of `MixerSpec` (its
config) and one line in `mixers/registry.py`; everything that lists parameters or buffers is derived from these tables:

    Param    checkpoint and GGUF names, counts, shapes, initial values, fp32 set, weight decay, packing, tensor-parallel
             shards, LoRA targets
    Buffer   allocation on CPU and GPU, kernel descriptors, trim, fork, snapshot, saved files, bytes in `plan`
    Cost     operations and values of a step or a prompt, which `plan` adds up
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar

from tiercel.errors import FormatError, RequestError

if TYPE_CHECKING:
    from torch import nn

MAX_CHUNK = 64  # tokens after which a state is committed at the latest, whatever a model was trained with
Init = Literal["linear", "residual", "embedding", "zeros", "ones", "dt_bias", "A_log"]
Shard = Literal["replicate", "column", "row"]  # Megatron's words: column splits outputs, row splits inputs and sums
Dtype = Literal["model", "float32"]
Lifetime = Literal["page", "pending", "sequence", "scratch"]


@dataclass(frozen=True)
class Transform:
    """A tensor's form in a foreign file and the number it needs; applied in `weights.transforms`.

    conv        (C, K) here, (C, 1, K) there
    column      (H) here, (H, 1) there
    row         (1, D) here, (D) there
    groups      (I) here, (G, I / G) there; n = G
    neg_exp     A_log here, A = −exp(A_log) there
    interleave  rows of q and k: rotate-half here, neighbouring pairs there (llama.cpp's `llama`); n = heads
    runs        there each of n heads has runs of rows, of lengths like `sizes`; here runs `take` of all heads
    tiled       value head i·n + j here, j·r + i there (n key heads); sizes: rows of a head, and of what comes before
    tiled_columns   the same of columns; sizes: columns of a head, and heads of one key head
    plus_one    1 + w here, w there (norms of Gemma and Qwen3.5)
    """

    name: str
    n: int = 0
    sizes: tuple[int, ...] = ()
    take: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Param:
    """One parameter of a mixer or feed-forward.

    name, shape   as in `named_parameters()` of the module: "in_proj.weight", (N, K)
    hf, gguf      default names below the layer ("in_proj.weight"; "ssm_in.weight"); a family may give others.
                  "{e}" in hf: one tensor for each index of the first axis.  gguf None: GGUF has no place for it
    hf_form, gguf_forms   changes of form on the way to a file
    init          how an untrained network draws it (`model.layers.fresh`); residual: a matrix whose output is added
                  to the residual stream
    keep_fp32     norms, convolutions, decays, routers: at least float32 where it matters, never packed
    fp32_on_gpu   stays float32 on a GPU too, where norms and convolutions take the matrices' dtype
    decay         weight decay applies in training
    shard, parts  how tensor parallelism splits it; parts: runs of rows (of columns: row), each split on its own:
                  [z | x | B | C | dt]
    reads_input   its Linear multiplies the layer's input, so a GPU may compute it together with others that do
    lora          a LoRA target by default
    role          its class in quantization recipes ("attn_v", "ffn_down", …)
    """

    name: str
    shape: tuple[int, ...]
    hf: str
    gguf: str | None
    hf_form: Transform | None = None
    gguf_forms: tuple[Transform, ...] = ()
    init: Init = "linear"
    keep_fp32: bool = False
    fp32_on_gpu: bool = False
    decay: bool = True
    shard: Shard = "replicate"
    parts: tuple[int, ...] = ()
    reads_input: bool = False
    lora: bool = False
    role: str = "other"

    @property
    def values(self) -> int:
        return math.prod(self.shape)

    @property
    def packs(self) -> bool:
        """Whether it may be quantized: matrices and stacks of them, not what a recurrence or routing rests on."""
        return len(self.shape) > 1 and not self.keep_fp32


def linear(
    name: str, shape: tuple[int, int], hf: str, gguf: str | None, *, bias: bool, **fields: Any
) -> Iterator[Param]:
    """A Linear's weight and its bias; hf, gguf: names without ".weight".  fields: of both, as in `Param`.

    gguf None for the bias alone: `bias_gguf=None`.
    """
    bias_gguf = fields.pop("bias_gguf", gguf)
    weight = None if gguf is None else f"{gguf}.weight"
    yield Param(name=f"{name}.weight", shape=shape, hf=f"{hf}.weight", gguf=weight, **fields)
    if bias:
        of_bias = {key: value for key, value in fields.items() if key in ("shard", "parts")}
        gguf = None if bias_gguf is None else f"{bias_gguf}.bias"
        yield Param(
            name=f"{name}.bias", shape=shape[:1], hf=f"{hf}.bias", gguf=gguf, init="zeros", decay=False, **of_bias
        )


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
    """What a layer does besides its matrices, for `plan`.  Keys of `ops` and `reads` are rates of `plan.machines`.

    ops      of reading the new tokens: {"attend": floating-point operations}, {"scan": state values × tokens}
    reads    values read in a step of one row: {"attend_read": keys and values}, {"scan_read": state values};
             keys and values in the model's dtype, states in float32
    width    float32 values of one token that are in memory at once between its products
    between  values of one token that its products write or read, those of `ops` aside
    """

    ops: Mapping[str, float] = field(default_factory=dict)
    reads: Mapping[str, float] = field(default_factory=dict)
    width: int = 0
    between: int = 0


class ModuleSpec(ABC):
    """What mixers and feed-forwards share."""

    kind: ClassVar[str]  # its name in config files: "attention", "mamba2", "gated_mlp"
    layer: ClassVar[str]  # where its module is, "tiercel.mixers.mamba2.layer:Mamba2"; imported when it is built
    word: ClassVar[str | None] = None  # its name in a pattern ("mamba2 attention/moe"); None: it has none
    tables: ClassVar[Mapping[str, type]] = {}  # fields that hold a dataclass of their own in a config file

    @abstractmethod
    def params(self, width: int) -> tuple[Param, ...]:
        """Every parameter, in the order of files; width: of the residual stream.

        With the layer's own tensors ("conv") moved before those of its parts ("in_proj.weight"), this is the order of
        the layer's `named_parameters()`.
        """

    @abstractmethod
    def describe(self) -> str:
        """One line for `tiercel show`: "mamba2 24 × 64, state 128, 1 group(s)"."""

    @abstractmethod
    def shard(self, size: int) -> Self:
        """The spec of one of `size` tensor-parallel ranks.

        Raises:
            RequestError: a size that does not divide what has to be divided, by name.
        """

    def build(self, width: int, eps: float) -> nn.Module:
        """The layer; imports torch."""
        module: nn.Module = resolve_name(self.layer)(self, width, eps)
        return module

    @classmethod
    def from_pattern(cls, width: int, **sizes: Any) -> Self:
        """The spec that a word of a pattern stands for; sizes: the arguments of `families.pattern.pattern`."""
        raise RequestError(f"{cls.kind} has no word in a pattern: give its fields in a config file")

    @property
    def label(self) -> str:
        """Its name in the picture of a network: "mamba2", "moe 2 of 8"."""
        return self.kind

    def _divided(self, what: str, count: int, size: int) -> int:
        if count % size:
            raise RequestError(f"{count} {what} cannot be split over {size} processes")
        return count // size


class MixerSpec(ModuleSpec):
    """A mixer: attention, a state-space model, a linear attention, a convolution."""

    report_class: ClassVar[str | None] = None  # its class in fidelity reports; None: its kind
    chunk: int  # tokens after which a recurrent state is committed at the latest; attention has none
    has_gpu_kernels: ClassVar[bool] = False  # `gpu.py` beside it
    window: int | None = None  # of attention: a token sees itself and window − 1 before it; None: all

    @abstractmethod
    def buffers(self) -> tuple[Buffer, ...]:
        """What is kept of a sequence, in the order in which kernels find it."""

    @abstractmethod
    def cost(self, tokens: int, context: int) -> Cost:
        """Of `tokens` new tokens after `context` earlier ones."""

    @property
    def segment_values(self) -> int:
        """Float32 values of a split attention's partial sums, for one new token and one segment of keys."""
        return 0

    @property
    def grows(self) -> bool:
        """Whether something is kept of every token, such as keys and values."""
        return any(b.lifetime == "page" for b in self.buffers())

    @classmethod
    def in_place_of(cls, mixer: MixerSpec) -> Self:
        """The spec with a mixer's heads and widths that takes its place; its layer has `take_over`.

        Raises:
            RequestError: these weights cannot be made from those.
        """
        raise RequestError(f"{cls.kind} cannot be made from the weights of {mixer.kind}")

    @property
    def recurrent(self) -> bool:
        """Whether a state is committed and can be rolled back to the last commit only."""
        return any(b.lifetime in ("sequence", "pending") for b in self.buffers())


class FeedForwardSpec(ModuleSpec):
    """A feed-forward: gated MLP, experts."""

    width: int  # of its hidden layer, of one expert

    @abstractmethod
    def cost(self, tokens: int) -> Cost:
        """Of `tokens` tokens, its matrices aside."""

    def routing(self) -> tuple[int, int]:
        """(active, experts): how many of how many stacked matrices a token meets."""
        return 1, 1


S = TypeVar("S", bound=ModuleSpec)


class Registry(dict[str, type[S]], Generic[S]):
    """Spec classes by kind; an unknown kind is a FormatError that lists the known ones."""

    def __init__(self, what: str, classes: Iterable[type[S]]) -> None:
        super().__init__()
        self.what = what
        for cls in classes:
            self.register(cls)

    def register(self, cls: type[S]) -> type[S]:
        """Add a class under its `kind`; usable as a decorator.

        Raises:
            RequestError: another class has that kind.
        """
        if self.get(cls.kind, cls) is not cls:
            raise RequestError(f"there is a {self.what} {cls.kind!r} already: {self[cls.kind].__name__}")
        self[cls.kind] = cls
        return cls

    def __missing__(self, kind: object) -> type[S]:
        raise FormatError(f"unknown {self.what} {kind!r:.60}; known: {', '.join(self)}")

    def words(self) -> dict[str, type[S]]:
        """The classes that have a word in patterns, by it."""
        return {cls.word: cls for cls in self.values() if cls.word is not None}
