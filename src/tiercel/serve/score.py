"""Log probabilities of a prompt's own tokens: `echo` with `logprobs`, which evaluations use over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tiercel.sampling.logprobs import Logprob, top_logprobs
from tiercel.serve.models import Lease

if TYPE_CHECKING:
    from tiercel.engine.engine import Engine
    from tiercel.model.runner import SequenceState

CHUNK_TOKENS = 64  # of logits at once: with a vocabulary of 128K they are 32 MB
ScoredToken = tuple[int, "dict[int, Logprob] | None"]  # None for the first token: nothing comes before it


class Scores:
    """Scores a prompt, a chunk at a time.  entries: of each token but the first, itself and the `top` likeliest."""

    def __init__(self, engine: Engine, ids: Sequence[int], top: int, key: str) -> None:
        self.engine, self.ids, self.top, self.key = engine, list(ids), top, key
        self.state: SequenceState | None = None
        self.read = 0
        self.entries: list[dict[int, Logprob]] = []

    @property
    def done(self) -> bool:
        """Whether the whole prompt was read."""
        return self.read == len(self.ids)

    def step(self) -> None:
        """Score a chunk; on the engine's thread.  The last one leaves the prompt in the prefix cache."""
        import torch

        runner = self.engine.runner
        state = self.state = self.state or runner.new_state()
        chunk = self.ids[self.read : self.read + CHUNK_TOKENS]
        tokens_L = torch.tensor(chunk, device=runner.device)
        (logits_LV,) = runner.forward([tokens_L], [state], logits_to_keep=len(chunk))
        following = self.ids[self.read + 1 : self.read + 1 + len(chunk)]
        for logits_V, token in zip(logits_LV, following, strict=False):
            self.entries.append(top_logprobs(logits_V, token, self.top))
        self.read += len(chunk)
        if self.done:
            if self.engine.cache.budget:
                self.engine.cache.put(self.key, self.ids, state.snapshot(), turn_end=False)
            self.state = None  # here, on the thread that owns the states


async def score(lease: Lease, ids: Sequence[int], top: int, key: str) -> list[ScoredToken]:
    """Each token with its entries.  Running requests wait for one chunk at most."""
    run = Scores(lease.loaded.engine.engine, ids, top, key)
    while not run.done:
        await lease.loaded.engine.call(run.step)
    return list(zip(ids, [None, *run.entries], strict=True))
