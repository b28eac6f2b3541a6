"""How much later the first token comes over HTTP than from the bare network.

    python benchmarks/first_token.py [MODEL] [--rounds 40] [--servers 1]
    python benchmarks/first_token.py --shape falcon-h1:0.5b     random weights in Q4_K_M with SmolLM2's words

In turn: the network alone reads a prompt and its best token is taken; `tiercel serve`, a process of its own, is asked
the same prompt over a connection that stands, streaming, until the first text is there.  Every prompt begins with its
own number, so that nothing of it is remembered.  Both with all the threads of this machine; medians, milliseconds.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import tiercel
from tiercel.bench.models import SHAPES, random_source
from tiercel.hub import local_models
from tiercel.weights.export import export
from tiercel.weights.gguf import GGUFFile, write_gguf
from tiercel.weights.stored import OutTensor

QUESTION = "{number} is my lucky number. Everybody knows that the capital of France is"


def served(model: str) -> tuple[subprocess.Popen[str], int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tiercel", "serve", model, "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "listening" in line:
            return process, port
    raise SystemExit("the server did not start")


def over_http(connection: http.client.HTTPConnection, path: str, body: dict[str, Any]) -> float:
    """Seconds until the first text of a stream; the rest of it is read, too."""
    data = json.dumps(body | {"stream": True, "temperature": 0, "max_tokens": 4, "ignore_eos": True}).encode()
    began = time.perf_counter()
    connection.request("POST", path, data, {"content-type": "application/json"})
    response = connection.getresponse()
    first = 0.0
    for line in response:
        if not first and line.startswith(b"data: {"):
            choice = json.loads(line[6:])["choices"][0]
            said = choice.get("delta", choice)
            if said.get("text") or said.get("content") or said.get("reasoning_content"):
                first = time.perf_counter() - began
    assert first, response.status
    return first


@torch.inference_mode()
def bare(network: Any, ids: list[int]) -> float:
    began = time.perf_counter()
    network(torch.tensor(ids), network.new_state(), logits_to_keep=1)[-1].argmax().item()
    return time.perf_counter() - began


def with_words(shape: str, folder: Path) -> Path:
    """A GGUF file of that shape, whose vocabulary and chat template are SmolLM2's."""
    with GGUFFile(local_models.resolve("smollm2")) as words:
        vocabulary = {key: value for key, value in words.metadata.items() if key.startswith("tokenizer.")}
    config = folder / "config.json"
    config.write_text(json.dumps(SHAPES[shape] | {"vocab_size": len(vocabulary["tokenizer.ggml.tokens"])}))
    export(random_source(str(config), "q4_k_m"), folder / "plain.gguf", name=shape)
    with GGUFFile(folder / "plain.gguf") as file:
        tensors = [OutTensor(t.name, t.shape, t.type, t.raw if t.type.startswith(("Q", "I")) else t.rows)
                   for t in file.tensors.values()]  # fmt: skip
        write_gguf(folder / "shape.gguf", file.metadata | vocabulary, tensors)
    return folder / "shape.gguf"


def measure(path: str, rounds: int) -> None:
    model = tiercel.load(path)
    assert model.tokenizer is not None, "a model with a tokenizer is needed"
    process, port = served(path)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.request("GET", "/api/ps")
    name = json.load(connection.getresponse())["models"][0]["name"]  # of a file the server makes its own
    times: dict[str, list[float]] = {"completions": [], "its network": [], "chat": [], "chat's network": []}
    try:
        for number in range(rounds + 5):
            text = QUESTION.format(number=1000 + 7 * number)
            messages = [
                {"role": "system", "content": f"{number * 3} times: be short."},
                {"role": "user", "content": text},
            ]
            found = {
                "its network": bare(model.network, model.tokenizer.encode(text)),
                "completions": over_http(connection, "/v1/completions", {"model": name, "prompt": text}),
                "chat's network": bare(model.network, model.tokenizer.chat(messages)),
                "chat": over_http(connection, "/v1/chat/completions", {"model": name, "messages": messages}),
            }
            for what, seconds in found.items():
                if number >= 5:
                    times[what].append(seconds)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
    middle = {what: statistics.median(values) * 1e3 for what, values in times.items()}
    print(f"{path}, {rounds} rounds, {os.cpu_count()} cores, milliseconds (median)")
    for over, network in (("completions", "its network"), ("chat", "chat's network")):
        extra = [(a - b) * 1e3 for a, b in zip(times[over], times[network], strict=True)]
        print(
            f"  {over:12s} bare {middle[network]:6.2f}   over HTTP {middle[over]:6.2f}   "
            f"overhead {middle[over] - middle[network]:5.2f}   (median of the pairs {statistics.median(extra):5.2f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--servers", type=int, default=1, help="so many, one after another")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.model if options.shape is None else str(with_words(options.shape, Path(folder)))
        for _ in range(options.servers):
            measure(path, options.rounds)


if __name__ == "__main__":
    main()
