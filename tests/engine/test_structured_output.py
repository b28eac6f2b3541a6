"""Answers keep their form, whatever the model would rather say, and hostile forms are refused in time."""

# ruff: noqa: E501

from __future__ import annotations

import gc
import json
import random
import re

import pytest
import torch

from test_text_stream import make
from tiercel.engine.structured_output import GrammarCompiler
from tiercel.errors import RequestError
from tiercel.runtime.subprocess import call
from tiercel.sampling.params import SamplingParams, Structured
from tiercel.sampling.sampler import Sampler

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "é"]}, "maxItems": 3},
        "kind": {"oneOf": [{"type": "null"}, {"const": "x"}]},
    },
    "required": ["name", "age", "tags", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars():
    made = GrammarCompiler(make("llama-bpe"))
    yield made
    made.close()


def say(grammars, structured, seed, most=400):
    """What a model without any opinion says."""
    matcher, dice, out = grammars.compile(structured).start(), random.Random(seed), []
    V = grammars.tokenizer.vocab_size + 20
    while not matcher.complete and len(out) < most:
        allowed = matcher.mask(V).nonzero()[:, 0].tolist()
        assert allowed and max(allowed) < grammars.tokenizer.vocab_size
        token = dice.choice(allowed)
        if token in grammars.tokenizer.eos:
            break
        assert token not in grammars.tokenizer.control_ids
        matcher.accept(token)
        out.append(token)
    assert matcher.mask(V)[list(grammars.tokenizer.eos)].any() or len(out) == most
    return grammars.tokenizer.decode(out, special=True)


def test_every_answer_follows_the_schema(grammars):
    for seed in range(30):
        found = json.loads(say(grammars, Structured(json=SCHEMA), seed))
        assert set(found) == {"name", "age", "tags", "kind"}
        assert len(found["name"]) <= 8 and 0 <= found["age"] <= 150 and set(found["tags"]) <= {"a", "b", "é"}
        assert found["kind"] in (None, "x")


@pytest.mark.parametrize("pattern", [r"[a-z]{3}-[0-9]+", "yes|no", r"(\p{L}|<){2,9}", "<think>a*"])
def test_every_answer_matches_the_regular_expression(grammars, pattern):
    for seed in range(20):
        said = say(grammars, Structured(regex=pattern), seed)
        assert re.fullmatch(pattern.replace(r"\p{L}", r"[^\W\d_]"), said) or len(said) > 300


def test_choices_and_grammars_and_any_object(grammars):
    texts = ['say "hi"', "back\\slash", "zwölf", "zwölf\n", "</s>"]
    assert {say(grammars, Structured(choice=texts), seed) for seed in range(60)} == set(texts)
    lark = 'start: "(" start ")" | NUMBER\nNUMBER: /[0-9]/'
    assert all(re.fullmatch(r"\(*\d\)*", say(grammars, Structured(grammar=lark), seed)) for seed in range(10))
    assert say(grammars, Structured(json_object=True), 0).startswith("{")


def test_an_answer_of_that_form_may_end_and_no_sooner(grammars):
    matcher = grammars.compile(Structured(regex="ab?")).start()
    end = next(iter(grammars.tokenizer.eos))
    (a,), (b,) = grammars.tokenizer.encode("a", bos=False), grammars.tokenizer.encode("b", bos=False)
    assert matcher.mask(900)[a] and not matcher.mask(900)[end]
    matcher.accept(a)
    assert matcher.mask(900)[end] and matcher.mask(900)[b] and not matcher.complete
    matcher.accept(b)
    assert matcher.complete and matcher.mask(900).nonzero()[:, 0].tolist() == sorted(grammars.tokenizer.eos)


def test_texts_of_sentencepiece_follow_a_form_too():
    grammars = GrammarCompiler(make("first"))
    for seed in range(5):
        assert set(json.loads(say(grammars, Structured(json=SCHEMA), seed))) == {"name", "age", "tags", "kind"}
    grammars.close()


def test_a_grammar_is_compiled_once(grammars):
    assert grammars.compile(Structured(json=SCHEMA)) is grammars.compile(Structured(json=json.dumps(SCHEMA)))


def test_what_of_a_schema_is_not_enforced_is_told(grammars):
    loose = grammars.compile(Structured(json={"type": "array", "items": {"type": "integer"}, "uniqueItems": True}))
    assert "uniqueItems" in loose.ignored[0] and not grammars.compile(Structured(json=SCHEMA)).ignored


BOTTOMLESS = {"type": "string"}
for _ in range(100):
    BOTTOMLESS = {"type": "object", "properties": {"a": BOTTOMLESS}}

HOSTILE = {
    "brackets": lambda: Structured(regex="(" * 60_000 + "a" + ")" * 60_000),
    "deep schema": lambda: Structured(json=BOTTOMLESS),
    "deep text": lambda: Structured(json="[" * 100_000),
    "too long": lambda: Structured(regex="a" * 600_000),
    "no json": lambda: Structured(json="{"),
    "no schema": lambda: Structured(json={"type": "nothing"}),
    "no regex": lambda: Structured(regex="a{2,1}"),
    "look-ahead": lambda: Structured(regex="(?=a)b"),
    "endless": lambda: Structured(grammar="start: start"),
    "no start": lambda: Structured(grammar='begin: "a"'),
    "references": lambda: Structured(json={"$ref": "#"}),
    "stack": lambda: Structured(grammar="start: r0\n" + "".join(f'r{i}: r{i + 1} r{i + 1} | "a{i}"\n' for i in range(5000))
                                + 'r5000: "x"'),
    "multiples": lambda: Structured(json={"allOf": [{"type": "integer", "multipleOf": k} for k in (99991, 99989, 99971)]}),
    "all of any": lambda: Structured(json={"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}} for j in
                                     range(3)]} for i in range(12)]}),
    "two forms": lambda: Structured(json={}, regex="a"),
    "number": lambda: Structured(json={"type": "integer", "minimum": float("nan")}),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_form_is_refused_within_two_seconds_in_one_line(grammars, name, monkeypatch):
    grammars.compile(Structured(choice=[name]))  # starts the worker where the last one was killed
    limits = []

    def called(process, job, timeout, max_bytes):
        limits.append(timeout)
        return call(process, job, timeout, max_bytes)

    monkeypatch.setattr("tiercel.engine.structured_output.call", called)
    with pytest.raises(RequestError) as error:
        grammars.compile(HOSTILE[name]())
    assert all(limit <= 2 for limit in limits[:1])
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_large_honest_schemas_are_accepted(grammars):
    fields = {
        f"field_{i}": {"type": ["string", "null"], "description": "x" * 300, "maxLength": 65_536} for i in range(10)
    }
    tools = [{"type": "object", "properties": {"name": {"const": f"tool_{i}"}, "arguments": {"type": "object",
             "properties": fields, "required": ["field_1"]}}, "required": ["name", "arguments"]} for i in range(120)]  # fmt: skip
    schema = {"anyOf": tools}
    assert 400_000 < len(json.dumps(schema)) < 512 << 10
    assert not grammars.compile(Structured(json=schema)).ignored


def test_a_form_and_limits_that_contradict_it_are_refused_when_it_shows(grammars):
    from tiercel.sampling.constraints import TokenConstraints

    params = SamplingParams(structured=Structured(regex="a+"), allowed_token_ids=[5], max_tokens=9)
    constraints = TokenConstraints.of(grammars.tokenizer, params, grammar=grammars.compile(params.structured))
    sampler = Sampler(params, [1], grammars.tokenizer.vocab_size, constraints=constraints)
    with pytest.raises(RequestError, match="no token is left"):
        sampler.sample(torch.zeros(grammars.tokenizer.vocab_size))


def test_the_process_that_tries_grammars_goes_with_who_asked_for_it():
    grammars = GrammarCompiler(make("llama-bpe"))
    grammars.compile(Structured(regex="a"))
    process = grammars._worker.process
    assert process.poll() is None
    del grammars
    gc.collect()
    assert process.poll() is not None
