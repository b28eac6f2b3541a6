"""A server under bad weather: clients that hang up, too many of them, slow ones, and a signal in the middle."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tiercel
import tiny
from tiercel import RequestError, SamplingParams
from tiercel.engine import Engine
from tiercel.serve.settings import Settings

LONG = {"model": "tiny", "prompt": "Why?", "options": {"num_predict": 400, "temperature": 2.0}, "stream": True}


def open_stream(port, body=LONG, path="/api/generate"):
    """A connection whose request has been sent."""
    raw = socket.create_connection(("127.0.0.1", port), timeout=60)
    data = json.dumps(body | ({"ignore_eos": True} if path.startswith("/v1") else {})).encode()
    raw.sendall(
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(data)) + data
    )
    return raw


FOREVER = {"model": "tiny", "prompt": "Why?", "max_tokens": 490, "stream": True, "temperature": 2.0}  # hard to guess


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return False


def at_rest(server):
    service = server.service
    engines = [loaded.engine.engine for loaded in service.models.loaded.values()]
    return not service.running and service.admitted == 0 and all(
        engine.idle and loaded.users == 0 and loaded.tokens == 0
        for engine, loaded in zip(engines, service.models.loaded.values(), strict=True)
    )  # fmt: skip


def test_who_hangs_up_frees_the_slot_at_once(start):
    server = start()
    raw = open_stream(server.port, FOREVER, "/v1/completions")
    assert b"200 OK" in raw.recv(100)
    assert until(lambda: server.service.running)
    raw.close()
    assert until(lambda: at_rest(server), 1.0)
    quiet = open_stream(server.port, FOREVER | {"stream": False}, "/v1/completions")
    assert until(lambda: server.service.running)
    quiet.close()
    assert until(lambda: at_rest(server), 1.0), "also when nothing is streamed"


def test_clients_that_hang_up_at_random_leave_nothing_behind(start):
    server = start()
    rng = random.Random(3)

    def visit(number):
        body = FOREVER | {"max_tokens": rng.randint(1, 60), "seed": number, "stream": rng.random() < 0.7}
        raw = open_stream(server.port, body, "/v1/completions")
        if rng.random() < 0.3:
            time.sleep(rng.random() * 0.05)
            raw.close()
            return None
        data = b""
        while piece := raw.recv(65536):
            data += piece
            if data.endswith((b"0\r\n\r\n", b"}\r\n0\r\n\r\n")) or (b"\r\n\r\n{" in data and data.endswith(b"}")):
                break
        raw.close()
        return data

    with ThreadPoolExecutor(8) as pool:
        first = [data for data in pool.map(visit, range(20)) if data is not None]
    assert until(lambda: at_rest(server))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with ThreadPoolExecutor(16) as pool:
        rest = [data for data in pool.map(visit, range(20, 80)) if data is not None]
    assert all(data.startswith(b"HTTP/1.1 200") for data in first + rest)
    assert until(lambda: at_rest(server))
    assert until(lambda: len(list(Path("/proc/self/fd").iterdir())) <= before + 2)


def test_too_many_are_sent_away_at_once_and_the_rest_are_served(start):
    server = start(slots=2, queue=4)
    server.ask("POST", "/api/generate", {"model": "tiny"})
    answered, overtaken = [], []

    def visit(number):
        before = len(answered)
        path = "/v1/completions" if number % 2 else "/api/generate"
        body = {"model": "tiny", "prompt": "x", "stream": False} | (
            {"max_tokens": 60, "ignore_eos": True} if number % 2 else {"options": {"num_predict": 60}})  # fmt: skip
        status, headers, data = server.raw("POST", path, body)
        if status != 200:
            overtaken.append(len(answered) - before)
            assert status == (429 if number % 2 else 503) and int(headers["retry-after"]) >= 1
            assert b"maximum pending requests" in data
        else:
            answered.append(number)
        return status

    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(visit, range(60)))
    assert 6 <= found.count(200) < 60 and set(found) == {200, 429, 503}
    assert sorted(overtaken)[len(overtaken) // 2] <= 2, "it does not wait for answers that are under way"
    assert until(lambda: at_rest(server))


def test_too_many_prompt_tokens_wait_elsewhere(start):
    server = start(queue_contexts=1)
    raws = [
        open_stream(server.port, FOREVER | {"prompt": "x" * 200, "max_tokens": 300}, "/v1/completions") for _ in "ab"
    ]
    assert until(lambda: len(server.service.running) == 2)
    assert server.raw("POST", "/v1/completions", {"model": "tiny", "prompt": "y" * 200})[0] == 429
    for raw in raws:
        raw.close()
    assert until(lambda: at_rest(server))


@pytest.fixture
def slowly(monkeypatch):
    """Steps of a larger model: the tiny one, guessing right, says 500 tokens in less than a timeout."""
    step = Engine.step

    def slow(engine):
        time.sleep(0.01)
        return step(engine)

    monkeypatch.setattr(Engine, "step", slow)


def test_an_answer_that_takes_too_long_ends_with_an_error(start, slowly):
    server = start(total_timeout=0.2)
    body = {"model": "tiny", "prompt": "x", "max_tokens": 480, "ignore_eos": True}
    server.ask("POST", "/api/generate", {"model": "tiny"})
    status, answer = server.ask("POST", "/v1/completions", body)
    assert status == 504 and answer["error"]["code"] == "timeout"
    last = server.events("/v1/completions", body | {"stream": True})[-1]
    assert "too long" in last["error"]["message"]
    assert until(lambda: at_rest(server))


def test_a_reader_that_takes_nothing_is_cut_off(start):
    """Small socket buffers, an answer that is larger than them, and nobody reads."""
    server = start(stall_timeout=0.5)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    raw.connect(("127.0.0.1", server.port))
    data = json.dumps({"model": "tiny", "input": ["x"] * 512}).encode()
    for _ in range(3):  # several answers on one connection, about 350 KB each
        raw.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
    assert until(lambda: server.service.admitted > 0)
    assert until(lambda: at_rest(server), 20)
    time.sleep(1.5)
    raw.settimeout(5)
    taken = 0
    try:
        while piece := raw.recv(65536):
            taken += len(piece)
    except OSError:
        pass
    assert taken < 3_000_000
    raw.close()


def test_who_does_not_finish_a_head_is_cut_off_and_who_does_is_not(start):
    server = start(head_timeout=0.3)
    silent, slow, quick = (socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(3))
    slow.sendall(b"GET /health HTTP/1.1\r\nHost: local")

    def healthy():
        quick.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        data = b""
        while not data.endswith(b"}"):
            data += quick.recv(4096)
        return data.startswith(b"HTTP/1.1 200")

    for _ in range(3):  # one connection, several requests, longer than the limit together
        assert healthy()
        time.sleep(0.15)
    for raw in (silent, slow):
        assert b"408" in raw.recv(4096) and raw.recv(100) == b""
    assert healthy(), "a connection that waits between two requests is not late"
    for raw in (silent, slow, quick):
        raw.close()


def test_who_waits_too_long_for_a_slot_is_sent_away(start, slowly):
    server = start(slots=1, queue_timeout=0.2)
    first = open_stream(server.port, FOREVER, "/v1/completions")
    assert b"200 OK" in first.recv(100)
    status, headers, data = server.raw("POST", "/v1/completions", FOREVER | {"stream": False})
    assert status == 429 and int(headers["retry-after"]) >= 1 and b"maximum pending" in data
    assert server.raw("POST", "/api/generate", LONG | {"stream": False})[0] == 503
    assert server.service.running, "who runs is not touched by it"
    first.close()
    assert until(lambda: at_rest(server))


def test_models_come_and_go(start):
    server = start(models=1, keep_alive=0.2)
    assert server.ask("POST", "/api/generate", {"model": "tiny"})[0] == 200
    assert server.ask("POST", "/api/generate", {"model": "thinker"})[0] == 200
    assert [model["name"] for model in server.ask("GET", "/api/ps")[1]["models"]] == ["thinker:latest"]
    assert until(lambda: not server.service.models.loaded, 3), "nobody asked for it again"
    raw = open_stream(server.port, FOREVER, "/v1/completions")
    assert until(lambda: server.service.running)
    assert server.ask("POST", "/api/generate", {"model": "thinker"})[0] == 503, "the only place is taken"
    raw.close()
    assert until(lambda: at_rest(server))


def test_a_model_that_does_not_fit_takes_the_place_of_an_idle_one(start):
    from tiercel.errors import DoesNotFit
    from tiercel.serve.models import open_model

    inside: list[str] = []

    def opener(path, settings):
        if path.name == "thinker" and inside == ["tiny"]:
            inside.clear()
            raise DoesNotFit("thinker needs 9 GB and 1 GB are free")
        inside.append(path.name)
        return open_model(path, settings)

    server = start(opener=opener)
    assert server.ask("POST", "/api/generate", {"model": "tiny"})[0] == 200
    assert server.ask("POST", "/api/generate", {"model": "thinker"})[0] == 200
    assert len(server.service.models.loaded) == 1


def test_a_server_guesses_what_comes_next_and_says_how_often(start):
    server = start()
    ids = [5, 9, 7, 3, 8, 6] * 12
    body = {"model": "tiny", "prompt": ids, "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    assert server.ask("POST", "/v1/completions", body)[0] == 200
    engine = next(iter(server.service.models.loaded.values())).engine.engine
    assert (engine.drafter is not None) == engine.runner.native
    page = server.raw("GET", "/metrics", None)[2].decode()
    assert "tiercel_engine_drafts_proposed" in page and "tiercel_engine_drafts_accepted" in page


def serve(checkpoints, drain, tmp_path, port, **environment):
    env = os.environ | {"OMP_NUM_THREADS": "1", "TIERCEL_HOME": str(tmp_path)} | environment
    process = subprocess.Popen(
        [sys.executable, "-m", "tiercel", "serve", str(checkpoints["tiny"]), "--port", str(port),
         "--drain", str(drain)],
        env=env, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stderr:
        if "listening" in line:
            break
    threading.Thread(target=process.stderr.read, daemon=True).start()
    return process


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def drained(checkpoints, tmp_path, drain, tokens, rng):
    """SIGTERM with 16 answers in flight; what each client read, the exit code, and the seconds it took."""
    port = free_port()
    process = serve(checkpoints, drain, tmp_path, port)
    read, sent = [], []

    def visit(number):
        path = "/v1/completions" if number % 2 else "/api/generate"
        body = FOREVER | {"max_tokens": tokens} if number % 2 else LONG | {"options": {"num_predict": tokens}}
        raw, data = open_stream(port, body, path), b""
        sent.append(number)
        while piece := raw.recv(65536):
            data += piece
            if data.endswith((b"\r\n0\r\n\r\n", b'"}', b"}}")) and (b"chunked" not in data or data.endswith(b"\n")):
                break
        raw.close()
        read.append((number, data))

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    assert until(lambda: len(sent) == 16)
    time.sleep(0.1 + rng.random() * 0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.15)
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        refused = False
    except OSError:
        refused = True
    code = process.wait(drain + 10)
    for thread in threads:
        thread.join(5)
    process.stderr.close()
    return read, code, refused


def check_ends(read, cut):
    assert len(read) == 16
    for number, data in read:
        if cut and data.startswith(b"HTTP/1.1 503"):  # it was still in the queue
            assert b"the server is going down" in data
            continue
        assert data.startswith(b"HTTP/1.1 200") and data.endswith(b"\r\n0\r\n\r\n"), data[-200:]
        if number % 2:
            assert b"data: [DONE]" in data
            assert cut or b'"finish_reason":"length"' in data
        else:
            assert b'"done":true' in data or (cut and b'"error"' in data)


def test_sigterm_lets_answers_finish(checkpoints, tmp_path):
    read, code, refused = drained(checkpoints, tmp_path, 20, 60, random.Random(0))
    check_ends(read, cut=False)
    assert code == 0 and refused


def test_sigterm_ends_the_server_also_while_a_download_stands_still(checkpoints, tmp_path):
    """And while somebody does not read what it is sent."""
    silent = socket.create_server(("127.0.0.1", 0))  # a hub that takes the call and says nothing
    hub = f"http://127.0.0.1:{silent.getsockname()[1]}"
    port = free_port()
    process = serve(checkpoints, 1, tmp_path, port, HF_ENDPOINT=hub)
    try:
        pull = open_stream(port, {"model": "hf.co/somebody/something"}, "/api/pull")
        deaf = open_stream(port, FOREVER, "/v1/completions")
        silent.settimeout(20)
        call, _ = silent.accept()
        assert b"200 OK" in deaf.recv(20)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0  # the hub never answers: the download was cut
        for each in (pull, deaf, call):
            each.close()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        silent.close()


def test_draft_models_and_shared_layers_change_no_answer(tmp_path):
    """A draft model of another vocabulary is named in the log, and prompt lookup drafts."""
    from tiercel.serve.models import open_model

    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    folder = tiny.checkpoint(tmp_path, "attention+mamba2 attention")
    expected = tiercel.load(folder).generate("abc", params).token_ids
    for settings in (Settings(draft_model=str(folder)), Settings(tensor_parallel=2, models=1)):
        model, loop = open_model(folder, settings)
        request = loop.engine.prepare(model.encode("abc"), params)
        loop.engine.queue(request)
        for _ in loop.engine.run(request):
            pass
        assert request.sequences[0].token_ids == expected
        assert (loop.engine.stats.drafts_proposed > 0) == bool(settings.draft_model)
    with pytest.raises(RequestError, match="one model at a time"):
        Settings(tensor_parallel=2)
