"""Training data of the reasoner: conversations → token ids and what is learned of them, by many processes.

Only the last answer of a conversation is learned, reasoning and end included.  The same seed and count give the same
documents, whatever the number of processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tiercel.problems import FAMILIES, conversations
from tiercel.train.data import Documents

FOLDER = Path(__file__).parents[2] / "src/tiercel/reasoner"
SHARDS = 64  # independent streams of problems, one seed each

Ids = list[int]


def parts(messages: list[dict[str, str]]) -> tuple[str, str]:
    """What is read and what is learned, as the chat template writes them (tests compare)."""
    read = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in messages[:-1])
    return read + "<|assistant|><think>", messages[-1]["content"].removeprefix("<think>") + "<|end|>"


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def tokenized(messages: list[dict[str, str]]) -> tuple[Ids, Ids]:
    """Ids, and for each 1 where it is learned."""
    front, back = (tokenizer().encode(text, add_special_tokens=False).ids for text in parts(messages))
    return front + back, [0] * len(front) + [1] * len(back)


def shard(seed: int, number: int, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At least so many tokens: ids (N,) uint16, learned (N,) uint8, lengths of documents."""
    ids: Ids = []
    learned: Ids = []
    lengths: Ids = []
    for messages in conversations(seed * SHARDS + number):
        if len(ids) >= tokens:
            break
        some, mask = tokenized(messages)
        ids += some
        learned += mask
        lengths.append(len(some))
    return np.array(ids, np.uint16), np.array(learned, np.uint8), np.array(lengths)


def documents(seed: int, tokens: int, processes: int = 1) -> Documents:
    each = -(-tokens // SHARDS)
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            shards = list(pool.map(shard, [seed] * SHARDS, range(SHARDS), [each] * SHARDS))
    else:
        shards = [shard(seed, number, each) for number in range(SHARDS)]
    ids, learned, lengths = (np.concatenate(part) for part in zip(*shards, strict=True))
    return Documents(ids.astype(np.int32), learned, np.concatenate([[0], np.cumsum(lengths)]))


def tests(each: int) -> Iterator[tuple[str, Documents]]:
    """Held-out problems of every family, of trained sizes."""
    for name, family in FAMILIES.items():
        yield name, Documents.of(map(tokenized, (problem.messages() for problem in family.test_set(each))))


def save(documents: Documents, path: Path) -> None:
    part = path.with_suffix(".part.npz")
    np.savez(part, tokens=documents.tokens.astype(np.uint16), mask=documents.mask, starts=documents.starts)
    part.replace(path)


def load(path: Path) -> Documents:
    with np.load(path) as file:
        return Documents(file["tokens"].astype(np.int32), file["mask"], file["starts"])


def show(seed: int = 0, count: int = 5) -> None:
    for messages in itertools.islice(conversations(seed), count):
        print("".join(parts(messages)), "\n")


if __name__ == "__main__":
    show()
