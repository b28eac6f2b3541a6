"""How likely a prompt's own tokens are: `echo` with `logprobs`, the way evaluations score texts over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tiercel.sampling.logprobs import Logprob, top_logprobs
from tiercel.serve.models import Lease

CHUNK = 64  # tokens of logits at once: a vocabulary of 128K is 32 MB of them


class Scores:
    """entries: of each token of the text but the first, itself and the `top` likeliest there; a chunk at a time."""

    def __init__(self, engine: Any, ids: Sequence[int], top: int, key: str) -> None:
        self.engine, self.ids, self.top, self.key = engine, list(ids), top, key
        self.state: Any = None
        self.read = 0
        self.entries: list[dict[int, Logprob]] = []

    @property
    def done(self) -> bool:
        return self.read == len(self.ids)

    def step(self) -> None:
        """On the engine's thread.  The last one leaves the text in the cache: the answer does not read it again."""
        import torch

        runner = self.engine.runner
        self.state = self.state or runner.new_state()
        chunk = self.ids[self.read : self.read + CHUNK]
        tokens_L = torch.tensor(chunk, device=runner.device)
        (logits_LV,) = runner.forward([tokens_L], [self.state], logits_to_keep=len(chunk))
        following = self.ids[self.read + 1 : self.read + 1 + len(chunk)]
        for logits_V, token in zip(logits_LV, following, strict=False):
            self.entries.append(top_logprobs(logits_V, token, self.top))
        self.read += len(chunk)
        if self.done:
            if self.engine.cache.budget:
                self.engine.cache.put(self.key, self.ids, self.state.snapshot(), place=False)
            self.state = None  # here, on the thread that owns the states


async def score(lease: Lease, ids: Sequence[int], top: int, key: str) -> list[tuple[int, dict[int, Logprob] | None]]:
    """Each token with its entries; the first has none.  Running answers wait for a chunk at most."""
    run = Scores(lease.loaded.engine.engine, ids, top, key)
    while not run.done:
        await lease.loaded.engine.call(run.step)
    return list(zip(ids, [None, *run.entries], strict=True))
