"""A ragged batch without padding: the new tokens of all sequences, one sequence after another.

Matrix products see all T tokens at once.  What depends on a sequence's own past (attention, convolution, scan) is one
native operation for all sequences, which finds their states and tokens through `rows`; on plain torch it runs sequence
by sequence on its span.  Either way a sequence's numbers do not depend on what shares the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tiercel.mixers.attention.cpu import rotary
from tiercel.mixers.attention.rope import RopeConfig
from tiercel.mixers.attention.rotary import frequencies_of
from tiercel.mixers.backend import Backend
from tiercel.ops.cpu import native
from tiercel.ops.cpu.batch import BatchMetadata


class SequenceMemory(Protocol):
    """What a batch needs of a state (`model.state.State`)."""

    dtype: torch.dtype
    adapter: str | None

    @property
    def length(self) -> int: ...
    @property
    def address(self) -> int: ...


class LayerMemory(Protocol):
    """What a batch needs of a layer's state (`model.layer_state.LayerState`)."""

    offset: int


class Batch:
    """New tokens of some sequences and the states they continue.

    Args:
        lengths: number of new tokens of each sequence.
        states: one for each, all alike; None: sequences without one.
        device: where the tokens are.

    Attributes:
        spans: each sequence's tokens among all T.
        adapters: each sequence's adapter; [] without states.
        rows: (B, 3) int64: address of the state's descriptor, first token, count (`SeqSlice` in ops/cpu/kernels.h).
        native: whether this forward runs on the CPU kernels; its activations are float32 then.
    """

    backend: Backend = "cpu"
    step = False  # see `state_cache.DeviceBatch`
    last_B: Tensor | None = None  # likewise

    def __init__(
        self,
        lengths: Sequence[int],
        states: Sequence[SequenceMemory] | None = None,
        device: torch.device | str = "cpu",
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

    def refill(self, states: Sequence[SequenceMemory]) -> None:
        """Continue these states instead, one for each sequence: so a captured step runs on others."""
        self._rows[:, 0] = [state.address for state in states]

    def metadata(self, layer: int) -> BatchMetadata:
        """The sequences, and the layer whose descriptor begins here in their states, as native kernels read them."""
        return BatchMetadata(self.rows.data_ptr(), len(self.lengths), layer, self.is_bf16, self.tokens)

    def metadata_for(self, state: LayerMemory) -> BatchMetadata:
        """The same, from the state of one mixer of the first sequence."""
        return self.metadata(state.offset)

    def side_by_side(self, runs: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """The outputs of a layer's mixers."""
        return [run() for run in runs]

    @cached_property
    def positions_T(self) -> Tensor:
        """(T,) int64: the position of each token in its sequence."""
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


def runs_natively(states: Sequence[SequenceMemory], device: torch.device) -> bool:
    """Whether there are kernels for these states: on the CPU, in bfloat16 or float32, all alike."""
    dtypes = {state.dtype for state in states}
    return native.available and device.type == "cpu" and len(dtypes) == 1 and dtypes <= {torch.bfloat16, torch.float32}
