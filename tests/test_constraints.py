"""Thoughts end when their budget does, the answer has its form, and circles are noticed."""

from __future__ import annotations

import json
import random

import pytest
import torch

from engine.test_speculative import accepted
from test_text_stream import make, spell
from tiercel.engine.structured_output import GrammarCompiler
from tiercel.errors import RequestError
from tiercel.sampling.constraints import RepetitionDetector, TokenConstraints
from tiercel.sampling.params import Repetition, SamplingParams, Structured
from tiercel.sampling.sampler import Sampler

KINDS = ["llama-bpe", "flagged", "untagged"]  # tags are tokens; special tokens; letters
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yy"]}},
    "required": ["a"],
    "additionalProperties": False,
}
FORM = Structured(json=SCHEMA)


@pytest.fixture(scope="module")
def grammars():
    made = {kind: GrammarCompiler(make(kind)) for kind in KINDS}
    yield made
    for one in made.values():
        one.close()


class Model:
    """Says what it is told to, and random tokens elsewhere; a row of logits depends on what was said so far."""

    def __init__(self, tokenizer, script=(), seed=0):
        self.V, self.script, self.seed, self.tokenizer = tokenizer.vocab_size + 9, list(script), seed, tokenizer

    def logits(self, said):
        dice = torch.Generator().manual_seed(hash((self.seed, tuple(said))) % 2**63)
        row = torch.randn(self.V, generator=dice)
        row[self.tokenizer.vocab_size :] = 5.0  # padding likes to be said
        if len(said) < len(self.script):
            row[self.script[len(said)]] += 50
        return row


def constrained(tokenizer, params, grammars=None, **options):
    grammar = grammars.compile(params.structured) if params.structured is not None else None
    return TokenConstraints.of(tokenizer, params, grammar=grammar, **options)


def run(tokenizer, model, params, grammars=None, draft=None, **options):
    """(ids, thoughts, answer, constraints); draft: guesses, as a function of what was said."""
    constraints = constrained(tokenizer, params, grammars, **options)
    sampler = Sampler(params, [1], model.V, eos=tokenizer.eos, constraints=constraints)
    said = []
    while len(said) < params.max_tokens:
        guess = draft(said) if draft else []
        rows = [model.logits(said + guess[:k]) for k in range(len(guess) + 1)]
        for token in accepted(torch.stack(rows), guess, sampler):
            said.append(token)
            if token in tokenizer.eos or (constraints and constraints.finish_reason) or len(said) == params.max_tokens:
                break
        if said[-1] in tokenizer.eos or (constraints and constraints.finish_reason):
            break
    stream = tokenizer.stream(
        thinking=options.get("thinking", "off"), starts_in_thinking=options.get("starts_in_thinking", False)
    )
    pieces = [p for id in said for p in stream.push(id)] + stream.finish()
    joined = {kind: "".join(p.text for p in pieces if p.kind == kind) for kind in ("thinking", "text")}
    return said, joined["thinking"], joined["text"], constraints


AUTO = {"thinking": "auto", "starts_in_thinking": True}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [0, 1, 7])
@pytest.mark.parametrize("opened", ["by the prompt", "by the model"])
def test_thoughts_end_at_their_budget_and_the_answer_follows(kind, budget, opened):
    tokenizer = make(kind)
    for seed in range(10):
        params = SamplingParams(thinking_budget=budget, seed=seed, max_tokens=60, ignore_eos=True)
        script = [] if opened == "by the prompt" else open_tag(tokenizer)
        said, thoughts, answer, constraints = run(
            tokenizer,
            Model(tokenizer, script, seed),
            params,
            thinking="auto",
            starts_in_thinking=opened == "by the prompt",
        )
        assert answer and constraints.thinking_tokens <= budget
        assert constraints.thinking_tokens == budget or len(thoughts) < 60
        if kind != "untagged":
            assert tokenizer.id_of("</think>") in said


def open_tag(tokenizer):
    return [tokenizer.id_of("<think>")] if tokenizer.id_of("<think>") is not None else spell(tokenizer, "<think>")


def test_a_second_block_of_thoughts_does_not_start_the_budget_again():
    tokenizer = make("llama-bpe")
    a = spell(tokenizer, "a")
    script = [*a * 3, tokenizer.id_of("</think>"), *a, tokenizer.id_of("<think>"), *a * 20]
    params = SamplingParams(thinking_budget=5, temperature=0, max_tokens=26)
    _, thoughts, answer, _ = run(tokenizer, Model(tokenizer, script), params, **AUTO)
    assert thoughts == "aaaaa" and answer.startswith("aaaaa")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("opened", ["by the prompt", "by the model", "not at all", "not asked for"])
def test_thoughts_are_free_and_the_answer_has_its_form(kind, opened, grammars):
    tokenizer = make(kind)
    script = {"by the model": open_tag(tokenizer)}.get(opened, [])
    options = {
        "thinking": "off" if opened == "not asked for" else "auto",
        "starts_in_thinking": opened == "by the prompt",
    }
    for seed in range(12):
        params = SamplingParams(structured=FORM, thinking_budget=9, seed=seed, max_tokens=200)
        said, thoughts, answer, constraints = run(
            tokenizer, Model(tokenizer, script, seed), params, grammars[kind], **options
        )
        assert json.loads(answer)["a"] in ("x", "yy")
        assert constraints.finish_reason == "stop" or said[-1] in tokenizer.eos
        assert bool(thoughts) == (opened in ("by the prompt", "by the model")) or (opened == "not at all")


def test_an_answer_may_begin_like_the_tag_of_thoughts(grammars):
    text = make("untagged")
    form = Structured(choice=["<thing>", "<", "<think", "no"])
    found = set()
    for seed in range(80):
        params = SamplingParams(structured=form, thinking_budget=2, seed=seed, max_tokens=60, temperature=3)
        _, _, answer, _ = run(text, Model(text, [], seed), params, grammars["untagged"], thinking="auto")
        found.add(answer)
    assert found <= set(form.choice) and len(found) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_guesses_change_nothing_where_a_form_and_a_budget_hold(kind, grammars):
    tokenizer, dice = make(kind), random.Random(3)
    for seed in range(15):
        params = SamplingParams(
            structured=FORM, thinking_budget=6, seed=seed, max_tokens=80, logprobs=1, repetition_penalty=1.3
        )
        model = Model(tokenizer, [], seed)
        truth = run(tokenizer, model, params, grammars[kind], **AUTO)[0]

        def guess(said, truth=truth, V=tokenizer.vocab_size):
            k = dice.randrange(6)
            good = dice.randrange(k + 1)
            wrong = [dice.randrange(V) for _ in range(k)]
            return (truth[len(said) : len(said) + good] + wrong)[:k]

        assert run(tokenizer, model, params, grammars[kind], draft=guess, **AUTO)[0] == truth


def test_an_answer_in_circles_ends_and_thoughts_in_circles_are_closed():
    tokenizer = make("llama-bpe")
    round_ = spell(tokenizer, "over and ")
    params = SamplingParams(temperature=0, repetition_detection={"min_count": 3, "min_tokens": 20}, max_tokens=300)
    said, _, _, constraints = run(tokenizer, Model(tokenizer, round_ * 20), params)
    assert constraints.finish_reason == "loop" and len(said) == 27
    said, thoughts, answer, constraints = run(tokenizer, Model(tokenizer, round_ * 4), params, **AUTO)
    assert thoughts == "over and " * 3 and answer and said[27] == tokenizer.id_of("</think>")


def test_circles_are_runs_of_any_length_within_bounds_and_nothing_else():
    def first(tokens, **rule):
        detector = RepetitionDetector(Repetition(**rule))
        return next((n for n, token in enumerate(tokens, 1) if detector.add(token)), None)

    assert first([5] * 300) == 96 and first(list(range(60)) * 5) == 240 and first(list(range(256)) * 5) == 1024
    assert first(list(range(257)) * 6) is None and first([1, 2] * 40 + [3] + [1, 2] * 40) is None
    assert first([1, 2] * 9, min_pattern_size=2, min_count=2, min_tokens=0) == 4
    assert first([7] * 9, min_pattern_size=3, min_count=2, min_tokens=0) == 6
    dice = random.Random(0)
    assert first([dice.randrange(40) for _ in range(20_000)]) is None


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(RequestError, match="a tokenizer"):
        TokenConstraints.of(None, SamplingParams(structured=FORM))
    with pytest.raises(RequestError, match="a tokenizer"):
        TokenConstraints.of(None, SamplingParams(thinking_budget=4))
    assert TokenConstraints.of(None, SamplingParams()) is None
