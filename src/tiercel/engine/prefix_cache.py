"""Prefix cache: snapshots of states at the ends of token runs, in one radix tree for each key.

A snapshot taken at `length` can restore any length from its `min_pos` (the committed length of the recurrent state) to
`length`.  So the best snapshot for a new prompt is not always at or before the position where the sequences part: one
a little behind it, trimmed, is as good.

    shared    how many tokens of a prompt are in the tree
    length    how many of those a snapshot can restore

The cache has a budget in bytes.  The least useful snapshot is evicted first: the one that would save the fewest tokens
(from the snapshot before it), for the most bytes, and was not used for the longest time.  With a spill folder it is
written to a file there, and read when it is used.
"""

from __future__ import annotations

import itertools
import secrets
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tiercel.errors import FormatError, TiercelError
from tiercel.model import state_file
from tiercel.model.pages import Page
from tiercel.model.runner import Runner
from tiercel.model.state import Snapshot

TURN_END_WEIGHT = 8.0  # how much likelier a later prompt branches off at the end of a turn than inside it
DISK_BYTES_PER_BYTE = 8  # of spilled files, for each byte of the budget
CACHE_MEMORY_SHARE, MAX_CACHE_BYTES = 1 / 8, 4 << 30  # of the free memory, by default


@dataclass(eq=False)
class Entry:
    """A snapshot in memory, or its file.  weight: how likely its use is · used: when it last was, by the clock."""

    length: int
    min_pos: int
    nbytes: int  # with all its pages: the size of its file
    weight: float
    used: int
    snapshot: Snapshot | None = None
    file: Path | None = None


@dataclass(eq=False)
class Node:
    """A run of tokens that follows its parent's; depth: tokens from the root to its end."""

    parent: Node | None
    run: list[int]
    depth: int
    children: dict[int, Node] = field(default_factory=dict)  # by the first token of their runs
    entry: Entry | None = None
    reach: float = float("inf")  # the least `min_pos` of the entries here and below

    def update_reach(self) -> None:
        """Update `reach`, here and above."""
        node: Node | None = self
        while node is not None:
            own = node.entry.min_pos if node.entry is not None else float("inf")
            node.reach = min([own, *(child.reach for child in node.children.values())])
            node = node.parent

    def ancestors(self) -> Iterator[Node]:
        """Yield the nodes from the parent to the root."""
        node = self.parent
        while node is not None:
            yield node
            node = node.parent


@dataclass(frozen=True)
class CacheHit:
    """A cache lookup.  shared: tokens in the tree · length: how many of them `snapshot` restores (0: none)."""

    shared: int
    length: int
    snapshot: Snapshot | None


class PrefixCache:
    """Snapshots of the states that `runner` made.

    Args:
        budget: bytes of snapshots in memory; 0: the cache is off.
        spill: a folder for snapshots that exceed it; None: they are dropped.
    """

    def __init__(self, runner: Runner, budget: int, spill: Path | None = None) -> None:
        self.runner, self.budget, self.spill = runner, budget, spill
        self.roots: dict[str, Node] = {}
        self.nodes: set[Node] = set()  # those with an entry
        self.nbytes = self.disk_bytes = 0
        self.clock = self.evictions = 0
        self._pages: Counter[Page] = Counter()  # how many snapshots share a page
        self._files: set[Path] = set()
        if spill is not None:
            spill.mkdir(parents=True, exist_ok=True)
            self._clean = weakref.finalize(self, _delete, self._files)

    def find(self, key: str, tokens: Sequence[int], limit: int) -> CacheHit:
        """Return the snapshot that restores most of the first `limit` of these tokens."""
        tokens = list(tokens)
        while True:
            shared, node = self._look(key, tokens, limit)
            if node is None or node.entry is None:
                return CacheHit(shared, 0, None)
            self.clock += 1
            node.entry.used = self.clock
            length = min(node.entry.length, shared, limit)
            if (snapshot := self._load(node)) is not None:
                return CacheHit(shared, length, snapshot)
            self._drop(node)  # its file is gone or damaged: try the next best

    def put(self, key: str, tokens: Sequence[int], snapshot: Snapshot, *, turn_end: bool) -> None:
        """Keep a snapshot of these tokens, if it fits.  turn_end: later prompts are likely to branch off there."""
        assert snapshot.length == len(tokens), "a snapshot holds its own tokens and no others"
        if not tokens or snapshot.nbytes > self.budget:
            return
        node = self._node(key, list(tokens))
        self.clock += 1
        weight = TURN_END_WEIGHT if turn_end else 1.0
        if node.entry is None:
            node.entry = Entry(snapshot.length, snapshot.min_pos, snapshot.nbytes, weight, self.clock, snapshot)
            self._account(snapshot)
            self.nodes.add(node)
            node.update_reach()
        else:
            node.entry.used, node.entry.weight = self.clock, max(weight, node.entry.weight)
        self._evict()

    def along(self, key: str, tokens: Sequence[int]) -> list[Snapshot]:
        """Return the snapshots at turn ends of these tokens, shortest first."""
        tokens, out = list(tokens), []
        node, depth = self.roots.get(key), 0
        while node is not None:
            if (
                node.entry is not None
                and node.entry.weight == TURN_END_WEIGHT
                and (found := self._load(node)) is not None
            ):
                out.append(found)
            child = node.children.get(tokens[depth]) if depth < len(tokens) else None
            if child is None or _common(child.run, tokens, depth) < len(child.run):
                break
            node, depth = child, child.depth
        return out

    def forget(self, key: str) -> None:
        """Drop all snapshots of a key."""
        root = self.roots.pop(key, None)
        for node in [node for node in self.nodes if root in (node, *node.ancestors())]:
            self._drop(node)

    def clear(self) -> None:
        """Drop all snapshots."""
        for key in list(self.roots):
            self.forget(key)

    # ── the tree ──

    def _look(self, key: str, tokens: list[int], limit: int) -> tuple[int, Node | None]:
        """Return how many tokens are in the tree, and the node whose entry restores most of them."""
        node, depth, best = self.roots.get(key), 0, None
        if node is None:
            return 0, None
        below: list[Node] = []  # continuations of the last shared token
        while True:
            if node.entry is not None and node.entry.min_pos <= limit:
                best = node  # deeper ones restore more
            child = node.children.get(tokens[depth]) if depth < len(tokens) else None
            if child is None:
                below = list(node.children.values())
                break
            same = _common(child.run, tokens, depth)
            depth += same
            if same < len(child.run):
                below = [child]
                break
            node = child
        wanted = min(depth, limit)
        if best is None or best.entry is None or best.entry.length < wanted:
            best = _find_reaching(below, wanted) or best
        return depth, best

    def _node(self, key: str, tokens: list[int]) -> Node:
        """Return the node that ends with these tokens; it is added where there is none."""
        node, depth = self.roots.setdefault(key, Node(None, [], 0)), 0
        while depth < len(tokens):
            child = node.children.get(tokens[depth])
            if child is None:
                child = Node(node, tokens[depth:], len(tokens))
                node.children[tokens[depth]] = child
                return child
            same = _common(child.run, tokens, depth)
            if same < len(child.run):
                child = _split(child, same)
            node, depth = child, child.depth
        return node

    def _drop(self, node: Node) -> None:
        """Remove an entry, and the nodes that only led to it."""
        entry = node.entry
        if entry is None:
            return
        if entry.snapshot is not None:
            self._release(entry.snapshot)
        self._delete_file(entry)
        node.entry = None
        self.nodes.discard(node)
        while node.entry is None and not node.children and node.parent is not None:
            parent = node.parent
            del parent.children[node.run[0]]
            node = parent
        if node.parent is not None and node.entry is None and len(node.children) == 1:
            node = _join(node)
        node.update_reach()

    # ── the budget ──

    def _evict(self) -> None:
        """Spill or drop snapshots, the least useful first, until the rest fits."""
        while self.nbytes > self.budget:
            node = min((node for node in self.nodes if node.entry and node.entry.snapshot), key=self._utility)
            self.evictions += 1
            if not (self.spill is not None and self._spill(node, self.spill)):
                self._drop(node)
        while self.disk_bytes > DISK_BYTES_PER_BYTE * self.budget:
            self._drop(min((node for node in self.nodes if node.entry and node.entry.file), key=self._utility))

    def _utility(self, node: Node) -> float:
        """Return the tokens an entry saves, weighted by how likely that is, for each byte."""
        entry = node.entry
        assert entry is not None
        before = next((above.depth for above in node.ancestors() if above.entry is not None), 0)
        saved = max(entry.length - before, 1)
        return entry.weight * saved / ((1 + self.clock - entry.used) * max(self._freeable(entry), 1))

    def _account(self, snapshot: Snapshot) -> None:
        """Add a snapshot to `nbytes`; a page that several share counts once."""
        self.nbytes += snapshot.own_nbytes + sum(page.nbytes for page in snapshot.pages if not self._pages[page])
        self._pages.update(snapshot.pages)

    def _release(self, snapshot: Snapshot) -> None:
        """Take a snapshot out of `nbytes`."""
        self.nbytes -= snapshot.own_nbytes
        for page in snapshot.pages:
            self._pages[page] -= 1
            if not self._pages[page]:
                del self._pages[page]
                self.nbytes -= page.nbytes

    def _freeable(self, entry: Entry) -> int:
        """Return the bytes that dropping an entry frees: of its pages the last, which no other snapshot holds."""
        if entry.snapshot is None:
            return entry.nbytes
        own = itertools.takewhile(lambda page: self._pages[page] == 1, reversed(entry.snapshot.pages))
        return entry.snapshot.own_nbytes + sum(page.nbytes for page in own)

    def _spill(self, node: Node, folder: Path) -> bool:
        """Write an entry's snapshot to a file; False where the disk is full."""
        entry = node.entry
        assert entry is not None and entry.snapshot is not None
        file = folder / f"{secrets.token_hex(8)}.state"
        state = self.runner.host_state()
        state.restore(entry.snapshot)
        try:
            state_file.save(state, file)
        except TiercelError:  # the disk is full
            return False
        self._files.add(file)
        self._release(entry.snapshot)
        self.disk_bytes += entry.nbytes
        entry.snapshot, entry.file = None, file
        return True

    def _load(self, node: Node) -> Snapshot | None:
        """Return an entry's snapshot, read from its file where it was spilled; None when that cannot be read."""
        entry = node.entry
        assert entry is not None
        if entry.snapshot is None and entry.file is not None:
            try:
                state = self.runner.host_state()
                state_file.load(state, entry.file)
                snapshot = state.snapshot(ending=True)
            except FormatError:
                return None
            self._delete_file(entry)
            entry.snapshot = snapshot
            self._account(snapshot)
            self._evict()
            return snapshot
        return entry.snapshot

    def _delete_file(self, entry: Entry) -> None:
        if entry.file is not None:
            entry.file.unlink(missing_ok=True)
            self._files.discard(entry.file)
            self.disk_bytes -= entry.nbytes
            entry.file = None


def _common(run: list[int], tokens: list[int], start: int) -> int:
    """Return how many tokens of a run are in `tokens` from `start` on."""
    if run == tokens[start : start + len(run)]:
        return len(run)
    return next((i for i, (a, b) in enumerate(zip(run, tokens[start:], strict=False)) if a != b), len(tokens) - start)


def _find_reaching(nodes: list[Node], length: int) -> Node | None:
    """Return a node here or below whose entry can restore this length."""
    node = next((node for node in nodes if node.reach <= length), None)
    while node is not None and not (node.entry is not None and node.entry.min_pos <= length):
        node = next((child for child in node.children.values() if child.reach <= length), None)
    return node


def _split(node: Node, count: int) -> Node:
    """Split a run; return the new node of its first `count` tokens."""
    parent = node.parent
    assert parent is not None
    first = Node(parent, node.run[:count], parent.depth + count, {node.run[count]: node}, reach=node.reach)
    parent.children[node.run[0]] = first
    node.parent, node.run = first, node.run[count:]
    return first


def _join(node: Node) -> Node:
    """Join a run that has no entry and one continuation with that."""
    (child,) = node.children.values()
    assert node.parent is not None
    child.parent, child.run = node.parent, node.run + child.run
    node.parent.children[child.run[0]] = child
    return child


def _delete(files: set[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def default_budget() -> int:
    """Return the cache's bytes where nothing else is asked: an eighth of the free memory, at most 4 GiB."""
    import psutil

    return min(int(psutil.virtual_memory().available * CACHE_MEMORY_SHARE), MAX_CACHE_BYTES)
