"""NF4 checkpoints in bitsandbytes' layout, in and out: one matrix is a handful of tensors.

    X                                    U8 (values / 2, 1)       two levels a byte, the first in the high nibble
    X.absmax                             F32 or U8 (blocks)       one per 64 values along the flattened matrix
    X.quant_map                          F32 (16)                 the levels
    X.nested_absmax, X.nested_quant_map  F32                      double quantization: absmax =
                                                                      nested_quant_map[u8] · nested_absmax + offset
    X.quant_state.bitsandbytes__nf4      U8                       JSON: shape, blocksize, dtype, nested_offset …

transformers reads and writes the same (bitsandbytes `QuantState.as_dict`).  A matrix whose rows are made of whole
blocks stays packed here; one whose blocks run across rows is unpacked as it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiercel.errors import FormatError, UnsupportedError
from tiercel.quant import nf4
from tiercel.weights.stored import OutTensor, Stored, StoredTensor, torch_dtype

STATE = ".quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
STATE_BYTES = 1 << 16
MAX_AXES = 4
NESTED_BLOCK = 256
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


# ── in


class Nested(NamedTuple):
    """What turns stored bytes into absmax."""

    absmax: StoredTensor
    levels: Tensor
    block: int
    offset: float


@dataclass(frozen=True)
class NF4Tensor:
    """Several stored tensors as one matrix: `Stored` like any other."""

    name: str
    shape: tuple[int, ...]
    type: str  # "NF4"; the dtype it was made from where blocks run across rows
    block: int
    packed: StoredTensor
    absmax: StoredTensor
    nested: Nested | None

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.absmax.nbytes

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.type)

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        stop = self.shape[0] if stop is None else stop
        values = math.prod(self.shape[1:])
        first, blocks = self._blocks(start, stop)
        flat = nf4.dequantize(blocks).view(-1)[start * values - first * 64 :][: (stop - start) * values]
        return flat.to(self.dtype).view(stop - start, *self.shape[1:])

    def raw(self, start: int = 0, stop: int | None = None) -> Tensor:
        assert self.type == "NF4"
        stop = self.shape[0] if stop is None else stop
        return self._blocks(start, stop)[1].view(stop - start, *self.shape[1:-1], -1)

    def _blocks(self, start: int, stop: int) -> tuple[int, Tensor]:
        """The first block of 64 that rows start … stop touch, and all of them as `quant.nf4` has them (n, 36)."""
        values = math.prod(self.shape[1:])
        first, last = start * values // 64, -(-stop * values // 64)
        packed = self.packed.rows(first * 32, min(last * 32, self.packed.shape[0])).view(-1)
        missing = (last - first) * 32 - len(packed)  # the last block of the matrix may be cut short
        packed = torch.cat([packed, packed.new_zeros(missing)]) if missing else packed
        absmax = self._absmax(first, last)
        return first, torch.cat([absmax.view(torch.uint8).view(-1, 4), packed.view(-1, 32)], dim=1)

    def _absmax(self, first: int, last: int) -> Tensor:
        """Of blocks of 64, float32; larger ones of the file count several times."""
        each = self.block // 64
        begin, end = first // each, -(-last // each)
        x = self.absmax.rows(begin, end)
        if self.nested is not None:
            scale_at, scale_end = begin // self.nested.block, -(-end // self.nested.block)
            scales = self.nested.absmax.rows(scale_at, scale_end).repeat_interleave(self.nested.block)
            scales = scales[begin - scale_at * self.nested.block :][: end - begin]
            x = self.nested.levels[x.int()] * scales + self.nested.offset
        x = x.float()
        return x.repeat_interleave(each)[first - begin * each :][: last - first].contiguous() if each > 1 else x


def joined(tensors: Mapping[str, StoredTensor]) -> dict[str, Stored]:
    """A folder's tensors with every NF4 matrix put together."""
    out: dict[str, Stored] = dict(tensors)
    for key in tensors:
        name, found, kind = key.partition(STATE)
        if not found:
            continue
        if kind != "nf4":
            raise UnsupportedError(f"{name} is bitsandbytes' {kind or 'nothing'}; of its types NF4 is read here")
        parts = {part: out.pop(f"{name}.{part}", None) for part in PARTS}
        packed, state = out.pop(name, None), out.pop(key)
        out[name] = _matrix(name, packed, parts, state)  # type: ignore[arg-type]
    return out


def _matrix(
    name: str, packed: StoredTensor | None, parts: Mapping[str, StoredTensor | None], state: StoredTensor
) -> NF4Tensor:
    about = _state(name, state)
    shape: Any = about.get("shape")
    block: Any = about.get("blocksize")
    if not _sizes(shape) or not _sizes([block]) or block % 64 or about.get("dtype") not in DTYPES:
        raise FormatError(f"{name}: its quant_state describes no NF4 matrix: {about!s:.120}")
    values = math.prod(shape)
    blocks = -(-values // block)
    absmax = parts["absmax"]
    if packed is None or packed.type != "U8" or packed.shape != (-(-values // 2), 1):
        raise FormatError(f"{name} of {shape} must be {-(-values // 2)} × 1 bytes of nibbles")
    nested = None
    if absmax is not None and absmax.type == "U8":
        nested = _nested(name, parts, about, blocks)
    if absmax is None or absmax.type not in ("U8", "F32") or absmax.shape != (blocks,):
        raise FormatError(f"{name}.absmax must be {blocks} numbers, one per block of {block}")
    levels = parts["quant_map"]
    if levels is None or levels.type != "F32" or levels.shape != (16,) or levels.rows().tolist() != list(_levels()):
        raise UnsupportedError(f"{name}.quant_map holds other levels than NF4's")
    kind = "NF4" if shape[-1] % 64 == 0 else DTYPES[about["dtype"]]
    return NF4Tensor(name, tuple(shape), kind, block, packed, absmax, nested)


def _sizes(values: Any) -> bool:
    """A few whole numbers from 1."""
    few = isinstance(values, list) and 0 < len(values) <= MAX_AXES
    return few and all(type(n) is int and 0 < n < 1 << 40 for n in values)


def _nested(name: str, parts: Mapping[str, StoredTensor | None], about: dict[str, Any], blocks: int) -> Nested:
    absmax, levels = parts["nested_absmax"], parts["nested_quant_map"]
    block, offset = about.get("nested_blocksize"), about.get("nested_offset")
    if not _sizes([block]) or not isinstance(offset, float) or not math.isfinite(offset):
        raise FormatError(f"{name}: its quant_state lacks nested_blocksize or nested_offset")
    assert isinstance(block, int)
    if absmax is None or absmax.type != "F32" or absmax.shape != (-(-blocks // block),):
        raise FormatError(f"{name}.nested_absmax must be {-(-blocks // block)} numbers")
    if levels is None or levels.type != "F32" or levels.shape != (256,):
        raise FormatError(f"{name}.nested_quant_map must be 256 numbers")
    return Nested(absmax, levels.rows(), block, offset)


def _state(name: str, state: StoredTensor) -> dict[str, Any]:
    if state.type != "U8" or state.nbytes > STATE_BYTES:
        raise FormatError(f"{name}: its quant_state has {state.nbytes} bytes of {state.type}")
    try:
        about = json.loads(bytes(state.rows().view(-1).tolist()))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name}: its quant_state is not JSON: {error}") from error
    if not isinstance(about, dict):
        raise FormatError(f"{name}: its quant_state must be a table")
    return about


def _levels() -> tuple[float, ...]:
    return tuple(torch.tensor(nf4.LEVELS).tolist())


# ── out


def tensors(
    name: str, shape: tuple[int, int], raw: Callable[[int, int], Tensor], dtype: str, step: int
) -> Iterator[OutTensor]:
    """A matrix as bitsandbytes writes it, with double quantization; raw: its rows packed as `quant.nf4` does.

    absmax is gathered first (`step` rows at a time), since its mean is part of the header.
    """
    absmax = torch.cat([_absmax_of(raw(i, min(i + step, shape[0]))) for i in range(0, shape[0], step)])
    offset = float(absmax.mean())
    codes, scales = _nested_codes(absmax - offset)
    state = {
        "quant_type": "nf4", "blocksize": 64, "dtype": dtype, "shape": list(shape), "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32", "nested_offset": offset,
    }  # fmt: skip
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    row = shape[1] // 2

    def nibbles(start: int, stop: int) -> Tensor:  # asked for in bytes; whole rows hold them
        first, last = start // row, -(-stop // row)
        packed = raw(first, last).view(-1, 36)[:, 4:].reshape(-1)
        return packed[start - first * row : stop - first * row].view(-1, 1)

    yield OutTensor(name, (shape[0] * row, 1), "U8", nibbles)
    for suffix, x in (("absmax", codes), ("nested_absmax", scales), ("nested_quant_map", dynamic_levels()),
                      ("quant_map", torch.tensor(nf4.LEVELS)), (f"{STATE[1:]}nf4", text)):  # fmt: skip
        yield OutTensor(f"{name}.{suffix}", tuple(x.shape), "U8" if x.dtype == torch.uint8 else "F32", _part(x))


def _part(x: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, stop: x[start:stop]


def _absmax_of(raw: Tensor) -> Tensor:
    return raw.reshape(-1, 36)[:, :4].contiguous().view(torch.float32).view(-1)


def _nested_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks) → their nearest dynamic levels as bytes, and the scale of every NESTED_BLOCK of them."""
    levels = dynamic_levels()
    padded = torch.nn.functional.pad(x, (0, -len(x) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    scales = padded.abs().amax(1)
    unit = padded / torch.where(scales > 0, scales, 1).unsqueeze(1)
    codes = torch.bucketize(unit, (levels[:-1] + levels[1:]) / 2).to(torch.uint8)
    return codes.view(-1)[: len(x)], scales


def dynamic_levels() -> Tensor:
    """The 256 levels of 8-bit dynamic quantization (Dettmers et al. 2021, arXiv 2110.02861).

    ±10^(i − 6) · (the middles of 2^i equal parts of 0.1 … 1) for i = 0 … 6; and 0, and 1.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2
        levels += (10 ** (i - 6) * middles).tolist() + (-(10 ** (i - 6)) * middles).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32)


def config(skipped: list[str], dtype: str) -> dict[str, Any]:
    """The `quantization_config` that transformers reads such a checkpoint by; skipped: modules left unpacked."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
