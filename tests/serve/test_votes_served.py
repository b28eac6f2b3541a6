"""`vote` in requests: many answers, one reply, and what it cost."""

import pytest

HI = [{"role": "user", "content": "What is 3 + 4?"}]
VOTE = {"k": 12, "method": "deepconf-low", "window": 3, "warmup": 6, "consensus": 0}


def chat(server, **more):
    body = {"model": "tiny", "messages": HI, "seed": 3, "max_tokens": 9, "temperature": 9, "vote": VOTE}
    return server.ask("POST", "/v1/chat/completions", body | more)


def ollama(**more):
    options = {"seed": 3, "num_predict": 9, "temperature": 9, "top_k": 0, "top_p": 1}
    return {"model": "tiny", "messages": HI, "options": options, "vote": VOTE} | more


def test_a_vote_is_one_answer_and_says_how_it_went(server):
    status, answer = chat(server)
    assert status == 200 and len(answer["choices"]) == 1
    vote = answer["vote"]
    assert vote["traces"] == vote["counted"] == len(vote["details"]) == 12
    assert vote["settings"]["method"] == "deepconf-low" and vote["threshold"] > 0
    usage = answer["usage"]
    assert usage["completion_tokens"] == sum(trace["tokens"] for trace in vote["details"]) > 12
    assert usage["prompt_tokens"] == vote["prompt_tokens"] < 60, "the prompt is counted once"
    assert vote["stopped"] == sum(trace["finish_reason"] == "confidence" for trace in vote["details"])
    assert chat(server)[1]["vote"]["table"] == vote["table"], "the same seed, the same vote"


def test_a_stream_tells_how_it_stands_and_then_the_answer(server):
    whole = chat(server)[1]
    body = {"model": "tiny", "messages": HI, "seed": 3, "max_tokens": 9, "temperature": 9, "vote": VOTE}
    chunks = server.events("/v1/chat/completions", body | {"stream": True})
    told = [chunk["vote"] for chunk in chunks if "vote" in chunk]
    assert any("done" in vote for vote in told) and told[-1]["table"] == whole["vote"]["table"]
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert said == whole["choices"][0]["message"]["content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] in ("stop", "length")


def test_responses_are_voted_on_too(server):
    body = {"model": "tiny", "input": HI, "max_output_tokens": 9, "temperature": 9, "vote": VOTE}
    status, answer = server.ask("POST", "/v1/responses", body)
    assert status == 200 and len(answer["output"]) == 1
    vote = answer["vote"]
    assert vote["traces"] == 12
    assert answer["usage"]["output_tokens"] == sum(trace["tokens"] for trace in vote["details"])
    events = server.events("/v1/responses", body | {"stream": True})
    told = [event["response"]["vote"] for event in events if "vote" in event.get("response", {})]
    assert len(told) > 2 and all("done" in vote for vote in told[:-1]) and told[-1]["traces"] == 12
    said = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == said
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    status, answer = server.ask("POST", "/v1/responses", body | {"vote": {"k": 65}})
    assert status == 400 and "may be 64 on this server" in answer["error"]["message"]


def test_ollamas_chat_and_generate(server):
    status, answer = server.ask("POST", "/api/chat", ollama(stream=False))
    assert status == 200 and answer["done"] and answer["vote"]["traces"] == 12
    assert answer["eval_count"] == answer["vote"]["completion_tokens"]
    lines = server.lines("/api/chat", ollama())
    assert sum(line["done"] for line in lines) == 1 and lines[-1]["vote"]["table"] == answer["vote"]["table"]
    assert lines[-1]["message"]["content"] == answer["message"]["content"] and "done" in lines[0]["vote"]
    status, answer = server.ask("POST", "/api/generate", ollama(stream=False, prompt="3 + 4 =") | {"messages": None})
    assert status == 200 and answer["vote"]["counted"] == 12 and answer["context"]


@pytest.mark.parametrize(
    "more, words",
    [
        ({"vote": {"k": 0}}, "vote.k"),
        ({"vote": {"k": 65}}, "may be 64 on this server"),
        ({"vote": {"k": "3"}}, "vote.k"),
        ({"vote": 3}, "vote"),
        ({"vote": {"method": "shouting"}}, "vote.method"),
        ({"vote": {"voices": 3}}, "vote has no 'voices'"),
        ({"vote": {"method": "majority", "keep": 10}}, "all traces count"),
        ({"n": 2}, "its own number of answers"),
        ({"temperature": 0}, "temperature above 0"),
        ({"logprobs": True}, "logprobs are of one answer"),
    ],
)
def test_a_vote_that_cannot_be_held_is_refused(server, more, words):
    status, answer = chat(server, **more)
    assert status == 400 and words in answer["error"]["message"]


def test_tools_are_not_voted_on(server):
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    status, answer = chat(server, model="caller", tools=[tool])
    assert status == 400 and "calls cannot be voted on" in answer["error"]["message"]


def test_thoughts_are_counted_and_kept_apart(server):
    status, answer = chat(server, model="thinker", thinking_token_budget=3, max_tokens=24)
    assert status == 200
    assert answer["choices"][0]["message"]["reasoning_content"]
    assert 0 < answer["usage"]["completion_tokens_details"]["reasoning_tokens"] < answer["usage"]["completion_tokens"]


def test_the_page_describes_it(server):
    schemas = server.ask("GET", "/openapi.json")[1]["components"]["schemas"]
    assert "vote" in schemas["ChatCompletion"]["properties"] and "vote" in schemas["Chat"]["properties"]
    assert "deepconf-low" in str(schemas["VoteField"]["properties"]["method"])


def test_the_command_line_asks_a_running_server(server):
    from tiercel.sampling.params import SamplingParams
    from tiercel.serve.client import Client
    from tiercel.serve.remote import RemoteBackend
    from tiercel.voting import VoteSettings

    talker, seen = RemoteBackend(Client("127.0.0.1", server.port), "tiny"), []
    params = SamplingParams(max_tokens=9, temperature=9, seed=3)
    told = talker.vote(HI, params, VoteSettings(k=5), seen.append)
    assert told["traces"] == 5 and told["text"] and seen and seen[-1]["k"] == 5
