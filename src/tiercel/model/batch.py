"""A ragged batch without padding: the rows' new tokens stand one after another.

Matrix products see all T tokens at once; what depends on a row's own past (attention, convolution, scan)
runs row by row on its span.  A row therefore gets the same treatment whoever shares the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiercel.model.config import RopeConfig
from tiercel.ops.rotary import frequencies


class Batch:
    """Where each row's new tokens lie (`spans`) and which positions they have in their text (`positions_T`)."""

    def __init__(self, lengths: Sequence[int], starts: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.spans: list[slice] = []
        stop = 0
        for length in lengths:
            self.spans.append(slice(stop, stop + length))
            stop += length
        self.positions_T = torch.cat(
            [torch.arange(start, start + length, device=device) for start, length in zip(starts, lengths, strict=True)]
        )
        self._rotary: dict[tuple[RopeConfig, int], tuple[Tensor, Tensor]] = {}

    def rotary(self, rope: RopeConfig, head_dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin (T, R / 2) float32, computed once for all layers that share them."""
        key = (rope, head_dim)
        if key not in self._rotary:
            f_R, scale = frequencies(rope, head_dim)
            angle_TR = torch.outer(self.positions_T.float(), f_R.to(self.positions_T.device))
            self._rotary[key] = (angle_TR.cos() * scale, angle_TR.sin() * scale)
        return self._rotary[key]
