"""Kinds of requests that failed once: what each field may hold, the forms of an answer, switches, functions, limits."""

from __future__ import annotations

import copy
import http.client
import json
import random

import pytest

HI = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
CLOSED = SCHEMA | {"additionalProperties": False}
FUNCTION = {"name": "look", "description": "d", "parameters": CLOSED}
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def chat(server, **more):
    return server.ask("POST", CHAT, {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 4} | more)


# ── odd values of every field

FULL = {
    CHAT: {"model": "tiny", "max_tokens": 1, "stop": ["x"], "logit_bias": {"65": 1.0}, "stream_options": {},
           "messages": [*HI, {"role": "assistant", "content": [{"type": "text", "text": "a"}], "tool_calls": [
               {"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
               {"role": "tool", "tool_call_id": "1", "content": "4"}],
           "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "none", "response_format":
           {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, "reasoning": {"effort": "low"},
           "chat_template_kwargs": {"a": 1}, "metadata": {"a": "b"}, "modalities": ["text"]},
    TEXT: {"model": "tiny", "prompt": ["a"], "max_tokens": 1, "structured_outputs": {"json": SCHEMA}, "logprobs": 1,
           "stop_token_ids": [1]},
    RESPONSES: {"model": "tiny", "max_output_tokens": 1, "metadata": {"a": 1}, "reasoning": {"effort": "low"},
                "text": {"format": {"type": "text"}}, "tools": [{"type": "namespace", "name": "n", "tools": [
                    {"type": "function", **FUNCTION}]}], "tool_choice": "none", "input": [
                    {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "t"}]},
                    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": "1", "output": "4"}]},
    "/api/chat": {"model": "tiny", "stream": False, "options": {"num_predict": 1, "stop": ["x"]}, "format": SCHEMA,
                  "messages": [*HI, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments":
                               {"a": 1}}}]}, {"role": "tool", "content": "4"}], "keep_alive": "5m"},
    "/api/generate": {"model": "tiny", "prompt": "Hi", "stream": False, "options": {"num_predict": 1, "num_ctx": 64},
                      "context": [65], "think": False},
    "/api/embed": {"model": "tiny", "input": ["a"], "dimensions": 4},
}  # fmt: skip
ODD = ["\r\nX: 1", "\ud800", "\x00", "", [], {}, [[]], [{}], {"\r\n": {"\ud800": 1}}, -1, 10**400, 1.5, True, None,
       ["x"] * 3, {"type": ["x"]}]  # fmt: skip


def places(value, path=()):
    """The path of every value inside a body, and of one key more in every table."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))
    if isinstance(value, dict):
        yield (*path, "odd\r\n\ud800")


def changed(body, path, value):
    body = copy.deepcopy(body)
    if not path:
        return value
    inside = body
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return body


@pytest.mark.parametrize("path", FULL)
def test_an_odd_value_of_any_field_is_answered_or_refused(server, path):
    """60 of all combinations, other ones for each route: no 500, no connection that is cut."""
    rng = random.Random(path)
    spots = list(places(FULL[path]))
    for _ in range(60):
        spot, value = rng.choice(spots), rng.choice(ODD)
        body = changed(FULL[path], spot, value)
        try:
            status, headers, data = server.raw("POST", path, body)
        except http.client.HTTPException as error:
            pytest.fail(f"{spot} = {value!r}: {type(error).__name__}")
        assert status < 500, (spot, value, data)
        assert "x" not in headers


@pytest.mark.parametrize("place", ["tools", "metadata", "response_format", "messages", "chat_template_kwargs"])
@pytest.mark.parametrize("number", ["1e999", "-1e400", "NaN", "Infinity"])
def test_numbers_that_json_has_not_are_refused_wherever_they_stand(server, place, number):
    body = json.dumps({"model": "tiny", "messages": HI, place: [{"x": "HERE"}]}).replace('"HERE"', number)
    status, answer = server.ask("POST", CHAT, body.encode())
    assert status == 400 and "no JSON number" in answer["error"]["message"]


@pytest.mark.parametrize("path, name", [(TEXT, "prompt"), (CHAT, "messages"), (CHAT, "stop_token_ids"),
                                        (RESPONSES, "input"), ("/api/chat", "messages"), ("/api/generate", "context"),
                                        ("/v1/embeddings", "input")])  # fmt: skip
def test_validation_ends_at_the_first_wrong_item(path, name):
    """A list of 100,000 wrong items makes as many errors as one of two."""
    from pydantic import ValidationError

    from tiercel.serve.ollama import schemas as ollama
    from tiercel.serve.openai import schemas as openai

    kind = {
        TEXT: openai.Completion,
        CHAT: openai.ChatCompletion,
        RESPONSES: openai.ResponsesRequest,
        "/api/chat": ollama.Chat,
        "/api/generate": ollama.Generate,
        "/v1/embeddings": openai.EmbeddingsRequest,
    }
    base = {"model": "m"} | ({"messages": HI} if path == CHAT and name != "messages" else {})

    def errors(count):
        with pytest.raises(ValidationError) as caught:
            kind[path].model_validate(base | {name: [None] * count})
        return caught.value.error_count()

    assert errors(100_000) == errors(2) <= 4


def test_tables_of_wrong_values_too():
    from pydantic import ValidationError

    from tiercel.serve.openai.schemas import ChatCompletion

    with pytest.raises(ValidationError) as caught:
        ChatCompletion.model_validate({"model": "m", "messages": HI, "logit_bias": {str(i): [] for i in range(10_000)}})
    assert caught.value.error_count() == 1


# ── the form of an answer

FORMS = {
    "guided_json": CLOSED, "guided_choice": ["yes", "no"], "guided_regex": "[0-9]{3}", "regex": "[0-9]{3}",
    "guided_grammar": 'root ::= "yes" | "no"', "grammar": 'start: "yes"', "ebnf": 'root ::= [0-9]+ "!"\n',
    "json_schema": CLOSED, "structured_outputs": {"choice": ["yes", "no"]}, "response_format": {"type": "json_object"},
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES, "/api/chat", "/api/generate"])
def test_a_form_binds_the_answer_in_every_dialect(server, path, name):
    body = {"model": "tiny", name: FORMS[name], "stream": False, "temperature": 0}
    body |= {"messages": HI} if "chat" in path else {"input": "Hi"} if path == RESPONSES else {"prompt": "Hi"}
    body |= {"options": {"num_predict": 30, "temperature": 0}} if path.startswith("/api") else {
        "max_output_tokens" if path == RESPONSES else "max_tokens": 30}  # fmt: skip
    status, answer = server.ask("POST", path, body)
    assert status == 200, answer
    if path == RESPONSES:
        text = answer["output"][0]["content"][0]["text"]
    elif path.startswith("/v1"):
        text = answer["choices"][0].get("text") or answer["choices"][0]["message"]["content"]
    else:
        text = answer.get("response") or answer["message"]["content"]
    begins = {"guided_json": "{", "json_schema": "{", "response_format": "{"}.get(name, "yn0123456789")
    assert text.lstrip()[0] in begins, text


@pytest.mark.parametrize("more, words", [
    ({"structural_tag": {"a": 1}}, "structural_tag"),
    ({"guided_regex": "a", "grammar": 'start: "a"'}, "one form"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs takes one of"),
    ({"grammar": 'root ::= "a'}, "cannot be read"),
    ({"grammar": 'root ::= nothing\n'}, "cannot be"),
])  # fmt: skip
def test_a_form_that_cannot_be_kept_is_refused(server, more, words):
    for path, body in ((CHAT, {"messages": HI}), (TEXT, {"prompt": "Hi"}), (RESPONSES, {"input": "Hi"})):
        status, answer = server.ask("POST", path, {"model": "tiny"} | body | more)
        assert status == 400 and words in answer["error"]["message"], answer


def test_a_schema_beside_json_object_and_one_without_its_wrapper(server):
    for form in ({"type": "json_object", "schema": CLOSED}, {"type": "json_schema", "schema": CLOSED},
                 {"type": "json_schema", "json_schema": {"schema": CLOSED}}):  # fmt: skip
        answer = chat(server, response_format=form, max_tokens=40)[1]["choices"][0]
        if answer["finish_reason"] == "stop":
            assert list(json.loads(answer["message"]["content"])) == ["ok"]


def test_a_forced_call_is_the_form_of_the_answer(server):
    tools = [{"type": "function", "function": FUNCTION}]
    for form in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": SCHEMA}}):
        answer = chat(server, model="caller", tools=tools, tool_choice="required", max_tokens=60, response_format=form)
        assert answer[0] == 200 and answer[1]["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "look"


# ── templates


def prompt_tokens(server, **more):
    status, answer = chat(server, model="thinker", max_tokens=1, **more)
    return answer["usage"]["prompt_tokens"] if status == 200 else answer["error"]["message"]


def test_switches_reach_a_template_that_names_them(server):
    on = prompt_tokens(server)
    off = prompt_tokens(server, chat_template_kwargs={"enable_thinking": False})
    assert on - off == len("<think>")
    assert prompt_tokens(server, chat_template_kwargs={"thinking": False}) == off
    assert prompt_tokens(server, chat_template_kwargs={"other": [1]}) == on
    assert server.raw("POST", CHAT, {"model": "thinker", "messages": HI, "max_tokens": 1, "chat_template_kwargs":
                      {"other": 1}})[1]["x-tiercel-ignored"] == "chat_template_kwargs.other"  # fmt: skip
    for wrong in ({"enable_thinking": False, "thinking": True}, {"messages": []}, {"enable_thinking": "yes"},
                  {"bos_token": "x"}, {"add_generation_prompt": False}):  # fmt: skip
        assert "chat_template_kwargs" in prompt_tokens(server, chat_template_kwargs=wrong), wrong


def test_the_last_message_of_the_assistant_is_continued(server):
    begun = [*HI, {"role": "assistant", "content": "1, 2, "}]
    native = server.ask("POST", "/api/chat", {"model": "tiny", "messages": begun, "stream": False,
                                              "options": {"num_predict": 1}})[1]["prompt_eval_count"]  # fmt: skip
    continued = chat(server, messages=begun, continue_final_message=True)[1]["usage"]["prompt_tokens"]
    bare = chat(server, messages=begun, add_generation_prompt=False)[1]["usage"]["prompt_tokens"]
    turn = chat(server, messages=begun)[1]["usage"]["prompt_tokens"]
    assert native == continued < bare < turn


# ── functions and items of other kinds


def test_hosted_tools_and_their_items_are_left_out_and_named(server):
    items = [{"role": "user", "content": "Hi"}, {"type": "web_search_call", "id": "w"},
             {"type": "custom_tool_call", "call_id": "c", "name": "x", "input": "y"}]  # fmt: skip
    body = {"model": "tiny", "input": items, "max_output_tokens": 1,
            "tools": [{"type": "web_search"}, {"type": "mcp", "server_label": "x"}]}  # fmt: skip
    status, headers, _ = server.raw("POST", RESPONSES, body)
    assert status == 200
    assert headers["x-tiercel-ignored"] == "tools.web_search, tools.mcp, input.web_search_call, input.custom_tool_call"


def test_functions_of_namespaces_are_offered_and_come_back_with_theirs(server):
    space = {"type": "namespace", "name": "mcp__x", "tools": [{"type": "function", **FUNCTION}]}
    body = {"model": "caller", "input": "Hi", "max_output_tokens": 60, "tool_choice": "required", "temperature": 0}
    call = server.ask("POST", RESPONSES, body | {"tools": [space]})[1]["output"][-1]
    assert (call["type"], call["name"], call["namespace"]) == ("function_call", "look", "mcp__x")
    two = [space, space | {"name": "mcp__y"}]
    choice = {"tool_choice": {"type": "function", "name": "look", "namespace": "mcp__y"}}
    call = server.ask("POST", RESPONSES, body | {"tools": two} | choice)[1]["output"][-1]
    assert (call["name"], call["namespace"]) == ("look", "mcp__y")


# ── lengths, offsets, routes


@pytest.mark.parametrize("path, name", [(CHAT, "max_tokens"), (CHAT, "max_completion_tokens"), (TEXT, "max_tokens"),
                                        (RESPONSES, "max_output_tokens")])  # fmt: skip
@pytest.mark.parametrize("value", [-1, 10**12, 2**31])
def test_no_limit_and_one_beyond_any_context(server, path, name, value):
    body = {"model": "tiny", "temperature": 0, name: value, "stop": ["e", "a", "t"]}
    body |= {CHAT: {"messages": HI}, TEXT: {"prompt": "Hi"}, RESPONSES: {"input": "Hi"}}[path]
    assert server.ask("POST", path, body | ({} if path != RESPONSES else {"stop": None}))[0] == 200


@pytest.mark.parametrize("prompt", ["a 🦅 b é c", "äöü", "🦅🦅", "plain"])
def test_text_offsets_index_the_text(server, prompt):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}
    choice = server.ask("POST", TEXT, body)[1]["choices"][0]
    offsets = choice["logprobs"]["text_offset"]
    assert offsets == sorted(offsets) and choice["text"] == prompt
    for token, at in zip(choice["logprobs"]["tokens"], offsets, strict=True):
        assert not token.isascii() or choice["text"][at : at + len(token)] == token
    stream = server.events(TEXT, {"model": "tiny", "prompt": "x", "max_tokens": 5, "logprobs": 0, "stream": True})
    joined = [at for event in stream for at in event["choices"][0]["logprobs"]["text_offset"]]
    assert joined == sorted(joined) and joined[-1] >= 1, "offsets of a stream go on"


def test_a_prompt_as_long_as_the_context_is_scored(server):
    body = {"model": "tiny", "prompt": [65] * 512, "max_tokens": 0, "echo": True, "logprobs": 1}
    assert server.ask("POST", TEXT, body)[0] == 200
    assert server.ask("POST", TEXT, body | {"prompt": [65] * 513})[0] == 400


@pytest.mark.parametrize("method, path", [("POST", "/v1/rerank"), ("GET", "/v1/files"), ("GET", "/v1/chat")])
def test_an_unknown_route_is_no_unknown_model(server, method, path):
    status, answer = server.ask(method, path, {} if method == "POST" else None)
    assert status == 404 and answer["error"]["code"] == "route_not_found"
    assert server.ask("GET", "/v1/models/nothing")[1]["error"]["code"] == "model_not_found"
    assert server.ask("GET", CHAT)[1]["error"]["code"] == "method_not_allowed"


def test_the_version_is_one_that_clients_of_ollama_accept(server):
    import tiercel

    found = server.ask("GET", "/api/version")[1]
    assert tuple(map(int, found["version"].split("."))) >= (0, 13, 4) and found["tiercel"] == tiercel.__version__


@pytest.mark.parametrize("path, field", [(TEXT, "prompt"), (CHAT, "messages"), ("/api/generate", "prompt"),
                                         ("/v1/embeddings", "input"), ("/api/embed", "input")])  # fmt: skip
@pytest.mark.parametrize("letter", ["a", "a ", "🦅", " "])
def test_of_a_prompt_that_is_far_too_long_only_a_beginning_is_tokenized(server, monkeypatch, path, field, letter):
    """2 MiB for a context of 512 tokens; with the true vocabulary a letter is a token."""
    from tiercel.tokenizer.tokenizer import Tokenizer

    read = []
    true = Tokenizer._section
    monkeypatch.setattr(Tokenizer, "_section", lambda self, text, *a, **k: read.append(len(text)) or true(
        self, text, *a, **k))  # fmt: skip
    text = letter * ((2 << 20) // len(letter.encode()))
    body = {"model": "tiny", "stream": False, field: [{"role": "user", "content": text}] if path == CHAT else text}
    status, answer = server.ask("POST", path, body)
    assert status == (200 if path == "/api/embed" else 400), answer
    assert path == "/api/embed" or "context" in str(answer["error"])
    assert sum(read) < 100_000, "a small part of it"


# ── stored responses


def respond(server, **more):
    return server.ask("POST", RESPONSES, {"model": "tiny", "input": "Hi", "max_output_tokens": 4} | more)


def test_a_response_continues_the_one_before(server):
    first = respond(server)[1]
    assert first["store"] and server.ask("GET", f"{RESPONSES}/{first['id']}")[1] == first
    more = {"previous_response_id": first["id"], "input": "And?"}
    second = respond(server, **more)[1]
    items = [{"role": "user", "content": "Hi"}, *first["output"], {"role": "user", "content": "And?"}]
    whole = respond(server, input=items)[1]
    assert second["usage"]["input_tokens"] == whole["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    assert second["previous_response_id"] == first["id"]
    counted = server.ask("POST", f"{RESPONSES}/input_tokens", {"model": "tiny"} | more)[1]
    assert counted == {"object": "response.input_tokens", "input_tokens": second["usage"]["input_tokens"]}
    third = server.events(RESPONSES, {"model": "tiny", "max_output_tokens": 1, "stream": True, "input": "So?",
                                      "previous_response_id": second["id"]})[-1]["response"]  # fmt: skip
    assert third["usage"]["input_tokens"] > second["usage"]["input_tokens"]
    assert server.ask("DELETE", f"{RESPONSES}/{first['id']}")[1]["deleted"]
    assert server.ask("GET", f"{RESPONSES}/{first['id']}")[1]["error"]["code"] == "response_not_found"
    assert respond(server, **more)[0] == 400


def test_what_is_not_to_be_stored_is_not(server):
    answer = respond(server, store=False)[1]
    assert not answer["store"] and server.ask("GET", f"{RESPONSES}/{answer['id']}")[0] == 404
    assert respond(server, previous_response_id=answer["id"])[0] == 400


def test_responses_belong_to_their_key(start):
    server = start(api_key="one", api_keys=("two",))
    body = {"model": "tiny", "input": "Hi", "max_output_tokens": 1}
    id = server.ask("POST", RESPONSES, body, Authorization="Bearer one")[1]["id"]
    assert server.ask("GET", f"{RESPONSES}/{id}", Authorization="Bearer one")[0] == 200
    assert server.ask("GET", f"{RESPONSES}/{id}", Authorization="Bearer two")[0] == 404
    more = body | {"previous_response_id": id}
    assert server.ask("POST", RESPONSES, more, Authorization="Bearer two")[0] == 400


def test_the_store_is_bounded_in_number_and_bytes():
    from tiercel.serve.openai.response_store import ResponseStore, StoredResponse

    store = ResponseStore(max_responses=3, max_bytes=1000)
    for number in range(5):
        store.put(StoredResponse({"id": str(number)}, [], ""))
    assert [store.get(str(number), "") is not None for number in range(5)] == [False, False, True, True, True]
    store.put(StoredResponse({"id": "large"}, [{"content": "x" * 900}], ""))
    assert store.get("3", "") is None or store.size <= 1000
    store.put(StoredResponse({"id": "larger"}, [{"content": "x" * 2000}], ""))
    assert store.size <= 1000 and store.get("larger", "") is None
