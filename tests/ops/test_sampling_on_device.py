"""Tokens chosen for many rows at once are those that `Sampler` chooses for each alone."""

from types import SimpleNamespace

import pytest
import torch

from tiercel.model.device_sampler import GREEDY, sample, way_of
from tiercel.ops.sampling import CANDIDATES, MAX_TOP_K, RUN, choose, choose_few, likeliest
from tiercel.sampling.params import SamplingParams
from tiercel.sampling.sampler import Sampler

V = 3000
PARAMS = [
    SamplingParams(temperature=0, seed=1),
    SamplingParams(temperature=1.0, seed=2),
    SamplingParams(temperature=0.7, top_k=5, seed=3),
    SamplingParams(temperature=1.3, top_p=0.6, seed=4),
    SamplingParams(temperature=2.0, min_p=0.1, seed=5),
    SamplingParams(temperature=1.5, min_p=0.01, top_k=200, top_p=0.9, seed=6),
    SamplingParams(temperature=1.0, top_p=1e-6, seed=7),
    SamplingParams(temperature=0.5, top_k=-1, seed=8),
]


def test_rows_together_are_the_samplers_of_each():
    g = torch.Generator().manual_seed(0)
    samplers = [Sampler(params, [], V) for params in PARAMS]
    count = len(PARAMS) + 1
    slots = SimpleNamespace(
        sampled_S=torch.full((count + 1,), -7),
        indices=lambda slot: torch.where(slot < 0, count, slot).long(),
    )
    numbers = [*range(len(PARAMS)), -1]
    for step in range(70):
        logits = 3 * torch.randn(len(numbers), V, generator=g)
        logits[:3, ::7] = logits[:3, :1]  # ties; among those that top_p parts any may stay
        draws = [*(sampler.draw_at(step) for sampler in samplers), GREEDY]
        table = torch.tensor([(slot, *draw) for slot, draw in zip(numbers, draws, strict=True)], dtype=torch.float64)
        got = sample(logits, table.t(), slots, way_of(draws), V)
        for row, sampler in enumerate(samplers):
            token = sampler.sample(logits[row])
            assert int(got[row]) == token == int(slots.sampled_S[row])
            sampler.accept(token)
    assert slots.sampled_S[len(PARAMS)] == -7  # the row without a slot


def test_a_row_without_a_finite_logit_is_reported():
    slots = SimpleNamespace(sampled_S=torch.zeros(3, dtype=torch.int64), indices=lambda slot: slot.long())
    logits = torch.randn(2, V)
    logits[0, 5] = torch.nan
    table = torch.tensor([(0, *GREEDY), (1, *GREEDY)], dtype=torch.float64).t()
    assert sample(logits, table, slots, "greedy", V).tolist() == [-1, int(logits[1].argmax())]


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (4, 1.0), (0, 0.8)])
def test_draws_are_spread_as_the_probabilities(top_k, top_p):
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5, -5.0])
    B = 20_000
    same = [torch.full((B,), value) for value in (0.8, 0.0)]
    u = torch.rand(B, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = choose(logits.expand(B, -1), *same, torch.full((B,), top_k), torch.full((B,), top_p), u)
    probs = torch.softmax(logits / 0.8, 0)
    order = probs.argsort(descending=True)
    before = probs[order].cumsum(0) - probs[order]
    kept = order[(before < top_p) & (torch.arange(6) < (top_k or 6))]
    expected = torch.zeros(6).index_copy_(0, kept, probs[kept] / probs[kept].sum())
    assert (torch.bincount(got, minlength=6) / B - expected).abs().max() < 0.015


def test_the_likeliest_are_found_run_by_run():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2 * CANDIDATES * RUN + 1003, generator=g)
    logits[1] = logits[1].round()  # ties everywhere
    logits[2, -5:] = 20.0  # in the rest after the last whole run
    got, at = likeliest(logits)
    assert torch.equal(got, logits.topk(CANDIDATES, 1).values) and torch.equal(got, logits.gather(1, at))


def test_few_kept_tokens_are_drawn_as_from_the_whole_vocabulary():
    g = torch.Generator().manual_seed(0)
    rows = [(0.0, 0.0, 0, 1.0), (0.8, 0.0, 40, 1.0), (1.3, 0.0, 5, 0.6), (2.0, 0.1, MAX_TOP_K, 1.0), (0.5, 0.0, 1, 0.9)]
    t, min_p, k, top_p = (torch.tensor(column).repeat(200) for column in zip(*rows, strict=True))
    for dtype in (torch.float32, torch.bfloat16):
        logits = (3 * torch.randn(len(t), V, generator=g)).to(dtype).float()
        u = torch.rand(len(t), dtype=torch.float64, generator=g)
        chosen = [way(logits, t, min_p, k.long(), top_p.double(), u) for way in (choose, choose_few)]
        assert (chosen[0] != chosen[1]).sum() <= 2  # sums of the whole vocabulary are rounded elsewhere
