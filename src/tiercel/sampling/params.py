"""Logits → token.

`SamplingParams` is what a caller may ask for, with vLLM's names and defaults; every field has bounds and
they stand beside it.  Importing it costs nothing: torch comes with the first sampled token.

`Sampler` turns one row of logits (V,) into one token id, in the order of vLLM's `v1/sample/sampler.py`:

    thinking budget → form of the answer                            what must be said (steering.py)
    → allowed_token_ids → bad_words → min_tokens → logit_bias       what may be said at all
    → repetition → frequency → presence penalty                     what was said before
    → temperature → min_p → top_k → top_p → draw                    how much is left to chance

Log-probabilities, when asked for, come from the raw logits, before any of this (also as vLLM).

The draw is a function of (seed, choice, position) alone: no generator whose state other requests could
move.  The same seed gives the same text whatever shares the batch.
"""

# ruff: noqa: RUF009  (the calls in the dataclass all return dataclasses.field)
from __future__ import annotations

import dataclasses
import hashlib
import math
import numbers
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from tiercel.errors import RequestError, TiercelError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_ID = 2**31 - 1
LARGEST_SEED = 2**64 - 1
GREEDY_BELOW = 1e-5  # vLLM's _SAMPLING_EPS: a temperature below it is 0
MOST_STRINGS, LONGEST_STRING = 16, 256  # stop strings and bad words; the length in UTF-8 bytes
MOST_IDS = 65_536  # logit_bias, allowed_token_ids, stop_token_ids


def shown(value: object) -> str:
    """A value as an error message may carry it: short, and safe for any input."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write integers of more than 4300 digits
        return "a number of more than 4300 digits"
    return text if len(text) <= 60 else text[:57] + "..."


def is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def refuse(name: str, value: object, expected: str) -> RequestError:
    return RequestError(f"{name} must be {expected}, not {shown(value)}")


def integer(default: int | None, low: int, high: int) -> Any:
    """A whole number in low … high; None is allowed when it is the default."""

    def check(name: str, value: object) -> int | None:
        if value is None and default is None:
            return None
        if not is_integer(value) or not low <= value <= high:
            raise refuse(name, value, f"a whole number from {low} to {high}")
        return int(value)

    return field(default=default, metadata={"check": check})


def real(default: float, low: float, high: float, *, above: bool = False) -> Any:
    """A finite number in low … high; `above` leaves `low` itself out."""

    def check(name: str, value: object) -> float:
        if not is_real(value) or not low <= value <= high or (above and value == low):
            raise refuse(name, value, f"a number {f'above {low:g}, up' if above else f'from {low:g}'} to {high:g}")
        return float(value)

    return field(default=default, metadata={"check": check})


def switch(default: bool) -> Any:
    def check(name: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise refuse(name, value, "true or false")
        return value

    return field(default=default, metadata={"check": check})


def listed(check: Callable[[str, object], Any]) -> Any:
    """A field that defaults to None and has a check of its own."""
    return field(default=None, metadata={"check": check})


def later(default: Any) -> Any:
    """A name that vLLM has and we do not serve yet: only its default passes."""

    def check(name: str, value: object) -> Any:
        if value is not default and not (type(default) is int and isinstance(value, int) and value == default):
            raise RequestError(f"{name} is not supported yet; leave it out (got {shown(value)})")
        return value

    return field(default=default, metadata={"check": check})


def strings(name: str, value: object) -> list[str] | None:
    expected = f"up to {MOST_STRINGS} non-empty strings of at most {LONGEST_STRING} bytes"
    if value is None:
        return None
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or len(found) > MOST_STRINGS:
        raise refuse(name, value, expected)
    for text in found:
        if not isinstance(text, str) or not 0 < len(text.encode(errors="surrogatepass")) <= LONGEST_STRING:
            raise refuse(name, text, expected)
    return list(found)


def token_id(name: str, value: object) -> int:
    if not is_integer(value) or not 0 <= value <= LARGEST_ID:
        raise refuse(name, value, f"token ids, whole numbers from 0 to {LARGEST_ID}")
    return int(value)


def token_ids(name: str, value: object) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple, set, frozenset)) or len(value) > MOST_IDS:
        raise refuse(name, value, f"a list of at most {MOST_IDS} token ids")
    return [token_id(name, item) for item in value]


def some_token_ids(name: str, value: object) -> list[int] | None:
    ids = token_ids(name, value)
    if ids is not None and not ids:
        raise refuse(name, value, "None or a list of at least one token id")
    return ids


def biases(name: str, value: object) -> dict[int, float] | None:
    """{token id: -100 … 100}; ids may be written as strings, as JSON must."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or len(value) > MOST_IDS:
        raise refuse(name, value, f"a table of at most {MOST_IDS} token ids")
    found: dict[int, float] = {}
    for key, bias in value.items():
        decimal = isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10
        if not is_real(bias) or not -100 <= bias <= 100:
            raise refuse(f"{name}[{shown(key)}]", bias, "a number from -100 to 100")
        found[token_id(name, int(key) if decimal else key)] = float(bias)
    return found


LARGEST_GRAMMAR, DEEPEST_SCHEMA = 512 << 10, 64  # UTF-8 bytes; levels of brackets


@dataclass(frozen=True)
class Structured:
    """The form an answer must have: exactly one of these (vLLM's names).

    json: a JSON schema, as a table or as text.  json_object: any JSON object.  regex: the whole answer matches it
    (Rust's dialect, no look-around).  grammar: Lark, beginning at `start`.  choice: one of these texts.
    Raises RequestError for text of more than 512 KiB, more than 64 levels of brackets, or what is no JSON.
    """

    json: dict[str, Any] | bool | str | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        names = ("json", "regex", "choice", "grammar", "json_object")
        given = [
            name
            for name in names
            if getattr(self, name) not in (None, False) or (name == "json" and self.json is False)
        ]
        if len(given) != 1:
            raise RequestError(f"structured needs exactly one of {', '.join(names)}, not {shown(given)}")
        (name,), value = given, getattr(self, given[0])
        if name == "json":
            value = self._schema(value)
            object.__setattr__(self, "json", value)
        elif name == "choice":
            if not isinstance(value, (list, tuple)) or not value or not all(isinstance(v, str) and v for v in value):
                raise refuse("choice", value, "a list of texts, none of them empty")
            object.__setattr__(self, "choice", tuple(value))
            value = "".join(value)
        elif name == "json_object":
            value = str(switch(False).metadata["check"](name, value))
        elif not isinstance(value, str):
            raise refuse(name, value, "text")
        if len(value.encode(errors="surrogatepass")) > LARGEST_GRAMMAR:
            raise RequestError(f"{name} is larger than {LARGEST_GRAMMAR >> 10} KiB")
        if name != "choice" and _depth(value) > DEEPEST_SCHEMA:
            raise RequestError(f"{name} has more than {DEEPEST_SCHEMA} levels of brackets")

    @staticmethod
    def _schema(value: Any) -> str:
        """The schema as JSON text."""
        import json

        if isinstance(value, str):
            try:
                if _depth(value) > DEEPEST_SCHEMA:
                    raise RequestError(f"json has more than {DEEPEST_SCHEMA} levels of brackets")
                value = json.loads(value[: LARGEST_GRAMMAR + 1])
            except ValueError as error:
                raise RequestError(f"json is not a JSON schema: {error}") from None
        if not isinstance(value, (dict, bool)):
            raise refuse("json", value, "a JSON schema: a table, or true")
        try:
            return json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"json is not a JSON schema: {error}") from None


def _depth(text: str) -> int:
    """Levels of brackets, counted without looking what they mean."""
    depth = deepest = 0
    for char in text:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}" and depth:
            depth -= 1
    return deepest


def structure(name: str, value: object) -> Structured | None:
    if value is None or isinstance(value, Structured):
        return value
    if isinstance(value, Mapping):
        names = {part.name for part in dataclasses.fields(Structured)}
        unknown = next((key for key in value if key not in names), None)
        if unknown is not None:
            raise RequestError(f"{name} has no {shown(unknown)}; it takes {', '.join(sorted(names))}")
        return Structured(**value)
    raise refuse(name, value, "a Structured, or a table with one of json, regex, choice, grammar, json_object")


@dataclass(frozen=True)
class Repetition:
    """When an answer goes in circles (vLLM's `repetition_detection`): the same tokens, `min_count` times in a row.

    Runs of min_pattern_size … max_pattern_size tokens are looked for; together they must be `min_tokens` at least,
    so that a table's line of dashes is no circle.
    """

    max_pattern_size: int = 256
    min_pattern_size: int = 1
    min_count: int = 4
    min_tokens: int = 96

    def __post_init__(self) -> None:
        for name, low, high in (("max_pattern_size", 1, 4096), ("min_pattern_size", 1, 4096), ("min_count", 2, 1000),
                                ("min_tokens", 0, 65_536)):  # fmt: skip
            integer(low, low, high).metadata["check"](name, getattr(self, name))
        if self.min_pattern_size > self.max_pattern_size:
            raise refuse("min_pattern_size", self.min_pattern_size, f"at most {self.max_pattern_size}")


def repetition(name: str, value: object) -> Repetition | None:
    if value is None or value is False or isinstance(value, Repetition):
        return value or None
    if value is True:
        return Repetition()
    names = {part.name for part in dataclasses.fields(Repetition)}
    if isinstance(value, Mapping) and set(value) <= names:
        return Repetition(**value)
    raise refuse(name, value, f"true, or a table of {', '.join(sorted(names))}")


@dataclass
class SamplingParams:
    """What may be asked of one generation; names and defaults are vLLM's.

    Raises RequestError naming the field, the value and the range.  Units are tokens unless said otherwise.
    `temperature=0` is greedy, `top_k=0` and `-1` keep all, `max_tokens=None` means what the context leaves,
    `logprobs=k` returns up to k + 1 entries (the chosen token is always among them), `seed=-1` is no seed.
    `thinking_budget`: after so many tokens of thoughts the block is closed (`thinking_token_budget` is vLLM's name,
    -1 no limit).  `structured` (vLLM: `structured_outputs`): the form of the answer after them.
    `repetition_detection`: end an answer that goes in circles, with finish_reason "loop"; thoughts are closed.
    """

    n: int = integer(1, 1, 16)
    presence_penalty: float = real(0.0, -2, 2)
    frequency_penalty: float = real(0.0, -2, 2)
    repetition_penalty: float = real(1.0, 0.01, 100)
    temperature: float = real(1.0, 0, 100)
    top_p: float = real(1.0, 0, 1, above=True)
    top_k: int = integer(0, -1, LARGEST_ID)
    min_p: float = real(0.0, 0, 1)
    seed: int | None = integer(None, -1, LARGEST_SEED)
    stop: str | list[str] | None = listed(strings)
    stop_token_ids: list[int] | None = listed(token_ids)
    ignore_eos: bool = switch(False)
    max_tokens: int | None = integer(16, 1, LARGEST_ID)
    min_tokens: int = integer(0, 0, LARGEST_ID)
    logprobs: int | None = integer(None, 0, 20)
    prompt_logprobs: int | None = later(None)
    logprob_token_ids: list[int] | None = later(None)
    flat_logprobs: bool = later(False)
    detokenize: bool = switch(True)
    skip_special_tokens: bool = switch(True)
    spaces_between_special_tokens: bool = later(True)
    include_stop_str_in_output: bool = switch(False)
    output_kind: int = later(0)
    structured_outputs: Any = listed(structure)
    logit_bias: dict[int, float] | None = listed(biases)
    allowed_token_ids: list[int] | None = listed(some_token_ids)
    bad_words: list[str] | None = listed(strings)
    extra_args: dict[str, Any] | None = later(None)
    skip_reading_prefix_cache: bool | None = later(None)
    thinking_token_budget: int | None = integer(None, -1, LARGEST_ID)
    repetition_detection: Repetition | dict[str, int] | bool | None = listed(repetition)
    structured: Structured | None = listed(structure)
    thinking_budget: int | None = integer(None, -1, LARGEST_ID)

    def __post_init__(self) -> None:
        self.verify()

    def verify(self) -> None:
        """Check every field again (they may be assigned) and bring each to its plain type."""
        for part in dataclasses.fields(self):
            value = getattr(self, part.name)
            if part.name == "max_tokens" and value is None:
                continue
            setattr(self, part.name, part.metadata["check"](part.name, value))
        if self.seed == -1:
            self.seed = None
        for ours, theirs in (("structured", "structured_outputs"), ("thinking_budget", "thinking_token_budget")):
            if getattr(self, theirs) is not None:
                if getattr(self, ours) not in (None, getattr(self, theirs)):
                    raise RequestError(f"{ours} and {theirs} are the same; give one of them")
                setattr(self, ours, getattr(self, theirs))
                setattr(self, theirs, None)
        if self.thinking_budget == -1:
            self.thinking_budget = None
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise refuse("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        if self.stop and not self.detokenize:
            raise RequestError("stop strings are found in text: leave detokenize on, or use stop_token_ids")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


@dataclass(frozen=True)
class Logprob:
    """One entry of `logprobs`: natural logarithm, and the rank among all V tokens (1 is the likeliest)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


def top_logprobs(logits_V: Tensor, chosen: int, count: int) -> dict[int, Logprob]:
    """{token id: Logprob}: the chosen token first, then the `count` likeliest."""
    import torch

    logprobs_V = torch.log_softmax(logits_V.to(torch.float32), dim=-1)
    rank = int((logprobs_V >= logprobs_V[chosen]).sum())
    out = {chosen: Logprob(float(logprobs_V[chosen]), rank)}
    values, ids = torch.topk(logprobs_V, min(count, len(logprobs_V)))
    for place, (value, token) in enumerate(zip(values.tolist(), ids.tolist(), strict=True), start=1):
        out.setdefault(token, Logprob(value, place))
    return out


def bad_word_ids(words: Sequence[str], encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Token sequences that spell the words, at the start of a text and after a space.

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


# What is left to chance: each takes logits (V,) float32 and returns logits with -inf where a token is out.


def keep_min_p(logits_V: Tensor, min_p: float) -> Tensor:
    """Tokens at least `min_p` times as likely as the likeliest."""
    return logits_V.masked_fill(logits_V < logits_V.max() + math.log(min_p), -math.inf)


def keep_top_k(logits_V: Tensor, k: int) -> Tensor:
    """The k likeliest, and those that tie with the last of them."""
    return logits_V.masked_fill(logits_V < logits_V.topk(k).values[-1], -math.inf)


def keep_top_p(logits_V: Tensor, top_p: float) -> Tensor:
    """The fewest likeliest tokens that together reach `top_p`; always at least one."""
    import torch

    probs_V = torch.softmax(logits_V, dim=-1)
    count, size = 256, len(probs_V)  # a whole sort costs ten times the rest, and is seldom needed
    while True:
        likeliest, ids = probs_V.topk(min(count, size))
        before = likeliest.double().cumsum(0) - likeliest
        if count >= size or before[-1] >= top_p:
            break
        count *= 16
    kept = ids[(before < top_p) | (torch.arange(len(ids)) == 0)]
    return torch.full_like(logits_V, -math.inf).index_copy_(0, kept, logits_V[kept])


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, the same for the same three integers."""
    text = b"".join(value.to_bytes(8, "little") for value in (seed, choice, position))
    return (int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 11) / 2**53


def draw(logits_V: Tensor, u: float) -> int:
    """Inverse distribution function: the first token whose cumulative probability passes u."""
    import torch

    cumulative_V = torch.softmax(logits_V, dim=-1).double().cumsum(0)
    total = cumulative_V[-1:]
    token = int(torch.searchsorted(cumulative_V, u * total, right=True))
    return min(token, int(torch.searchsorted(cumulative_V, total)))  # u · total may round up to total


class TokenConstraints(Protocol):
    """What a sampler asks of steering.py."""

    def mask(self, V: int) -> Tensor | int | None:
        """Which tokens may come next, (V,) bool; a token that must come; None: any."""

    def accept(self, token: int) -> None: ...


class Sampler:
    """Chooses the tokens of one generation.

        sampler = Sampler(params, prompt_ids, vocab_size, eos=text.eos)
        token = sampler.sample(logits_V)     # nothing is remembered yet
        sampler.accept(token)                # now it counts: penalties, position of the next draw

    choice: which of the `n` answers this is; each has its own stream of the same seed.
    steering: thinking budget, grammar and circles (steering.py), where the request has any of them.
    bad_words: the token sequences of `params.bad_words`, from `bad_word_ids`.
    last_logprobs: {token id: Logprob} of the last `sample`, None unless `params.logprobs` is given.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        *,
        eos: Collection[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
        choice: int = 0,
        steering: TokenConstraints | None = None,
    ) -> None:
        params.verify()
        self.steering = steering
        if params.bad_words and not bad_words:
            raise RequestError("bad_words needs a tokenizer, and this model has none; use logit_bias")
        self.params, self.vocab_size, self.choice = params, vocab_size, choice
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self.output_ids: list[int] = []
        self.last_logprobs: dict[int, Logprob] | None = None
        self.ahead: int | None = None  # the next token, chosen where the logits are (ops/sampling.py)
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
        """One token id from a row of logits (V,), any float type.

        Raises TiercelError when the row holds NaN or no finite number, RequestError when the request
        excludes every token.
        """
        import torch

        if self.ahead is not None:
            token, self.ahead = self.ahead, None
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
        mask_V = self.steering.mask(self.vocab_size) if self.steering is not None else None
        if isinstance(mask_V, int):
            token = mask_V
        else:
            steered_V = raw_V if mask_V is None else raw_V.masked_fill(~mask_V, -math.inf)
            token = self._choose(self._penalize(self._restrict(steered_V, mask_V is not None)))
        if self.params.logprobs is not None:
            self.last_logprobs = top_logprobs(raw_V, token, self.params.logprobs)
        return token

    @property
    def free(self) -> bool:
        """Whether the next token follows from logits, temperature, min_p, top_k, top_p and the draw alone."""
        p = self.params
        steered = self.steering is not None or self._penalized or self._allowed or self._bad_words or p.logit_bias
        return not steered and p.logprobs is None and len(self.output_ids) >= p.min_tokens

    @property
    def u(self) -> float:
        """What the next draw will draw with."""
        return uniform(self.seed, self.choice, len(self.output_ids))

    def accept(self, token: int) -> None:
        """The token is part of the output from now on."""
        self.output_ids.append(token)
        if self.steering is not None:
            self.steering.accept(token)
        if self._penalized:
            self._seen_V[token] = True
            self._counts_V[token] += 1

    def _restrict(self, logits_V: Tensor, steered: bool = False) -> Tensor:
        """allowed_token_ids, bad_words, min_tokens, logit_bias; a new tensor where anything changes."""
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
        if (self._allowed or banned or steered) and logits_V.max() == -math.inf:
            raise RequestError(
                "no token is left to choose: allowed_token_ids, bad_words, min_tokens and the form of the answer "
                "exclude every one"
            )
        return logits_V

    def _banned(self) -> list[int]:
        """Ends that come too early, and tokens that would complete a bad word."""
        said = len(self.output_ids)
        early = self._stop_ids if said < self.params.min_tokens else []
        last = [ids[-1] for ids in self._bad_words if self.output_ids[said - len(ids) + 1 :] == ids[:-1]]
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
        params = self.params
        if params.greedy:
            return int(logits_V.argmax())
        logits_V = (logits_V - logits_V.max()) / params.temperature  # the largest is 0: nothing overflows
        if params.min_p > 0:
            logits_V = keep_min_p(logits_V, params.min_p)
        if 0 < params.top_k < self.vocab_size:
            logits_V = keep_top_k(logits_V, params.top_k)
        if params.top_p < 1:
            logits_V = keep_top_p(logits_V, params.top_p)
        return draw(logits_V, self.u)
