"""Native Mamba-1 (cpu.cpp): the parts of x_proj, and the selective scan over the sequences' states.

Reference: `reference.py`.  Letters: T tokens, I inner, R dt rank, N state.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tiercel.ops.cpu import native
from tiercel.ops.cpu.batch import BatchMetadata
from tiercel.ops.cpu.native import address


def split_norm(
    batch: BatchMetadata, x_TS: Tensor, norms: Sequence[Tensor | None], rank: int, state: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Split Mamba-1's x_proj into dt (T, R), B and C (T, N), each normed where it has a weight."""
    widths = rank, state, state
    dt_TR, B_TN, C_TN = (native.empty(batch.tokens, width) for width in widths)
    addresses = [address(norm) for norm in norms] + [address(dt_TR), address(B_TN), address(C_TN)]
    native.extension.split_norm(address(x_TS), *addresses, batch.tokens, *widths, eps, batch.is_bf16)
    return dt_TR, B_TN, C_TN


def selective_scan(
    batch: BatchMetadata,
    x_TI: Tensor,
    dt_TI: Tensor,
    dt_bias_I: Tensor,
    B_TN: Tensor,
    C_TN: Tensor,
    A_NI: Tensor,
    D_I: Tensor,
    xz_TI: Tensor,
    *,
    taps: int,
    chunk: int,
) -> Tensor:
    """(scan(x, softplus(dt + bias), A, B, C) + D x) · silu(z) → (T, I); xz: output of in_proj."""
    T, I = x_TI.shape
    N = A_NI.shape[0]
    y_TI = native.empty(T, I)
    conv_in, z_TI = xz_TI[:, :I], xz_TI[:, I:]
    native.extension.selective_scan(
        batch, address(x_TI), address(dt_TI), address(dt_bias_I), address(B_TN), address(C_TN), address(A_NI),
        address(D_I), address(z_TI), address(conv_in), address(y_TI), xz_TI.stride(0), I, N, taps, chunk,
    )  # fmt: skip
    return y_TI
