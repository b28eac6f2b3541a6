"""The state of one mixer for one sequence: the base of `mixers.paged.PagedState` and `mixers.recurrent.RecurrentState`.

Kernels read and write the same memory as this Python.  They find it through the state's descriptor, int64s at an
address that stays for the state's lifetime (`StateDescriptor` in ops/cpu/kernels.h): a header, then the fields of
every layer.  So a captured step stays valid while a sequence grows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tiercel.mixers.spec import Buffer, MixerSpec

LENGTH = 0  # where in a descriptor the number of tokens is

Descriptor = np.ndarray  # int64


class LayerState(ABC):
    """State of one mixer.

    descriptor   the mixer's own part of the state's
    offset       where that begins
    """

    descriptor: Descriptor
    offset: int

    def __init__(self, spec: MixerSpec, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.dtype, self.device = spec, dtype, device

    @property
    @abstractmethod
    def size(self) -> int:
        """How many int64s of the descriptor it takes."""

    def attach(self, descriptor: Descriptor, offset: int) -> None:
        """Use the fields of a state's descriptor from `offset` on."""
        self._whole, self.descriptor, self.offset = descriptor, descriptor[offset : offset + self.size], offset
        self.publish()

    @abstractmethod
    def publish(self) -> None:
        """Write the addresses of all buffers into the descriptor."""

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return int(self._whole[LENGTH])

    @property
    @abstractmethod
    def committed_pos(self) -> int:
        """The first token whose inputs are still held."""

    @property
    @abstractmethod
    def buffers(self) -> Mapping[str, Tensor]:
        """Everything allocated, pages aside."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Exactly the valid part of the state: views, but of pages a copy."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor], length: int, committed_pos: int) -> None:
        """Set the state to copies of tensors whose shapes are those of `shapes`."""

    @abstractmethod
    def shapes(self, length: int, committed_pos: int) -> dict[str, tuple[int, ...]]:
        """The shapes that `tensors` has at a length and committed position.

        Raises:
            ValueError: such a state cannot be.
        """


def dtype_of(buffer: Buffer, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a buffer in a state of this dtype."""
    return torch.float32 if buffer.dtype == "float32" else dtype
