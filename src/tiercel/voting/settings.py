"""How a vote is held.

majority           every trace counts one (self-consistency)
weighted           each counts as much as it was sure
filtered-low       offline DeepConf: of all traces the surest tenth votes, weighted
filtered-high      … the surest nine tenths
deepconf-low       online DeepConf: a warm-up in full sets a threshold, and each further trace stops as soon as a
deepconf-high      window of it falls below; low keeps a tenth of the warm-up, high nine tenths (confidence.py)
deepconf           deepconf-high: what Falcon-H1R used
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tiercel.errors import RequestError
from tiercel.sampling.fields import is_integer, is_real, refuse
from tiercel.voting.confidence import TOP_TOKENS, WEIGHTS, WINDOW_TOKENS

KEEP = {"majority": 100.0, "weighted": 100.0, "filtered-low": 10.0, "filtered-high": 90.0, "deepconf-low": 10.0,
        "deepconf-high": 90.0, "deepconf": 90.0}  # fmt: skip
METHODS = tuple(KEEP)
MAX_TRACES, WARMUP_TRACES, CONSENSUS_SHARE = 1024, 16, 0.95


@dataclass(frozen=True)
class VoteSettings:
    """How a vote is held.

    Args:
        k: traces at most.
        method: one of METHODS.
        keep: the share of traces that stays, in percent (η); by default the method's.
        weight: what a trace counts, one of WEIGHTS; by default `one` for majority, else `lowest`.
        window: tokens of a group.
        top_k: likeliest tokens of a token's confidence.
        warmup: traces run in full first (deepconf; others: before a consensus counts); by default 16, or half of k
            where that is less.
        consensus: share of the weight (τ) of the leading answer that ends the vote, 0 for none; by default 0.95 for
            deepconf, else 0.

    Raises:
        RequestError: names the field, the value and the range.
    """

    k: int = 16
    method: str = "majority"
    keep: float | None = None
    weight: str | None = None
    window: int = WINDOW_TOKENS
    top_k: int = TOP_TOKENS
    warmup: int | None = None
    consensus: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise refuse("vote.method", self.method, f"one of {', '.join(METHODS)}")
        for name, low, high in (
            ("k", 1, MAX_TRACES),
            ("window", 1, 1 << 20),
            ("top_k", 1, 100),
            ("warmup", 1, MAX_TRACES),
        ):
            value = getattr(self, name)
            if (value is not None or name != "warmup") and (not is_integer(value) or not low <= value <= high):
                raise refuse(f"vote.{name}", value, f"a whole number from {low} to {high}")
        if self.weight is None:
            self._set("weight", "one" if self.method == "majority" else "lowest")
        if self.weight not in WEIGHTS:
            raise refuse("vote.weight", self.weight, f"one of {', '.join(WEIGHTS)}")
        if self.keep is None:
            self._set("keep", KEEP[self.method])
        if not is_real(self.keep) or not 0 < self.keep <= 100:
            raise refuse("vote.keep", self.keep, "a number above 0, up to 100 (percent)")
        if KEEP[self.method] == 100 and self.keep != 100:
            raise RequestError(f"vote.keep is for filtered and deepconf votes; with {self.method} all traces count")
        if self.warmup is None:
            self._set("warmup", min(WARMUP_TRACES, max(self.k // 2, 1)))
        if self.consensus is None:
            self._set("consensus", CONSENSUS_SHARE if self.online else 0)
        if self.consensus != 0:
            if not is_real(self.consensus) or not 0.5 < self.consensus <= 1:
                raise refuse("vote.consensus", self.consensus, "0, or a number above 0.5, up to 1")
            if self.filtered:
                raise RequestError(f"vote.consensus: {self.method} looks at all traces before it counts any")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def online(self) -> bool:
        """Whether traces are stopped while they run."""
        return self.method.startswith("deepconf")

    @property
    def filtered(self) -> bool:
        """Whether the surest of all traces vote."""
        return self.method.startswith("filtered")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> VoteSettings:
        """Return the settings of a request's table; None is the same as left out.  Raises RequestError."""
        names = [part.name for part in dataclasses.fields(cls)]
        unknown = next((name for name in given if name not in names), None)
        if unknown is not None:
            raise RequestError(f"vote has no {str(unknown)[:40]!r}; it takes {', '.join(names)}")
        return cls(**{name: value for name, value in given.items() if value is not None})

    @classmethod
    def typed(cls, k: int | None, method: str, pairs: Iterable[str]) -> VoteSettings | None:
        """Return the settings of --vote, --vote-method and --vote-set; None without --vote.  Raises RequestError."""
        if k is None:
            if method != "majority" or list(pairs):
                raise RequestError("--vote-method and --vote-set need --vote K, the number of answers")
            return None
        given: dict[str, Any] = {}
        for pair in pairs:
            name, _, word = pair.partition("=")
            try:
                given[name] = word if name == "weight" else int(word) if word.isdecimal() else float(word)
            except ValueError:
                raise RequestError(f"--vote-set takes NAME=VALUE, as in window=256, not {pair!r}") from None
        return cls.of(given | {"k": k, "method": method})
