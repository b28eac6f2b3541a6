"""Four tasks on which attention and state-space layers are said to part, and one on which they should not.

    recall    MQAR (Zoology, arXiv 2312.04927): k v k v …, then every key again in another order; say its value
    copy      selective copying (Mamba, arXiv 2312.00752; MAD, arXiv 2403.17844): say the letters scattered in noise
    istree    IsTree with chain of thought (arXiv 2402.18510): edges, then the depth-first walk from node 0, the verdict
    parity    after every bit, whether the ones so far are odd (arXiv 2411.12537): the control, nobody should keep it up

Length extrapolation is each task at the sizes of `longer`, by the networks that were trained at `size`.

All tokens are numbers below VOCABULARY.  `make` gives inputs and targets (B, L) int64: what is to be said after each
token, or IGNORE; inputs of a task that speaks more than once hold the right earlier answers, so a row in which every
target is the likeliest token is a row that greedy decoding writes without a mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

VOCABULARY = 256
IGNORE = -100
NOISE, SEPARATOR, TREE, NO_TREE = 252, 253, 254, 255
KEYS = 64  # keys are tokens 0 … 63, values 64 … 127
LETTERS = 16  # of copy; istree: nodes are tokens 0, 1, …

Made = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Task:
    """size: of training, in `unit`; longer: only examined.

    measure: what counts as right: "tokens" each by itself, "rows" whole ones, "last" the last token of each.
    """

    name: str
    what: str
    unit: str
    size: int
    longer: tuple[int, ...]
    measure: str
    chance: float
    make: Callable[[np.random.Generator, int, int], Made]


def recall(random: np.random.Generator, rows: int, pairs: int) -> Made:
    """`pairs` different keys, each with a value; then all keys, each followed by its value."""
    keys = random.random((rows, KEYS)).argsort(1)[:, :pairs]
    values = random.integers(KEYS, 2 * KEYS, (rows, pairs))
    order = random.random((rows, pairs)).argsort(1)
    told = np.stack([keys, values], 2).reshape(rows, -1)
    asked = np.stack([np.take_along_axis(t, order, 1) for t in (keys, values)], 2).reshape(rows, -1)
    tokens = np.concatenate([told, asked], 1)
    targets = np.full_like(tokens, IGNORE)
    targets[:, 2 * pairs :: 2] = tokens[:, 2 * pairs + 1 :: 2]
    return tokens[:, :-1], targets[:, :-1]


def copy(random: np.random.Generator, rows: int, room: int, letters: int = 12) -> Made:
    """`letters` letters at random places of `room`, noise elsewhere; then the separator and the letters in order."""
    said = random.integers(0, LETTERS, (rows, letters))
    places = np.sort(random.random((rows, room)).argsort(1)[:, :letters], 1)
    shown = np.full((rows, room), NOISE)
    np.put_along_axis(shown, places, said, 1)
    tokens = np.concatenate([shown, np.full((rows, 1), SEPARATOR), said], 1)
    targets = np.full_like(tokens, IGNORE)
    targets[:, room:-1] = said
    return tokens[:, :-1], targets[:, :-1]


def parity(random: np.random.Generator, rows: int, bits: int) -> Made:
    tokens = random.integers(0, 2, (rows, bits))
    return tokens, tokens.cumsum(1) % 2


def istree(random: np.random.Generator, rows: int, nodes: int) -> Made:
    """Two hubs, every other node joins one of them, and one edge more: a tree where it joins the two halves."""
    longest = 2 * (nodes - 1) + 1 + 2 * nodes
    tokens = np.full((rows, longest), NOISE)
    targets = np.full((rows, longest), IGNORE)
    for i in range(rows):
        edges = graph(random, nodes)
        steps, verdict = walk(edges, nodes)
        text = [node for edge in edges for node in edge] + [SEPARATOR] + steps + [TREE if verdict else NO_TREE]
        tokens[i, : len(text)] = text
        first = 2 * (nodes - 1)
        targets[i, first : len(text) - 1] = text[first + 1 :]
    return tokens[:, :-1], targets[:, :-1]


def graph(random: np.random.Generator, nodes: int) -> list[tuple[int, int]]:
    """n − 1 edges in random order and direction; about half of the graphs are trees."""
    names = random.permutation(nodes).tolist()
    hubs, others = names[:2], names[2:]
    side = random.integers(0, 2, len(others)).tolist()
    edges = [(hubs[s], node) for s, node in zip(side, others, strict=True)]
    halves: list[list[int]] = [[hubs[0]], [hubs[1]]]
    for s, node in zip(side, others, strict=True):
        halves[s].append(node)
    edges.append(_joining(random, halves) if random.random() < 0.5 else _closing(random, halves, edges))
    turned = [(b, a) if random.random() < 0.5 else (a, b) for a, b in edges]
    return [turned[j] for j in random.permutation(len(turned))]


def _joining(random: np.random.Generator, halves: list[list[int]]) -> tuple[int, int]:
    a, b = (half[random.integers(len(half))] for half in halves)
    return a, b


def _closing(random: np.random.Generator, halves: list[list[int]], edges: list[tuple[int, int]]) -> tuple[int, int]:
    """Two leaves of one hub, which closes a circle; of the larger half, since the other may have none."""
    half = max(halves, key=len)
    a, b = random.choice(half[1:], 2, replace=False).tolist()
    return a, b


def walk(edges: list[tuple[int, int]], nodes: int) -> tuple[list[int], bool]:
    """Every node the walk stands on, from 0 and back, and whether the graph is a tree.

    Neighbours in the order of their edges; it stops at the first node that it meets a second time by a new edge.
    """
    near: list[list[int]] = [[] for _ in range(nodes)]
    for a, b in edges:
        near[a].append(b)
        near[b].append(a)
    steps, met = [0], {0}

    def go(node: int, came_from: int) -> bool:
        for other in near[node]:
            if other == came_from:
                continue
            steps.append(other)
            if other in met:
                return False
            met.add(other)
            if not go(other, node):
                return False
            steps.append(node)
        return True

    return steps, go(0, -1) and len(met) == nodes


def _named(*tasks: Task) -> dict[str, Task]:
    return {task.name: task for task in tasks}


TASKS = _named(
    Task("recall", "associative recall (MQAR)", "pairs", 16, (32, 64), "tokens", 1 / KEYS, recall),
    Task("copy", "selective copying of 12 letters", "places", 48, (96, 192), "rows", 0.0, copy),
    Task("istree", "IsTree with chain of thought", "nodes", 10, (12, 16), "rows", 0.0, istree),
    Task("parity", "parity (control)", "bits", 32, (64, 128), "last", 0.5, parity),
)
SMALL = _named(
    replace(TASKS["recall"], size=4, longer=(8, 16)),
    replace(
        TASKS["copy"], what="selective copying of 4 letters", size=12, longer=(24, 48), make=partial(copy, letters=4)
    ),
    replace(TASKS["istree"], size=6, longer=(8,)),
    replace(TASKS["parity"], size=8, longer=(16, 32)),
)
