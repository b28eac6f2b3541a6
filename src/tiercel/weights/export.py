"""A network or a checkpoint becomes a file: a Hugging Face folder, or one .gguf file that llama.cpp reads.

Tensors are made in row blocks while they are written, so no more than a few rows are in memory twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiercel.errors import RequestError, UnsupportedError
from tiercel.families.family import Layout, TensorMapping, refuse
from tiercel.families.rope import LONGROPE
from tiercel.mixers.attention.rotary import frequencies
from tiercel.mixers.spec import Transform
from tiercel.model.decoder import Decoder
from tiercel.model.layers import named_weights
from tiercel.ops.qtensor import QTensor
from tiercel.quant import PACKED_TYPES, PACKINGS, recipes
from tiercel.quant.recipes import file_type
from tiercel.runtime.atomic import atomic_write
from tiercel.tokenizer.tokenizer import Tokenizer
from tiercel.tokenizer.vocab_gguf import GGUF_TYPES
from tiercel.weights import packed_folder
from tiercel.weights.checkpoint import Checkpoint, Source, open_checkpoint, parameter_shapes
from tiercel.weights.gguf import Typed, write_gguf
from tiercel.weights.load import STORED, as_dtype
from tiercel.weights.safetensors import write_safetensors
from tiercel.weights.stored import OutTensor
from tiercel.weights.transforms import WHOLE, check_packed, foreign_shape, scaled, scaled_rows, to_foreign


@dataclass
class NetworkSource:
    """A network in memory as a source: what was trained or changed here can be exported like any checkpoint."""

    network: Decoder
    layout: Layout
    own_tokenizer: Tokenizer | None = None

    def __post_init__(self) -> None:
        self._state = dict(named_weights(self.network))

    def read(self, row: TensorMapping, start: int, stop: int) -> Tensor:
        weight = self._state[row.ours]
        if isinstance(weight, QTensor):
            return weight.numbers(start, stop)
        if isinstance(weight, list):
            return torch.stack([expert.numbers() for expert in weight[start:stop]])
        return weight.detach()[start:stop]

    def raw(self, row: TensorMapping, start: int, stop: int) -> Tensor:
        weight = self._state[row.ours]
        if isinstance(weight, QTensor):
            return weight.raw(start, stop)
        assert isinstance(weight, list), f"{row.ours} is not packed"
        return torch.stack([expert.raw() for expert in weight[start:stop]])

    def stored(self, row: TensorMapping) -> str:
        weight = self._state[row.ours]
        if isinstance(weight, list):
            weight = weight[0]
        return weight.type if isinstance(weight, QTensor) else STORED[weight.dtype]

    def tokenizer(self) -> Tokenizer | None:
        return self.own_tokenizer


def export(
    source: Source | str | Path,
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    name: str | None = None,
    private: bool = False,
) -> Path:
    """Write a checkpoint in the other form, or the same: a .gguf file that llama.cpp reads, or a Hugging Face folder.

    dtype None keeps the stored precision, packed types too where readers of the target know them: block types in
    GGUF, NF4 in a folder; others become bfloat16.  private: every packed type may stay in a folder, which only
    Tiercel reads then (`packed_folder`).  Norms, convolutions and decays are float32 in GGUF.  Nothing is written
    when the target cannot say what the model needs (UnsupportedError).
    """
    if isinstance(source, (str, Path)):
        source = open_checkpoint(source)
    out = Path(out)
    origin = _origin(source)
    if isinstance(origin, Checkpoint) and out.resolve() in (origin.path.resolve(), origin.path.resolve().parent):
        raise RequestError(f"{out} is what is being read: choose another place to export to")
    wanted = None if dtype is None else STORED[as_dtype(dtype)]
    if out.suffix == ".gguf":
        _export_gguf(source, out, wanted, name)
    else:
        _export_hf(source, out, wanted, private)
    return out


def _origin(source: Source) -> Source:
    """What a source that changes another's weights was made from."""
    return getattr(source, "base", source)


def _type(source: Source, row: TensorMapping, wanted: str | None, packed: Iterable[str]) -> str:
    """The type a tensor is written in; packed: those the target may hold."""
    stored = source.stored(row)
    if wanted or stored in STORED.values() or stored in packed:
        return wanted or stored
    return "F32" if stored == "F64" or row.keep_fp32 else "BF16"


def _reader(
    source: Source, row: TensorMapping, shape: Sequence[int], transforms: Sequence[Transform], kind: str, scale: bool
) -> Callable[[int, int], Tensor]:
    """Rows of the foreign tensor, made from rows of ours; packed ones stay packed."""
    packed = kind in PACKED_TYPES
    read = source.raw if packed else source.read

    def changed(start: int, stop: int) -> Tensor:
        x = read(row, start, stop)
        if scale and packed:
            x = scaled_rows(kind, x, row.scale, start, inverse=True)
        elif scale:
            x = scaled(x, row.scale, start, inverse=True)
        for form in transforms:
            if packed:
                check_packed(form, kind)
            x = to_foreign(form, x)
        return x

    whole = any(form.name in WHOLE for form in (*transforms, *row.gguf_forms))
    return _once(lambda: changed(0, shape[0]), shape[0]) if whole else changed


def _once(make: Callable[[], Tensor], last: int) -> Callable[[int, int], Tensor]:
    """Rows of a tensor that can only be made whole: made when first asked for, let go with its last row."""
    kept: list[Tensor] = []

    def rows(start: int, stop: int) -> Tensor:
        if not kept:
            kept.append(make())
        x = kept[0][start:stop]
        if stop == last:
            kept.clear()
        return x

    return rows


def _export_hf(source: Source, folder: Path, wanted: str | None, private: bool) -> None:
    layout = source.layout
    config = dict(layout.hf_config) if layout.hf_config is not None else None
    if config is None:
        if layout.family.write is None:
            raise UnsupportedError(f"{layout.family.name} cannot be written as a Hugging Face folder")
        config = layout.family.write(layout.config)
    shapes = parameter_shapes(layout)
    tensors: list[OutTensor] = []
    packed: dict[str, str] = {}
    dtype, unfold = _config_dtype(source, wanted), layout.hf_config is not None
    for row in layout.rows:
        kind = _type(source, row, wanted, PACKED_TYPES if private else ("NF4",))
        folded = kind in PACKED_TYPES and private
        for name, shape, rows in _foreign(source, row, shapes[row.ours], kind, unfold=unfold and not folded):
            if kind in PACKED_TYPES:
                packed[name] = kind
                tensors += packed_folder.tensors(name, shape, kind, rows, dtype, private)
            else:
                tensors.append(OutTensor(name, shape, kind, rows))
    tensors = _added_up(tensors)
    for key in ("torch_dtype", "dtype"):
        if key in config and wanted is not None:
            config[key] = dtype
    metadata = {"format": "pt"}
    if packed:
        matrices = [tensor.name for tensor in tensors if len(tensor.shape) == 2 and tensor.name not in packed]
        config["quantization_config"] = packed_folder.config(matrices, dtype, private)
        metadata |= packed_folder.metadata(packed) if private else {}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder, tensors, metadata=metadata)
    _write_text(_origin(source), folder)
    with atomic_write(folder / "config.json") as file:
        file.write((json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())


def _added_up(tensors: Iterable[OutTensor]) -> list[OutTensor]:
    """Tensors of one name are parts of one, each zero where the others are not."""
    out: dict[str, OutTensor] = {}
    for tensor in tensors:
        if (first := out.get(tensor.name)) is not None:
            tensor = replace(first, rows=partial(_sum, first.rows, tensor.rows))
        out[tensor.name] = tensor
    return list(out.values())


def _sum(first: Callable[[int, int], Tensor], second: Callable[[int, int], Tensor], start: int, stop: int) -> Tensor:
    return first(start, stop) + second(start, stop)


def _config_dtype(source: Source, wanted: str | None) -> str:
    """What a config calls the dtype of the unpacked tensors."""
    types = [source.stored(row) for row in source.layout.rows]
    plain = wanted or next((type for type in types if type in ("BF16", "F16")), "F32" if "F32" in types else "BF16")
    return {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[plain]


def _foreign(
    source: Source, row: TensorMapping, shape: tuple[int, ...], kind: str, *, unfold: bool
) -> Iterator[tuple[str, tuple[int, ...], Callable[[int, int], Tensor]]]:
    """The Hugging Face tensors of a row: name, shape, rows."""
    if isinstance(row.hf, tuple) and not row.hf_rows:
        read = source.raw if kind in PACKED_TYPES else source.read
        for e, name in enumerate(row.hf):
            yield name, shape[1:], _once(partial(_expert, read, row, e), shape[1])
        return
    if row.fused is not None and isinstance(row.hf, str):
        _, part, parts = row.fused
        read = source.raw if kind in PACKED_TYPES else source.read
        yield row.hf, (shape[0], parts * shape[1], shape[2]), partial(_part, read, row, part, parts)
        return
    foreign = shape
    for form in row.hf_forms:
        foreign = foreign_shape(form, foreign)
    rows, names = _reader(source, row, shape, row.hf_forms, kind, unfold), row.hf
    if isinstance(names, str):
        yield names, foreign, rows
        return
    first = 0
    for name, count in zip(names, row.hf_rows, strict=True):
        yield name, (count, *foreign[1:]), partial(_from, rows, first)
        first += count


def _from(rows: Callable[[int, int], Tensor], first: int, start: int, stop: int) -> Tensor:
    return rows(first + start, first + stop)


def _expert(read: Callable[[TensorMapping, int, int], Tensor], row: TensorMapping, e: int) -> Tensor:
    return read(row, e, e + 1)[0]


def _part(
    read: Callable[[TensorMapping, int, int], Tensor], row: TensorMapping, part: int, parts: int, start: int, stop: int
) -> Tensor:
    """Experts start … stop, zero in the rows of the other parts: mappings of one tensor are added up."""
    x = read(row, start, stop)
    whole = x.new_zeros(len(x), parts, *x.shape[1:])
    whole[:, part] = x
    return whole.flatten(1, 2)


def _write_text(source: Source, folder: Path) -> None:
    """The tokenizer: its own files where there are some, else made from what the GGUF file says."""
    if isinstance(source, Checkpoint) and source.gguf is None:
        origin = source.path if source.path.is_dir() else source.path.parent
        names = (
            "tokenizer*",
            "special_tokens_map.json",
            "chat_template*",
            "generation_config.json",
            "vocab.json",
            "merges.txt",
        )
        for found in sorted(path for name in names for path in origin.glob(name) if path.is_file()):
            if found.resolve() != (folder / found.name).resolve():
                with atomic_write(folder / found.name) as out:
                    out.write(found.read_bytes())
    elif (tokenizer := source.tokenizer()) is not None:
        tokenizer.save(folder)


def _export_gguf(source: Source, path: Path, wanted: str | None, name: str | None) -> None:
    layout, family = source.layout, source.layout.family
    if family.gguf is None or family.write_gguf is None:
        raise UnsupportedError(f"{family.name} has no GGUF form that llama.cpp reads; export to a folder instead")
    refuse(family.limits(layout.config), f"{family.name} cannot be written as GGUF")
    shapes, tensors = parameter_shapes(layout), []
    for row in layout.rows:
        assert row.gguf is not None, row.ours
        shape = foreign = shapes[row.ours]
        for form in row.gguf_forms:
            foreign = foreign_shape(form, foreign)
        kind = "F32" if row.keep_fp32 or len(shape) < 2 else _type(source, row, wanted, PACKINGS)
        tensors.append(OutTensor(row.gguf, foreign, kind, _reader(source, row, shape, row.gguf_forms, kind, False)))
    tensors = _added_up(tensors)
    tensors += _extra_gguf(source, tensors)
    arch = family.gguf_of(layout.config) if family.gguf_of else family.gguf
    metadata: dict[str, Any] = {
        "general.architecture": arch,
        "general.name": name or path.stem,
        "general.file_type": _file_type(source, wanted, tensors),
        "general.quantization_version": 2,
    }
    metadata |= {f"{arch}.{key}": value for key, value in family.write_gguf(layout.config).items()}
    metadata[f"{arch}.vocab_size"] = layout.config.vocab_size
    tokenizer = source.tokenizer()
    fields = {"tokenizer.ggml.model": "no_vocab"} if tokenizer is None else tokenizer.to_gguf(layout.config.vocab_size)
    metadata |= {key: Typed(GGUF_TYPES[key], value) if key in GGUF_TYPES else value for key, value in fields.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(path, metadata, tensors)


def _file_type(source: Source, wanted: str | None, tensors: Iterable[OutTensor]) -> int:
    """What the source is called, where its types stay; else the name of most of them."""
    named = getattr(source, "file_type", None) if wanted is None else None
    return named if named is not None else file_type(tensor.type for tensor in tensors if len(tensor.shape) > 1)


def _extra_gguf(source: Source, tensors: Iterable[OutTensor]) -> Iterator[OutTensor]:
    """What GGUF keeps as tensors and we as settings: the logit scale of a tied model, llama3's rotary divisors."""
    config = source.layout.config
    if config.tied and config.logit_scale != 1.0 and not source.layout.family.gguf_scales:
        embed = next(t for t in tensors if t.name == "token_embd.weight")
        row = next(row for row in source.layout.rows if row.ours == "embed.weight")
        kind = recipes.output(embed.type, embed.shape[-1]) if embed.type in PACKINGS else embed.type
        assert kind is not None
        yield replace(embed, name="output.weight", type=kind, rows=partial(_scaled_embedding, source, row))
    attention: Any = next((m for layer in config.layers for m in layer.mixers if getattr(m, "rope", None)), None)
    rope = getattr(attention, "rope", None)
    if rope is not None and rope.scaling == "longrope":
        for name, factors in zip(LONGROPE, (rope.factors, rope.long_factors or rope.factors), strict=True):
            divisors = torch.tensor(factors)
            yield OutTensor(name, tuple(divisors.shape), "F32", partial(_rows_of, divisors))
    elif rope is not None and (rope.factors is not None or rope.scaling == "llama3"):
        head_dim = attention.head_dim
        plain, _ = frequencies(replace(rope, scaling="none", factors=None), head_dim)
        divisors = plain / frequencies(rope, head_dim)[0]
        yield OutTensor("rope_freqs.weight", tuple(divisors.shape), "F32", lambda a, b: divisors[a:b])


def _rows_of(x: Tensor, start: int, stop: int) -> Tensor:
    return x[start:stop]


def _scaled_embedding(source: Source, row: TensorMapping, start: int, stop: int) -> Tensor:
    return scaled(source.read(row, start, stop), source.layout.config.logit_scale, 0)
