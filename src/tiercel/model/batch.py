"""A ragged batch without padding: the rows' new tokens stand one after another.

Matrix products see all T tokens at once.  What depends on a row's own past (attention, convolution, scan) is one
native operation for all rows, told by `rows` where each row's state and tokens are; on plain torch it runs row by
row on its span.  Either way a row gets the same treatment whoever shares the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from tiercel.mixers.attention.cpu import rotary
from tiercel.mixers.attention.rope import RopeConfig
from tiercel.mixers.attention.rotary import frequencies
from tiercel.mixers.backend import Backend
from tiercel.model.layer_state import LayerState
from tiercel.model.state import State
from tiercel.ops.cpu import native
from tiercel.ops.cpu.batch import BatchMetadata

frequencies_of = lru_cache(maxsize=None)(frequencies)  # also keeps alive what a recorded step points to


class Batch:
    """Where each row's new tokens lie (`spans`), and the states they go on from.

    adapters: what each row wears, [] for nobody.
    rows (B, 3) int64: address of its state's descriptor, first token, how many (`SeqSlice` in ops/cpu/kernels.h).
    native: whether this forward runs on the kernels; its activations are float32 then.
    """

    backend: Backend = "cpu"
    step = False  # of a device: `model.slots.DeviceBatch`

    def __init__(
        self, lengths: Sequence[int], states: Sequence[State] | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.lengths, self.device = list(lengths), torch.device(device)
        self.starts = [0] * len(self.lengths) if states is None else [state.length for state in states]
        stops = np.cumsum(self.lengths)
        self.spans = [slice(int(stop) - length, int(stop)) for stop, length in zip(stops, self.lengths, strict=True)]
        self.tokens = int(stops[-1])
        self.native = states is not None and runs_natively(states, self.device)
        self.rows = torch.zeros(len(self.lengths), 3, dtype=torch.int64)
        self._rows = self.rows.numpy()
        self._rows[:, 1], self._rows[:, 2] = stops - self.lengths, self.lengths
        self.adapters = [] if states is None else [state.adapter for state in states]
        if states is not None:
            self.is_bf16 = states[0].dtype == torch.bfloat16
            self.refill(states)
        self._rotary: dict[tuple[RopeConfig, int], tuple[Tensor, Tensor]] = {}

    def refill(self, states: Sequence[State]) -> None:
        """Go on from these states, one for each row: what a recorded step needs to be run on other texts."""
        self._rows[:, 0] = [state.address for state in states]

    def metadata(self, layer: int) -> BatchMetadata:
        """The sequences, and the layer whose descriptor begins here in their states, as native kernels read them."""
        return BatchMetadata(self.rows.data_ptr(), len(self.lengths), layer, self.is_bf16, self.tokens)

    def metadata_for(self, memory: LayerState) -> BatchMetadata:
        """The same, for what one mixer remembers."""
        return self.metadata(memory.at)

    def side_by_side(self, runs: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """What each of a layer's mixers answers."""
        return [run() for run in runs]

    @cached_property
    def positions_T(self) -> Tensor:
        """Which position each token has in its text."""
        spans = zip(self.starts, self.lengths, strict=True)
        return torch.cat([torch.arange(start, start + length, device=self.device) for start, length in spans])

    def rotary(self, rope: RopeConfig, head_dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin (T, R / 2) float32, computed once for all layers that share them."""
        key = (rope, head_dim)
        if key not in self._rotary:
            f_R, scale = frequencies_of(rope, head_dim)
            if self.native:
                self._rotary[key] = rotary(self.metadata(0), f_R, scale)
                return self._rotary[key]
            angle_TR = torch.outer(self.positions_T.float(), f_R.to(self.device))
            self._rotary[key] = (angle_TR.cos() * scale, angle_TR.sin() * scale)
        return self._rotary[key]


def runs_natively(states: Sequence[State], device: torch.device) -> bool:
    """Whether there are kernels for these states: on the CPU, in bfloat16 or float32, all alike."""
    dtypes = {state.dtype for state in states}
    return native.available and device.type == "cpu" and len(dtypes) == 1 and dtypes <= {torch.bfloat16, torch.float32}
