"""Ollama's API as its clients use it: the `ollama` package, and the curl lines of its documentation."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

GREEDY = {"temperature": 0, "num_predict": 6}
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")
COUNTS = ("prompt_eval_count", "eval_count")


@pytest.fixture(scope="module")
def client(server):
    ollama = pytest.importorskip("ollama")
    client = ollama.Client(host=server.url)
    yield client
    client._client.close()


def test_the_example_everybody_starts_with(server):
    status, answer = server.ask("POST", "/api/generate", {"model": "tiny", "prompt": "Why?", "stream": False})
    assert status == 200 and answer["done"] is True and answer["done_reason"] in ("stop", "length")
    assert isinstance(answer["response"], str)
    assert all(isinstance(answer[name], int) for name in DURATIONS + COUNTS)
    assert datetime.fromisoformat(answer["created_at"])


def test_generate_streams_lines_of_json_and_the_last_has_the_figures(server):
    status, headers, data = server.raw("POST", "/api/generate", {"model": "tiny", "prompt": "Why?", "options": GREEDY})
    assert status == 200 and headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in data.splitlines()]
    assert all(data.splitlines()), "a client parses every line"
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["eval_count"] == 6 and lines[-1]["done_reason"] == "length"
    whole = server.ask("POST", "/api/generate", {"model": "tiny", "prompt": "Why?", "options": GREEDY, "stream": False})
    assert whole[1]["response"] == "".join(line["response"] for line in lines)
    assert len(whole[1]["context"]) == whole[1]["prompt_eval_count"] + 6


def test_context_goes_on_from_an_earlier_answer(server):
    ask = {"model": "tiny", "prompt": "Why?", "options": GREEDY, "stream": False}
    first = server.ask("POST", "/api/generate", ask)[1]
    second = server.ask("POST", "/api/generate", ask | {"context": first["context"]})[1]
    assert second["prompt_eval_count"] == len(first["context"]) + first["prompt_eval_count"]


def test_a_second_turn_is_not_read_from_its_beginning(server):
    talk = [{"role": "user", "content": "one two three four five six seven eight nine ten " * 4}]
    ask = {"model": "tiny", "options": GREEDY, "stream": False}
    first = server.ask("POST", "/api/chat", ask | {"messages": talk})[1]
    talk += [first["message"], {"role": "user", "content": "go on"}]
    second = server.ask("POST", "/api/chat", ask | {"messages": talk})[1]
    assert second["cached_tokens"] >= first["prompt_eval_count"] * 0.9


def test_chat_says_message_in_every_line(server):
    lines = server.lines("/api/chat", {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}],
                                       "options": GREEDY})  # fmt: skip
    assert all(line["message"]["role"] == "assistant" for line in lines)
    assert {"prompt_eval_count", "eval_count"} <= set(lines[-1])


def test_raw_prompts_have_no_template_and_no_context(server):
    ask = {"model": "tiny", "prompt": "abc", "raw": True, "stream": False, "options": GREEDY}
    answer = server.ask("POST", "/api/generate", ask)[1]
    assert answer["prompt_eval_count"] == 3 and "context" not in answer
    assert server.ask("POST", "/api/generate", ask | {"system": "x"})[1] == {
        "error": "raw mode does not support template, system, or context"
    }


def test_no_prompt_loads_and_keep_alive_zero_unloads(server):
    status, answer = server.ask("POST", "/api/generate", {"model": "tiny"})
    assert (status, answer["done"], answer["done_reason"], answer["response"]) == (200, True, "load", "")
    status, answer = server.ask("POST", "/api/chat", {"model": "tiny", "messages": []})
    assert answer["done_reason"] == "load" and answer["message"]["role"] == "assistant"
    loaded = server.ask("GET", "/api/ps")[1]["models"]
    assert "tiny:latest" in [model["name"] for model in loaded]
    assert server.ask("POST", "/api/generate", {"model": "thinker"})[1]["done_reason"] == "load"
    assert server.ask("POST", "/api/generate", {"model": "thinker", "keep_alive": 0})[1]["done_reason"] == "unload"
    assert "thinker:latest" not in [model["name"] for model in server.ask("GET", "/api/ps")[1]["models"]]


@pytest.mark.parametrize("value, seconds", [("1h", 3600), (120, 120), ("2m30s", 150)])
def test_keep_alive_takes_seconds_and_durations(server, value, seconds):
    before = datetime.now().timestamp()
    server.ask("POST", "/api/generate", {"model": "thinker", "keep_alive": value})
    model = next(m for m in server.ask("GET", "/api/ps")[1]["models"] if m["name"] == "thinker:latest")
    expires, after = datetime.fromisoformat(model["expires_at"]).timestamp(), datetime.now().timestamp()
    assert before + seconds - 1 <= expires <= after + seconds + 1
    server.ask("POST", "/api/generate", {"model": "thinker", "keep_alive": 0})


def test_thoughts_come_apart(server):
    ask = {"model": "thinker", "messages": [{"role": "user", "content": "Hi"}], "options": GREEDY, "stream": False}
    thinking = server.ask("POST", "/api/chat", ask)[1]["message"]
    assert thinking["thinking"] and not thinking["content"], "the template opened a block that never closes"
    plain = server.ask("POST", "/api/chat", ask | {"think": False})[1]["message"]
    assert plain["content"] and "thinking" not in plain
    assert server.ask("POST", "/api/chat", ask | {"model": "tiny", "think": True}) == (
        400, {"error": '"tiny" does not support thinking'})  # fmt: skip


def test_logprobs(server):
    ask = {"model": "tiny", "prompt": "Hi", "options": GREEDY, "logprobs": True, "top_logprobs": 3, "stream": False}
    found = server.ask("POST", "/api/generate", ask)[1]["logprobs"]
    assert len(found) == 6 and all(len(entry["top_logprobs"]) == 3 for entry in found)
    assert all(entry["logprob"] <= 0 and bytes(entry["bytes"]) for entry in found)
    assert found[0]["top_logprobs"][0]["token"] == found[0]["token"], "greedy takes the likeliest"


def test_the_same_seed_says_the_same(server):
    ask = {"model": "tiny", "prompt": "Hi", "stream": False, "options": {"seed": 7, "num_predict": 12}}
    assert len({server.ask("POST", "/api/generate", ask)[1]["response"] for _ in range(2)}) == 1


def test_embeddings_have_length_one_and_may_be_cut(server):
    answer = server.ask("POST", "/api/embed", {"model": "tiny", "input": ["abc", "a much longer text " * 40]})[1]
    assert [len(vector) for vector in answer["embeddings"]] == [32, 32]
    assert all(abs(sum(x * x for x in vector) - 1) < 1e-5 for vector in answer["embeddings"])
    short = server.ask("POST", "/api/embed", {"model": "tiny", "input": "abc", "dimensions": 5})[1]["embeddings"][0]
    assert len(short) == 5 and abs(sum(x * x for x in short) - 1) < 1e-5
    assert server.ask("POST", "/api/embed", {"model": "tiny", "input": ""})[1]["embeddings"] == []
    assert len(server.ask("POST", "/api/embeddings", {"model": "tiny", "prompt": "abc"})[1]["embedding"]) == 32
    long = {"model": "tiny", "input": "x" * 600}
    assert server.ask("POST", "/api/embed", long)[1]["prompt_eval_count"] == 512
    assert server.ask("POST", "/api/embed", long | {"truncate": False}) == (
        400, {"error": "the input length exceeds the context length"})  # fmt: skip


def test_show_and_tags_tell_what_agents_look_for(server):
    shown = server.ask("POST", "/api/show", {"model": "tiny"})[1]
    arch = shown["model_info"]["general.architecture"]
    assert shown["model_info"][f"{arch}.context_length"] == 512
    assert set(shown["capabilities"]) == {"completion", "embedding"}
    assert "thinking" in server.ask("POST", "/api/show", {"name": "thinker"})[1]["capabilities"]
    names = [model["name"] for model in server.ask("GET", "/api/tags")[1]["models"]]
    assert {"tiny:latest", "thinker:latest"} <= set(names)


@pytest.mark.parametrize(
    "path, body, status, words",
    [
        ("/api/generate", b"", 400, "missing request body"),
        ("/api/generate", b"{", 400, "the body is not JSON"),
        ("/api/generate", {"prompt": "x"}, 400, "model is required"),
        ("/api/generate", {"model": "nobody", "prompt": "x"}, 404, "model 'nobody' not found"),
        ("/api/generate", {"model": "/etc/passwd", "prompt": "x"}, 404, "not found"),
        ("/api/generate", {"model": "../tiny", "prompt": "x"}, 404, "not found"),
        ("/api/generate", {"model": "tiny", "prompt": 5}, 400, "prompt"),
        ("/api/generate", {"model": "tiny", "prompt": "x", "options": {"temperature": "hot"}}, 400, "temperature"),
        ("/api/generate", {"model": "tiny", "prompt": "x", "options": {"num_ctx": -1}}, 400, "num_ctx"),
        ("/api/generate", {"model": "tiny", "prompt": "x" * 600}, 400, "context holds 512"),
        ("/api/generate", {"model": "tiny", "prompt": "x", "images": ["aGk="]}, 400, "images"),
        ("/api/generate", {"model": "tiny", "prompt": "x", "keep_alive": "soon"}, 400, "keep_alive"),
        ("/api/generate", {"model": "tiny", "prompt": "x", "top_logprobs": 99}, 400, "top_logprobs must be between"),
        ("/api/generate", {"model": "tiny", "prompt": "x", "format": "xml"}, 400, "format"),
        ("/api/chat", {"model": "tiny", "messages": [{"content": "x"}]}, 400, "role is required"),
        ("/api/embed", {"model": "tiny", "input": 5}, 400, "invalid input type"),
        ("/api/show", {}, 400, "model is required"),
        ("/api/show", {"model": "nobody"}, 404, "not found"),
        ("/api/push", {"model": "tiny"}, 400, "push is not supported"),
        ("/api/pull", {"model": "/etc/passwd"}, 400, "invalid model name"),
        ("/api/create", {"model": "Bad Name", "from": "tiny"}, 400, "invalid model name"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_ollamas_form(server, path, body, status, words):
    found, answer = server.ask("POST", path, body)
    assert found == status and set(answer) == {"error"} and words in answer["error"]


def test_num_ctx_bounds_this_request(server):
    ask = {"model": "tiny", "prompt": "x" * 40, "raw": True, "stream": False}
    answer = server.ask("POST", "/api/generate", ask | {"options": {"num_ctx": 50, "temperature": 0}})[1]
    assert answer["eval_count"] <= 10
    assert server.ask("POST", "/api/generate", ask | {"options": {"num_ctx": 20}})[0] == 400


def test_what_is_ignored_is_named(server):
    ask = {"model": "tiny", "prompt": "x", "options": {"mirostat": 1, "num_predict": 1}, "brand_new": 1}
    _, headers, _ = server.raw("POST", "/api/generate", ask)
    assert "brand_new" in headers["x-tiercel-ignored"] and "mirostat" in headers["x-tiercel-ignored"]


def test_head_and_the_words_clients_check(server):
    assert server.raw("GET", "/")[2] == b"Ollama is running"
    for path in ("/", "/api/version", "/api/tags"):
        status, _, data = server.raw("HEAD", path)
        assert status == 200 and data == b""
    assert server.ask("GET", "/api/version")[1]["version"].count(".") == 2
    assert server.ask("GET", "/api/generate")[0] == 405


# ── the ollama package


def test_client_generate_and_chat(client):
    answer = client.generate(model="tiny", prompt="Why?", options=GREEDY)
    assert answer.response is not None and 0 < answer.eval_count <= 6
    parts = list(client.chat(model="tiny", messages=[{"role": "user", "content": "Hi"}], options=GREEDY, stream=True))
    assert parts[-1].done and parts[-1].prompt_eval_count > 0 and all(part.message.role for part in parts)


def test_client_lists_shows_and_embeds(client):
    assert "tiny:latest" in [model.model for model in client.list().models]
    assert client.show("tiny").modelinfo
    assert len(client.embed(model="tiny", input=["a", "b"]).embeddings) == 2
    assert len(client.embeddings(model="tiny", prompt="a").embedding) == 32
    assert client.ps().models[0].expires_at is not None


def test_client_meets_errors_with_their_status(client):
    ollama = pytest.importorskip("ollama")
    with pytest.raises(ollama.ResponseError, match="not found") as found:
        client.generate(model="nobody", prompt="x")
    assert found.value.status_code == 404


# ── models of one's own


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty home."""
    from tiercel.hub import local_models
    from tiercel.hub import store as names

    monkeypatch.setenv("TIERCEL_HOME", str(tmp_path))
    return local_models, names, tmp_path


def test_blobs_are_taken_only_under_their_own_digest(server, store):
    import hashlib

    data = b"GGUF and nothing else"
    good = "sha256:" + hashlib.sha256(data).hexdigest()
    bad = "sha256:" + "0" * 64
    assert server.raw("HEAD", f"/api/blobs/{good}")[0] == 404
    assert server.ask("POST", f"/api/blobs/{bad}", data)[1]["error"].startswith("digest mismatch, expected")
    assert server.raw("POST", f"/api/blobs/{good}", data)[0] == 201
    assert server.raw("POST", f"/api/blobs/{good}", data)[0] == 200
    assert server.raw("HEAD", f"/api/blobs/{good}")[0] == 200
    for name in ("sha256:..%2f..%2fetc", "md5:00", "sha256:" + "g" * 64, "sha256:" + "A" * 64):
        assert server.raw("POST", f"/api/blobs/{name}", data)[0] in (400, 404)
    kept = [path for path in store[2].rglob("*") if path.is_file()]
    assert [path.name for path in kept] == [good.replace(":", "-")], "nothing half-written, nothing elsewhere"
    status, answer = server.ask("POST", "/api/create", {"model": "x", "files": {"a.gguf": good}, "stream": False})
    assert status == 400 and "error" in answer


def test_create_copy_and_delete(server, store, smollm2, client):
    local_models, names, home = store
    names.put("base", local_models.LocalModel("smollm2", smollm2, 0, "", 0.0, "test"), {})
    progress = list(client.create(model="mine:v1", from_="base", system="Be short.", stream=True,
                                  parameters={"temperature": 0, "stop": ["\n"]}))  # fmt: skip
    assert progress[-1].status == "success"
    shown = client.show("mine:v1")
    assert "temperature" in shown.parameters and "Be short." in shown.modelfile
    assert client.copy("mine:v1", "other").status == "success"
    assert {"base:latest", "mine:v1", "other:latest"} <= {model.model for model in client.list().models}
    assert (home / "models/other/latest").is_dir()
    for name in ("base", "mine:v1", "other"):
        assert client.delete(name).status == "success"
    assert server.raw("DELETE", "/api/delete", {"model": "other"})[0] == 404
    assert not any((home / "models").rglob("*.gguf")) and smollm2.exists()


@pytest.mark.parametrize(
    "more", [{"messages": [{}]}, {"messages": [3]}, {"system": "x" * 100_000}, {"parameters": {"top_p": "x"}}]
)
def test_what_create_refuses_is_the_clients_fault_in_json(server, more):
    status, answer = server.ask("POST", "/api/create", {"model": "mine", "from": "tiny", "stream": False} | more)
    assert status in (200, 400) and (status == 200 or set(answer) == {"error"}), answer


def test_a_model_of_the_command_line_is_here_when_it_is_pulled(server):
    """Codex pulls what it does not find under the very name; there is nowhere to fetch this one from."""
    assert server.lines("/api/pull", {"model": "tiny"}) == [{"status": "success"}]
    assert server.ask("POST", "/api/pull", {"model": "tiny:latest", "stream": False}) == (200, {"status": "success"})
