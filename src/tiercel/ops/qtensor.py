"""Products with a matrix that stays: y = x Wᵀ + b, W (N, K) as a plain tensor or packed.

    QTensor    W in one of the block types of `quant`, or in rows of bfloat16 or float32
    linear     the product, whichever W is

The native kernels read W in panels of sixteen rows (ops/cpu/formats.h), the same bytes in another order; without them
the blocks of the file are kept and unpacked for every product, which is slow and believable.  A kernel rounds its
inputs to eight bits, one scale for 32 of them, where W is packed (about 0.5 % of the norm of y), and to bfloat16 where
W is; `exact` keeps them float32.

Letters: T tokens, N outputs, K inputs.
"""

from __future__ import annotations

import math
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tiercel import quant
from tiercel.ops.cpu import native

NUMBERS = {"BF16": torch.bfloat16, "F32": torch.float32}
SLAB = 1 << 22  # values unpacked at a time where there are no kernels


def row_bytes(type: str, inputs: int) -> int:
    return inputs * NUMBERS[type].itemsize if type in NUMBERS else quant.row_bytes(type, inputs)


class QTensor:
    """A matrix (N, K) of a type of `quant.PACKED_TYPES`, "BF16" or "F32", made to be multiplied with.

    Filled with `put`, read back with `raw` (the very bytes that went in) or `rows` (float32).
    """

    requires_grad = False
    device = torch.device("cpu")

    def __init__(self, type: str, shape: tuple[int, int], *, exact: bool = False) -> None:
        self.type, self.shape, self.exact = type, torch.Size(shape), exact
        self.repacked = native.available
        self.stored_type = type  # what the kernels read
        N, K = shape
        self.reserved_bytes = native.panel_bytes(type, N, K) if self.repacked else N * row_bytes(type, K)
        self.data = torch.empty(0, dtype=torch.uint8)  # until the first rows come

    def __repr__(self) -> str:
        return f"QTensor({self.type}, {self.shape[0]} × {self.shape[1]})"

    @property
    def packed(self) -> bool:
        """Whether it holds less than the numbers themselves."""
        return self.type not in NUMBERS

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers it holds; float32 for packed types."""
        return NUMBERS.get(self.type, torch.float32)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes or self.reserved_bytes

    def numel(self) -> int:
        return math.prod(self.shape)

    # ── in and out ──

    def put(self, start: int, raw_NB: Tensor) -> None:
        """Rows from `start` (a multiple of 16) as uint8 bytes (rows, row_bytes), or as numbers to be rounded."""
        raw = raw_NB if raw_NB.dtype == torch.uint8 else raw_NB.to(self.dtype).contiguous().view(torch.uint8)
        raw = raw.contiguous()
        assert self.stored_type == self.type, "rows of a matrix that is complete cannot be put"
        if not len(self.data):
            self.data = torch.empty(self.reserved_bytes, dtype=torch.uint8)
        if self.repacked:
            native.repack(self.type, raw, self.data, self.shape, start)
        else:
            self.data.view(self.shape[0], -1)[start : start + len(raw)] = raw

    def complete(self) -> None:
        """All rows are in: bfloat16 is from now on held in twelve bits, the same numbers (ops/cpu/twelve.h)."""
        if self.repacked and self.type == "BF16" and self.numel():
            shorter = native.compress_bf12(self.data, self.shape)
            if shorter.nbytes < self.data.nbytes:
                self.data, self.stored_type = shorter, "BF16_12"

    def raw(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start … stop as bytes, (rows, row_bytes) uint8."""
        stop = self.shape[0] if stop is None else stop
        if not self.repacked:
            return self.data.view(self.shape[0], -1)[start:stop]
        first = start // 16 * 16
        out = torch.empty(stop - first, row_bytes(self.type, self.shape[1]), dtype=torch.uint8)
        native.unpack_rows(self.stored_type, out, self.data, self.shape, first)
        return out[start - first :]

    def numbers(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start … stop as what they stand for, in `dtype`."""
        raw = self.raw(start, stop)
        return quant.dequantize(self.type, raw) if self.packed else raw.view(self.dtype)

    def rows(self, which_T: Tensor, scale: float = 1.0) -> Tensor:
        """Rows by number times `scale`, (T, K) float32: an embedding."""
        if self.repacked:
            return native.get_rows(self.stored_type, self.data, self.shape, which_T, scale)
        raw = self.data.view(self.shape[0], -1)[which_T]
        y_TK = quant.dequantize(self.type, raw) if self.packed else raw.view(self.dtype).float()
        return y_TK if scale == 1.0 else y_TK * scale

    # ── product ──

    @property
    def fused_rows(self) -> int:
        """Rows up to which a sum may be fused with the product."""
        return 0

    def fused(self, x: Tensor, bias_N: Tensor | None = None, *, base: Tensor) -> Tensor:
        """base + x Wᵀ + b of `fused_rows` rows at most."""
        raise NotImplementedError

    def multiply(self, x: Tensor, bias_N: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """scale · x Wᵀ + b, (…, K) → (…, N) float32.  Gradients reach x and b, never W."""
        if torch.is_grad_enabled() and (x.requires_grad or (bias_N is not None and bias_N.requires_grad)):
            y: Tensor = Product.apply(x, self, bias_N, scale)
            return y
        if not self.repacked:
            return multiply_reference(x, self, bias_N, scale)
        x = x.float().contiguous()
        y_TN = native.linear(
            self.stored_type, self.data, self.shape, x.view(-1, x.shape[-1]), bias_N, scale, self.exact
        )
        return y_TN.view(*x.shape[:-1], self.shape[0])

    def back(self, dy: Tensor, scale: float = 1.0) -> Tensor:
        """scale · dy W, (…, N) → (…, K) float32: the gradient of `multiply` for its input."""
        N, K = self.shape
        half = self.type == "BF16" and not self.exact and torch_multiplies_bf16()
        dy_TN = (dy.float() * scale if scale != 1.0 else dy).reshape(-1, N)
        dy_TN = dy_TN.to(torch.bfloat16 if half else torch.float32)
        dx_TK, step = torch.zeros(len(dy_TN), K), max(16, SLAB // K // 16 * 16)
        for start in range(0, N, step):
            stop = min(start + step, N)
            if half:
                dx_TK += dy_TN[:, start:stop] @ self.numbers(start, stop)
            else:
                dx_TK.addmm_(dy_TN[:, start:stop], self.floats(start, stop))
        return dx_TK.view(*dy.shape[:-1], K)

    def floats(self, start: int, stop: int) -> Tensor:
        """Rows start … stop, float32: as `numbers`, by whichever unpacking is faster."""
        if self.repacked:
            return native.get_rows(self.stored_type, self.data, self.shape, torch.arange(start, stop))
        return self.numbers(start, stop).float()


@cache
def torch_multiplies_bf16() -> bool:
    """Whether torch multiplies bfloat16 fast here."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class QStack(list[QTensor]):
    """The matrices of a layer's experts, of one shape and type."""

    @property
    def shape(self) -> torch.Size:
        """(E, N, K)"""
        return torch.Size((len(self), *self[0].shape))

    @cached_property
    def table(self) -> Tensor:
        """Address and format of every matrix, as kernels find them; asked for when all rows are in."""
        return torch.tensor([(matrix.data.data_ptr(), native.FORMATS[matrix.stored_type]) for matrix in self])


class Product(torch.autograd.Function):
    """`QTensor.multiply` with a way back, dx = scale · dy W: W stays as it is held and is unpacked a slab at a time,
    x is not kept.  Forward is what runs without gradients, its rounding of inputs too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QTensor, bias_N: Tensor | None, scale: float) -> Tensor:
        ctx.weight, ctx.scale, ctx.dtype = weight, scale, x.dtype
        return weight.multiply(x, bias_N, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        dx = ctx.weight.back(dy, ctx.scale).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        db_N = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, db_N, None


def multiply_reference(x: Tensor, weight: QTensor, bias_N: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """`QTensor.multiply` on float32 numbers, a slab of rows at a time."""
    N, K = weight.shape
    x, step = x.float(), max(16, SLAB // K // 16 * 16)
    slabs = [F.linear(x, weight.numbers(start, min(start + step, N)).float()) for start in range(0, N, step)]
    y = slabs[0] if len(slabs) == 1 else torch.cat(slabs, -1)
    y = y * scale if scale != 1.0 else y
    return y if bias_N is None else y + bias_N.float()
