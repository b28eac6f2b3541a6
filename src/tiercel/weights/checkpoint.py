"""What lies in a path: a folder with config.json and safetensors, or one .gguf file, understood.

    file → its tensors and config → a family's layout → Checkpoint: every tensor of ours, where it lies and in what form

Nothing is read but names and shapes, and those are compared with the config: what is missing or left over is said here.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tiercel.errors import FormatError, ModelNotFound
from tiercel.families import from_gguf, from_hf
from tiercel.families.family import Layout, Runs, TensorMapping
from tiercel.families.rope import LONGROPE
from tiercel.mixers.spec import Transform
from tiercel.model.decoder import Decoder
from tiercel.model.parameters import parameters
from tiercel.plan import parameter_count
from tiercel.quant import PACKED_TYPES, PACKINGS, dequantize
from tiercel.tokenizer.tokenizer import Tokenizer
from tiercel.weights import packed_folder
from tiercel.weights.gguf import GGUFFile
from tiercel.weights.safetensors import open_safetensors
from tiercel.weights.stored import Concatenated, Stored
from tiercel.weights.transforms import WHOLE, check_packed, foreign_shape, scaled, scaled_rows, to_ours

MAX_PARAMETERS = 1 << 45
# Buffers some checkpoints carry along; they follow from the config.
HEAD = "lm_head.weight"
COMPARED_VALUES = 1 << 22
DERIVED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".mup_vector")


class Source(Protocol):
    """Where the tensors of a layout come from, in our names and forms."""

    @property
    def layout(self) -> Layout: ...

    def read(self, row: TensorMapping, start: int, stop: int) -> Tensor:
        """Rows start … stop as ours, at least as wide as stored."""

    def stored(self, row: TensorMapping) -> str:
        """The type it is stored in: "F32", "BF16", "Q4_K" …"""

    def raw(self, row: TensorMapping, start: int, stop: int) -> Tensor:
        """Rows start … stop as ours where `stored` is a packed type: uint8, the last axis in bytes."""

    def tokenizer(self) -> Tokenizer | None: ...


@dataclass
class Checkpoint:
    """An opened Hugging Face folder or GGUF file, its layout understood and every tensor accounted for."""

    path: Path
    layout: Layout
    tensors: Mapping[str, Stored]
    gguf: Mapping[str, Any] | None = None  # its metadata, for a GGUF file
    folded: frozenset[str] = frozenset()  # tensors of a folder that hold our values: no multiplier is applied
    flat: set[str] = field(default_factory=set)  # ours, (1, D), of which a GGUF file has (D): older converters squeeze

    def __post_init__(self) -> None:
        if len(self.layout.config.layers) > len(self.tensors):
            raise FormatError(
                f"{self.path}: {len(self.tensors)} tensors cannot make {len(self.layout.config.layers)} layers"
            )
        self._check()

    # ── which stored tensor is which ──

    def _stored(self, row: TensorMapping) -> list[Stored]:
        """The tensor of a row; for experts one each, or the one that holds them all."""
        if self.gguf is not None:
            names = [row.gguf or ""]
            if _experts(row) and names[0] not in self.tensors:  # files from before April 2024
                each = [names[0].replace("_exps.", f".{e}.") for e in range(len(row.hf))]
                names = each if each[0] in self.tensors else names
        else:
            names = list(row.hf) if isinstance(row.hf, tuple) else [row.hf]
            if row.fused and names[0] not in self.tensors and row.fused[0] in self.tensors:
                return [self.tensors[row.fused[0]]]
            if names[0] not in self.tensors:
                others = [[alias] if isinstance(alias, str) else list(alias) for alias in row.aliases]
                names = next((other for other in others if other[0] in self.tensors), names)
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise FormatError(f"{self.path}: the tensor {missing[0]!r} is missing ({self.layout.family.name})")
        found = [self.tensors[name] for name in names]
        return [Concatenated(tuple(found))] if row.hf_rows and len(found) > 1 else found

    def _one_per_expert(self, row: TensorMapping, stored: list[Stored]) -> bool:
        """Whether the experts of a row are a tensor each."""
        if self.gguf is not None:
            return stored[0].name != row.gguf
        return _experts(row) and not self._is_fused(row, stored)

    def _is_fused(self, row: TensorMapping, stored: list[Stored]) -> bool:
        """Whether the row's experts are a part of a tensor that holds them all."""
        if self.gguf is not None or row.fused is None:
            return False
        return isinstance(row.hf, str) or stored[0].name == row.fused[0]

    def _forms(self, row: TensorMapping) -> tuple[Transform, ...]:
        if self.gguf is not None:
            return (Transform("row"),) if row.ours in self.flat else row.gguf_forms
        return row.hf_forms

    def _check(self) -> None:
        """Every tensor of ours is there in the right shape, and none is left over."""
        shapes = parameter_shapes(self.layout)
        used: set[str] = set()
        for row in self.layout.rows:
            stored = self._stored(row)
            for tensor in stored:
                used.update(tensor.names if isinstance(tensor, Concatenated) else (tensor.name,))
            expected = shapes[row.ours]
            if self.gguf is not None and len(stored[0].shape) == 1 < len(expected) and expected[0] == 1:
                self.flat.add(row.ours)
            for form in self._forms(row):
                expected = foreign_shape(form, expected)
            if row.fused and self._is_fused(row, stored):
                expected = (expected[0], expected[1] * row.fused[2], *expected[2:])
            elif self._one_per_expert(row, stored):
                expected = expected[1:]
            elif isinstance(stored[0], Concatenated) and row.hf_form is None:  # convolutions are cut in other places,
                self._check_rows(row, stored[0])  # too: transformers 5.24 saves equal parts
            for tensor in stored:
                if tensor.shape != expected:
                    raise FormatError(
                        f"{self.path}: {tensor.name} is {_by(tensor.shape)}, the config says {_by(expected)}"
                    )
        self._name_left_out()
        extra = [name for name in self.tensors if name not in used and not self._derived(name)]
        if extra:
            known = self.layout.family.name
            raise FormatError(f"{self.path}: {known} has no tensor {extra[0]!r} ({len(extra)} unknown in all)")

    def _check_rows(self, row: TensorMapping, stored: Concatenated) -> None:
        for tensor, rows in zip(stored.parts, row.hf_rows, strict=True):
            if tensor.shape[0] != rows:
                raise FormatError(f"{self.path}: {tensor.name} has {tensor.shape[0]} rows, the config says {rows}")

    def _left_out(self, name: str) -> bool:
        return name.startswith(self._not_read)

    @cached_property
    def _not_read(self) -> tuple[str, ...]:
        """What names of tensors begin with that are no part of the text model; in a GGUF file prediction heads."""
        if self.gguf is None:
            return self.layout.family.left_out
        depth, heads = len(self.layout.config.layers), self.gguf.get(f"{self.layout.family.gguf}.nextn_predict_layers")
        return tuple(f"blk.{depth + i}." for i in range(heads)) if type(heads) is int and 0 < heads < 100 else ()

    def _name_left_out(self) -> None:
        if found := [name for name in self.tensors if self._left_out(name)]:
            parts = ", ".join(f"{p}*" for p in self._not_read if any(n.startswith(p) for n in found))
            warnings.warn(f"{self.path}: {len(found)} tensors are left out, they are not read: {parts}", stacklevel=6)

    def _derived(self, name: str) -> bool:
        tied = self.layout.config.tied and name in ("lm_head.weight", "output.weight")
        return tied or self._left_out(name) or name in ("rope_freqs.weight", *LONGROPE) or name.endswith(DERIVED)

    # ── Source ──

    def read(self, row: TensorMapping, start: int, stop: int) -> Tensor:
        stored, transforms = self._stored(row), self._forms(row)
        if row.fused and self._is_fused(row, stored):
            _, part, parts = row.fused
            return stored[0].rows(start, stop).chunk(parts, 1)[part]
        if self._one_per_expert(row, stored):
            return torch.stack([tensor.rows() for tensor in stored[start:stop]])
        if any(form.name in WHOLE for form in transforms):
            x = stored[0].rows()
            for form in reversed(transforms):
                x = to_ours(form, x)
            return x[start:stop]
        x = stored[0].rows(start, stop)
        for form in transforms:
            x = to_ours(form, x)
        scale = self._scale(row, stored[0])
        if scale != 1.0 and stored[0].type in PACKED_TYPES:  # the values that `raw` stands for
            return dequantize(stored[0].type, self.raw(row, start, stop))
        return scaled(x, scale, start)

    def _scale(self, row: TensorMapping, stored: Stored) -> float | Runs:
        """The multiplier between the file's values and ours."""
        return 1.0 if self.gguf is not None or stored.name in self.folded else row.scale

    def stored(self, row: TensorMapping) -> str:
        return self._stored(row)[0].type

    @property
    def file_type(self) -> int | None:
        """The recipe a GGUF file says it was packed by."""
        found = None if self.gguf is None else self.gguf.get("general.file_type")
        packed = any(tensor.type in PACKINGS for tensor in self.tensors.values())
        return found if packed and type(found) is int and 0 <= found < 1 << 16 else None

    def raw(self, row: TensorMapping, start: int, stop: int) -> Tensor:
        stored = self._stored(row)
        assert self.stored(row) in PACKED_TYPES, f"{row.ours} is {self.stored(row)}"
        if row.fused and self._is_fused(row, stored):
            _, part, parts = row.fused
            return stored[0].raw(start, stop).chunk(parts, 1)[part].contiguous()
        if self._one_per_expert(row, stored):
            return torch.stack([tensor.raw() for tensor in stored[start:stop]])
        x, forms = stored[0], self._forms(row)
        whole = any(form.name in WHOLE for form in forms)
        raw = x.raw() if whole else x.raw(start, stop)
        for form in reversed(forms):
            check_packed(form, x.type)
            raw = to_ours(form, raw)  # rows change places, or whole blocks of them; what is in them stays
        if whole:
            return raw[start:stop].contiguous()
        return scaled_rows(x.type, raw, self._scale(row, x), start)

    def tokenizer(self) -> Tokenizer | None:
        if self.gguf is not None:
            return Tokenizer.from_gguf(dict(self.gguf))
        return Tokenizer.from_folder(self.path if self.path.is_dir() else self.path.parent)


GENERATION = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def generation_defaults(path: Path) -> dict[str, Any]:
    """The sampling settings a folder's generation_config.json recommends; {} without one."""
    file = path / "generation_config.json"
    found = read_json(file) if path.is_dir() and file.is_file() else {}
    return {k: found[k] for k in GENERATION if found.get(k) is not None} if isinstance(found, dict) else {}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A folder with config.json, or a .gguf file.  FormatError names what is wrong with it."""
    path = Path(path)
    if path.is_dir() and not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if not ggufs:
            raise FormatError(f"{path} holds neither config.json nor a .gguf file")
        if len(ggufs) > 1 and "-00001-of-" not in ggufs[0].name:
            raise FormatError(f"{path} holds {len(ggufs)} .gguf files: name the one you mean, such as {ggufs[0]}")
        path = ggufs[0]
    if path.is_dir():
        return _folder(path, path / "config.json")
    if not path.exists():
        raise ModelNotFound(f"there is no {path}")
    if path.suffix == ".safetensors":
        return _folder(path, path.parent / "config.json")
    file = GGUFFile(path)
    return Checkpoint(path, from_gguf(file.metadata, file.tensors), file.tensors, file.metadata)


def _folder(path: Path, config: Path) -> Checkpoint:
    folder = open_safetensors(path)
    rest, packed = packed_folder.understood(read_json(config), folder)
    layout = from_hf(rest)
    if layout.config.tied and _has_another_head(layout, packed.tensors):
        warnings.warn(f"{config} ties the output to the embedding, but {HEAD} differs: both are kept", stacklevel=4)
        layout = from_hf(rest | {"tie_word_embeddings": False})
    return Checkpoint(path, layout, packed.tensors, folded=packed.folded)


def _has_another_head(layout: Layout, tensors: Mapping[str, Stored]) -> bool:
    """Whether a tied model's file holds an output projection of other values than its embedding."""
    head = tensors.get(HEAD)
    if head is None:
        return False
    row = next(row for row in layout.rows if row.ours == "embed.weight")
    embed = next((tensors[name] for name in row.names if name in tensors), None)
    if embed is None or head.shape != embed.shape:
        return embed is not None
    step = max(1, COMPARED_VALUES // math.prod(head.shape[1:]))
    spans = ((start, min(start + step, head.shape[0])) for start in range(0, head.shape[0], step))
    return not all(torch.equal(head.rows(*span).double(), embed.rows(*span).double()) for span in spans)


def read_json(path: Path) -> Any:
    """A config file of at most 16 MiB."""
    try:
        if path.stat().st_size > 16 << 20:
            raise FormatError(f"{path} is too large for a config file")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not JSON: {error}") from error


def _experts(row: TensorMapping) -> bool:
    """Whether it is a stack, and may be a tensor for each expert."""
    return isinstance(row.hf, tuple) and not row.hf_rows


def outline(layout: Layout) -> Decoder:
    """The network without memory: shapes only.  FormatError for sizes no memory could hold."""
    parameter_shapes(layout)
    with torch.device("meta"):
        return Decoder(layout.config)


def parameter_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """The shapes of all our tensors.  FormatError for sizes no memory could hold."""
    if (count := parameter_count(layout.config)) > MAX_PARAMETERS:
        raise FormatError(f"the config describes {count:.1e} parameters: no such model exists")
    shapes = {name: param.shape for name, param in parameters(layout.config).items()}
    differ = {row.ours for row in layout.rows} ^ set(shapes)
    assert not differ, f"{layout.family.name}: table and network differ in {sorted(differ)[:3]}"
    return shapes


def _by(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "a scalar"
