"""Anthropic's API by hand; with the `anthropic` package where it is installed."""

from __future__ import annotations

import json

import pytest

HI = [{"role": "user", "content": "Hi"}]
MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Paris", "Oslo"]}}, "required": ["city"]}
TOOLS = [{"name": "weather", "description": "d", "input_schema": SCHEMA}]


def ask(server, **more):
    return server.ask("POST", MESSAGES, {"model": "tiny", "max_tokens": 6, "messages": HI, "temperature": 0} | more)


def stream(server, **more):
    body = {"model": "tiny", "max_tokens": 6, "messages": HI, "temperature": 0, "stream": True} | more
    return server.events(MESSAGES, body)


def blocks_of(events):
    """The content that a client puts together of the events of a stream."""
    found = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(found)
            found.append(event["content_block"] | {"json": ""})
        elif event["type"] == "content_block_delta":
            delta, block = event["delta"], found[event["index"]]
            field = next(name for name in ("text", "thinking", "partial_json") if name in delta)
            block["json" if field == "partial_json" else field] += delta[field]
    for block in found:
        text = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = json.loads(text or "{}")
    return found


def test_a_message_and_its_stream(server):
    status, answer = ask(server, system=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
    assert status == 200 and answer["type"] == "message" and answer["role"] == "assistant"
    assert answer["stop_reason"] == "max_tokens" and answer["content"][0]["type"] == "text"
    assert answer["usage"]["output_tokens"] == 6
    events = stream(server, system="a\nb")
    assert [event["type"] for event in events][:2] == ["message_start", "content_block_start"]
    assert [event["type"] for event in events][-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert blocks_of(events) == answer["content"] and events[0]["message"]["content"] == []
    assert events[-2]["delta"]["stop_reason"] == "max_tokens" and events[-2]["usage"]["output_tokens"] == 6
    assert "message" not in events[-1]
    used = events[-2]["usage"]
    count = server.ask("POST", COUNT, {"model": "tiny", "messages": HI, "system": "a\nb"})[1]["input_tokens"]
    assert used["input_tokens"] + used["cache_read_input_tokens"] == count


def test_the_frames_of_a_stream(server):
    raw = server.raw(
        "POST", MESSAGES + "?beta=true", {"model": "tiny", "max_tokens": 1, "messages": HI, "stream": True}
    )
    frames = raw[2].decode().split("\n\n")
    assert raw[1]["content-type"] == "text/event-stream" and frames[-1] == ""
    for frame in frames[:-1]:
        name, data = frame.split("\n")
        assert name == "event: " + json.loads(data.removeprefix("data: "))["type"]
    assert frames[-2].startswith("event: message_stop")


def test_stop_sequences(server):
    text = ask(server, max_tokens=20)[1]["content"][0]["text"]
    answer = ask(server, max_tokens=20, stop_sequences=[text[5]])[1]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", text[5])


def test_thinking_is_a_block_of_its_own_when_enabled(server):
    answer = ask(server, model="thinker", max_tokens=40, thinking={"type": "enabled", "budget_tokens": 5})[1]
    assert [block["type"] for block in answer["content"]] == ["thinking", "text"]
    for off in ({}, {"thinking": {"type": "disabled"}}):
        assert [block["type"] for block in ask(server, model="thinker", **off)[1]["content"]] == ["text"]
    events = stream(server, model="thinker", max_tokens=40, thinking={"type": "enabled", "budget_tokens": 5})
    assert blocks_of(events) == answer["content"]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_tool_call_and_the_turn_after_it(server, choice):
    more = {"model": "caller", "max_tokens": 60, "tools": TOOLS, "tool_choice": choice}
    answer = ask(server, **more)[1]
    (call,) = answer["content"]
    assert (
        answer["stop_reason"] == "tool_use" and call["name"] == "weather" and call["input"]["city"] in ("Paris", "Oslo")
    )
    (streamed,) = blocks_of(stream(server, **more))
    assert streamed["input"] == call["input"] and streamed["name"] == "weather" and streamed["id"]
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "4"}]}
    turns = [*HI, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    after = ask(server, model="caller", tools=TOOLS, tool_choice={"type": "auto"}, messages=turns)
    assert after[0] == 200 and after[1]["content"]
    assert ask(server, model="caller", tools=TOOLS, tool_choice={"type": "none"})[0] == 200


def test_the_assistants_words_are_continued(server):
    def tokens(messages):
        return server.ask("POST", COUNT, {"model": "tiny", "messages": messages})[1]["input_tokens"]

    begun = [*HI, {"role": "assistant", "content": [{"type": "text", "text": "1, 2, "}]}]
    assert ask(server, messages=begun)[0] == 200
    assert tokens(begun) == tokens(HI) + len("1, 2, "), "no end of a turn, no further beginning"


def test_hosted_tools_and_blocks_are_left_out_and_named(server):
    blocks = [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "a"}, {"type": "server_tool_use"}]
    body = {"model": "tiny", "max_tokens": 1, "messages": [*HI, {"role": "assistant", "content": blocks}, *HI],
            "tools": [{"type": "web_search_20250305", "name": "web_search"}]}  # fmt: skip
    status, headers, _ = server.raw("POST", MESSAGES, body)
    assert status == 200
    assert headers["x-tiercel-ignored"] == ("tools.web_search_20250305, messages.redacted_thinking, "
                                            "messages.server_tool_use")  # fmt: skip


def test_a_form_binds_the_answer(server):
    form = {"type": "json_schema", "schema": SCHEMA}
    for more in ({"output_format": form}, {"output_config": {"format": form}}):
        assert json.loads(ask(server, max_tokens=400, **more)[1]["content"][0]["text"])["city"] in ("Paris", "Oslo")


@pytest.mark.parametrize("more, words", [
    ({"messages": []}, "at least one"), ({"messages": [{"role": "x", "content": "a"}]}, "role must be"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "only text"),
    ({"messages": [{"role": "user", "content": 3}]}, "must be a string"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "must be a string"),
    ({"messages": [{"role": "user", "content": [3]}]}, "block with a type"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": None}, "max_tokens"), ({"temperature": "x"}, "temperature"),
    ({"tool_choice": {"type": "any"}}, "needs tools"),
    ({"tools": [{"name": "x"}]}, "input_schema"), ({"tools": [{"input_schema": {}}]}, "name"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "y"}}, "no tool"),
    ({"output_format": {"type": "xml"}}, "output_format"), ({"system": [{"type": "image"}]}, "only text"),
])  # fmt: skip
def test_what_is_wrong_is_400_in_anthropics_form(server, more, words):
    for streamed in (False, True):
        status, answer = ask(server, stream=streamed, **more)
        assert status == 400 and set(answer) == {"type", "error"} and answer["type"] == "error", answer
        assert answer["error"]["type"] == "invalid_request_error" and words in answer["error"]["message"]
    status, answer = ask(server, model="nobody")
    assert status == 404 and answer["error"]["type"] == "not_found_error"


def test_odd_values_are_answered_or_refused(server):
    full = {"model": "tiny", "max_tokens": 1, "system": [{"type": "text", "text": "s"}], "tools": [], "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "tool_use", "id": "1", "name": "f",
             "input": {}}]}, {"role": "user", "content": [
                 {"type": "tool_result", "tool_use_id": "1", "content": "4"}]}],
        "thinking": {"type": "enabled", "budget_tokens": 4}, "metadata": {"user_id": "u"}}  # fmt: skip
    from test_kinds import ODD, changed, places

    for path in places(full):
        for value in ODD[:: 1 + len(path)]:
            status, data = server.raw("POST", MESSAGES, changed(full, path, value))[::2]
            assert status < 500, (path, value, data)


def test_the_key_may_come_as_anthropics_clients_send_it(start):
    locked = start(api_key="secret")
    body = {"model": "tiny", "messages": HI}
    assert locked.ask("POST", COUNT, body, X_Api_Key="secret")[0] == 200
    for wrong in ({}, {"X_Api_Key": "other"}):
        status, answer = locked.ask("POST", COUNT, body, **wrong)
        assert status == 401 and answer["error"]["type"] == "authentication_error"


def test_the_anthropic_package(server):
    anthropic = pytest.importorskip("anthropic")
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        answer = client.messages.create(model="tiny", max_tokens=4, messages=HI)
        assert answer.content[0].text and answer.usage.output_tokens == 4
        with client.messages.stream(model="tiny", max_tokens=4, messages=HI) as streamed:
            assert "".join(streamed.text_stream) == streamed.get_final_message().content[0].text
        assert client.messages.count_tokens(model="tiny", messages=HI).input_tokens > 0
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(model="nobody", max_tokens=4, messages=HI)
