"""Asks llama.cpp for its numbers and writes them beside this file.  Run by hand, once per peer version.

    python make_llamacpp.py nano FOLDER                   FOLDER/<name>.gguf: the models of nano.py, F32
    python make_llamacpp.py smollm2 PACKED.gguf F32.gguf  SmolLM2-135M-Instruct as it comes, and unpacked

`nano` writes <name>.npz: `logits` (positions × V float32) at `positions` of nano.TOKENS, the whole context in
one batch on the CPU, KV cache in F32, no flash attention.

`smollm2` writes smollm2.json: for each of 20 prompts its token ids, and for both files the 64 ids that llama.cpp
finds most likely and, at each step, the gap between its two highest logits.  llama.cpp multiplies packed weights
with activations rounded to 8 bits; on the unpacked file, the same weights, it does not.  `noise` says how much
that rounding alone moves the gap (root mean square and 99th percentile over all steps, same tokens fed to both).

The peer is llama-cpp-python 0.3.36 (llama.cpp 0c1e570) in its own Python.  The GGUF files are written by us:

    from tiercel.weights.export import export; import nano
    export(nano.build("falcon-h1", folder), "falcon-h1.gguf", dtype="float32")
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import nano

HERE = Path(__file__).parent
POSITIONS = sorted({*range(0, len(nano.TOKENS), 6), *range(len(nano.TOKENS) - 4, len(nano.TOKENS))})
ANSWER = 64
PROMPTS = [
    "Why is the sky blue?", "Write a haiku about the sea.", "What is the capital of Mongolia?", "2 + 2 * 3 =",
    "Explain gravity to a child.", "Translate to French: good morning, my friend.", "List three uses of vinegar.",
    "Once upon a time, there was a small", "def fibonacci(n):", "Who wrote Don Quixote?",
    "What is the difference between a virus and a bacterium?", "Give me a recipe for pancakes.",
    "The three laws of thermodynamics are", "How do I tie a tie?", "Tell me a joke about a falcon.",
    "Summarize the plot of Hamlet in two sentences.", "What does HTTP stand for?", "Name five rivers in Africa.",
    "Why do cats purr?", "Once the snow had melted, the old man",
]  # fmt: skip


@contextmanager
def context(path: Path, length: int) -> Iterator[tuple[Any, Any]]:
    """(vocabulary, context) of a model on the CPU with everything that can be float32 in float32."""
    llama_cpp.llama_backend_init()
    wanted = llama_cpp.llama_model_default_params()
    wanted.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), wanted)
    assert model, f"llama.cpp refuses {path}"
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = length, length, length
    options.n_threads = options.n_threads_batch = 2
    options.type_k = options.type_v = 0  # F32
    options.flash_attn_type = 0  # off
    ctx = llama_cpp.llama_init_from_model(model, options)
    assert ctx, f"llama.cpp cannot run {path}"
    yield llama_cpp.llama_model_get_vocab(model), ctx
    llama_cpp.llama_free(ctx)
    llama_cpp.llama_model_free(model)


def run(ctx: Any, vocab: Any, tokens: list[int], start: int, every: bool) -> np.ndarray:
    """Feeds tokens at positions start…; logits (L, V) float32 of all of them or (1, V) of the last."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i] = token, start + i
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        batch.logits[i] = every or i == len(tokens) - 1
    assert llama_cpp.llama_decode(ctx, batch) == 0
    size = llama_cpp.llama_vocab_n_tokens(vocab)
    wanted = range(len(tokens)) if every else [len(tokens) - 1]
    rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, i), (size,)).copy() for i in wanted]
    llama_cpp.llama_batch_free(batch)
    return np.stack(rows)


def make_nano(folder: Path, out: Path) -> None:
    for name in nano.CONFIGS:
        with context(folder / f"{name}.gguf", 256) as (vocab, ctx):
            logits = run(ctx, vocab, nano.TOKENS, 0, every=True)
        np.savez(out / f"{name}.npz", logits=logits[POSITIONS], positions=np.array(POSITIONS))
        print(f"{name}: spread {logits.std():.3f}, {logits.shape}")


def make_smollm2(packed: Path, unpacked: Path, out: Path) -> None:
    runs, moved = [], []
    for prompt in PROMPTS:
        with context(packed, 512) as (vocab, ctx):
            ids = tokenize(vocab, prompt)
            found = greedy(ctx, vocab, ids)
        with context(unpacked, 512) as (vocab, ctx):
            exact = greedy(ctx, vocab, ids)
        moved.append(gaps(packed, ids + found["ids"][:-1]) - gaps(unpacked, ids + found["ids"][:-1], like=packed))
        runs.append({"prompt": prompt, "prompt_ids": ids, "packed": found, "unpacked": exact})
        print(repr(prompt), "smallest gaps", min(found["gaps"]), min(exact["gaps"]))
    moves = np.abs(np.concatenate(moved))
    noise = {"rms": round(float((moves**2).mean() ** 0.5), 4), "p99": round(float(np.quantile(moves, 0.99)), 4)}
    about = {"peer": f"llama-cpp-python {llama_cpp.__version__}", "model": packed.name, "kv": "F32", "noise": noise}
    (out / "smollm2.json").write_text(json.dumps({"about": about, "runs": runs}, ensure_ascii=False))
    print(noise)


def gaps(path: Path, tokens: list[int], like: Path | None = None) -> np.ndarray:
    """(L,) highest logit minus second; with `like`, of the two tokens that that file finds highest."""
    with context(path, 512) as (vocab, ctx):
        logits = run(ctx, vocab, tokens, 0, every=True)
    leader = logits
    if like is not None:
        with context(like, 512) as (vocab, ctx):
            leader = run(ctx, vocab, tokens, 0, every=True)
    second, first = np.argsort(leader, -1)[:, -2:].T
    step = np.arange(len(tokens))
    return logits[step, first] - logits[step, second]


def tokenize(vocab: Any, text: str) -> list[int]:
    raw = text.encode()
    room = (llama_cpp.llama_token * 512)()
    count = llama_cpp.llama_tokenize(vocab, raw, len(raw), room, 512, False, False)
    assert count > 0
    return list(room[:count])


def greedy(ctx: Any, vocab: Any, ids: list[int]) -> dict[str, list[Any]]:
    """The most likely token 64 times, going on through any end of text so that every run has 64 steps."""
    logits, start = run(ctx, vocab, ids, 0, every=False)[0], len(ids)
    answer: list[int] = []
    gaps: list[float] = []
    for _ in range(ANSWER):
        second, first = np.sort(logits)[-2:]
        answer.append(int(logits.argmax()))
        gaps.append(round(float(first - second), 5))
        logits, start = run(ctx, vocab, [answer[-1]], start, every=False)[0], start + 1
    return {"ids": answer, "gaps": gaps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["nano", "smollm2"])
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    (make_nano if given.what == "nano" else make_smollm2)(*given.paths, given.out)


if __name__ == "__main__":
    main()
