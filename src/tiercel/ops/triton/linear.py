"""Products with packed matrices on a GPU, y = x Wᵀ + b.

    few rows     (up to FEW) inputs are rounded to eight bits: `rounded.py`
    some rows    (up to SOME) tiles are unpacked to bfloat16 for the tensor cores: `tiled.py`.  With `exact`, or a width
                 that 64 does not divide, few and some rows are `_some`'s, without haste
    many rows    the whole matrix is unpacked to bfloat16 first: PyTorch's product, and the matrix read once more

The bits of a file's blocks lie in planes, those of `rounded.py`; nothing is rounded.  Matrices of other types are
unpacked when they come to the device.  FP8 is made on the device: `fp8.py`.

Letters: T rows of x, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tiercel import quant
from tiercel.ops.qtensor import QTensor
from tiercel.ops.triton import FEW, fp8, interpreted, tiled
from tiercel.ops.triton.activation import activated
from tiercel.ops.triton.launch import early, others_done
from tiercel.ops.triton.rounded import TYPES as ROUNDED
from tiercel.ops.triton.rounded import product, rounded
from tiercel.quant.bits import fields
from tiercel.quant.nf4 import LEVELS

TYPES = ("Q4_K", "Q6_K", "NF4", "Q8_0", "INT8")
SOME = 128
TILED_ROWS = 32  # beyond which a bfloat16 matrix is read faster than a packed one is unpacked
SPARE_BYTES = 8 << 30  # of the device's memory, that are left when one is kept beside a packed one
PLAIN = 2, 1024, 4, 2  # outputs and inputs that a program takes at a time, its warps, loads under way


@triton.jit
def _values(q, scales, d, levels, n, k, K, seen, TYPE: tl.constexpr):
    """W[n, k] float32 for index tensors that broadcast.  levels: of NF4, or the top bits of Q6_K."""
    if TYPE == "Q6_K":
        byte = tl.load(q + n * (K // 2) + k // 64 * 32 + k % 32, seen, 0).to(tl.int32)
        tops = tl.load(levels + n * (K // 4) + k // 64 * 16 + k % 32 // 8 * 4 + k % 4, seen, 0).to(tl.int32)
        tops = (tops >> (k % 8 // 4 * 4 + k % 64 // 32 * 2)) & 3
        number = ((byte >> (k % 64 // 32 * 4)) & 15 | (tops << 4)) - 32
        scale = tl.load(scales + n * (K // 16) + k // 16, seen, 0).to(tl.float32)
        return number.to(tl.float32) * (tl.load(d + n * (K // 256) + k // 256, seen, 0.0).to(tl.float32) * scale)
    elif TYPE == "Q4_K" or TYPE == "NF4":
        byte = tl.load(q + n * (K // 2) + k // 64 * 32 + k % 32, seen, 0).to(tl.int32)
        bits = (byte >> (k % 64 // 32 * 4)) & 15
        if TYPE == "NF4":
            return tl.load(levels + bits) * tl.load(scales + n * (K // 64) + k // 64, seen, 0.0)
        pair, ends = scales + (n * (K // 32) + k // 32) * 2, d + (n * (K // 256) + k // 256) * 2
        scale = tl.load(ends, seen, 0.0).to(tl.float32) * tl.load(pair, seen, 0).to(tl.float32)
        least = tl.load(ends + 1, seen, 0.0).to(tl.float32) * tl.load(pair + 1, seen, 0).to(tl.float32)
        return bits.to(tl.float32) * scale - least
    else:
        number = tl.load(q + n * K + k, seen, 0)
        if TYPE == "FP8":
            number = number.to(tl.float8e4nv, bitcast=True)
        number = number.to(tl.float32)
        if TYPE == "INT8" or TYPE == "FP8":
            return number * tl.load(scales + n)
        return number * tl.load(scales + n * (K // 32) + k // 32, seen, 0.0).to(tl.float32)


@triton.jit
def _some(
    x, q, scales, d, levels, bias, y, T, N, K, scale, stride_x,
    TYPE: tl.constexpr, BIAS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    sum_ = tl.zeros((BT, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        seen = (k < K)[:, None] & (n < N)[None, :]
        w_KN = _values(q, scales, d, levels, tl.where(n < N, n, 0)[None, :], k[:, None], K, seen, TYPE)
        x_TK = tl.load(x + t[:, None] * stride_x + k[None, :], (t < T)[:, None] & (k < K)[None, :], 0.0)
        if EXACT:
            sum_ += tl.dot(x_TK.to(tl.float32), w_KN, input_precision="ieee")
        else:
            sum_ += tl.dot(x_TK.to(tl.bfloat16), w_KN.to(tl.bfloat16))
    sum_ = sum_ * scale
    if BIAS:
        sum_ += tl.load(bias + n, n < N, 0.0).to(tl.float32)[None, :]
    at = y + t[:, None] * N + n[None, :]
    tl.store(at, sum_.to(y.dtype.element_ty), (t < T)[:, None] & (n < N)[None, :])


@triton.jit
def _rows(q, scales, d, levels, which, out, K, TYPE: tl.constexpr, BK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    n = tl.load(which + t).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    w = _values(q, scales, d, levels, n + tl.zeros((BK,), tl.int64), k, K, k < K, TYPE)
    tl.store(out + t * K + k, w.to(out.dtype.element_ty), k < K)


@triton.jit
def _plain(
    x,
    w,
    up,
    bias,
    base,
    y,
    N,
    K,
    stride_x,
    stride_w,
    T: tl.constexpr,
    BIAS: tl.constexpr,
    BASE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    rows = tl.arange(0, T)
    k = tl.arange(0, BK)
    seen = (n < N)[:, None] & (k < K)[None, :]
    w_NK = tl.load(w + n[:, None] * stride_w + k[None, :], seen, 0.0).to(tl.float32)
    if ACTIVATION is not None:
        u_NK = tl.load(up + n[:, None] * stride_w + k[None, :], seen, 0.0).to(tl.float32)
    others_done(EARLY)
    x_TK = tl.load(x + rows[:, None] * stride_x + k[None, :], (k < K)[None, :], 0.0).to(tl.float32)
    sums = x_TK[:, None, :] * w_NK[None, :, :]
    others = x_TK[:, None, :] * u_NK[None, :, :] if ACTIVATION is not None else sums
    for k0 in tl.range(BK, K, BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK)
        seen = (n < N)[:, None] & (k < K)[None, :]
        w_NK = tl.load(w + n[:, None] * stride_w + k[None, :], seen, 0.0).to(tl.float32)
        x_TK = tl.load(x + rows[:, None] * stride_x + k[None, :], (k < K)[None, :], 0.0).to(tl.float32)
        sums += x_TK[:, None, :] * w_NK[None, :, :]
        if ACTIVATION is not None:
            u_NK = tl.load(up + n[:, None] * stride_w + k[None, :], seen, 0.0).to(tl.float32)
            others += x_TK[:, None, :] * u_NK[None, :, :]
    out = tl.sum(sums, 2)
    if ACTIVATION is not None:
        out = activated(out, ACTIVATION) * tl.sum(others, 2)
    if BIAS:
        out += tl.load(bias + n, n < N, 0.0).to(tl.float32)[None, :]
    if BASE:
        out += tl.load(base + rows[:, None] * N + n[None, :], (n < N)[None, :], 0.0).to(tl.float32)
    tl.store(y + rows[:, None] * N + n[None, :], out.to(y.dtype.element_ty), (n < N)[None, :])


def plain(
    x: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None,
    up_NK: Tensor | None = None,
    activation: str | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + b for one or two rows (…, K) of a plain W, in its dtype: W is read once, at the speed of the memory.

    With `up`, a matrix like W: act(x Wᵀ) · (x Uᵀ).  With `base`: added, and the answer is in its dtype.
    """
    N, K = weight_NK.shape
    x_TK = x.reshape(-1, K)
    y_TN = torch.empty(x_TK.shape[0], N, dtype=weight_NK.dtype if base is None else base.dtype, device=x.device)
    BN, BK, warps, stages = PLAIN
    _plain[(triton.cdiv(N, BN),)](
        x_TK, weight_NK, weight_NK if up_NK is None else up_NK, x_TK if bias_N is None else bias_N,
        x_TK if base is None else base, y_TN, N, K,
        x_TK.stride(0), weight_NK.stride(0), T=x_TK.shape[0], BIAS=bias_N is not None, BASE=base is not None,
        ACTIVATION=activation, BN=BN, BK=BK, STAGES=stages, num_warps=warps, **early(),
    )  # fmt: skip
    return y_TN.view(*x.shape[:-1], N)


class DeviceQTensor(QTensor):
    """A packed matrix on a GPU: of TYPES, made by `on_device`.  Answers in the dtype of its inputs."""

    repacked = False

    def __init__(
        self,
        type: str,
        shape: tuple[int, int],
        q: Tensor,
        scales: Tensor,
        d: Tensor | None = None,
        top: Tensor | None = None,
    ) -> None:
        self.type, self.shape, self.exact = type, torch.Size(shape), False
        self.q, self.scales, self.d, self.top = q, scales, d, top
        self.device = q.device
        self.levels = torch.tensor(LEVELS, device=q.device) if type == "NF4" else None
        self.data = q
        self._wide_NK: Tensor | None = None
        self._more_scales = scales
        self._asked = False

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The planes it has, rows first."""
        return tuple(t for t in (self.q, self.scales, self.d, self.top) if t is not None)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.parts)

    @property
    def takes_q8(self) -> bool:
        """Whether few rows are rounded to eight bits to be multiplied with it."""
        return self.type in ROUNDED and not self.exact and self.shape[1] % 64 == 0

    @property
    def fused_rows(self) -> int:
        """Rows that are multiplied where a gate or a sum may be fused with the product."""
        if self.type == "FP8":
            return 0 if self.exact else fp8.FUSED_ROWS
        return FEW if self.takes_q8 else 0

    @property
    def planes(self) -> tuple[Tensor, ...]:
        levels = self.levels if self.top is None else self.top
        return self.q, self.scales, self.scales if self.d is None else self.d, self.q if levels is None else levels

    @property
    def words(self) -> tuple[Tensor, ...]:
        """q, top, scales, d as `rounded.product` reads them."""
        q = self.q.view(torch.int32)
        top = q if self.top is None else self.top.view(torch.int32)
        scales = self.scales.flatten(1).view(torch.int32) if self.type == "Q4_K" else self.scales
        d = scales if self.d is None else self.d
        d = d.flatten(1).view(torch.int32) if self.type in ("Q4_K", "Q8_0") else d
        return q, top, scales, d

    @property
    def bytes(self) -> tuple[Tensor, ...]:
        """q, top, scales, d as `tiled.product` reads them."""
        top = self.q if self.top is None else self.top
        if self.type == "Q4_K":
            return self.q, top, *self.words[2:]
        return self.q, top, self.scales, self.scales if self.d is None else self.d

    @classmethod
    def joined(cls, matrices: Sequence[DeviceQTensor]) -> DeviceQTensor:
        """One below the other; of one type and width."""
        rows = sum(m.shape[0] for m in matrices)
        return matrices[0]._like(rows, [torch.cat(parts) for parts in zip(*(m.parts for m in matrices), strict=True)])

    def split(self, counts: Sequence[int]) -> list[DeviceQTensor]:
        """Split into parts of these numbers of rows, in the same memory."""
        parts = zip(*(part.split(list(counts)) for part in self.parts), strict=True)
        return [self._like(n, part) for n, part in zip(counts, parts, strict=True)]

    def _like(self, rows: int, parts: Sequence[Tensor]) -> DeviceQTensor:
        m = DeviceQTensor(self.type, (rows, self.shape[1]), *parts)
        m.exact = self.exact
        return m

    def rows(self, which_T: Tensor, scale: float = 1.0) -> Tensor:
        y = self._unpack(which_T.flatten(), torch.float32).view(*which_T.shape, -1)
        return y if scale == 1.0 else y * scale

    def numbers(self, start: int = 0, stop: int | None = None) -> Tensor:
        which = torch.arange(start, self.shape[0] if stop is None else stop, device=self.device)
        return self._unpack(which, torch.float32)

    def _unpack(self, which: Tensor, dtype: torch.dtype) -> Tensor:
        K = self.shape[1]
        out = torch.empty(len(which), K, dtype=dtype, device=self.device)
        _rows[(len(which), triton.cdiv(K, 1024))](*self.planes, which, out, K, TYPE=self.type, BK=1024)
        return out

    def fused(
        self,
        x: Tensor,
        bias_N: Tensor | None = None,
        scale: float = 1.0,
        *,
        up: DeviceQTensor | None = None,
        activation: str | None = None,
        base: Tensor | None = None,
    ) -> Tensor:
        """Products of `fused_rows` rows (…, K) at most; `base`, what is added, gives its dtype to the answer."""
        dtype = x.dtype if base is None else base.dtype
        if self.type == "FP8":
            y_TN = fp8.few(
                x.reshape(-1, x.shape[-1]), (self.q, self.scales), dtype, bias_N=bias_N, scale=scale,
                up=None if up is None else (up.q, up.scales), activation=activation, base=base,
            )  # fmt: skip
            return y_TN if x.dim() == 2 else y_TN.view(*x.shape[:-1], -1)
        y_TN = product(
            rounded(x), self.type, (self.shape[0], self.shape[1]), self.words, dtype,
            bias_N=bias_N, scale=scale, up=None if up is None else up.words, activation=activation, base=base,
        )  # fmt: skip
        return y_TN if x.dim() == 2 else y_TN.view(*x.shape[:-1], -1)

    def multiply(self, x: Tensor, bias_N: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """scale · x Wᵀ + b, (…, K) → (…, N).  No gradients."""
        N, K = self.shape
        x_TK = x.reshape(-1, K)
        T = x_TK.shape[0]
        if self.type == "FP8" and not self.exact and self.fused_rows < T:
            return self._fp8(x_TK, bias_N, scale).to(x.dtype).view(*x.shape[:-1], N)
        kept = T > TILED_ROWS and not self.exact and self._keeps_wide()
        if T > SOME or kept:
            W = self._wide_NK if kept and self._wide_NK is not None else self._unpacked()
            y_TN = F.linear(x_TK.to(W.dtype), W).to(x.dtype)
            y_TN = y_TN * scale if scale != 1.0 else y_TN
            y_TN = y_TN if bias_N is None else y_TN + bias_N.to(y_TN.dtype)
            return y_TN.view(*x.shape[:-1], N)
        if self.fused_rows >= T:
            return self.fused(x, bias_N, scale)
        if self.takes_q8:
            y_TN = tiled.product(x_TK, self.type, (N, K), self.bytes, bias_N=bias_N, scale=scale)
            return y_TN.view(*x.shape[:-1], N)
        y_TN = torch.empty(T, N, dtype=x.dtype, device=x.device)
        bias = x_TK if bias_N is None else bias_N
        BT, BN = max(16, min(64, triton.next_power_of_2(T))), 32
        _some[(triton.cdiv(N, BN), triton.cdiv(T, BT))](
            x_TK, *self.planes, bias, y_TN, T, N, K, scale, x_TK.stride(0), TYPE=self.type,
            BIAS=bias_N is not None, BT=BT, BN=BN, BK=128, EXACT=self.exact or interpreted, num_warps=4,
        )  # fmt: skip
        return y_TN.view(*x.shape[:-1], N)

    def _padded(self) -> tuple[Tensor, Tensor]:
        """e4m3 and scales of as many outputs as PyTorch's product takes, a multiple of 16: a copy where it is not."""
        if self.shape[0] % 16 == 0:
            return self.q, self.scales
        if self._wide_NK is None:
            more = -self.shape[0] % 16
            self._wide_NK, self._more_scales = F.pad(self.q, (0, 0, 0, more)), F.pad(self.scales, (0, more), value=1.0)
        return self._wide_NK, self._more_scales

    def _unpacked(self) -> Tensor:
        rows = torch.arange(self.shape[0], device=self.device)
        return self._unpack(rows, torch.float32 if self.exact else torch.bfloat16)

    def _keeps_wide(self) -> bool:
        """Whether its numbers are kept beside it, for many rows: from the first time on, where memory is left."""
        if not self._asked and self.device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            self._asked = True
            need = self.shape[0] * self.shape[1] * 2
            if torch.cuda.mem_get_info(self.device)[0] > need + SPARE_BYTES:
                self._wide_NK = self._unpacked()
        return self._wide_NK is not None

    def _fp8(self, x_TK: Tensor, bias_N: Tensor | None, scale: float) -> Tensor:
        N = self.shape[0]
        if not interpreted:
            y_TN = fp8.many(x_TK, self._padded(), None, scale)[:, :N]
            return y_TN if bias_N is None else y_TN + bias_N.to(y_TN.dtype)
        y_TN = F.linear(fp8.rounded(x_TK), self.numbers()) * scale
        return y_TN if bias_N is None else y_TN + bias_N


def gated(x: Tensor, gate: DeviceQTensor, up: DeviceQTensor, activation: str) -> Tensor:
    """act(gate x) · up x of few rows and two matrices alike."""
    return gate.fused(x, up=up, activation=activation)


def on_device(weight: QTensor, device: torch.device | str) -> DeviceQTensor | Tensor:
    """The same matrix for a GPU; a bfloat16 tensor where its type has no kernel there."""
    if weight.type not in TYPES:
        return weight.numbers().to(torch.bfloat16).to(device)
    parts = planes(weight.type, weight.raw(), weight.shape[1])
    return DeviceQTensor(weight.type, tuple(weight.shape), *(t.to(device) for t in parts))  # type: ignore[arg-type]


def in_fp8(W_NK: Tensor) -> DeviceQTensor | Tensor:
    """A matrix on a GPU in e4m3; itself where 64 does not divide its width."""
    if W_NK.shape[1] % 64:
        return W_NK
    return DeviceQTensor("FP8", (W_NK.shape[0], W_NK.shape[1]), *fp8.quantize_matrix(W_NK))


def planes(type: str, raw_NB: Tensor, K: int) -> tuple[Tensor, ...]:
    """Rows as a file has them (N, row_bytes) → q, scales and, for K types, d and top."""
    N = len(raw_NB)
    if type == "INT8":
        return raw_NB[:, 4:].contiguous().view(torch.int8), raw_NB[:, :4].contiguous().view(torch.float32).view(N)
    blocks = raw_NB.view(N, K // quant.BLOCKS[type].values, quant.BLOCKS[type].bytes)
    if type == "Q8_0":
        q, d = blocks[:, :, 2:].contiguous().view(torch.int8), blocks[:, :, :2].contiguous().view(torch.float16)
        return q.view(N, K), d.view(N, -1)
    if type == "NF4":
        absmax, pairs = blocks[:, :, :4].contiguous().view(torch.float32), blocks[:, :, 4:]
        bits = torch.stack((pairs >> 4, pairs & 15), -1).flatten(2)  # 64 values in order
        return (bits[..., :32] | (bits[..., 32:] << 4)).reshape(N, K // 2), absmax.view(N, -1)
    if type == "Q6_K":
        return _planes_of_q6_k(blocks.flatten(0, 1), N)
    packed = blocks[:, :, 4:16]
    low, high, rest = packed.split(4, -1)
    scales = torch.cat((low & 63, (rest & 15) | ((low >> 6) << 4)), -1)
    least = torch.cat((high & 63, (rest >> 4) | ((high >> 6) << 4)), -1)
    d = blocks[:, :, :4].contiguous().view(torch.float16)
    return blocks[:, :, 16:].contiguous().view(N, K // 2), torch.stack((scales, least), -1).view(N, -1, 2), d


def _planes_of_q6_k(blocks: Tensor, N: int) -> tuple[Tensor, ...]:
    low = fields(blocks[:, :128].unflatten(1, (2, 64)), 4).reshape(-1, 4, 2, 32)
    top = fields(blocks[:, 128:192].unflatten(1, (2, 32)), 2).reshape(-1, 4, 2, 4, 2, 4)  # group, half, m, j, c
    q = low[:, :, 0] | (low[:, :, 1] << 4)
    tops = top[:, :, 0, :, 0] | (top[:, :, 1, :, 0] << 2) | (top[:, :, 0, :, 1] << 4) | (top[:, :, 1, :, 1] << 6)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).view(N, -1)
    d = blocks[:, 208:210].contiguous().view(torch.float16).view(N, -1)
    return q.reshape(N, -1), scales, d, tops.reshape(N, -1)
