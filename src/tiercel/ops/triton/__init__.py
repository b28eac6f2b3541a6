"""Kernels for GPUs, in Triton, under the names of their references one level up; tensors in, tensors out.

Written for what PyTorch lacks; large plain products and the attention of prompts are PyTorch's own.  Under
TRITON_INTERPRET=1 the same kernels run on the CPU, which is how they are tested without a GPU.

Statistics, sums, scans and S are float32 whatever the dtype of the tensors; outputs that feed a matrix are in the
matrix's dtype.  Where tensors are bfloat16, tensor cores see float32 values as TF32 (ten bits); where they are float32,
as they are.  Kernels are launched with fixed block sizes: no request waits for a search.
"""

from __future__ import annotations

import importlib.util
import os

from torch import Tensor

interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # it does not multiply bfloat16 matrices
there = importlib.util.find_spec("triton") is not None
FEW = 4  # rows that meet a packed matrix in eight bits


def takes(*tensors: Tensor) -> bool:
    """Whether these go to a kernel: on a GPU, contiguous, and no gradient is wanted."""
    return there and all(t.is_cuda and t.is_contiguous() and not t.requires_grad for t in tensors)
