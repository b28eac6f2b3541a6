"""OpenAI's API as its clients use it: the `openai` package, and requests by hand."""

from __future__ import annotations

import base64
import json
import struct

import pytest

HI = [{"role": "user", "content": "Hi there"}]


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(server, **more):
    return server.ask("POST", "/v1/chat/completions", {"model": "tiny", "messages": HI, "temperature": 0} | more)


def test_chat_and_its_usage(client):
    answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=5, temperature=0)
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason == "length"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    again = client.chat.completions.create(model="tiny", messages=HI, max_tokens=5, temperature=0)
    assert again.choices[0].message.content == choice.message.content
    assert again.usage.prompt_tokens_details.cached_tokens > 0, "the same prompt is not read twice"


def test_a_stream_is_the_same_answer(client, server):
    whole = chat(server, max_tokens=6)[1]["choices"][0]["message"]["content"]
    chunks = list(client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=6, temperature=0, stream=True, stream_options={"include_usage": True}
    ))  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[-2].choices[0].finish_reason == "length" and not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == 6
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_frames_of_a_stream(server):
    status, headers, data = server.raw("POST", "/v1/chat/completions",
                                       {"model": "tiny", "messages": HI, "max_tokens": 2, "stream": True})  # fmt: skip
    assert status == 200 and headers["content-type"] == "text/event-stream"
    frames = data.decode().split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""] and all(frame.startswith("data: ") for frame in frames[:-1])
    last = json.loads(frames[-3][6:])
    assert last["choices"][0]["delta"] == {} and "usage" not in last


def test_n_answers_of_one_prompt(client):
    answer = client.chat.completions.create(model="tiny", messages=HI, n=3, max_tokens=4, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    finished = {}
    for chunk in client.chat.completions.create(model="tiny", messages=HI, n=2, max_tokens=3, stream=True):
        for choice in chunk.choices:
            finished[choice.index] = choice.finish_reason
    assert set(finished) == {0, 1} and None not in finished.values()


def test_stop_strings_logprobs_and_seed(server):
    whole = chat(server, max_tokens=12, skip_special_tokens=True)[1]["choices"][0]["message"]["content"]
    middle = whole[len(whole) // 2]
    short = chat(server, max_tokens=12, stop=[middle])[1]["choices"][0]
    assert short["message"]["content"] == whole[: whole.index(middle)] and short["finish_reason"] == "stop"
    entries = chat(server, max_tokens=3, logprobs=True, top_logprobs=2)[1]["choices"][0]["logprobs"]["content"]
    assert len(entries) == 3 and all(len(entry["top_logprobs"]) == 2 and entry["bytes"] for entry in entries)
    one, two = (chat(server, max_tokens=8, temperature=1, seed=5)[1]["choices"] for _ in range(2))
    assert one == two


def test_thoughts_are_reasoning_content_and_counted(server):
    found = chat(server, model="thinker", max_tokens=6)[1]
    assert found["choices"][0]["message"]["reasoning_content"] and found["choices"][0]["message"]["content"] == ""
    assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] == 6
    for off in ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}):
        plain = chat(server, model="thinker", max_tokens=6, **off)[1]
        assert plain["choices"][0]["message"]["content"]
        assert plain["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_parts_roles_and_earlier_calls_are_understood(server):
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "4"},
    ]  # fmt: skip
    assert chat(server, messages=messages, max_tokens=2)[0] == 200


def test_completions(client, server):
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=4, temperature=0, logprobs=2, seed=1)
    assert answer.usage.prompt_tokens == 3 and len(answer.choices[0].logprobs.tokens) == 4
    body = {"model": "tiny", "prompt": ["abc", "xyz"], "n": 2, "max_tokens": 3}
    assert [c["index"] for c in server.ask("POST", "/v1/completions", body)[1]["choices"]] == [0, 1, 2, 3]
    ids = server.ask("POST", "/v1/completions", {"model": "tiny", "prompt": [66, 67], "max_tokens": 1, "echo": True})
    assert ids[1]["usage"]["prompt_tokens"] == 2 and ids[1]["choices"][0]["text"]
    assert (
        server.ask("POST", "/v1/completions", {"model": "tiny", "prompt": "a"})[1]["usage"]["completion_tokens"] <= 16
    )
    events = server.events("/v1/completions", {"model": "tiny", "prompt": "abc", "stream": True, "max_tokens": 3})
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_embeddings_also_as_base64(client, server):
    vectors = client.embeddings.create(model="tiny", input=["a", "b"])  # the client asks for base64
    floats = server.ask("POST", "/v1/embeddings", {"model": "tiny", "input": ["a", "b"]})[1]
    assert vectors.usage.prompt_tokens == 2
    for ours, theirs in zip(floats["data"], vectors.data, strict=True):
        assert ours["embedding"] == pytest.approx(theirs.embedding, abs=1e-6)
    raw = server.ask("POST", "/v1/embeddings", {"model": "tiny", "input": [65, 66], "encoding_format": "base64"})[1]
    assert len(struct.unpack("<32f", base64.b64decode(raw["data"][0]["embedding"]))) == 32


def test_models(client):
    assert "tiny:latest" in [model.id for model in client.models.list()]
    assert client.models.retrieve("tiny").id == "tiny"


def test_responses(client):
    answer = client.responses.create(model="tiny", input="Hi", max_output_tokens=4, temperature=0)
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output_text and answer.usage.output_tokens == 4
    events = list(client.responses.create(model="thinker", input="Hi", max_output_tokens=4, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.incomplete"
    assert "response.reasoning_summary_text.delta" in kinds
    items = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]
    more = {"temperature": 0, "max_output_tokens": 2}
    assert client.responses.create(model="tiny", input=items, instructions="Be short.", **more).output


def test_errors_have_the_class_the_client_expects(client):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=HI)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=HI, temperature=1000)


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]


@pytest.mark.parametrize(
    "path, more, words",
    [
        (CHAT, {"messages": []}, "at least one message"),
        (CHAT, {"messages": IMAGE}, "only text"),
        (CHAT, {"messages": [{"content": "x"}]}, "role is required"),
        (CHAT, {"n": 10**9}, "n must be"),
        (CHAT, {"n": 0}, "n must be"),
        (CHAT, {"top_logprobs": 3}, "needs logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "between 0 and 20"),
        (CHAT, {"max_tokens": -5}, "max_tokens"),
        (CHAT, {"stop": ["x"] * 17}, "stop must be"),
        (CHAT, {"stop": "x" * 300}, "stop must be"),
        (CHAT, {"logit_bias": {"5": 1000}}, "logit_bias"),
        (CHAT, {"response_format": {"type": "yaml"}}, "response_format"),
        (CHAT, {"modalities": ["audio"]}, "only text"),
        (CHAT, {"tools": [{"type": "function", "name": "f"}]}, "description as `function`"),
        (CHAT, {"tools": [{"type": "web"}], "tool_choice": "required"}, "no tool of this request can be called"),
        (CHAT, {"tools": [{"type": 5}]}, "needs a type"),
        (CHAT, {"chat_template_kwargs": {"x": "{{ 1 }}"}}, "chat_template_kwargs"),
        (CHAT, {"reasoning_effort": "very"}, "reasoning_effort"),
        (TEXT, {"prompt": "x", "suffix": "y"}, "suffix"),
        (TEXT, {"prompt": "x", "best_of": 5}, "best_of"),
        (TEXT, {"prompt": [99999999]}, "token id"),
        (TEXT, {"prompt": ""}, "empty"),
        (TEXT, {"prompt": "x" * 600}, "context holds 512"),
        ("/v1/embeddings", {"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ("/v1/responses", {"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ("/v1/responses", {"input": [{"type": "item_reference"}]}, "not supported"),
    ],
)
def test_what_is_wrong_is_400_in_openais_form(server, path, more, words):
    body = {"model": "tiny"} | ({"messages": HI} if path == CHAT else {}) | more
    for stream in (False, True):
        status, answer = server.ask("POST", path, body | ({} if path == "/v1/embeddings" else {"stream": stream}))
        assert status == 400, answer
        assert set(answer["error"]) == {"message", "type", "param", "code"} and words in answer["error"]["message"]
        assert answer["error"]["type"] == "invalid_request_error"


def test_a_number_out_of_any_range_is_never_our_fault(server):
    """Boundaries of every numeric field: 400 or an answer, quickly."""
    extremes = [-(2**63), -1, 0, 2**31, 2**63, 2**64, 1e308, -1e308, 10**400]
    fields = ("temperature", "top_p", "n", "seed", "max_tokens", "presence_penalty", "frequency_penalty", "top_k",
              "min_p", "repetition_penalty", "min_tokens", "top_logprobs", "max_completion_tokens")  # fmt: skip
    for field in fields:
        for value in extremes:
            status = chat(server, max_tokens=1, **{} if field == "max_tokens" else {field: value})[0]
            assert status in (200, 400), (field, value)
    for text in (b'{"model":"tiny","messages":[],"temperature":NaN}', b'{"model":"tiny","n":1e999}', b"[" * 100_000,
                 b'{"a":' * 80 + b"1" + b"}" * 80, b'"x"', b"\xff", 
                 b'{"model":"\\ud800","messages":[{}]}'):  # fmt: skip
        assert server.ask("POST", CHAT, text)[0] == 400
