"""Where the tokens of several sequences belong in one forward: tables that the kernels of prompts read on the device.

A forward adds `length` tokens to each row's sequence.  Its scan begins at the row's committed state, `base` ≤ `start`,
so the inputs are the pending ones, base … start − 1, and the new ones; they lie one row after another.

    tokens   the new ones of all rows; position and slot of each
    inputs   pending and new; each has its row
    chunks   of inputs, cut where positions are multiples of CHUNK and at the row's next base: those before it join the
             committed state, the last of a row stays pending
    tiles    of QUERIES tokens of a row, for attention

All tables have the sizes of a `Capacity`, so that a captured forward finds them in place; what is not used is −1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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
        sizes = [c.tokens, c.tokens, c.inputs, 3 * c.chunks, 2 * c.tiles, 9 * c.rows]
        self._all = torch.full((sum(sizes),), -1, dtype=torch.int32, device=device)
        tables = self._all.split(sizes)
        self.slot_T, self.position_T, self.row_I = tables[:3]
        self.chunks, self.tiles, self.rows = (t.view(n, -1) for t, n in zip(tables[3:], (3, 2, 9), strict=True))

    @property
    def last_B(self) -> Tensor:
        start_B, end_B, token_B = self.rows[START], self.rows[END], self.rows[TOKEN]
        last_B: Tensor = token_B + end_B - start_B - 1
        return last_B.clamp(min=0).long()

    @classmethod
    def exact(cls, pieces: Sequence[Piece], device: torch.device) -> RaggedPlan:
        plan = cls(Capacity.needed(pieces), device)
        plan.fill(pieces)
        return plan

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Write the tables, in one copy to the device."""
        c = self.capacity
        rows = torch.full((9, c.rows), -1, dtype=torch.int32)
        chunks, tiles = (
            torch.full((3, c.chunks), -1, dtype=torch.int32),
            torch.full((2, c.tiles), -1, dtype=torch.int32),
        )
        slot_T, position_T, row_I = (torch.full((n,), -1, dtype=torch.int32) for n in (c.tokens, c.tokens, c.inputs))
        token = input_ = chunk = tile = 0
        for r, p in enumerate(pieces):
            length, count = p.end - p.start, p.end - p.base
            slot_T[token : token + length] = p.slot
            position_T[token : token + length] = torch.arange(p.start, p.end, dtype=torch.int32)
            row_I[input_ : input_ + count] = r
            cuts = _chunks(p)
            table = torch.tensor(cuts, dtype=torch.int32).t() - p.base + input_
            chunks[0, chunk : chunk + len(cuts)] = r
            chunks[1:, chunk : chunk + len(cuts)] = table
            n = -(-length // QUERIES)
            tiles[0, tile : tile + n] = r
            tiles[1, tile : tile + n] = torch.arange(n, dtype=torch.int32) * QUERIES
            rows[:, r] = torch.tensor(
                [p.slot, p.start, p.base, p.next_base, p.end, token, input_, chunk, len(cuts) - 1], dtype=torch.int32
            )
            token, input_, chunk, tile = token + length, input_ + count, chunk + len(cuts), tile + n
        position_T[token:] = 0
        flat = torch.cat([t.flatten() for t in (slot_T, position_T, row_I, chunks, tiles, rows)])
        if self.device.type == "cuda":
            flat = flat.pin_memory()
        self._all.copy_(flat, non_blocking=True)
