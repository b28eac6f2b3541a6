"""Answers of a given form and tool calls, over both APIs."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from tiercel.sampling.params import SamplingParams
from tiercel.serve.generation import ChoiceReader
from tiercel.serve.ollama.writers import WholeCalls, arguments_of
from tiercel.serve.openai.formats import call_delta
from tiercel.serve.types import GenerationRequest, Usage
from tiercel.tokenizer.stream import Piece

SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}, "size": {"enum": ["s", "m", "l"]}},
          "required": ["ok", "size"], "additionalProperties": False}  # fmt: skip
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_kept_in_every_api(server, stream):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    chat = {"model": "tiny", "messages": HI, "max_tokens": 480, "stream": stream}
    if stream:
        chunks = server.events("/v1/chat/completions", chat | {"response_format": form})
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        native = "".join(line["message"]["content"] for line in server.lines(
            "/api/chat", {"model": "tiny", "messages": HI, "format": SCHEMA}))  # fmt: skip
    else:
        text = server.ask("POST", "/v1/chat/completions", chat | {"response_format": form})[1]["choices"][0]["message"][
            "content"]  # fmt: skip
        native = server.ask("POST", "/api/generate", {"model": "tiny", "prompt": "Hi", "format": SCHEMA,
                                                      "stream": False})[1]["response"]  # fmt: skip
    for answer in (text, native):
        found = json.loads(answer)
        assert isinstance(found["ok"], bool) and found["size"] in "sml"


def test_responses_keep_a_schema_too(server):
    body = {"model": "tiny", "input": "Hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}}
    answer = server.ask("POST", "/v1/responses", body)[1]
    assert answer["status"] == "completed" and json.loads(answer["output"][0]["content"][0]["text"])["size"] in "sml"


def test_a_regex_after_the_thoughts(server):
    body = {"model": "thinker", "messages": HI, "structured_outputs": {"regex": "(yes|no)"}, "max_tokens": 300,
            "thinking_token_budget": 5}  # fmt: skip
    answer = server.ask("POST", "/v1/chat/completions", body)[1]
    assert answer["choices"][0]["message"]["content"] in ("yes", "no")
    assert 0 < answer["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 5 + len("</think>") + 1


@pytest.mark.parametrize("form", [{"regex": "("}, {"grammar": "start: nothing"}, {"json": {"type": "nonsense"}}])
def test_a_form_that_is_none_is_refused(server, form):
    status, answer = server.ask("POST", "/v1/chat/completions", {"model": "tiny", "messages": HI,
                                                                "structured_outputs": form})  # fmt: skip
    assert status == 400 and answer["error"]["message"]


def test_tools_go_to_the_template_that_knows_them(server):
    plain = server.ask("POST", "/v1/chat/completions", {"model": "caller", "messages": HI, "max_tokens": 1})[1]
    body = {"model": "caller", "messages": HI, "max_tokens": 1, "tools": [TOOL]}
    with_tool = server.ask("POST", "/v1/chat/completions", body)[1]
    assert with_tool["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"] + len("add")
    none = server.ask("POST", "/v1/chat/completions", body | {"tool_choice": "none"})[1]
    assert none["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    assert server.ask("POST", "/v1/chat/completions", body | {"tool_choice": "required"})[0] == 200
    assert "tools" in server.ask("POST", "/api/show", {"model": "caller"})[1]["capabilities"]


def said(text, cuts):
    """The parts of an answer that comes in pieces of so many characters."""
    from tiercel.tokenizer.tool_formats import ToolFormat

    choice, parts = (
        ChoiceReader(GenerationRequest([1], SamplingParams(), tool_format=ToolFormat.of("tools <tool_call>"))),
        [],
    )
    counts = Usage()
    for start in range(0, len(text), cuts):
        last = start + cuts >= len(text)
        update = SimpleNamespace(index=0, pieces=[Piece("text", text[start : start + cuts])], token_ids=[1],
                                 logprobs=None, finish_reason="stop" if last else None, stop_reason=None)  # fmt: skip
        parts.append(choice.delta(update, counts))
    return parts


@pytest.mark.parametrize("cuts", [1, 3, 7, 1000])
def test_calls_have_each_dialects_form_however_they_are_cut(cuts):
    text = ('Sure.<tool_call>{"name": "add", "arguments": {"a": [1, "é"]}}</tool_call>'
            '<tool_call>{"name": "sub", "arguments": {}}</tool_call>')  # fmt: skip
    parts = said(text, cuts)
    assert parts[-1].finish_reason == "tool_calls" and "".join(part.text for part in parts).strip() == "Sure."
    deltas = [call_delta(call) for part in parts for call in part.tool_calls]
    assert [delta["index"] for delta in deltas] == sorted(delta["index"] for delta in deltas)
    joined = ["".join(d["function"]["arguments"] for d in deltas if d["index"] == index) for index in (0, 1)]
    assert [json.loads(arguments) for arguments in joined] == [{"a": [1, "é"]}, {}]
    assert all(d["type"] == "function" and d["id"] for d in deltas if "name" in d["function"])
    calls, found = WholeCalls(), []
    for part in said(text, cuts):
        found += calls.complete(part)
    assert [(call.name, arguments_of(call)) for call in found] == [("add", {"a": [1, "é"]}), ("sub", {})]
