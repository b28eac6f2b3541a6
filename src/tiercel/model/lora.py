"""Adapters that are served: W + B A for some matrices, chosen row by row (LoRA, Hu et al. 2021).

    network.adapters["poet"] = adapter          `weights.adapters.read` makes it of a PEFT folder
    network.new_state("poet")                   a sequence that uses it for its whole lifetime

One forward has rows of several adapters and of none: every Linear makes its product for all rows, and each adapter
adds to its own.  A row without one gets the bits it would get without adapters; a row with one gets the same bits
whatever else is in its step, where there are kernels.  Letters: T tokens, K inputs, N outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tiercel.errors import RequestError
from tiercel.ops.cpu import native
from tiercel.ops.linear import linear
from tiercel.ops.qtensor import QTensor

Pair = tuple[Tensor | QTensor, Tensor | QTensor]


@dataclass
class Adapter:
    """pairs: our name of a Linear → A (R, K) and B (N, R) with all scales in B, float32.  id: of its bytes."""

    id: str
    pairs: dict[str, tuple[Tensor, Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(A.nbytes + B.nbytes for A, B in self.pairs.values())


@dataclass
class ActiveAdapters:
    """The adapter of each token of the forward in progress; none between forwards."""

    tokens: list[tuple[str, Tensor | None]] = field(default_factory=list)  # None: all of them

    def set_active(self, names: Sequence[str | None], lengths: Sequence[int]) -> None:
        """names, lengths: of each row."""
        self.tokens = []
        for name in dict.fromkeys(name for name in names if name is not None):
            if all(other == name for other in names):
                self.tokens.append((name, None))
                continue
            spans, at = [], 0
            for other, length in zip(names, lengths, strict=True):
                if other == name:
                    spans.append(torch.arange(at, at + length))
                at += length
            self.tokens.append((name, torch.cat(spans)))

    def clear_active(self) -> None:
        self.tokens = []


class LoRADelta:
    """What the adapters of one Linear add to its output."""

    def __init__(self, active: ActiveAdapters) -> None:
        self.active, self.pairs = active, dict[str, Pair]()

    def add(self, y_TN: Tensor, x_TK: Tensor, scale: float) -> Tensor:
        """y + scale · B A x in the rows that use one."""
        for name, tokens_T in self.active.tokens:
            if name not in self.pairs:
                continue
            A, B = self.pairs[name]
            if tokens_T is None:
                y_TN = y_TN + linear(linear(x_TK.float(), A), B, None, scale).to(y_TN.dtype)
            else:
                tokens_T = tokens_T.to(x_TK.device)
                added = linear(linear(x_TK[tokens_T].float(), A), B, None, scale)
                y_TN = y_TN.index_add(0, tokens_T, added.to(y_TN.dtype))
        return y_TN


class Adapters:
    """The adapters of a network by name, like a dict; each Linear holds its own."""

    def __init__(self, network: nn.Module) -> None:
        self._network, self._active, self._held = (
            [network],
            ActiveAdapters(),
            dict[str, Adapter](),
        )  # a list: no submodule

    def __setitem__(self, name: str, adapter: Adapter) -> None:
        if name in self._held:
            self.pop(name)
        for path, (A, B) in adapter.pairs.items():
            module: Any = self._network[0].get_submodule(path)
            low = module.adapters or LoRADelta(self._active)
            low.pairs[name] = (_laid_out(A, module), _laid_out(B, module))
            module.adapters = low
        self._held[name] = adapter

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._held:
            known = ", ".join(self._held) or "none are loaded"
            raise RequestError(f"there is no adapter {name[:80]!r}: {known}")
        return self._held[name]

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def pop(self, name: str) -> None:
        """Forget an adapter; RequestError when there is none of that name."""
        self[name]
        del self._held[name]
        for module in self._network[0].modules():
            low = getattr(module, "adapters", None)
            if isinstance(low, LoRADelta):
                low.pairs.pop(name, None)
                if not low.pairs:
                    module.adapters = None  # type: ignore[assignment]

    def set_active(self, names: Iterable[str | None], lengths: Sequence[int]) -> None:
        """Set each row's adapter for the next forward.  RequestError for one that is gone."""
        names = list(names)
        for name in names:
            if name is not None:
                self[name]
        self._active.set_active(names, lengths)

    def clear_active(self) -> None:
        self._active.clear_active()


def _laid_out(matrix: Tensor, module: nn.Module) -> Tensor | QTensor:
    """As the kernels read it, exactly, where the module's own matrix is: then a row's bits do not depend on others."""
    weight = module.weight
    if isinstance(weight, QTensor) and weight.repacked and native.available:
        packed = QTensor("F32", (matrix.shape[0], matrix.shape[1]))
        packed.put(0, matrix)
        return packed
    return matrix.to(weight.device)  # type: ignore[arg-type]
