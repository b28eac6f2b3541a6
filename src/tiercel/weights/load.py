"""A path becomes a network: where config, family, file and memory meet.

    folder with config.json and safetensors  ┐
    one .gguf file                           ├→ Checkpoint → Decoder       (and back: export.py)
    a pattern (.json, .toml): fresh weights  ┘

Tensors travel in row blocks, straight into the memory they stay in, so loading takes little more than the model.
Shapes are compared with the files before that memory is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from tiercel.errors import RequestError
from tiercel.families.family import Layout, TensorMapping
from tiercel.families.pattern import PATTERN, read_file
from tiercel.families.pattern import rows as pattern_rows
from tiercel.model.config import ModelConfig
from tiercel.model.decoder import Decoder
from tiercel.model.initialize import initialize
from tiercel.model.layers import fast_bf16, named_weights, set_weight
from tiercel.ops.cpu import native
from tiercel.ops.qtensor import NUMBERS, QStack, QTensor
from tiercel.plan import check_fits, parameter_count
from tiercel.quant import PACKED_TYPES, held_bytes, row_bytes
from tiercel.runtime.workspace import trim
from tiercel.tokenizer.tokenizer import Tokenizer
from tiercel.weights.checkpoint import Source, open_checkpoint, outline, parameter_shapes
from tiercel.weights.stored import PLAIN, torch_dtype
from tiercel.weights.transforms import WHOLE

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)

BLOCK_BYTES = 8 << 20  # rows on their way from a file
HOLES = 256 << 20  # bytes read after which what they left behind is given back
DTYPES = {
    "float32": torch.float32, "f32": torch.float32, "float": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "f16": torch.float16, "half": torch.float16,
}  # fmt: skip
STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def load(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    exact: bool = False,
    progress: Progress | None = None,
) -> tuple[Decoder, Tokenizer | None, Layout]:
    """The network (in eval mode), its tokenizer if it has one, and the layout it came in.

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
        from tiercel.weights.quantized import quantized

        if dtype != "auto":
            raise RequestError(f"choose one: dtype={dtype!r} or quantize={quantize!r}")
        source = quantized(checkpoint, quantize)
    return of_source(source, dtype, progress, exact=exact), checkpoint.tokenizer(), checkpoint.layout


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


def _fresh(config: ModelConfig, dtype: str | torch.dtype, seed: int = 0) -> tuple[Decoder, Tokenizer | None, Layout]:
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
    network, shapes = outline(layout), parameter_shapes(layout)
    matrices = {row.ours for row in layout.rows if source and _is_matrix(row) and len(shapes[row.ours]) > 1}
    kinds = {row.ours: _kind(row, shapes[row.ours], dtype, source, packed) for row in layout.rows}
    sizes = [_bytes(kinds[name], shape, name in matrices) for name, shape in shapes.items()]
    needed = sum(held for held, _ in sizes) + max(filled - held for held, filled in sizes)
    check_fits(needed, f"a network of {str(dtype).removeprefix('torch.')} weights")
    for name, shape in shapes.items():
        owner, _, leaf = name.rpartition(".")
        set_weight(network.get_submodule(owner), leaf, _empty(kinds[name], shape, name in matrices))
    network._tie()
    return network


def _kind(row: TensorMapping, shape: tuple[int, ...], dtype: torch.dtype, source: Source | None, packed: bool) -> str:
    """The type a tensor is held in.  Norms, convolutions and decays are never held narrower than they are stored."""
    stored = "F32" if source is None else source.stored(row)
    if row.keep_fp32 or len(shape) < 2:
        exact = dtype == torch.float32 or native.available  # the kernels read these in float32
        return "F32" if exact or stored not in STORED.values() else stored
    return stored if packed and stored in PACKED_TYPES else STORED[dtype]


def _bytes(kind: str, shape: tuple[int, ...], matrix: bool) -> tuple[int, int]:
    """What a tensor takes in the end, and while it is filled."""
    if kind in PACKED_TYPES:
        packed = math.prod(shape[:-1]) * row_bytes(kind, shape[-1])
        return packed, packed
    plain = math.prod(shape) * PLAIN[kind][1]
    if not (matrix and native.available and kind == "BF16"):
        return plain, plain
    *experts, N, K = shape
    count, held = math.prod(experts), held_bytes(kind, N, K)
    return count * held, count * held + plain // count


def _is_matrix(row: TensorMapping) -> bool:
    """Whether it is multiplied with, if it has rows and columns.  Routers are, though float32: however rows are cut."""
    return not row.keep_fp32 or row.ours.endswith(".weight")


def _empty(kind: str, shape: tuple[int, ...], matrix: bool) -> nn.Parameter | QTensor | QStack:
    """Memory for one tensor: a QTensor for what is packed or read by kernels, a list of them for experts."""
    if matrix and (kind in PACKED_TYPES or (native.available and kind in NUMBERS)):
        *experts, N, K = shape
        return QStack(QTensor(kind, (N, K)) for _ in range(experts[0])) if experts else QTensor(kind, (N, K))
    return nn.Parameter(torch.empty(shape, dtype=torch_dtype(kind)), requires_grad=False)


@torch.no_grad()
def fill(network: Decoder, source: Source, progress: Progress | None = None) -> None:
    """Copy every tensor into place, a few rows at a time."""
    weights = dict(named_weights(network))
    total, done = sum(_held(weight) for weight in weights.values()), 0
    passed = 0
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
        passed += held
        if passed > HOLES:
            trim()
            passed = 0
    trim()


def put(target: nn.Parameter | QTensor | QStack, source: Source, row: TensorMapping, start: int, stop: int) -> None:
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


def _held(weight: nn.Parameter | QTensor | QStack) -> int:
    return sum(map(_held, weight)) if isinstance(weight, list) else weight.nbytes


def _rows(weight: nn.Parameter | QTensor | QStack) -> int:
    return len(weight) if isinstance(weight, list) else weight.shape[0]


def row_blocks(target: nn.Parameter | QTensor | QStack, row: TensorMapping) -> Iterator[tuple[int, int]]:
    """Row ranges of about BLOCK_BYTES, a multiple of sixteen rows; what has a form that cannot be cut is one range."""
    count = _rows(target)
    step = max(1, BLOCK_BYTES * count // max(_held(target), 1))
    if isinstance(target, QTensor):
        step = max(16, step // 16 * 16)
    if any(form.name in WHOLE for form in (*row.gguf_forms, *row.hf_forms)):
        step = count
    for start in range(0, count, step):
        yield start, min(start + step, count)
