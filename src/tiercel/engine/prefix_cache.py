"""What has been read before, and the places one can go back to.

One tree of token runs for each key.  At the ends of some runs stand snapshots: a snapshot taken at `length` takes a
state back to any length from its `min_pos` (where its committed state stands) to `length`, so for a new prompt the best
one is not always at or before the place where the texts part: one a little behind it, cut back, is as good as exact.

    shared    how many tokens of a prompt are in the tree
    length    how many of those a snapshot can bring back

The cache has a budget in bytes.  The least useful snapshot goes first: the one that would save the fewest tokens (from
the snapshot before it), for the most bytes, and was not asked for in the longest time.  With a folder to spill to it
goes there as a file, and comes back when it is asked for.
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
from tiercel.model.pages import Page
from tiercel.model.runner import Runner
from tiercel.model.state import Snapshot

PLACE = 8.0  # how much likelier it is that somebody comes back to the end of a text than to its middle
ON_DISK = 8  # bytes of files for each byte of memory


@dataclass(eq=False)
class Entry:
    """A snapshot in memory, or its file.  weight: how likely it is wanted · used: when it last was, by the clock"""

    length: int
    min_pos: int
    nbytes: int  # with all its pages: what its file takes
    weight: float
    used: int
    snapshot: Snapshot | None = None
    file: Path | None = None


@dataclass(eq=False)
class Node:
    """A run of tokens that follows its parent's; `depth` is where it ends in the text."""

    parent: Node | None
    run: list[int]
    depth: int
    children: dict[int, Node] = field(default_factory=dict)  # by the first token of their runs
    entry: Entry | None = None
    reach: float = float("inf")  # the least `min_pos` of the entries here and below

    def settle(self) -> None:
        """Bring `reach` up to date, here and above."""
        node: Node | None = self
        while node is not None:
            own = node.entry.min_pos if node.entry is not None else float("inf")
            node.reach = min([own, *(child.reach for child in node.children.values())])
            node = node.parent

    def path(self) -> Iterator[Node]:
        """From the parent up to the root."""
        node = self.parent
        while node is not None:
            yield node
            node = node.parent


@dataclass(frozen=True)
class Found:
    """shared: tokens that are in the tree · length: how many of them `snapshot` brings back (0: none)"""

    shared: int
    length: int
    snapshot: Snapshot | None


class PrefixCache:
    """budget: bytes of snapshots in memory; 0 keeps none.  spill: a folder for those that do not fit."""

    def __init__(self, runner: Runner, budget: int, spill: Path | None = None) -> None:
        self.runner, self.budget, self.spill = runner, budget, spill
        self.roots: dict[str, Node] = {}
        self.nodes: set[Node] = set()  # those with an entry
        self.nbytes = self.disk_bytes = 0
        self.clock = self.evictions = 0
        self._pages: Counter[Page] = Counter()  # how many snapshots hold a page; it is counted once
        self._files: set[Path] = set()
        if spill is not None:
            spill.mkdir(parents=True, exist_ok=True)
            self._clean = weakref.finalize(self, _delete, self._files)

    def find(self, key: str, tokens: Sequence[int], limit: int) -> Found:
        """The snapshot that brings back most of the first `limit` of these tokens, and is able to be cut to that."""
        tokens = list(tokens)
        while True:
            shared, node = self._look(key, tokens, limit)
            if node is None or node.entry is None:
                return Found(shared, 0, None)
            self.clock += 1
            node.entry.used = self.clock
            length = min(node.entry.length, shared, limit)
            if (snapshot := self._in_memory(node)) is not None:
                return Found(shared, length, snapshot)
            self._drop(node)  # its file is gone or damaged: look for the next best

    def put(self, key: str, tokens: Sequence[int], snapshot: Snapshot, *, place: bool) -> None:
        """Keep a snapshot of these tokens, if it fits.  place: where people come back to, not somewhere on the way."""
        assert snapshot.length == len(tokens), "a snapshot holds its own tokens and no others"
        if not tokens or snapshot.nbytes > self.budget:
            return
        node = self._node(key, list(tokens))
        self.clock += 1
        weight = PLACE if place else 1.0
        if node.entry is None:
            node.entry = Entry(snapshot.length, snapshot.min_pos, snapshot.nbytes, weight, self.clock, snapshot)
            self._hold(snapshot)
            self.nodes.add(node)
            node.settle()
        else:
            node.entry.used, node.entry.weight = self.clock, max(weight, node.entry.weight)
        self._fit()

    def along(self, key: str, tokens: Sequence[int]) -> list[Snapshot]:
        """The snapshots at places on the way through these tokens, shortest first."""
        tokens, out = list(tokens), []
        node, depth = self.roots.get(key), 0
        while node is not None:
            if node.entry is not None and node.entry.weight == PLACE and (found := self._in_memory(node)) is not None:
                out.append(found)
            child = node.children.get(tokens[depth]) if depth < len(tokens) else None
            if child is None or _same(child.run, tokens, depth) < len(child.run):
                break
            node, depth = child, child.depth
        return out

    def forget(self, key: str) -> None:
        """Everything of one key."""
        root = self.roots.pop(key, None)
        for node in [node for node in self.nodes if root in (node, *node.path())]:
            self._drop(node)

    def clear(self) -> None:
        for key in list(self.roots):
            self.forget(key)

    # ── the tree ──

    def _look(self, key: str, tokens: list[int], limit: int) -> tuple[int, Node | None]:
        """How many tokens are known, and the node whose entry brings back most of them."""
        node, depth, best = self.roots.get(key), 0, None
        if node is None:
            return 0, None
        below: list[Node] = []  # where texts go on from the last token that is shared
        while True:
            if node.entry is not None and node.entry.min_pos <= limit:
                best = node  # deeper ones bring back more
            child = node.children.get(tokens[depth]) if depth < len(tokens) else None
            if child is None:
                below = list(node.children.values())
                break
            same = _same(child.run, tokens, depth)
            depth += same
            if same < len(child.run):
                below = [child]
                break
            node = child
        wanted = min(depth, limit)
        if best is None or best.entry is None or best.entry.length < wanted:
            best = _reaching(below, wanted) or best
        return depth, best

    def _node(self, key: str, tokens: list[int]) -> Node:
        """The node that ends with these tokens, made where there is none."""
        node, depth = self.roots.setdefault(key, Node(None, [], 0)), 0
        while depth < len(tokens):
            child = node.children.get(tokens[depth])
            if child is None:
                child = Node(node, tokens[depth:], len(tokens))
                node.children[tokens[depth]] = child
                return child
            same = _same(child.run, tokens, depth)
            if same < len(child.run):
                child = _split(child, same)
            node, depth = child, child.depth
        return node

    def _drop(self, node: Node) -> None:
        """Without its entry, and without what is left of the tree for nobody."""
        entry = node.entry
        if entry is None:
            return
        if entry.snapshot is not None:
            self._let_go(entry.snapshot)
        self._forget_file(entry)
        node.entry = None
        self.nodes.discard(node)
        while node.entry is None and not node.children and node.parent is not None:
            parent = node.parent
            del parent.children[node.run[0]]
            node = parent
        if node.parent is not None and node.entry is None and len(node.children) == 1:
            node = _join(node)
        node.settle()

    # ── the budget ──

    def _fit(self) -> None:
        """Send snapshots away, the least useful first, until the rest fits."""
        while self.nbytes > self.budget:
            node = min((node for node in self.nodes if node.entry and node.entry.snapshot), key=self._use)
            self.evictions += 1
            if not (self.spill is not None and self._to_disk(node, self.spill)):
                self._drop(node)
        while self.disk_bytes > ON_DISK * self.budget:
            self._drop(min((node for node in self.nodes if node.entry and node.entry.file), key=self._use))

    def _use(self, node: Node) -> float:
        """Tokens it saves, weighted by how likely that is, for each byte."""
        entry = node.entry
        assert entry is not None
        before = next((above.depth for above in node.path() if above.entry is not None), 0)
        saved = max(entry.length - before, 1)
        return entry.weight * saved / ((1 + self.clock - entry.used) * max(self._freed(entry), 1))

    def _hold(self, snapshot: Snapshot) -> None:
        self.nbytes += snapshot.own_nbytes + sum(page.nbytes for page in snapshot.pages if not self._pages[page])
        self._pages.update(snapshot.pages)

    def _let_go(self, snapshot: Snapshot) -> None:
        self.nbytes -= snapshot.own_nbytes
        for page in snapshot.pages:
            self._pages[page] -= 1
            if not self._pages[page]:
                del self._pages[page]
                self.nbytes -= page.nbytes

    def _freed(self, entry: Entry) -> int:
        """Bytes that are free without it: of its pages the last ones, which no other snapshot holds."""
        if entry.snapshot is None:
            return entry.nbytes
        own = itertools.takewhile(lambda page: self._pages[page] == 1, reversed(entry.snapshot.pages))
        return entry.snapshot.own_nbytes + sum(page.nbytes for page in own)

    def _to_disk(self, node: Node, folder: Path) -> bool:
        entry = node.entry
        assert entry is not None and entry.snapshot is not None
        file = folder / f"{secrets.token_hex(8)}.state"
        state = self.runner.new_state()
        state.restore(entry.snapshot)
        try:
            state.save(file)
        except TiercelError:  # the disk is full
            return False
        self._files.add(file)
        self._let_go(entry.snapshot)
        self.disk_bytes += entry.nbytes
        entry.snapshot, entry.file = None, file
        return True

    def _in_memory(self, node: Node) -> Snapshot | None:
        """The snapshot, read from its file where it was sent away; None when that cannot be read."""
        entry = node.entry
        assert entry is not None
        if entry.snapshot is None and entry.file is not None:
            try:
                snapshot = self.runner.load_state(entry.file).snapshot(ending=True)
            except FormatError:
                return None
            self._forget_file(entry)
            entry.snapshot = snapshot
            self._hold(snapshot)
            self._fit()
            return snapshot
        return entry.snapshot

    def _forget_file(self, entry: Entry) -> None:
        if entry.file is not None:
            entry.file.unlink(missing_ok=True)
            self._files.discard(entry.file)
            self.disk_bytes -= entry.nbytes
            entry.file = None


def _same(run: list[int], tokens: list[int], start: int) -> int:
    """How many tokens of the run stand in the text from `start` on."""
    if run == tokens[start : start + len(run)]:
        return len(run)
    return next((i for i, (a, b) in enumerate(zip(run, tokens[start:], strict=False)) if a != b), len(tokens) - start)


def _reaching(nodes: list[Node], length: int) -> Node | None:
    """A node here or below whose entry can be cut back to this length."""
    node = next((node for node in nodes if node.reach <= length), None)
    while node is not None and not (node.entry is not None and node.entry.min_pos <= length):
        node = next((child for child in node.children.values() if child.reach <= length), None)
    return node


def _split(node: Node, count: int) -> Node:
    """Cut a run in two; the new node is the first `count` tokens of it."""
    parent = node.parent
    assert parent is not None
    first = Node(parent, node.run[:count], parent.depth + count, {node.run[count]: node}, reach=node.reach)
    parent.children[node.run[0]] = first
    node.parent, node.run = first, node.run[count:]
    return first


def _join(node: Node) -> Node:
    """A run without an entry and with one continuation is one run with it."""
    (child,) = node.children.values()
    assert node.parent is not None
    child.parent, child.run = node.parent, node.run + child.run
    node.parent.children[child.run[0]] = child
    return child


def _delete(files: set[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
