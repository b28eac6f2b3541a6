"""Tools for models whose template has none, and hosted tools on /v1/chat/completions."""

from __future__ import annotations

import json

import pytest

from tiercel.serve.generic_tools import with_tools

LOOK = {"name": "look", "parameters": {"type": "object", "properties": {"q": {"enum": ["a", "b"]}}, "required": ["q"]}}
TOOLS = [{"type": "function", "function": LOOK}]
CHAT = "/v1/chat/completions"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
CALLED = [
    {"role": "user", "content": "Look."},
    {"role": "assistant", "content": "", "tool_calls": [
        {"id": "1", "function": {"name": "look", "arguments": {"q": "a"}}},
        {"id": "2", "function": {"name": "look", "arguments": '{"q": "b"}'}}]},
    {"role": "tool", "content": "one", "tool_call_id": "1"},
    {"role": "tool", "content": [{"type": "text", "text": "two"}], "tool_call_id": "2"},
    {"role": "user", "content": "And?"},
]  # fmt: skip


@pytest.mark.parametrize("template", [PLAIN, PLAIN + "{# system #}"])
@pytest.mark.parametrize("system", [None, "Be brief.", [{"type": "text", "text": "Be brief."}]])
def test_a_conversation_with_tools_is_text(template, system):
    given = [*([{"role": "system", "content": system}] if system else []), *CALLED]
    found = with_tools(given, TOOLS, template)
    first = found.pop(0)
    assert json.dumps(LOOK) in first["content"] and first["role"] == (
        "system" if system or "system" in template else "user"
    )
    assert ("Be brief." in first["content"]) == bool(system)
    if first["role"] == "system":
        assert found.pop(0) == {"role": "user", "content": "Look."}
    else:
        assert first["content"].endswith("\n\nLook.")
    call = '<tool_call>\n{{"name": "look", "arguments": {{"q": "{}"}}}}\n</tool_call>'
    answer = "<tool_response>\n{}\n</tool_response>"
    assert found == [
        {"role": "assistant", "content": call.format("a") + "\n" + call.format("b")},
        {"role": "user", "content": answer.format("one") + "\n\n" + answer.format("two")},
        {"role": "user", "content": "And?"},
    ]
    assert given[-1] == CALLED[-1] and "tool_calls" in CALLED[1], "what was given is unchanged"


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "look"}}])
def test_a_model_without_tools_in_its_template_is_shown_them(server, choice):
    body = {"model": "tiny", "messages": CALLED[:1], "max_tokens": 40, "temperature": 0, "seed": 1}
    without = server.ask("POST", CHAT, body)[1]["usage"]["prompt_tokens"]
    status, reply = server.ask("POST", CHAT, {**body, "tools": TOOLS, "tool_choice": choice})
    assert status == 200 and reply["usage"]["prompt_tokens"] > without + 40
    if choice != "auto":
        call = reply["choices"][0]["message"]["tool_calls"][0]["function"]
        assert call["name"] == "look" and json.loads(call["arguments"])["q"] in ("a", "b")


@pytest.mark.parametrize("path", ["/api/chat", "/v1/messages", "/v1/responses"])
def test_the_other_dialects_show_them_too(server, path):
    body = {"model": "tiny", "messages": CALLED[:1], "stream": False, "max_tokens": 4, "options": {"num_predict": 4}}
    tools = {"/v1/messages": [{"name": "look", "input_schema": LOOK["parameters"]}],
             "/v1/responses": [{"type": "function", **LOOK}]}.get(path, TOOLS)  # fmt: skip
    if path == "/v1/responses":
        body = {"model": "tiny", "input": "Look.", "max_output_tokens": 4}

    def tokens(more):
        status, reply = server.ask("POST", path, body | more)
        assert status == 200, reply
        return reply["prompt_eval_count"] if path == "/api/chat" else reply["usage"]["input_tokens"]

    assert tokens({"tools": tools}) > tokens({}) + 40


def test_hosted_tools_are_left_out_and_named(server):
    hosted = [{"type": "web_search_preview"}, {"type": "custom", "custom": {"name": "x"}}]
    body = {"model": "tiny", "messages": CALLED[:1], "max_tokens": 4}
    status, headers, data = server.raw("POST", CHAT, {**body, "tools": hosted})
    assert status == 200 and headers["x-tiercel-ignored"] == "tools.web_search_preview, tools.custom"
    with_both = server.ask("POST", CHAT, {**body, "tools": [*hosted, *TOOLS]})[1]["usage"]["prompt_tokens"]
    alone = server.ask("POST", CHAT, {**body, "tools": TOOLS})[1]["usage"]["prompt_tokens"]
    assert with_both == alone > json.loads(data)["usage"]["prompt_tokens"]
