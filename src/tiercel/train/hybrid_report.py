"""What a conversion kept and gained: the same measures of the model before and after.

perplexity, accuracy   of the next token of held-out text
needle                 share of a value's tokens that are found again, by the tokens of the row it is hidden in
cache_bytes            keys, values and states of a sequence, by its tokens (bfloat16, states float32)
tokens_per_second      decoding one sequence on the CPU, by the tokens before
lambada, arc_challenge as `tiercel eval` has them
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tiercel import plan
from tiercel.errors import Offline, RequestError
from tiercel.model.config import ModelConfig
from tiercel.model.decoder import Decoder
from tiercel.model.varlen import VarlenBatch
from tiercel.plan.sizes import kv_bytes
from tiercel.train.data import Batches, Documents
from tiercel.train.loop import Settings, autocast, evaluate

NEEDLE_TOKENS, NEEDLE_ROWS = 4, 16  # of the key and of the value; rows of each length
ROWS, SLICE = 4, 256  # at once: rows of text, tokens of logits
DECODED_TOKENS, PREFILL_TOKENS = 16, 512


@dataclass(frozen=True)
class Checks:
    """What is measured.

    Args:
        needles: lengths of rows; those beyond the model's context are left out.
        contexts: tokens before a step, for bytes and speed; likewise.
        speed: whether speed is measured.
        tasks: of `tiercel eval`.
        limit: items of each task.
    """

    needles: Sequence[int] = (256, 512, 1024, 2048)
    contexts: Sequence[int] = (1024, 8192)
    speed: bool = True
    tasks: Sequence[str] = ("lambada", "arc_challenge")
    limit: int = 200
    data: str | None = None


@torch.no_grad()
def measure(network: Decoder, held: Documents, settings: Settings, checks: Checks) -> dict[str, Any]:
    """Perplexity, accuracy and needles of a network in float32."""
    length = int((held.starts[1:] - held.starts[:-1]).max())

    def batches() -> Any:
        return Batches(held, rows=ROWS, length=length, shuffle=False).once()

    right = counted = 0
    for rows in batches():
        rows = rows.to(settings.device)
        with autocast(settings):
            x_TD = network.hidden_states(rows.tokens_BL, rows.batch)[rows.counted_T]
            for x, targets in zip(x_TD.split(SLICE), rows.targets_T.split(SLICE), strict=True):
                right += int((network.head(x).argmax(-1) == targets).sum())
        counted += rows.count
    lengths = [n for n in checks.needles if 4 * NEEDLE_TOKENS <= n <= network.config.max_length]
    return {
        "perplexity": round(math.exp(evaluate(network, batches(), settings)), 4),
        "accuracy": round(right / max(1, counted), 4),
        "held_out_tokens": counted,
        "needle": {str(n): needle(network, held, n, settings) for n in lengths},
    }


@torch.no_grad()
def needle(network: Decoder, held: Documents, length: int, settings: Settings) -> float:
    """The share of tokens found of a value that stands after a key somewhere in held-out text, and is asked by the key.

    Key and value are tokens of the text, drawn at random, so that no model can do it by its sense of language; the
    depths of the rows go evenly from the beginning to the end.
    """
    draw = torch.Generator().manual_seed(length)
    text, N = torch.from_numpy(held.tokens).long(), NEEDLE_TOKENS
    right = 0
    for at in range(NEEDLE_ROWS):
        first = int(torch.randint(len(text), (1,), generator=draw))
        row = text.roll(-first).repeat(-(-length // len(text)))[:length].clone()
        pair = text[torch.randint(len(text), (2 * N,), generator=draw)]
        where = at * (length - 4 * N) // (NEEDLE_ROWS - 1)
        row[where : where + 2 * N] = pair
        row[-2 * N :] = pair
        tokens_BL = row.unsqueeze(0).to(settings.device)
        with autocast(settings):
            x_TD = network.hidden_states(tokens_BL, VarlenBatch(torch.zeros_like(tokens_BL, dtype=torch.bool)))
            right += int((network.head(x_TD[-N - 1 : -1]).argmax(-1).cpu() == row[-N:]).sum())
    return round(right / (N * NEEDLE_ROWS), 4)


def measure_folder(path: Path, config: ModelConfig, checks: Checks) -> dict[str, Any]:
    """Bytes, speed and tasks of a model on the disk."""
    contexts = [n for n in checks.contexts if n <= config.max_length]
    found: dict[str, Any] = {
        "parameters": plan.parameter_count(config),
        "cache_bytes": {str(n): kv_bytes(config, n) + plan.state_bytes(config) for n in contexts},
    }
    if checks.speed:
        found["tokens_per_second"] = {str(n): speed for n, speed in zip(contexts, _speeds(path, contexts), strict=True)}
    return found | _tasks(path, checks)


def _speeds(path: Path, contexts: Sequence[int]) -> list[float]:
    """Measure tokens a second of one sequence after contexts of these lengths: the fastest of the steps."""
    from tiercel.model.cpu_runner import CPURunner
    from tiercel.weights.load import load

    runner = CPURunner(load(path, dtype="bfloat16")[0])
    state, speeds = runner.new_state(), []
    draw = torch.Generator().manual_seed(0)
    for context in sorted(contexts):
        while state.length < context:
            ids = torch.randint(
                runner.config.vocab_size, (min(PREFILL_TOKENS, context - state.length),), generator=draw
            )
            runner.forward([ids], [state], logits_to_keep=1)
        before, seconds = state.snapshot(), []
        for _ in range(DECODED_TOKENS):
            began = time.perf_counter()
            runner.forward([ids[:1]], [state], logits_to_keep=1)
            seconds.append(time.perf_counter() - began)
        state.restore(before)
        speeds.append(round(1 / min(seconds), 2))
    return speeds


def _tasks(path: Path, checks: Checks) -> dict[str, Any]:
    """Scores of tasks; a task that cannot be asked has the reason in the place of its score."""
    if not checks.tasks:
        return {}
    import tiercel
    from tiercel.evals.registry import open_task
    from tiercel.evals.run import evaluate as ask
    from tiercel.evals.task import Settings as Asked

    model, found = tiercel.load(path), dict[str, Any]()
    for name in checks.tasks:
        try:
            result = ask(model, open_task(name), Asked(limit=checks.limit, chat=False, data=checks.data))
        except (RequestError, Offline) as error:
            found[name] = f"not asked: {error}"
        else:
            found[name] = round(result.score, 4)
    del model
    gc.collect()
    return found
