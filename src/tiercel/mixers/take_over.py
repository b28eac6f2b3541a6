"""Weights of a recurrent mixer from those of the attention whose place it takes.

q, k and v become what a query, a key and a value are in the recurrence (Mamba-2's C, B and x), o its output projection:
Wang et al. 2024, arXiv 2408.15237, section 2; likewise Bick et al. 2024, arXiv 2408.10189, and Goldstein et al. 2025,
arXiv 2505.03005.  Ours, by least squares on a few inputs of the layer: a gate that begins open, and the output
projection that is nearest to the attention's outputs.

Letters: T tokens, D width, I = H · P of all heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

OPEN_GATE = 1.2785  # silu of it is 1
RIDGE = 1e-3  # of the mean squared input


@torch.no_grad()
def least_squares(gram_II: Tensor, cross_ID: Tensor) -> Tensor:
    """W (D, I) of the least |x Wᵀ − y|² + ridge |W|² for gram = Σ x xᵀ and cross = Σ x yᵀ, in float64."""
    gram = gram_II.double()
    ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-30)
    solved: Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram), device=gram.device), cross_ID.double())
    return solved.T


@torch.no_grad()
def pass_through(conv_CK: Tensor) -> None:
    """Let a causal convolution pass each token alone."""
    conv_CK.zero_()
    conv_CK[:, -1] = 1.0
