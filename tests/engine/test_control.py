"""Forms, budgets and guesses in the engine: what a user asks for with SamplingParams is what comes."""

from __future__ import annotations

import json

import pytest

import tiny
from tiercel import SamplingParams, load
from tiercel.engine.draft_model import ModelDrafter
from tiercel.engine.engine import Engine
from tiercel.engine.speculative import NgramDrafter
from tiercel.errors import RequestError
from tiercel.model.cpu_runner import CPURunner
from tiercel.sampling.params import Structured

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yy"]}},
    "required": ["a"],
    "additionalProperties": False,
}
PROMPT = list(range(40, 70))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny.checkpoint(tmp_path_factory.mktemp("control"), template=tiny.TEMPLATE))


def answers(engine, asked):
    requests = [engine.add(ids, params, **more) for ids, params, more in asked]
    while not engine.idle:
        engine.step()
    return [choice for request in requests for choice in request.sequences]


def test_a_schema_asked_for_by_any_name_is_followed(model):
    for params in (SamplingParams(structured=Structured(json=SCHEMA), max_tokens=200, seed=3, n=3),
                   SamplingParams(structured_outputs={"json": SCHEMA}, max_tokens=200, temperature=0),
                   SamplingParams(structured={"choice": ['{"a": "x"}']}, max_tokens=200, stop=["never"])):  # fmt: skip
        for choice in answers(Engine(model), [(PROMPT, params, {})]):
            assert json.loads(choice.text)["a"] in ("x", "yy") and choice.finish_reason == "stop"


def test_thoughts_within_a_budget_and_then_the_form(model):
    params = SamplingParams(structured={"json": SCHEMA}, thinking_budget=5, max_tokens=200, seed=1)
    (choice,) = answers(Engine(model), [(PROMPT, params, {"thinking": "auto", "starts_in_thinking": True})])
    assert choice.constraints.thinking_tokens == 5 and choice.reasoning
    assert json.loads(choice.text)["a"] in ("x", "yy")


@pytest.mark.parametrize("guesses", ["ngrams", "itself", "another"])
def test_guessing_changes_no_token_of_any_request_in_a_mixed_batch(model, guesses):
    network = model.network if guesses == "itself" else tiny.network(seed=9)

    def drafter(sequence):
        return (
            NgramDrafter(1, 3) if guesses == "ngrams" else ModelDrafter(CPURunner(network), 300, 4096, sequence.sampler)
        )

    asked = [
        (PROMPT * 3, SamplingParams(temperature=0, max_tokens=60, ignore_eos=True), {}),
        (PROMPT, SamplingParams(seed=4, max_tokens=70, logprobs=1, n=2), {}),
        (PROMPT[3:] * 2, SamplingParams(structured={"json": SCHEMA}, seed=2, max_tokens=80), {}),
        (PROMPT[7:], SamplingParams(seed=8, thinking_budget=9, max_tokens=50, repetition_penalty=1.2),
         {"thinking": "auto", "starts_in_thinking": True}),
        (PROMPT[5:], SamplingParams(temperature=0, max_tokens=80, stop=["q"], repetition_detection=True), {}),
    ]  # fmt: skip
    plain = answers(Engine(model, slots=6), asked)
    engine = Engine(model, slots=6, drafter=drafter)
    drafted = answers(engine, asked)
    assert engine.stats.drafts_proposed > 10
    for one, other in zip(plain, drafted, strict=True):
        assert (one.token_ids, one.text, one.reasoning) == (other.token_ids, other.text, other.reasoning)
        assert (one.finish_reason, one.logprobs) == (other.finish_reason, other.logprobs)


def test_a_bad_form_is_refused_before_anything_runs(model):
    engine = Engine(model)
    with pytest.raises(RequestError, match="cannot be followed"):
        engine.add(PROMPT, SamplingParams(structured={"regex": "a{3,1}"}))
    assert engine.idle
