"""With the cache or without, alone or in company, interrupted or not: an answer is the same, bit for bit.

Random lives of an engine (prompts that extend, branch off, repeat; aborts, preemptions, evictions, spilling, right and
wrong guesses), each answer compared with the same prompt by hand on an empty state.  Freed memory is NaN throughout.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

import tiercel
import tiny
from by_hand import Generation
from tiercel.engine.engine import Engine
from tiercel.engine.output_processor import OutputProcessor
from tiercel.model.state import nbytes_together
from tiercel.runtime import allocator as pool
from tiercel.sampling.params import SamplingParams

LONGEST = 200
NETWORKS = {
    "every kind": lambda built: tiny.network(tiny.EVERY_KIND),
    "attention+mamba2": lambda built: tiny.network("attention+mamba2", seed=1),
    "mamba1": lambda built: tiny.network("mamba1/-", seed=2),
    "attention": lambda built: tiny.network("attention", seed=3),
    **{
        name: (lambda built, name=name: tiercel.load(built(name).folder, dtype="float32").network)
        for name in ("h1-gate_first", "h1-norm_first", "jamba-experts", "bamba-biases")
    },
}
WORDS = 90  # of the vocabulary: all networks have these


@pytest.fixture(scope="module")
def networks(built):
    done = {}

    def get(name):
        if name not in done:
            done[name] = NETWORKS[name](built)
        return done[name]

    return get


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """Every reply keeps the logits it was given; memory is spoiled before it is used and after."""
    sample = OutputProcessor.sample

    def record(self, logits_V):
        self.__dict__.setdefault("seen", []).append(logits_V.clone())
        return sample(self, logits_V)

    monkeypatch.setattr(OutputProcessor, "sample", record)
    monkeypatch.setattr(pool, "poison", True)


class Guesser:
    """Guesses what the prompts of this life often go on with, and nonsense."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice

    def match_class(self, tokens):
        return self.dice.choice([-1, 0, 1])

    def propose(self, tokens, k):
        last = [tokens[-1]] * k  # these networks repeat themselves: often right
        return last if self.dice.random() < 0.6 else [self.dice.randrange(WORDS) for _ in range(k)]

    def release(self):
        pass


class Life:
    def __init__(self, network, seed, folder) -> None:
        self.dice = dice = random.Random(seed)
        self.network = network
        self.engine = Engine(
            SimpleNamespace(network=network, tokenizer=None, max_length=LONGEST + 60),
            slots=dice.choice([1, 2, 4]),
            max_num_batched_tokens=dice.choice([4, 16, 64, 512]),
            cache_bytes=dice.choice([0, 200_000, 1 << 20, 1 << 26, 1 << 26]),
            spill=folder / str(seed) if dice.random() < 0.3 else None,
            state_bytes=dice.choice([None, None, 100_000]),
            drafter=(lambda choice: Guesser(dice)) if dice.random() < 0.5 else None,
        )
        self.texts = [self.words(dice.randrange(1, 120))]
        self.requests = []

    def words(self, count):
        return [self.dice.randrange(WORDS) for _ in range(count)]

    def ask(self, prompt):
        dice = self.dice
        params = SamplingParams(
            temperature=dice.choice([0, 0, 1.0]), seed=dice.randrange(99), max_tokens=dice.choice([1, 3, 8]),
            ignore_eos=True, n=dice.choice([1, 1, 1, min(2, self.engine.scheduler.slots)]),
        )  # fmt: skip
        turn = dice.choice([None, dice.randrange(len(prompt))])
        self.requests.append(self.engine.add(prompt, params, key=dice.choice(["", "", "other"]), turn=turn))
        self.texts.append(prompt)

    def act(self) -> None:
        dice, engine = self.dice, self.engine
        what = dice.choice("extend extend extend branch branch again new step step abort preempt evict".split())
        text = dice.choice([*self.texts[-3:], *(r.sequences[0].tokens for r in self.requests[-3:])])
        if what == "extend":
            self.ask((text + self.words(dice.randrange(1, 40)))[-LONGEST:])
        elif what == "branch":
            self.ask((text[: dice.randrange(len(text) + 1)] + self.words(dice.randrange(1, 30)))[:LONGEST])
        elif what == "again":
            self.ask(list(text[:LONGEST]))
        elif what == "new":
            self.ask(self.words(dice.choice([1, 2, 17, 70, 150])))
        elif what == "abort" and self.requests and dice.random() < 0.5:
            engine.abort(dice.choice(self.requests).id)
        elif what == "preempt" and engine.scheduler.running:
            engine.preempt(dice.choice(engine.scheduler.running))
        elif what == "evict" and engine.cache.nodes:
            engine.cache._drop(dice.choice(sorted(engine.cache.nodes, key=lambda node: (node.depth, node.run))))
        for _ in range(dice.choice([0, 1, 3])):
            engine.step()

    def finish(self) -> None:
        for _ in range(10_000):
            if self.engine.idle:
                break
            self.engine.step()
        assert self.engine.idle
        stats = self.engine.stats
        assert (stats.running, stats.waiting, stats.kv_bytes, stats.failed) == (0, 0, 0, 0)
        check_tree(self.engine.cache)
        for request in self.requests:
            for choice in request.sequences:
                self.compare(choice)

    def compare(self, choice) -> None:
        by_hand = Generation(self.network, choice.prompt_ids, choice.params, LONGEST + 60, index=choice.index)
        if choice.token_ids:
            by_hand.max_output_tokens = len(choice.token_ids)
            by_hand.run()
        assert choice.token_ids == by_hand.token_ids
        assert choice.finish_reason == ("length" if len(choice.token_ids) == choice.max_output_tokens else "abort")
        for ours, theirs in zip(choice.__dict__.get("seen", []), by_hand.__dict__.get("seen", []), strict=True):
            if self.network.native:
                assert torch.equal(ours, theirs)
            else:
                assert torch.allclose(ours, theirs, atol=1e-4)


def check_tree(cache) -> None:
    """Entries stand where their tokens end, bytes are what they add up to, no empty branches."""
    held, seen = [], 0
    stack = list(cache.roots.values())
    while stack:
        node = stack.pop()
        entries = [node.entry.min_pos] if node.entry else []
        assert node.reach == min([*entries, *(child.reach for child in node.children.values())], default=float("inf"))
        if node.entry is not None:
            seen += 1
            assert node.entry.length == node.depth and node in cache.nodes
            assert (node.entry.snapshot is None) == (node.entry.file is not None)
            if node.entry.snapshot is not None:
                assert node.entry.snapshot.length == node.depth
                held.append(node.entry.snapshot)
        elif node.parent is not None:
            assert len(node.children) > 1
        for token, child in node.children.items():
            assert child.parent is node and child.run[0] == token and child.depth == node.depth + len(child.run)
            stack.append(child)
    assert seen == len(cache.nodes) and cache.nbytes == nbytes_together(held) <= cache.budget


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 10))])
def test_any_life_of_an_engine_says_what_each_prompt_says_alone(name, part, networks, tmp_path):
    network = networks(name)
    for seed in range(part * 13, part * 13 + 13):
        life = Life(network, f"{name} {seed}", tmp_path)
        for _ in range(life.dice.randrange(3, 12)):
            life.act()
        life.finish()
