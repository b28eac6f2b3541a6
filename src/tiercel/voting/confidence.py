"""How sure a trace was, from the network's own probabilities (DeepConf, arXiv 2508.15260, and its released code).

    token      C_i = −(1/k) Σ_{j ≤ k} log P_i(j)   over the k likeliest tokens; higher is more peaked
    group      the mean of C over a sliding window, one for each token once the window is full
    lowest     the least of the groups
    bottom     the mean of the lowest tenth of the groups
    tail       the mean of the last window
    mean       of all tokens

A trace shorter than the window has one group: its mean.  L tokens, W windows, k likeliest, V vocabulary.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
WINDOW_TOKENS, TOP_TOKENS, BOTTOM_PERCENT = 2048, 20, 10.0  # of a group; of a token's confidence; of the groups


def token_confidence(logprobs_Lk: ArrayLike) -> Floats:
    """Return the confidence of each token (L,) from the log-probabilities (L, k) of its likeliest tokens."""
    mean_L: Floats = np.asarray(logprobs_Lk, dtype=np.float64).mean(axis=-1)
    return -mean_L


def token_confidence_of(logits_V: Tensor, k: int = TOP_TOKENS) -> float:
    """Return the confidence of one token from its logits (V,)."""
    row_V = logits_V.float()
    top_k = row_V.topk(min(k, len(row_V))).values
    return float(row_V.logsumexp(0) - top_k.mean())


def group_confidence(token_L: ArrayLike, window: int = WINDOW_TOKENS) -> Floats:
    """Return the means of all windows of (L,): (W,), W = max(L − window + 1, 1); empty for an empty trace."""
    sums = np.concatenate(([0.0], np.cumsum(np.asarray(token_L, dtype=np.float64))))
    width = min(window, len(sums) - 1)
    return (sums[width:] - sums[: len(sums) - width]) / width if width else np.empty(0)


def lowest_group_confidence(token_L: ArrayLike, window: int = WINDOW_TOKENS) -> float:
    """Return the least group confidence."""
    return float(group_confidence(token_L, window).min())


def bottom_confidence(token_L: ArrayLike, window: int = WINDOW_TOKENS, percent: float = BOTTOM_PERCENT) -> float:
    """Return the mean of the lowest `percent` of the groups, of one at least."""
    groups = np.sort(group_confidence(token_L, window))
    return float(groups[: max(int(len(groups) * percent / 100), 1)].mean())


def tail_confidence(token_L: ArrayLike, window: int = WINDOW_TOKENS) -> float:
    """Return the mean of the last window."""
    return float(np.asarray(token_L, dtype=np.float64)[-window:].mean())


def mean_confidence(token_L: ArrayLike) -> float:
    """Return the mean of all tokens."""
    return float(np.asarray(token_L, dtype=np.float64).mean())


WEIGHTS = ("one", "mean", "lowest", "bottom", "tail")


def confidences(token_L: ArrayLike, window: int = WINDOW_TOKENS) -> dict[str, float]:
    """Return all confidences by name, and `one` for unweighted votes; zeros for an empty trace."""
    if len(np.asarray(token_L)) == 0:
        return dict.fromkeys(WEIGHTS, 0.0) | {"one": 1.0}
    return {
        "one": 1.0, "mean": mean_confidence(token_L), "lowest": lowest_group_confidence(token_L, window),
        "bottom": bottom_confidence(token_L, window), "tail": tail_confidence(token_L, window),
    }  # fmt: skip


def threshold(lowest: ArrayLike, keep: float) -> float:
    """Return s, below which a trace is stopped: the (100 − keep)th percentile of the warm-up's lowest groups.

    keep is the share of traces that stays, in percent, the paper's η.  Two readings are in use:
      low    keep 10: the 90th percentile, "DeepConf-low": one in ten passes, the most tokens are saved
      high   keep 90: the 10th percentile, "DeepConf-high": what the released code does by default
             (confidence_percentile=90) and what fits Falcon-H1R's figures, whose text says "10th percentile"
    """
    return float(np.percentile(np.asarray(lowest, dtype=np.float64), 100 - keep))


class Running:
    """The confidences of a trace as it grows; constant work for a token.  `group` is None until a window is full."""

    def __init__(self, window: int = WINDOW_TOKENS) -> None:
        self.window = window
        self.tokens = array("f")
        self._sums = array("d", [0.0])
        self.lowest = float("inf")

    def add(self, confidence: float) -> float | None:
        """Append a token's confidence; return the group's."""
        self.tokens.append(confidence)
        self._sums.append(self._sums[-1] + self.tokens[-1])
        group = self.group
        if group is not None:
            self.lowest = min(self.lowest, group)
        return group

    @property
    def group(self) -> float | None:
        """The mean of the last window; None until it is full."""
        full = len(self.tokens) >= self.window
        return (self._sums[-1] - self._sums[-1 - self.window]) / self.window if full else None

    def all(self) -> dict[str, float]:
        """Return all confidences of the trace by name."""
        return confidences(self.tokens, self.window)
