"""What packing costs: how far the packed network's predictions are from the unpacked one's, over a text.

    KL(p ‖ q) = Σ_v p(v) (log p(v) − log q(v))     p unpacked, q packed; the mean over positions, in nats
    top-1                                          how often both find the same token likeliest

Both are taken at the last SPAN positions before a mark (512 and 8,192 tokens: what a recurrent state accumulates
shows late), for everything packed and for one class of tensors at a time.  The network is the unpacked one with
packed values put in their place, so what a kernel rounds on top is not in these numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tiercel.errors import DoesNotFit, RequestError
from tiercel.families.family import Layout, TensorMapping
from tiercel.mixers import MIXERS
from tiercel.model.decoder import Decoder
from tiercel.model.layers import named_weights
from tiercel.quant import PACKED_TYPES
from tiercel.tokenizer.tokenizer import Tokenizer
from tiercel.weights.checkpoint import Source
from tiercel.weights.load import build, fill, put, row_blocks
from tiercel.weights.quantized import Quantized

MARKS = (512, 8192)
SPAN = 64
EXCERPTS = {512: 4}  # of the text; other marks have one
CHUNK = 512
Progress = Callable[[int, int], None]  # (tokens read, tokens in all)


@dataclass
class Cost:
    """One line of the report."""

    packed: str  # "all", or a class
    position: int
    kl: float
    top1: float  # share of positions, 0 … 1
    positions: int  # how many were looked at


@dataclass
class Report:
    costs: list[Cost]
    skipped: dict[int, str]  # mark → why
    dtype: str  # what the unpacked values were computed in
    tokens: int  # of the text

    def to_json(self) -> dict[str, Any]:
        return {
            "costs": [asdict(cost) for cost in self.costs],
            "skipped": {str(mark): why for mark, why in self.skipped.items()},
            "dtype": self.dtype,
            "tokens": self.tokens,
        }

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Report:
        costs = [Cost(**cost) for cost in found["costs"]]
        return cls(costs, {int(mark): why for mark, why in found["skipped"].items()}, found["dtype"], found["tokens"])


def measure(view: Quantized, tokens: Sequence[int], progress: Progress | None = None) -> Report:
    """The report for a quantized view of a source over a text.  RequestError when the text reaches no mark."""
    excerpts, skipped = _excerpts(tokens, view.layout.config.max_length)
    if not excerpts:
        raise RequestError(f"the report needs at least {MARKS[0]} tokens: " + "; ".join(skipped.values()))
    network, dtype = _network(view.base)
    rows = [row for row in view.layout.rows if row.ours in view.kinds]
    classes = {"all": rows} | classed(rows)
    report = _counter(progress, (1 + len(classes)) * sum(len(ids) for ids in excerpts))
    truth = [_log_probs(network, ids, report) for ids in excerpts]
    costs = []
    for name, members in classes.items():
        _put(network, view, members)
        packed = (_log_probs(network, ids, report) for ids in excerpts)
        compared = [(len(ids), *_compare(p, q)) for ids, p, q in zip(excerpts, truth, packed, strict=True)]
        _put(network, view.base, members)
        for mark in dict.fromkeys(len(ids) for ids in excerpts):
            of_mark = [(kl, same) for length, kl, same in compared if length == mark]
            kl, same = (torch.cat(parts) for parts in zip(*of_mark, strict=True))
            costs.append(Cost(name, mark, float(kl.mean()), float(same.float().mean()), len(kl)))
    return Report(costs, skipped, dtype, len(tokens))


def _excerpts(tokens: Sequence[int], max_length: int) -> tuple[list[Tensor], dict[int, str]]:
    """Pieces of the text that end at the marks, and why a mark has none."""
    ids = torch.tensor(tokens, dtype=torch.long)
    found, skipped = [], {}
    for mark in MARKS:
        if mark > max_length:
            skipped[mark] = f"the model's context ends at {max_length:,}"
        elif mark > len(ids):
            skipped[mark] = f"the text has {len(ids):,} tokens, not {mark:,}"
        else:
            count = min(EXCERPTS.get(mark, 1), len(ids) // mark)
            apart = len(ids) // count
            found += [ids[i * apart : i * apart + mark] for i in range(count)]
    return found, skipped


class _Unpacked:
    """A source whose packed tensors are read as values."""

    def __init__(self, base: Source) -> None:
        self.base = base

    @property
    def layout(self) -> Layout:
        return self.base.layout

    def stored(self, row: TensorMapping) -> str:
        stored = self.base.stored(row)
        return "F32" if stored in PACKED_TYPES else stored

    def read(self, row: TensorMapping, start: int, stop: int) -> Tensor:
        return self.base.read(row, start, stop)

    def raw(self, row: TensorMapping, start: int, stop: int) -> Tensor:
        raise AssertionError("nothing is packed here")

    def tokenizer(self) -> Tokenizer | None:
        return self.base.tokenizer()


def _network(base: Source) -> tuple[Decoder, str]:
    """The unpacked network, in float32 where there is memory for it."""
    source = _Unpacked(base)
    try:
        network = build(source.layout, torch.float32, source)
    except DoesNotFit:
        network = build(source.layout, torch.bfloat16, source)
    fill(network, source)
    network.eval()
    return network, str(network.dtype).removeprefix("torch.")


@torch.no_grad()
def _put(network: Decoder, source: Source, rows: Sequence[TensorMapping]) -> None:
    """The values of these tensors as a source has them."""
    weights = dict(named_weights(network))
    for row in rows:
        for start, stop in row_blocks(weights[row.ours], row):
            put(weights[row.ours], source, row, start, stop)


def _log_probs(network: Decoder, ids: Tensor, report: Callable[[int], None]) -> Tensor:
    """(SPAN, V) log probabilities after each of the last SPAN tokens."""
    state = network.new_state()
    logits = torch.empty(0)
    for chunk in ids.split(CHUNK):
        logits = network(chunk, state, logits_to_keep=SPAN)
        report(len(chunk))
    return torch.log_softmax(logits.float(), -1)


def _compare(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Per position: KL(p ‖ q), and whether the likeliest tokens are the same."""
    return (p.exp() * (p - q)).sum(-1).clamp(min=0), p.argmax(-1) == q.argmax(-1)


def classed(rows: Sequence[TensorMapping]) -> dict[str, list[TensorMapping]]:
    """Tensors by their mixer's `report_class`, then those of feed-forwards, then embedding and output."""
    of_mixers = {cls.report_class or kind: list[TensorMapping]() for kind, cls in MIXERS.items()}
    classes = of_mixers | {"feed-forward": [], "embedding and output": []}
    for row in rows:
        _, _, part, *rest = row.ours.split(".") if row.ours.startswith("layers.") else ("", "", "top")
        if part == "mixers":
            classes[MIXERS[rest[0]].report_class or rest[0]].append(row)
        elif part in ("feed_forward", "top"):
            classes["feed-forward" if part == "feed_forward" else "embedding and output"].append(row)
    return {name: members for name, members in classes.items() if members}


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def read(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress is not None:
            progress(done, total)

    return read


def table(report: Report) -> Iterator[str]:
    """The report as lines of text."""
    yield f"{'packed':<22}{'position':>9}{'KL':>11}{'top-1':>9}"
    for cost in report.costs:
        yield f"{cost.packed:<22}{cost.position:>9,}{cost.kl:>11.5f}{cost.top1:>9.1%}"
    for mark, why in report.skipped.items():
        yield f"position {mark:,} is not measured: {why}"
