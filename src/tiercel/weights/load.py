"""A path becomes a network: where config, family, file and memory meet.  And back: a network becomes a file.

    folder with config.json and safetensors  ┐                         ┌ a Hugging Face folder
    one .gguf file                           ├→ Checkpoint → Decoder → ┤
    a pattern (.json, .toml): fresh weights  ┘                         └ a GGUF file

Tensors travel in row blocks, straight into the memory they stay in, so loading takes little more than the model.
Shapes are compared with the files before that memory is taken.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tiercel.errors import FormatError, ModelNotFound, RequestError, UnsupportedError
from tiercel.families import from_gguf, from_hf
from tiercel.families.family import Form, Layout, Row, Runs, refuse
from tiercel.families.pattern import PATTERN, read_file
from tiercel.families.pattern import rows as pattern_rows
from tiercel.model.config import ModelConfig
from tiercel.model.decoder import Decoder
from tiercel.model.layers import fast_bf16, hold, initialize, named_weights
from tiercel.ops import cpu
from tiercel.ops.linear import NUMBERS, QTensor
from tiercel.ops.rotary import frequencies
from tiercel.plan import check_fits, parameter_count
from tiercel.quant import PACKED_TYPES, PACKINGS, dequantize, held_bytes, recipes, row_bytes
from tiercel.quant.recipes import file_type
from tiercel.text import Text
from tiercel.text.vocab_gguf import GGUF_TYPES
from tiercel.weights import packed_folder
from tiercel.weights.atomic import atomic_write
from tiercel.weights.forms import foreign_shape, scaled, scaled_rows, to_foreign, to_ours
from tiercel.weights.gguf import GGUFFile, Typed, write_gguf
from tiercel.weights.safetensors import open_safetensors, write_safetensors
from tiercel.weights.stored import PLAIN, OutTensor, Stored, torch_dtype

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)

BLOCK_BYTES = 8 << 20  # rows on their way from a file
MOST_PARAMETERS = 1 << 45
DTYPES = {
    "float32": torch.float32, "f32": torch.float32, "float": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "f16": torch.float16, "half": torch.float16,
}  # fmt: skip
STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
WHOLE = ("interleave", "groups", "column", "neg_exp")  # forms that cannot be cut into row blocks
# Buffers some checkpoints carry along; they follow from the config.
DERIVED = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias", ".mup_vector")


class Source(Protocol):
    """Where the tensors of a layout come from, in our names and forms."""

    @property
    def layout(self) -> Layout: ...

    def read(self, row: Row, start: int, stop: int) -> Tensor:
        """Rows start … stop as ours, at least as wide as stored."""

    def stored(self, row: Row) -> str:
        """The type it is stored in: "F32", "BF16", "Q4_K" …"""

    def raw(self, row: Row, start: int, stop: int) -> Tensor:
        """Rows start … stop as ours where `stored` is a packed type: uint8, the last axis in bytes."""

    def text(self) -> Text | None: ...


@dataclass
class Checkpoint:
    """An opened Hugging Face folder or GGUF file, its layout understood and every tensor accounted for."""

    path: Path
    layout: Layout
    tensors: Mapping[str, Stored]
    gguf: Mapping[str, Any] | None = None  # its metadata, for a GGUF file
    folded: frozenset[str] = frozenset()  # tensors of a folder that hold our values: no multiplier is applied

    def __post_init__(self) -> None:
        if len(self.layout.config.layers) > len(self.tensors):
            raise FormatError(
                f"{self.path}: {len(self.tensors)} tensors cannot make {len(self.layout.config.layers)} layers"
            )
        self._check()

    # ── which stored tensor is which ──

    def _stored(self, row: Row) -> list[Stored]:
        """The tensor of a row; for experts one each, or the one that holds them all."""
        if self.gguf is not None:
            names = [row.gguf or ""]
        else:
            names = list(row.hf) if isinstance(row.hf, tuple) else [row.hf]
            if row.fused and names[0] not in self.tensors and row.fused[0] in self.tensors:
                return [self.tensors[row.fused[0]]]
            if names[0] not in self.tensors:
                names = next(([alias] for alias in row.aliases if alias in self.tensors), names)
        missing = [name for name in names if name not in self.tensors]
        if missing:
            raise FormatError(f"{self.path}: the tensor {missing[0]!r} is missing ({self.layout.family.name})")
        return [self.tensors[name] for name in names]

    def _forms(self, row: Row) -> tuple[Form, ...]:
        if self.gguf is not None:
            return row.gguf_forms
        return (row.hf_form,) if row.hf_form else ()

    def _check(self) -> None:
        """Every tensor of ours is there in the right shape, and none is left over."""
        shapes = parameter_shapes(self.layout)
        used: set[str] = set()
        for row in self.layout.rows:
            stored = self._stored(row)
            used.update(tensor.name for tensor in stored)
            expected = shapes[row.ours]
            for form in self._forms(row):
                expected = foreign_shape(form, expected)
            if self.gguf is None and row.fused and stored[0].name == row.fused[0]:
                expected = (expected[0], expected[1] * row.fused[2], *expected[2:])
            elif isinstance(row.hf, tuple) and self.gguf is None:
                expected = expected[1:]
            for tensor in stored:
                if tensor.shape != expected:
                    raise FormatError(
                        f"{self.path}: {tensor.name} is {_by(tensor.shape)}, the config says {_by(expected)}"
                    )
        extra = [name for name in self.tensors if name not in used and not self._derived(name)]
        if extra:
            known = self.layout.family.name
            raise FormatError(f"{self.path}: {known} has no tensor {extra[0]!r} ({len(extra)} unknown in all)")

    def _derived(self, name: str) -> bool:
        tied = self.layout.config.tied and name in ("lm_head.weight", "output.weight")
        return tied or name == "rope_freqs.weight" or name.endswith(DERIVED)

    # ── Source ──

    def read(self, row: Row, start: int, stop: int) -> Tensor:
        stored, forms = self._stored(row), self._forms(row)
        if self.gguf is None and row.fused and stored[0].name == row.fused[0]:
            _, part, parts = row.fused
            return stored[0].rows(start, stop).chunk(parts, 1)[part]
        if self.gguf is None and isinstance(row.hf, tuple):
            return torch.stack([tensor.rows() for tensor in stored[start:stop]])
        if any(form.name in WHOLE for form in forms):
            x = stored[0].rows()
            for form in reversed(forms):
                x = to_ours(form, x)
            return x[start:stop]
        x = stored[0].rows(start, stop)
        for form in forms:
            x = to_ours(form, x)
        scale = self._scale(row, stored[0])
        if scale != 1.0 and stored[0].type in PACKED_TYPES:  # the values that `raw` stands for
            return dequantize(stored[0].type, self.raw(row, start, stop))
        return scaled(x, scale, start)

    def _scale(self, row: Row, stored: Stored) -> float | Runs:
        """The multiplier between the file's values and ours."""
        return 1.0 if self.gguf is not None or stored.name in self.folded else row.scale

    def stored(self, row: Row) -> str:
        return self._stored(row)[0].type

    @property
    def file_type(self) -> int | None:
        """The recipe a GGUF file says it was packed by."""
        found = None if self.gguf is None else self.gguf.get("general.file_type")
        packed = any(tensor.type in PACKINGS for tensor in self.tensors.values())
        return found if packed and type(found) is int and 0 <= found < 1 << 16 else None

    def raw(self, row: Row, start: int, stop: int) -> Tensor:
        stored = self._stored(row)
        assert self.stored(row) in PACKED_TYPES, f"{row.ours} is {self.stored(row)}"
        if self.gguf is None and row.fused and stored[0].name == row.fused[0]:
            _, part, parts = row.fused
            return stored[0].raw(start, stop).chunk(parts, 1)[part].contiguous()
        if self.gguf is None and isinstance(row.hf, tuple):
            return torch.stack([tensor.raw() for tensor in stored[start:stop]])
        if any(form.name in WHOLE for form in self._forms(row)):
            x = stored[0].raw()
            for form in reversed(self._forms(row)):
                x = to_ours(form, x)  # rows change places; what is in them stays
            return x[start:stop].contiguous()
        return scaled_rows(stored[0].type, stored[0].raw(start, stop), self._scale(row, stored[0]), start)

    def text(self) -> Text | None:
        if self.gguf is not None:
            return Text.from_gguf(dict(self.gguf))
        return Text.from_folder(self.path if self.path.is_dir() else self.path.parent)


@dataclass
class NetworkSource:
    """A network in memory as a source: what was trained or changed here can be exported like any checkpoint."""

    network: Decoder
    layout: Layout
    words: Text | None = None

    def __post_init__(self) -> None:
        self._state = dict(named_weights(self.network))

    def read(self, row: Row, start: int, stop: int) -> Tensor:
        weight = self._state[row.ours]
        if isinstance(weight, QTensor):
            return weight.numbers(start, stop)
        if isinstance(weight, list):
            return torch.stack([expert.numbers() for expert in weight[start:stop]])
        return weight.detach()[start:stop]

    def raw(self, row: Row, start: int, stop: int) -> Tensor:
        weight = self._state[row.ours]
        if isinstance(weight, QTensor):
            return weight.raw(start, stop)
        assert isinstance(weight, list), f"{row.ours} is not packed"
        return torch.stack([expert.raw() for expert in weight[start:stop]])

    def stored(self, row: Row) -> str:
        weight = self._state[row.ours]
        if isinstance(weight, list):
            weight = weight[0]
        return weight.type if isinstance(weight, QTensor) else STORED[weight.dtype]

    def text(self) -> Text | None:
        return self.words


def outline(layout: Layout) -> Decoder:
    """The network without memory: shapes only.  FormatError for sizes no memory could hold."""
    if (count := parameter_count(layout.config)) > MOST_PARAMETERS:
        raise FormatError(f"the config describes {count:.1e} parameters: no such model exists")
    with torch.device("meta"):
        network = Decoder(layout.config)
    differ = {row.ours for row in layout.rows} ^ {name for name, _ in network.named_parameters()}
    assert not differ, f"{layout.family.name}: table and network differ in {sorted(differ)[:3]}"
    return network


def parameter_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """The shapes of all our tensors."""
    return {name: tuple(p.shape) for name, p in outline(layout).named_parameters()}


def _by(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "a scalar"


# ── in ───────────────────────────────────────────────────────────────────────────────────────────────────


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
    return Checkpoint(path, from_hf(rest), packed.tensors, folded=packed.folded)


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


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    exact: bool = False,
    progress: Progress | None = None,
) -> tuple[Decoder, Text | None, Layout]:
    """The network (in eval mode), its text side if it has one, and the layout it came in.

    dtype: "auto" (as stored, packed types packed; float16 becomes what this CPU multiplies well), or a float type.
    quantize: a recipe such as "q4_k_m", "int8", "nf4": packed on the way in, a few rows at a time.
    exact: products with packed matrices take their inputs as they are and not rounded to eight bits; slower.
    Raises FormatError, UnsupportedError, ModelNotFound, DoesNotFit.
    """
    path = Path(path)
    if path.suffix in (".json", ".toml") and path.is_file():
        if quantize is not None:
            raise RequestError("a pattern file has fresh weights, to be trained: there is nothing to quantize")
        return _fresh(read_file(path), dtype)
    checkpoint = open_checkpoint(path)
    source: Source = checkpoint
    if quantize is not None:
        from tiercel.weights.quantize import quantized

        if dtype != "auto":
            raise RequestError(f"choose one: dtype={dtype!r} or quantize={quantize!r}")
        source = quantized(checkpoint, quantize)
    return of_source(source, dtype, progress, exact=exact), checkpoint.text(), checkpoint.layout


def of_source(
    source: Source, dtype: str | torch.dtype = "auto", progress: Progress | None = None, *, exact: bool = False
) -> Decoder:
    """The network of any source, filled and ready to run."""
    network = build(source.layout, pick_dtype(dtype, source), source, packed=dtype == "auto")
    fill(network, source, progress)
    for _, weight in named_weights(network):
        for matrix in weight if isinstance(weight, list) else [weight]:
            if isinstance(matrix, QTensor):
                matrix.exact = exact
    return network.eval()


def _fresh(config: ModelConfig, dtype: str | torch.dtype, seed: int = 0) -> tuple[Decoder, Text | None, Layout]:
    layout = Layout(PATTERN, config, pattern_rows(config))
    check_fits(4 * parameter_count(config), "a network of float32 weights")
    network = Decoder(config).to(torch.float32 if dtype == "auto" else as_dtype(dtype)).requires_grad_(False)
    initialize(network, seed)
    network.pack()
    return network.eval(), None, layout


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in STORED:
        raise RequestError(f"dtype {dtype!r} is not known; choose auto, float32, bfloat16 or float16")
    return found


def pick_dtype(dtype: str | torch.dtype, source: Source) -> torch.dtype:
    """What matrices that are not packed will be held in; "auto" goes by the largest matrix of all."""
    if dtype != "auto":
        return as_dtype(dtype)
    shapes = parameter_shapes(source.layout)
    stored = source.stored(max(source.layout.rows, key=lambda row: math.prod(shapes[row.ours])))
    if stored in ("F32", "F64") or stored in PACKED_TYPES:
        return torch.float32
    return torch.bfloat16 if stored == "BF16" or fast_bf16() else torch.float32


def build(layout: Layout, dtype: torch.dtype, source: Source | None = None, *, packed: bool = True) -> Decoder:
    """A network of that layout with its memory allocated and not yet filled.

    Matrices of a source are laid out for running where there are kernels, without one they are plain, to be trained.
    packed: matrices that the source has in a packed type keep it.
    """
    network = outline(layout)
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    matrices = {row.ours for row in layout.rows if source and _is_matrix(row) and len(shapes[row.ours]) > 1}
    kinds = {row.ours: _kind(row, shapes[row.ours], dtype, source, packed) for row in layout.rows}
    sizes = [_bytes(kinds[name], shape, name in matrices) for name, shape in shapes.items()]
    needed = sum(held for held, _ in sizes) + max(filled - held for held, filled in sizes)
    check_fits(needed, f"a network of {str(dtype).removeprefix('torch.')} weights")
    for name, shape in shapes.items():
        owner, _, leaf = name.rpartition(".")
        hold(network.get_submodule(owner), leaf, _empty(kinds[name], shape, name in matrices))
    network._tie()
    return network


def _kind(row: Row, shape: tuple[int, ...], dtype: torch.dtype, source: Source | None, packed: bool) -> str:
    """The type a tensor is held in.  Norms, convolutions and decays are never held narrower than they are stored."""
    stored = "F32" if source is None else source.stored(row)
    if row.precise or len(shape) < 2:
        exact = dtype == torch.float32 or cpu.there  # the kernels read these in float32
        return "F32" if exact or stored not in STORED.values() else stored
    return stored if packed and stored in PACKED_TYPES else STORED[dtype]


def _bytes(kind: str, shape: tuple[int, ...], matrix: bool) -> tuple[int, int]:
    """What a tensor takes in the end, and while it is filled."""
    if kind in PACKED_TYPES:
        packed = math.prod(shape[:-1]) * row_bytes(kind, shape[-1])
        return packed, packed
    plain = math.prod(shape) * PLAIN[kind][1]
    if not (matrix and cpu.there and kind == "BF16"):
        return plain, plain
    *experts, N, K = shape
    count, held = math.prod(experts), held_bytes(kind, N, K)
    return count * held, count * held + plain // count


def _is_matrix(row: Row) -> bool:
    """Whether it is multiplied with.  Routers are, precise as they are, by our kernels: however rows are cut."""
    return not row.precise or row.ours.endswith(".router.weight")


def _empty(kind: str, shape: tuple[int, ...], matrix: bool) -> nn.Parameter | QTensor | list[QTensor]:
    """Memory for one tensor: a QTensor for what is packed or read by kernels, a list of them for experts."""
    if matrix and (kind in PACKED_TYPES or (cpu.there and kind in NUMBERS)):
        *experts, N, K = shape
        return [QTensor(kind, (N, K)) for _ in range(experts[0])] if experts else QTensor(kind, (N, K))
    return nn.Parameter(torch.empty(shape, dtype=torch_dtype(kind)), requires_grad=False)


@torch.no_grad()
def fill(network: Decoder, source: Source, progress: Progress | None = None) -> None:
    """Copy every tensor into place, a few rows at a time."""
    weights = dict(named_weights(network))
    total, done = sum(_held(weight) for weight in weights.values()), 0
    for row in source.layout.rows:
        target = weights[row.ours]
        held = _held(target)
        for start, stop in row_blocks(target, row):
            put(target, source, row, start, stop)
            if progress is not None:
                done += held * (stop - start) // _rows(target)
                progress(done, total)
        for matrix in target if isinstance(target, list) else [target]:
            if isinstance(matrix, QTensor):
                matrix.complete()


def put(target: nn.Parameter | QTensor | list[QTensor], source: Source, row: Row, start: int, stop: int) -> None:
    """Rows start … stop of one tensor from the source into the network."""
    if isinstance(target, nn.Parameter):
        target[start:stop] = source.read(row, start, stop)
        return
    first = target[0] if isinstance(target, list) else target
    new = source.raw(row, start, stop) if first.packed else source.read(row, start, stop)
    if isinstance(target, QTensor):
        target.put(start, new)
    else:
        for expert, matrix in zip(target[start:stop], new, strict=True):
            expert.put(0, matrix)


def _held(weight: nn.Parameter | QTensor | list[QTensor]) -> int:
    return sum(map(_held, weight)) if isinstance(weight, list) else weight.nbytes


def _rows(weight: nn.Parameter | QTensor | list[QTensor]) -> int:
    return len(weight) if isinstance(weight, list) else weight.shape[0]


def row_blocks(target: nn.Parameter | QTensor | list[QTensor], row: Row) -> Iterator[tuple[int, int]]:
    """Row ranges of about BLOCK_BYTES, a multiple of sixteen rows; what has a form that cannot be cut is one range."""
    count = _rows(target)
    step = max(1, BLOCK_BYTES * count // max(_held(target), 1))
    if isinstance(target, QTensor):
        step = max(16, step // 16 * 16)
    if any(form.name in WHOLE for form in row.gguf_forms):
        step = count
    for start in range(0, count, step):
        yield start, min(start + step, count)


# ── out ──────────────────────────────────────────────────────────────────────────────────────────────────


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


def _type(source: Source, row: Row, wanted: str | None, packed: Iterable[str]) -> str:
    """The type a tensor is written in; packed: those the target may hold."""
    stored = source.stored(row)
    if wanted or stored in STORED.values() or stored in packed:
        return wanted or stored
    return "F32" if stored == "F64" or row.precise else "BF16"


def _reader(
    source: Source, row: Row, shape: Sequence[int], forms: Sequence[Form], kind: str, scale: bool
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
        for form in forms:
            x = to_foreign(form, x)
        return x

    whole = any(form.name in WHOLE for form in (*forms, *row.gguf_forms))
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


def _config_dtype(source: Source, wanted: str | None) -> str:
    """What a config calls the dtype of the unpacked tensors."""
    types = [source.stored(row) for row in source.layout.rows]
    plain = wanted or next((type for type in types if type in ("BF16", "F16")), "F32" if "F32" in types else "BF16")
    return {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[plain]


def _foreign(
    source: Source, row: Row, shape: tuple[int, ...], kind: str, *, unfold: bool
) -> Iterator[tuple[str, tuple[int, ...], Callable[[int, int], Tensor]]]:
    """The Hugging Face tensors of a row: name, shape, rows."""
    if isinstance(row.hf, tuple):
        read = source.raw if kind in PACKED_TYPES else source.read
        for e, name in enumerate(row.hf):
            yield name, shape[1:], _once(partial(_expert, read, row, e), shape[1])
        return
    forms = (row.hf_form,) if row.hf_form else ()
    foreign = shape
    for form in forms:
        foreign = foreign_shape(form, foreign)
    yield row.hf, foreign, _reader(source, row, shape, forms, kind, unfold)


def _expert(read: Callable[[Row, int, int], Tensor], row: Row, e: int) -> Tensor:
    return read(row, e, e + 1)[0]


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
                shutil.copyfile(found, folder / found.name)
    elif (text := source.text()) is not None:
        text.save(folder)


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
        kind = "F32" if row.precise or len(shape) < 2 else _type(source, row, wanted, PACKINGS)
        tensors.append(OutTensor(row.gguf, foreign, kind, _reader(source, row, shape, row.gguf_forms, kind, False)))
    tensors += _extra_gguf(source, tensors)
    metadata: dict[str, Any] = {
        "general.architecture": family.gguf,
        "general.name": name or path.stem,
        "general.file_type": _file_type(source, wanted, tensors),
        "general.quantization_version": 2,
    }
    metadata |= {f"{family.gguf}.{key}": value for key, value in family.write_gguf(layout.config).items()}
    metadata[f"{family.gguf}.vocab_size"] = layout.config.vocab_size
    text = source.text()
    words = {"tokenizer.ggml.model": "no_vocab"} if text is None else text.to_gguf(layout.config.vocab_size)
    metadata |= {key: Typed(GGUF_TYPES[key], value) if key in GGUF_TYPES else value for key, value in words.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(path, metadata, tensors)


def _file_type(source: Source, wanted: str | None, tensors: Iterable[OutTensor]) -> int:
    """What the source is called, where its types stay; else the name of most of them."""
    named = getattr(source, "file_type", None) if wanted is None else None
    return named if named is not None else file_type(tensor.type for tensor in tensors if len(tensor.shape) > 1)


def _extra_gguf(source: Source, tensors: Iterable[OutTensor]) -> Iterator[OutTensor]:
    """What GGUF keeps as tensors and we as settings: the logit scale of a tied model, llama3's rotary divisors."""
    config = source.layout.config
    if config.tied and config.logit_scale != 1.0:
        embed = next(t for t in tensors if t.name == "token_embd.weight")
        row = next(row for row in source.layout.rows if row.ours == "embed.weight")
        kind = recipes.output(embed.type, embed.shape[-1]) if embed.type in PACKINGS else embed.type
        assert kind is not None
        yield replace(embed, name="output.weight", type=kind, rows=partial(_scaled_embedding, source, row))
    rope = getattr(config.layers[0].mixers[0], "rope", None)
    if rope is not None and (rope.factors is not None or rope.scaling == "llama3"):
        head_dim = config.layers[0].mixers[0].head_dim  # type: ignore[union-attr]
        plain, _ = frequencies(replace(rope, scaling="none", factors=None), head_dim)
        divisors = plain / frequencies(rope, head_dim)[0]
        yield OutTensor("rope_freqs.weight", tuple(divisors.shape), "F32", lambda a, b: divisors[a:b])


def _scaled_embedding(source: Source, row: Row, start: int, stop: int) -> Tensor:
    return scaled(source.read(row, start, stop), source.layout.config.logit_scale, 0)
