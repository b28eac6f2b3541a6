"""`SamplingParams`: what a caller may ask of one generation, with vLLM's names and defaults.

Importing this module does not import torch.
"""

# ruff: noqa: RUF009  (the calls in the dataclass all return dataclasses.field)
from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tiercel.errors import RequestError
from tiercel.sampling.fields import (
    MAX_TOKEN_ID,
    biases,
    integer,
    later,
    listed,
    real,
    refuse,
    shown,
    some_token_ids,
    strings,
    switch,
    token_ids,
)

MAX_SEED = 2**64 - 1
NO_LIMIT = " (null for no limit; over HTTP leave it out)"
GREEDY_BELOW = 1e-5  # vLLM's _SAMPLING_EPS: a temperature below it is 0
MAX_GRAMMAR_BYTES, MAX_SCHEMA_DEPTH = 512 << 10, 64  # UTF-8 bytes; levels of brackets


@dataclass(frozen=True)
class Structured:
    """The form an answer must have: exactly one of these (vLLM's names).

    Args:
        json: a JSON schema, as a table or as text.
        regex: a regular expression (Rust's dialect, no look-around) that the whole answer matches.
        choice: texts, one of which is the answer.
        grammar: a Lark grammar that begins at `start`.
        json_object: any JSON object.

    Raises:
        RequestError: not exactly one of them, text of more than 512 KiB or 64 levels of brackets, or no valid JSON.
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
        if len(value.encode(errors="surrogatepass")) > MAX_GRAMMAR_BYTES:
            raise RequestError(f"{name} is larger than {MAX_GRAMMAR_BYTES >> 10} KiB")
        if name != "choice" and _depth(value) > MAX_SCHEMA_DEPTH:
            raise RequestError(f"{name} has more than {MAX_SCHEMA_DEPTH} levels of brackets")

    @staticmethod
    def _schema(value: Any) -> str:
        """Return the schema as JSON text."""

        if isinstance(value, str):
            try:
                if _depth(value) > MAX_SCHEMA_DEPTH:
                    raise RequestError(f"json has more than {MAX_SCHEMA_DEPTH} levels of brackets")
                value = json.loads(value[: MAX_GRAMMAR_BYTES + 1])
            except ValueError as error:
                raise RequestError(f"json is not a JSON schema: {error}") from None
        if not isinstance(value, (dict, bool)):
            raise refuse("json", value, "a JSON schema: a table, or true")
        try:
            return json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"json is not a JSON schema: {error}") from None


def _depth(text: str) -> int:
    """Count levels of brackets, in strings too."""
    depth = deepest = 0
    for char in text:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}" and depth:
            depth -= 1
    return deepest


def structure(name: str, value: object) -> Structured | None:
    """Check a Structured, or a table of its fields."""
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
    """When an answer repeats itself (vLLM's `repetition_detection`): a pattern of tokens, `min_count` times in a row.

    Args:
        max_pattern_size: tokens of the longest pattern.
        min_pattern_size: tokens of the shortest pattern.
        min_count: repetitions in a row.
        min_tokens: tokens of all repetitions together, so that a line of dashes in a table does not count.
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
    """Check true, false, a Repetition, or a table of its fields."""
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
    """What a caller may ask of one generation; names and defaults are vLLM's, units are tokens.

    `temperature=0` is greedy, `top_k=0` and `-1` keep all, `max_tokens=None` is what the context leaves,
    `logprobs=k` returns up to k + 1 entries (the sampled token is always among them), `seed=-1` is no seed.

    Args:
        thinking_budget: tokens of reasoning after which its block is closed (vLLM: `thinking_token_budget`); -1 for
            no limit.
        structured: the form of the answer after the reasoning (vLLM: `structured_outputs`).
        repetition_detection: end an answer that repeats itself, with finish_reason "loop"; reasoning is closed.

    Raises:
        RequestError: names the field, the value and the range.
    """

    n: int = integer(1, 1, 16)
    presence_penalty: float = real(0.0, -2, 2)
    frequency_penalty: float = real(0.0, -2, 2)
    repetition_penalty: float = real(1.0, 0.01, 100)
    temperature: float = real(1.0, 0, 100)
    top_p: float = real(1.0, 0, 1, above=True)
    top_k: int = integer(0, -1, MAX_TOKEN_ID)
    min_p: float = real(0.0, 0, 1)
    seed: int | None = integer(None, -1, MAX_SEED)
    stop: str | list[str] | None = listed(strings)
    stop_token_ids: list[int] | None = listed(token_ids)
    ignore_eos: bool = switch(False)
    max_tokens: int | None = integer(16, 1, MAX_TOKEN_ID, hint=NO_LIMIT)
    min_tokens: int = integer(0, 0, MAX_TOKEN_ID)
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
    thinking_token_budget: int | None = integer(None, -1, MAX_TOKEN_ID)
    repetition_detection: Repetition | dict[str, int] | bool | None = listed(repetition)
    structured: Structured | None = listed(structure)
    thinking_budget: int | None = integer(None, -1, MAX_TOKEN_ID)

    def __post_init__(self) -> None:
        self.verify()

    def verify(self) -> None:
        """Check every field again (they may be assigned) and convert each to its plain type.

        Raises:
            RequestError: a value out of its range, by name.
        """
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
        """Whether the likeliest token is taken."""
        return self.temperature < GREEDY_BELOW
