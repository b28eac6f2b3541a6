"""Logits → token.

`Sampler` turns one row of logits (V,) into one token id, in the order of vLLM's `v1/sample/sampler.py`:

    thinking budget → structured output                             which tokens the form allows (constraints.py)
    → allowed_token_ids → bad_words → min_tokens → logit_bias       which tokens the request allows
    → repetition → frequency → presence penalty                     which tokens came before
    → temperature → min_p → top_k → top_p → draw                    chance

Log-probabilities, when asked for, come from the raw logits, before any of this (also as vLLM).

The draw is a function of (seed, index, position) alone: there is no generator whose state other requests could move.
The same seed gives the same text whatever shares the batch.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from tiercel.errors import RequestError, TiercelError
from tiercel.sampling.fields import refuse
from tiercel.sampling.logprobs import Logprob, top_logprobs
from tiercel.sampling.params import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from tiercel.sampling.constraints import TokenConstraints

TOP_P_CANDIDATES = 256  # tokens that are sorted first for top_p: a whole sort costs ten times the rest


def bad_word_ids(words: Sequence[str], encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Return token sequences that spell the words, at the start of a text and after a space.

    The spaced form counts only where it is another single step of the same length, as in vLLM's
    `SamplingParams.update_from_tokenizer`.
    """
    out: list[list[int]] = []
    for word in words:
        plain, spaced = encode(word.lstrip()), encode(" " + word.lstrip())
        if plain:
            out.append(plain)
        if spaced and (not plain or (spaced[0] != plain[0] and len(spaced) == len(plain))):
            out.append(spaced)
    return out


# Each of these takes logits (V,) float32 and returns logits with -inf where a token is excluded.


def keep_min_p(logits_V: Tensor, min_p: float) -> Tensor:
    """Keep tokens at least `min_p` times as likely as the likeliest."""
    return logits_V.masked_fill(logits_V < logits_V.max() + math.log(min_p), -math.inf)


def keep_top_k(logits_V: Tensor, k: int) -> Tensor:
    """Keep the k likeliest tokens, and those that tie with the last of them."""
    return logits_V.masked_fill(logits_V < logits_V.topk(k).values[-1], -math.inf)


def keep_top_p(logits_V: Tensor, top_p: float) -> Tensor:
    """Keep the fewest likeliest tokens that together reach `top_p`; always at least one."""
    import torch

    probs_V = torch.softmax(logits_V, dim=-1)
    count, size = TOP_P_CANDIDATES, len(probs_V)
    while True:
        likeliest, ids = probs_V.topk(min(count, size))
        before = likeliest.double().cumsum(0) - likeliest
        if count >= size or before[-1] >= top_p:
            break
        count *= 16
    kept = ids[(before < top_p) | (torch.arange(len(ids)) == 0)]
    return torch.full_like(logits_V, -math.inf).index_copy_(0, kept, logits_V[kept])


def uniform(seed: int, index: int, position: int) -> float:
    """Return a number in [0, 1) with 53 random bits: a hash (BLAKE2b) of the three integers."""
    text = b"".join(value.to_bytes(8, "little") for value in (seed, index, position))
    return (int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 11) / 2**53


def draw(logits_V: Tensor, u: float) -> int:
    """Sample by the inverse distribution function: the first token whose cumulative probability passes u."""
    import torch

    cumulative_V = torch.softmax(logits_V, dim=-1).double().cumsum(0)
    total = cumulative_V[-1:]
    token = int(torch.searchsorted(cumulative_V, u * total, right=True))
    return min(token, int(torch.searchsorted(cumulative_V, total)))  # u · total may round up to total


class Draw(NamedTuple):
    """How one token is sampled from its logits.  temperature: 0: the likeliest · top_k: 0: all · u: in [0, 1)"""

    temperature: float
    min_p: float
    top_k: int
    top_p: float
    u: float


class Sampler:
    """Sample the tokens of one sequence.

        sampler = Sampler(params, prompt_ids, vocab_size, eos=tokenizer.eos)
        token = sampler.sample(logits_V)     # changes nothing
        sampler.accept(token)                # the token counts: penalties, position of the next draw

    Args:
        params: what the request asks for; verified again here.
        prompt_ids: tokens that the repetition penalty counts.
        vocab_size: V, the length of a row of logits.
        eos: tokens that end the output; min_tokens excludes them.
        bad_words: token sequences of `params.bad_words`, from `bad_word_ids`.
        index: number of the sequence among the request's `n`; each has its own stream of draws for the same seed.
        constraints: thinking budget, grammar and repetition detection, where the request has any of them.
        num_tokens: of the tokenizer: rows of logits from there on are padding and never sampled; None: there is none.

    Attributes:
        last_logprobs: {token id: Logprob} of the last `sample`; None unless `params.logprobs` is given.
        device_token: the next token where it was sampled on a device (engine/async_scheduling.py), else None.

    Raises:
        RequestError: a token id of the request is outside the vocabulary, or bad_words has no tokenizer.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        *,
        eos: Collection[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
        index: int = 0,
        constraints: TokenConstraints | None = None,
        num_tokens: int | None = None,
    ) -> None:
        params.verify()
        self.constraints = constraints
        if params.bad_words and not bad_words:
            raise RequestError("bad_words needs a tokenizer, and this model has none; use logit_bias")
        self.params, self.vocab_size, self.index = params, vocab_size, index
        self.num_tokens = vocab_size if num_tokens is None else min(num_tokens, vocab_size)
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self.output_ids: list[int] = []
        self.last_logprobs: dict[int, Logprob] | None = None
        self.device_token: int | None = None
        self._bad_words = [list(ids) for ids in bad_words]
        self._stop_ids = self._inside("stop_token_ids", [*eos, *(params.stop_token_ids or ())])
        self._allowed = self._inside("allowed_token_ids", params.allowed_token_ids or ())
        self._bias_ids = self._inside("logit_bias", params.logit_bias or ())
        self._penalized = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1, 0, 0)
        if self._penalized:
            self._start_counts(prompt_ids)
        for id in (id for ids in self._bad_words for id in ids):
            self._inside("bad_words", [id])

    def _inside(self, name: str, ids: Collection[int]) -> list[int]:
        wrong = [id for id in ids if not 0 <= id < self.vocab_size]
        if wrong:
            raise refuse(name, wrong[0], f"below the vocabulary size ({self.vocab_size})")
        return list(ids)

    def _start_counts(self, prompt_ids: Sequence[int]) -> None:
        import torch

        prompt = torch.tensor(self._inside("prompt", prompt_ids), dtype=torch.long)
        self._seen_V = torch.zeros(self.vocab_size, dtype=torch.bool)  # in the prompt or the output
        self._seen_V[prompt] = True
        self._counts_V = torch.zeros(self.vocab_size, dtype=torch.float32)  # in the output

    def sample(self, logits_V: Tensor) -> int:
        """Return one token id for a row of logits (V,) of any float type.

        Raises:
            TiercelError: the row holds NaN or no finite number.
            RequestError: the request excludes every token.
        """
        import torch

        if self.device_token is not None:
            token, self.device_token = self.device_token, None
            return token
        if logits_V.shape != (self.vocab_size,):
            raise ValueError(f"logits must be ({self.vocab_size},), not {tuple(logits_V.shape)}")
        raw_V = logits_V.detach().to("cpu", torch.float32)
        if not math.isfinite(top := float(raw_V.max())):  # max carries a NaN on
            what = "NaN" if math.isnan(top) else f"no finite logit (the largest is {top})"
            raise TiercelError(
                f"the network produced {what} at output token {len(self.output_ids)}; "
                "load it with dtype float32, and check the weights with their publisher's sha256"
            )
        mask_V = self.constraints.mask(self.vocab_size) if self.constraints is not None else None
        if isinstance(mask_V, int):
            token = mask_V
        else:
            masked_V = raw_V if mask_V is None else raw_V.masked_fill(~mask_V, -math.inf)
            token = self._choose(self._penalize(self._restrict(masked_V, mask_V is not None)))
        if self.params.logprobs is not None:
            self.last_logprobs = top_logprobs(raw_V, token, self.params.logprobs)
        return token

    @cached_property
    def _masked(self) -> bool:
        """Whether a token depends on more than logits, temperature, min_p, top_k, top_p and the draw."""
        masked = self.constraints is not None or self._penalized or self._allowed or self._bad_words
        return bool(masked or self.params.logit_bias or self.params.logprobs is not None)

    def draw_at(self, position: int) -> Draw | None:
        """Return what a device needs to sample output token `position`; None where `sample` must do it."""
        p = self.params
        if self._masked or position < p.min_tokens:
            return None
        u = 0.0 if p.greedy else uniform(self.seed, self.index, position)
        return Draw(0.0 if p.greedy else p.temperature, p.min_p, max(p.top_k, 0), p.top_p, u)

    def accept(self, token: int) -> None:
        """Append a token to the output."""
        self.output_ids.append(token)
        if self.constraints is not None:
            self.constraints.accept(token)
        if self._penalized:
            self._seen_V[token] = True
            self._counts_V[token] += 1

    def _restrict(self, logits_V: Tensor, masked: bool = False) -> Tensor:
        """Apply allowed_token_ids, bad_words, min_tokens and logit_bias; a new tensor where anything changes."""
        import torch

        banned = self._banned()
        if self._allowed:
            kept = torch.tensor(sorted(set(self._allowed)))
            logits_V = torch.full_like(logits_V, -math.inf).index_copy_(0, kept, logits_V[kept])
        if banned:
            logits_V = logits_V.index_fill(0, torch.tensor(banned), -math.inf)
        if self.params.logit_bias:
            bias = torch.tensor(list(self.params.logit_bias.values()), dtype=torch.float32)
            logits_V = logits_V.index_add(0, torch.tensor(self._bias_ids), bias)
        if (self._allowed or banned or masked) and logits_V[: self.num_tokens].max() == -math.inf:
            raise RequestError(
                "no token is left to choose: allowed_token_ids, bad_words, min_tokens and the form of the answer "
                "exclude every one"
            )
        return logits_V

    def _banned(self) -> list[int]:
        """Return end tokens before min_tokens, and tokens that would complete a bad word."""
        num_output_tokens = len(self.output_ids)
        early = self._stop_ids if num_output_tokens < self.params.min_tokens else []
        last = [ids[-1] for ids in self._bad_words if self.output_ids[num_output_tokens - len(ids) + 1 :] == ids[:-1]]
        return [*early, *last]

    def _penalize(self, logits_V: Tensor) -> Tensor:
        """l > 0: l / r, else l · r for tokens seen (Keskar et al. 2019); − f · count − p · [count > 0]."""
        import torch

        if not self._penalized:
            return logits_V
        r = self.params.repetition_penalty
        logits_V = torch.where(self._seen_V, torch.where(logits_V > 0, logits_V / r, logits_V * r), logits_V)
        logits_V = logits_V - self.params.frequency_penalty * self._counts_V
        return logits_V - self.params.presence_penalty * (self._counts_V > 0)

    def _choose(self, logits_V: Tensor) -> int:
        params, logits_V = self.params, logits_V[: self.num_tokens]
        if params.greedy:
            return int(logits_V.argmax())
        logits_V = (logits_V - logits_V.max()) / params.temperature  # the largest is 0: nothing overflows
        if params.min_p > 0:
            logits_V = keep_min_p(logits_V, params.min_p)
        if 0 < params.top_k < self.vocab_size:
            logits_V = keep_top_k(logits_V, params.top_k)
        if params.top_p < 1:
            logits_V = keep_top_p(logits_V, params.top_p)
        return draw(logits_V, uniform(self.seed, self.index, len(self.output_ids)))
