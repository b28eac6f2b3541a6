"""What programs around language models ask for: forced calls, scores of a prompt, many answers, tenants, LiteLLM."""

from __future__ import annotations

import json
import math

import pytest

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi there"}]


def tool(name, **parameters):
    schema = {"type": "object", "properties": parameters, "required": list(parameters), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [tool("weather", city={"enum": ["Paris", "Oslo"]}), tool("clock", hour={"enum": [1, 2]})]


@pytest.mark.parametrize("choice, names", [
    ("required", {"weather", "clock"}),
    ({"type": "function", "function": {"name": "clock"}}, {"clock"}),
])  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_can_be_forced(server, choice, names, stream):
    """By a model of random weights, which would never make one."""
    body = {"model": "caller", "messages": HI, "tools": TOOLS, "tool_choice": choice, "max_tokens": 120, "seed": 3}
    if stream:
        deltas = [event["choices"][0] for event in server.events(CHAT, body | {"stream": True})]
        pieces = [call for delta in deltas for call in delta["delta"].get("tool_calls", ())]
        name, arguments = pieces[0]["function"]["name"], "".join(piece["function"]["arguments"] for piece in pieces)
        said, finish = "".join(delta["delta"].get("content") or "" for delta in deltas), deltas[-1]["finish_reason"]
    else:
        answer = server.ask("POST", CHAT, body)[1]["choices"][0]
        (call,) = answer["message"]["tool_calls"]
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        said, finish = answer["message"]["content"] or "", answer["finish_reason"]
    assert name in names and said == "" and finish == "tool_calls"
    given = json.loads(arguments)
    assert given in ([{"city": "Paris"}, {"city": "Oslo"}] if name == "weather" else [{"hour": 1}, {"hour": 2}])


def test_a_call_can_be_forced_over_responses_too(server):
    flat = [{"type": "function", **each["function"]} for each in TOOLS]
    body = {"model": "caller", "input": "Hi", "tools": flat, "tool_choice": {"type": "function", "name": "clock"}}
    (call,) = server.ask("POST", "/v1/responses", body)[1]["output"]
    assert (
        call["type"] == "function_call" and call["name"] == "clock" and json.loads(call["arguments"])["hour"] in (1, 2)
    )


@pytest.mark.parametrize("more, words", [
    ({"tool_choice": "required"}, "needs tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}, "tools": TOOLS}, "no tool"),
    ({"tool_choice": {"type": "function", "function": 3}, "tools": TOOLS}, "tool_choice must be"),
    ({"tools": TOOLS, "response_format": {"type": "json_object"}, "guided_regex": "a"}, "one form"),
])  # fmt: skip
def test_a_call_that_cannot_be_forced_is_refused(server, more, words):
    status, answer = server.ask("POST", CHAT, {"model": "caller", "messages": HI} | more)
    assert status == 400 and words in answer["error"]["message"]


def test_a_prompt_is_scored_as_evaluations_do_it(server):
    """The logprob of each token of the prompt is that of the same token when it was the answer."""
    said = server.ask("POST", TEXT, {"model": "tiny", "prompt": "abc", "max_tokens": 6, "temperature": 0, "logprobs": 1,
                                     "ignore_eos": True, "skip_special_tokens": False})[1]["choices"][0]  # fmt: skip
    ids = server.service.models.loaded[next(iter(server.service.models.loaded))].model.tokenizer.encode
    prompt = [*ids("abc"), *(ids(said["text"], special=True))]
    for tokens in (0, 1):
        body = {"model": "tiny", "prompt": [prompt, prompt], "max_tokens": tokens, "echo": True, "logprobs": 1}
        status, answer = server.ask("POST", TEXT, body | {"temperature": 0, "ignore_eos": True})
        assert status == 200 and [choice["index"] for choice in answer["choices"]] == [0, 1]
        found = answer["choices"][1]["logprobs"]
        assert len(found["tokens"]) == len(prompt) + tokens and found["token_logprobs"][0] is None
        assert found["token_logprobs"][3:9] == said["logprobs"]["token_logprobs"]
        assert all(found["token_logprobs"][i] == max(found["top_logprobs"][i].values()) for i in range(3, 9)), "greedy"
        assert answer["usage"]["completion_tokens"] == 2 * tokens
    if tokens:
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(prompt) - 1, "and it is read once"
    streamed = server.events(TEXT, body | {"prompt": prompt, "stream": True})
    assert streamed[0]["choices"][0]["logprobs"] == {
        key: value[: len(prompt)] for key, value in found.items()
    } and streamed[0]["choices"][0]["text"].startswith("abc")  # fmt: skip


def test_a_long_prompt_is_scored_in_pieces_and_counts_what_it_must(server):
    body = {"model": "tiny", "prompt": "x" * 200, "max_tokens": 0, "echo": True, "logprobs": 0}
    found = server.ask("POST", TEXT, body)[1]
    scores = found["choices"][0]["logprobs"]["token_logprobs"]
    assert len(scores) == 200 and all(math.isfinite(score) and score < 0 for score in scores[1:])
    assert found["usage"] == found["usage"] | {"prompt_tokens": 200, "completion_tokens": 0}


def test_more_answers_than_slots_come_one_after_another(start):
    server = start(slots=2)
    body = {"model": "tiny", "prompt": "Why?", "n": 7, "max_tokens": 5, "seed": 4, "ignore_eos": True, "temperature": 1}
    few = server.ask("POST", TEXT, body)[1]["choices"]
    many = start(slots=8).ask("POST", TEXT, body)[1]["choices"]
    assert [choice["index"] for choice in few] == list(range(7)) and few == many
    assert len({choice["text"] for choice in few}) > 1


def test_what_one_key_has_said_is_not_reused_for_another(start):
    server = start(api_key="a", api_keys=("b",))
    body = {"model": "tiny", "prompt": "A secret that is long enough", "max_tokens": 1}

    def cached(key, **more):
        answer = server.ask("POST", TEXT, body | more, Authorization=f"Bearer {key}")[1]
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached("a"), cached("b"), cached("a") > 0, cached("b") > 0] == [0, 0, True, True]
    assert [cached("a", cache_salt="x"), cached("a", cache_salt="x") > 0] == [0, True], "also by what a client adds"
    assert server.ask("POST", TEXT, body, Authorization="Bearer c")[0] == 401


def test_loading_a_model_is_no_request_of_anybodys(start, caplog):
    server = start()
    with caplog.at_level("INFO"):
        server.ask("POST", "/api/generate", {"model": "tiny"})
    (loaded,) = server.service.models.loaded.values()
    assert (loaded.engine.stats.requests, loaded.engine.stats.generated_tokens) == (0, 0)
    assert not any("prompt tokens reused" in record.message for record in caplog.records)


def test_verbose_show_lists_the_tensors(server):
    found = server.ask("POST", "/api/show", {"model": "tiny", "verbose": True})[1]["tensors"]
    assert len(found) > 10 and all(set(tensor) == {"name", "type", "shape"} for tensor in found)


# ── LiteLLM ──


@pytest.fixture(scope="module")
def litellm():
    import os
    import warnings

    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it fetches prices when it is imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("litellm")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
@pytest.mark.parametrize("provider", ["openai", "ollama_chat"])
def test_litellm_completes_streams_and_calls(server, litellm, provider):
    base = server.url + ("/v1" if provider == "openai" else "")
    more = {"api_base": base, "api_key": "none", "messages": HI, "max_tokens": 5, "temperature": 0}
    answer = litellm.completion(model=f"{provider}/tiny", **more)
    text = answer.choices[0].message.content
    assert text and answer.usage.completion_tokens == 5
    chunks = list(litellm.completion(model=f"{provider}/tiny", stream=True, **more))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(model=f"{provider}/nobody", num_retries=0, max_retries=0, **more)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own
def test_litellm_gets_a_forced_call(server, litellm):
    answer = litellm.completion(
        model="openai/caller", api_base=server.url + "/v1", api_key="none", messages=HI, tools=TOOLS,
        tool_choice="required", max_tokens=120,
    )  # fmt: skip
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name in ("weather", "clock") and json.loads(call.function.arguments)
