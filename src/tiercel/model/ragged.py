"""Where the tokens of several sequences belong in one forward: tables that the kernels of prompts read on the device.

A forward adds `length` tokens to each row's sequence.  Its scan begins at the row's committed state, `base` ≤ `start`,
so the inputs are the pending ones, base … start − 1, and the new ones; they lie one row after another.

    tokens   the new ones of all rows; id, position and slot of each
    inputs   pending and new; each has its row
    chunks   of inputs, cut where positions are multiples of CHUNK and at the row's next base: those before it join the
             committed state, the last of a row stays pending
    tiles    of QUERIES tokens of a row, for attention

All tables have the sizes of a `Capacity`, so that a captured forward finds them in place; what is not used is −1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK, QUERIES = 256, 128
SLOT, START, BASE, NEXT, END, TOKEN, INPUT, FIRST, WHOLE = range(9)  # rows of `RaggedPlan.rows`


class Capacity(NamedTuple):
    """How many tokens, rows, inputs, chunks and tiles there may be."""

    tokens: int
    rows: int
    inputs: int
    chunks: int
    tiles: int

    @classmethod
    def of(cls, tokens: int, rows: int, pending: int) -> Capacity:
        """Enough for any `rows` sequences with `tokens` new tokens, each with up to `pending` inputs before them."""
        inputs = tokens + rows * pending
        return cls(tokens, rows, inputs, inputs // CHUNK + 3 * rows, tokens // QUERIES + rows)

    @classmethod
    def needed(cls, pieces: Sequence[Piece]) -> Capacity:
        """What these take."""
        chunks = sum(len(_chunks(p)) for p in pieces)
        tiles = sum(-(-(p.end - p.start) // QUERIES) for p in pieces)
        inputs = sum(p.end - p.base for p in pieces)
        return cls(sum(p.end - p.start for p in pieces), len(pieces), inputs, chunks, tiles)


class Piece(NamedTuple):
    """One row's part: new tokens start … end − 1, a scan from base, a committed state moved on to next_base."""

    slot: int
    start: int
    end: int
    base: int
    next_base: int


def _chunks(piece: Piece) -> list[tuple[int, int]]:
    """The positions that each chunk begins and stops at; the last one is what stays pending."""
    whole, at = [], piece.base
    while at < piece.next_base:
        stop = min((at // CHUNK + 1) * CHUNK, piece.next_base)
        whole.append((at, stop))
        at = stop
    return [*whole, (piece.next_base, piece.end)]


class RaggedPlan:
    """The tables of one forward, on a device.  last_B: the number of each row's last token, 0 where there is no row."""

    def __init__(self, capacity: Capacity, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        c = capacity
        self._sizes = [c.tokens, c.tokens, c.tokens, c.inputs, 3 * c.chunks, 2 * c.tiles, 9 * c.rows]
        # each begins at 16 bytes: kernels are compiled anew for addresses that do not
        self._all = torch.full((sum(-(-n // 4) * 4 for n in self._sizes),), -1, dtype=torch.int32, device=device)
        tables = self._parts(self._all)
        self.id_T, self.slot_T, self.position_T, self.row_I = tables[:4]
        self.chunks, self.tiles, self.rows = (t.view(n, -1) for t, n in zip(tables[4:], (3, 2, 9), strict=True))

    def _parts(self, flat: Tensor) -> list[Tensor]:
        return [t[:n] for t, n in zip(flat.split([-(-n // 4) * 4 for n in self._sizes]), self._sizes, strict=True)]

    @property
    def last_B(self) -> Tensor:
        start_B, end_B, token_B = self.rows[START], self.rows[END], self.rows[TOKEN]
        last_B: Tensor = token_B + end_B - start_B - 1
        return last_B.clamp(min=0).long()

    @classmethod
    def exact(
        cls, pieces: Sequence[Piece], device: torch.device, ids: Sequence[Sequence[int]] | None = None
    ) -> RaggedPlan:
        plan = cls(Capacity.needed(pieces), device)
        plan.fill(pieces, ids)
        return plan

    def fill(self, pieces: Sequence[Piece], ids: Sequence[Sequence[int]] | None = None) -> None:
        """Write the tables, in one copy to the device.  ids: of each row's new tokens."""
        flat = torch.full((len(self._all),), -1, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        tables = [t.numpy() for t in self._parts(flat)]
        id_T, slot_T, position_T, row_I = tables[:4]
        chunks, tiles, rows = (t.reshape(n, -1) for t, n in zip(tables[4:], (3, 2, 9), strict=True))
        slot, start, end, base, next_ = np.array(pieces, dtype=np.int32).T
        length, count, row = end - start, end - base, np.arange(len(pieces))
        cuts = [_chunks(piece) for piece in pieces]
        whole = np.array([len(each) for each in cuts])
        tile = -(-length // QUERIES)
        token, input_, first, first_tile = (np.cumsum(n) - n for n in (length, count, whole, tile))
        T, I = int(length.sum()), int(count.sum())
        id_T[:], position_T[:] = 0, 0
        if ids is not None:
            id_T[:T] = np.concatenate([np.asarray(each, dtype=np.int32) for each in ids])
        slot_T[:T] = slot.repeat(length)
        position_T[:T] = np.arange(T) + (start - token).repeat(length)
        row_I[:I] = row.repeat(count)
        owner = row.repeat(whole)
        chunks[0, : len(owner)] = owner
        chunks[1:, : len(owner)] = np.concatenate(cuts).T + (input_ - base)[owner]
        owner = row.repeat(tile)
        tiles[0, : len(owner)] = owner
        tiles[1, : len(owner)] = (np.arange(len(owner)) - first_tile[owner]) * QUERIES
        rows[:, : len(pieces)] = slot, start, base, next_, end, token, input_, first, whole - 1
        self._all.copy_(flat, non_blocking=True)
