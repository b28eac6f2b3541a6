"""Eight at once over HTTP, and how much of a prompt is read again: `tiercel serve` and llama-server, in turn.

    TIERCEL_LLAMA_SERVER=…/llama-server python benchmarks/serving.py [--rounds 3] [--turns turns.py]

streams   the shape of Falcon-H1-0.5B in Q4_K_M with random weights, prompts of 256 token ids, 64 tokens each, eight
          connections; total tokens a second of the answers, from the first request to the last token.  Twice with
          other prompts: the first eight after the start, whose memory the system has to give first, and the next eight
turns     with --turns: a script that takes BASE_URL and MODEL and whose last line is JSON with `reused_share` and
          `warm_seconds`; SmolLM2 (tiercel pull smollm2) against both servers

One server runs at a time, each with all cores and the same file; the ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiercel.bench.models import random_source
from tiercel.bench.run import cores
from tiercel.hub import local_models
from tiercel.weights.export import export
from tiercel.weights.gguf import GGUFFile, Typed, write_gguf
from tiercel.weights.stored import OutTensor

STREAMS, PROMPT, ANSWER = 8, 256, 64


def with_words(source: Path, out: Path) -> None:
    """The same weights with a made-up vocabulary: llama-server opens no model without one."""
    with GGUFFile(source) as file:
        size = file.tensors["token_embd.weight"].shape[0]
        words = ["w", "w1", "1", *(f"w{number}" for number in range(3, size - 2)), "<s>", "</s>"]
        types = Typed("[i32]", [1] * (size - 2) + [3, 3])
        vocabulary: dict[str, Any] = {
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": words,
            "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": ["w 1"],
            "tokenizer.ggml.bos_token_id": size - 2, "tokenizer.ggml.eos_token_id": size - 1,
            "tokenizer.ggml.add_bos_token": False,
        }  # fmt: skip
        tensors = [OutTensor(t.name, t.shape, t.type, t.raw if t.type.startswith(("Q", "I")) else t.rows)
                   for t in file.tensors.values()]  # fmt: skip
        write_gguf(out, {**file.metadata, **vocabulary}, tensors)


@contextlib.contextmanager
def serving(command: list[str]) -> Iterator[str]:
    """The address of a server that answers /health; `{port}` in the command is its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([word.format(port=port) for word in command], stdout=log, stderr=log)
        base = f"http://127.0.0.1:{port}"
        try:
            while True:
                try:
                    urllib.request.urlopen(base + "/health", timeout=5).close()
                    break
                except (OSError, urllib.error.HTTPError):
                    if process.poll() is not None:
                        log.seek(0)
                        raise SystemExit(f"{command[0]} did not start:\n{log.read()[-2000:]}") from None
                    time.sleep(0.1)
            yield base
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def ask(base: str, model: str, prompt: list[int], tokens: int) -> int:
    """How many tokens the answer has."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    request = urllib.request.Request(
        base + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        return int(json.load(response)["usage"]["completion_tokens"])


def streams(base: str, model: str, rng: random.Random) -> float:
    """Tokens a second of eight answers at once."""
    prompts = [[rng.randrange(30000) for _ in range(PROMPT)] for _ in range(STREAMS)]
    said: list[int] = []
    threads = [threading.Thread(target=lambda p=p: said.append(ask(base, model, p, ANSWER))) for p in prompts]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    assert said == [ANSWER] * STREAMS, said
    return STREAMS * ANSWER / seconds


def commands(file: Path, llama: str | None) -> dict[str, list[str]]:
    ours = [sys.executable, "-m", "tiercel", "serve", str(file), "--port", "{port}", "--slots", str(STREAMS)]
    if llama is None:
        return {"tiercel": ours}
    theirs = [llama, "-m", str(file), "--port", "{port}", "-np", str(STREAMS), "-c", str(STREAMS * 1024),
              "-t", str(cores())]  # fmt: skip
    return {"tiercel": ours, "llama-server": theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="a GGUF file of the 0.5B without a vocabulary, else one is written")
    parser.add_argument("--turns", type=Path)
    options = parser.parse_args()
    llama = os.environ.get("TIERCEL_LLAMA_SERVER")
    rng, found = random.Random(11), dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as scratch:
        if options.model is None:
            options.model = Path(scratch) / "plain.gguf"
            export(random_source("falcon-h1:0.5b", "q4_k_m"), options.model, name="falcon-h1:0.5b")
        file = Path(scratch) / "streams.gguf"
        with_words(options.model, file)
        for number in range(options.rounds):
            for name, command in commands(file, llama).items():
                with serving(command) as base:
                    ask(base, "streams", [rng.randrange(30000) for _ in range(PROMPT)], 8)
                    for when in ("first", "next"):
                        found.setdefault(f"{name}, {when} eight", []).append(streams(base, "streams", rng))
                        print(f"round {number + 1}: {name}, {when} eight: "
                              f"{found[f'{name}, {when} eight'][-1]:.1f} tok/s", flush=True)  # fmt: skip
    result: dict[str, Any] = {"streams": {name: statistics.median(values) for name, values in found.items()}}
    if llama is not None:
        for when in ("first", "next"):
            pairs = zip(found[f"tiercel, {when} eight"], found[f"llama-server, {when} eight"], strict=True)
            result[f"ratio, {when} eight"] = statistics.median(a / b for a, b in pairs)
    if options.turns is not None:
        for name, command in commands(local_models.resolve("smollm2"), llama).items():
            with serving(command) as base:
                model = json.load(urllib.request.urlopen(base + "/v1/models"))["data"][0]["id"]
                ask(base, model, list(range(100, 164)), 4)
                done = subprocess.run(
                    [sys.executable, str(options.turns), base, model], check=True, capture_output=True, text=True
                )
            result[f"turns {name}"] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps({"cores": cores(), "rounds": options.rounds} | result, indent=1))


if __name__ == "__main__":
    main()
