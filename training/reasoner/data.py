"""Training rows of the reasoner: conversations → token ids, packed into rows of 512, by many processes.

A row is uint16: the id in the low ten bits, LEARN where the token is to be learned (the last answer and its end),
START where a conversation begins.  The same seed and count give the same rows, whatever the number of processes.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tiercel.problems import conversations

FOLDER = Path(__file__).parents[2] / "src/tiercel/reasoner"
LENGTH = 512
LEARN, START, ID = 1 << 15, 1 << 14, (1 << 10) - 1
SHARDS = 64  # independent streams of problems, one seed each
OPEN = 8  # rows that are filled at the same time, so that little room is lost


def parts(messages: list[dict[str, str]]) -> tuple[str, str]:
    """What is read and what is learned, as the chat template writes them (tests compare)."""
    read = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages[:-1])
    return read + "<|assistant|><think>", messages[-1]["content"].removeprefix("<think>") + "<|end|>"


def shard(seed: int, number: int, rows: int) -> np.ndarray:
    """(rows, LENGTH) uint16."""
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    stream = conversations(seed * SHARDS + number)
    full: list[list[int]] = []
    filling: list[list[int]] = [[] for _ in range(OPEN)]
    while len(full) < rows:
        read, learned = parts(next(stream))
        front = tokenizer.encode(read, add_special_tokens=False).ids
        ids = front + [id | LEARN for id in tokenizer.encode(learned, add_special_tokens=False).ids]
        ids[0] |= START
        if len(ids) > LENGTH:
            continue
        fitting = [row for row in filling if len(row) + len(ids) <= LENGTH]
        if not fitting:
            fullest = max(filling, key=len)
            filling.remove(fullest)
            full.append(fullest)
            filling.append(row := [])
            fitting = [row]
        max(fitting, key=len).extend(ids)
    found = np.zeros((rows, LENGTH), np.uint16)
    for i, row in enumerate(full):
        found[i, : len(row)] = row
    return found


def rows(seed: int, count: int, processes: int = 1) -> np.ndarray:
    """(count, LENGTH) uint16; row i comes from shard i mod SHARDS, so that a batch mixes them."""
    each = -(-count // SHARDS)
    with ProcessPoolExecutor(processes) as pool:
        shards = list(pool.map(shard, [seed] * SHARDS, range(SHARDS), [each] * SHARDS))
    return np.stack(shards, 1).reshape(-1, LENGTH)[:count]
