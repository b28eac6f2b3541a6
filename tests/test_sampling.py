"""What a caller may ask of sampling, and what the chosen tokens must then look like."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest
import torch

from tiercel.errors import RequestError, TiercelError
from tiercel.sampling.logprobs import top_logprobs
from tiercel.sampling.params import Repetition, SamplingParams, Structured
from tiercel.sampling.sampler import Sampler, bad_word_ids, draw, uniform

V = 50


def logits(seed: int = 0, size: int = V, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale


def drawn(params: SamplingParams, row: torch.Tensor, times: int, prompt: tuple[int, ...] = ()) -> torch.Tensor:
    """How often each token comes out of the same row, position after position."""
    sampler = Sampler(params, list(prompt), len(row))
    counts = torch.zeros(len(row))
    for _ in range(times):
        counts[sampler.sample(row)] += 1
        sampler.output_ids.append(0)  # only the position moves: penalties are tested elsewhere
    return counts


# ── the parameters


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.seed, params.stop, params.logprobs) == (
        16,
        0,
        None,
        None,
        None,
    )
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert params.skip_special_tokens and params.detokenize and not params.include_stop_str_in_output


def test_importing_the_parameters_does_not_import_torch() -> None:
    code = "import sys; from tiercel import SamplingParams; SamplingParams(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", v) for v in (-0.1, math.nan, math.inf, -math.inf, 1e308, "1", None, True, 10**400)],
        *[("top_p", v) for v in (0, -1, 1.01, math.nan)],
        *[("min_p", v) for v in (-0.01, 1.01, math.nan)],
        *[("top_k", v) for v in (-2, 1.5, 2**31, 2**64, True)],
        *[("n", v) for v in (0, 17, 10**9, -1, None)],
        *[("presence_penalty", v) for v in (-2.1, 2.1, math.nan)],
        *[("frequency_penalty", v) for v in (-2.1, 2.1, math.nan)],
        *[("repetition_penalty", v) for v in (0, -1, 101, math.nan)],
        *[("max_tokens", v) for v in (0, -1, 2**63, 1.5, 10**4000)],
        *[("min_tokens", v) for v in (-1, 17, 2**63)],
        *[("seed", v) for v in (-2, 2**64, 0.5)],
        *[("logprobs", v) for v in (-1, 21, True)],
        *[("stop", v) for v in ("", ["a"] * 17, ["x" * 257], [""], [1], {"a": 1}, 3)],
        *[("stop_token_ids", v) for v in ([-1], [2**31], ["1"], 5, [True], [0] * 10**6)],
        *[("allowed_token_ids", v) for v in ([], [-1])],
        *[("logit_bias", v) for v in ({1: 101}, {1: math.nan}, {-1: 0}, {"x": 1}, {"9" * 5000: 1}, {1: "2"}, [1])],
        *[("bad_words", v) for v in ([""], ["x" * 257], 7)],
        *[("ignore_eos", v) for v in (1, None, "yes")],
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("prompt_logprobs", 1), ("output_kind", 1),
     ("spaces_between_special_tokens", False), ("flat_logprobs", True), ("extra_args", {}),
     ("skip_reading_prefix_cache", True), ("logprob_token_ids", [1])],
)  # fmt: skip
def test_a_name_not_served_yet_is_refused_and_never_ignored(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{name} is not supported yet"):
        SamplingParams(**{name: value})
    SamplingParams(**{name: getattr(SamplingParams(), name)})  # the default passes


def test_no_limit_has_another_name_than_a_number(name: str = "max_tokens") -> None:
    for value in (-1, 10**12):
        with pytest.raises(RequestError, match=rf"null for no limit; over HTTP leave it out\), not {value}"):
            SamplingParams(**{name: value})
    assert SamplingParams(**{name: None}).max_tokens is None


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 3.0, "seed": 1}, {"top_p": 0.5, "seed": 2}])
def test_padding_behind_the_tokens_is_never_sampled(params: dict) -> None:
    row = torch.zeros(V)
    row[V - 3 :] = 20.0
    sampler = Sampler(SamplingParams(**params), [], V, num_tokens=V - 3)
    for _ in range(50):
        token = sampler.sample(row)
        sampler.accept(token)
        assert token < V - 3


def test_a_number_too_long_to_print_is_refused_all_the_same() -> None:
    with pytest.raises(RequestError, match="4300 digits"):
        SamplingParams(max_tokens=10**5000)


def test_edge_values_that_are_meant_pass() -> None:
    params = SamplingParams(temperature=0, top_k=-1, seed=-1, max_tokens=None, stop="END", logit_bias={"7": -100})
    assert params.greedy and params.seed is None and params.stop == ["END"] and params.logit_bias == {7: -100.0}


def test_stop_strings_need_text() -> None:
    with pytest.raises(RequestError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_an_assigned_field_is_checked_before_sampling() -> None:
    params = SamplingParams()
    params.temperature = math.nan
    with pytest.raises(RequestError, match="temperature"):
        Sampler(params, [], V)


# ── the choice


def test_greedy_takes_the_likeliest_and_the_first_of_equals() -> None:
    row = torch.zeros(V)
    row[[7, 30]] = 2.0
    assert Sampler(SamplingParams(temperature=0), [], V).sample(row) == 7


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(temperature: float) -> None:
    row, times = logits(1, 12, 1.0), 4000
    counts = drawn(SamplingParams(temperature=temperature, seed=3), row, times)
    expected = torch.softmax(row / temperature, -1) * times
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 31.3  # 11 degrees of freedom, p = 0.001


def test_filtered_tokens_come_as_often_as_the_renormalised_softmax_says() -> None:
    row, times = logits(2, 12, 1.0), 4000
    counts = drawn(SamplingParams(top_k=5, seed=5), row, times)
    kept = row.topk(5).indices
    assert set(counts.nonzero().flatten().tolist()) == set(kept.tolist())
    expected = torch.softmax(row[kept], -1) * times
    assert float(((counts[kept] - expected) ** 2 / expected).sum()) < 18.5  # 4 degrees of freedom


def reference_kept(row: torch.Tensor, temperature: float, min_p: float, top_k: int, top_p: float) -> set[int]:
    """The plain reading of min_p → top_k → top_p, token by token."""
    probs = torch.softmax(row.double() / temperature, -1)
    kept = {i for i, p in enumerate(probs) if p >= min_p * probs.max()}
    if top_k:
        kept = set(sorted(kept, key=lambda i: -probs[i])[:top_k])
    total, out, reached = sum(probs[i] for i in kept), set(), 0.0
    for i in sorted(kept, key=lambda i: -probs[i]):
        if reached / total >= top_p:
            break
        out.add(i)
        reached += probs[i]
    return out


@pytest.mark.parametrize("seed", range(20))
def test_only_what_min_p_top_k_and_top_p_keep_can_be_drawn(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    temperature, min_p, top_p = (torch.rand(3, generator=generator) * torch.tensor([1.5, 0.2, 0.95]) + 0.05).tolist()
    top_k = int(torch.randint(0, V, (), generator=generator))
    row = logits(seed)
    kept = reference_kept(row, temperature, min_p, top_k, top_p)
    params = SamplingParams(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p, seed=seed)
    sampler, ids = Sampler(params, [], V), set()
    for position in range(400):
        sampler.output_ids = [0] * position
        ids.add(sampler.sample(row))
    assert ids <= kept
    assert max(kept, key=lambda i: row[i]) in ids


def test_top_p_reaches_beyond_its_first_guess_in_a_flat_vocabulary() -> None:
    size = 20_000
    counts = drawn(SamplingParams(top_p=0.9, seed=1), torch.linspace(0, 0.1, size), 300)
    assert counts[: int(size * 0.09)].sum() == 0  # the least likely tenth is out
    assert counts[int(size * 0.11) : size // 2].sum() > 50  # the rest is in


def test_top_k_larger_than_the_vocabulary_keeps_all() -> None:
    row = logits(3)
    one, other = Sampler(SamplingParams(top_k=10**6, seed=9), [], V), Sampler(SamplingParams(seed=9), [], V)
    assert one.sample(row) == other.sample(row)


@pytest.mark.parametrize("params", [{"top_p": 1e-9}, {"top_k": 1}, {"min_p": 1.0}, {"temperature": 1e-4}])
def test_the_tightest_filter_still_leaves_the_likeliest(params: dict[str, float]) -> None:
    row = logits(4)
    assert Sampler(SamplingParams(**params), [], V).sample(row) == int(row.argmax())


def test_min_p_one_keeps_every_tie() -> None:
    row = torch.zeros(V)
    row[[3, 4]] = 5.0
    assert set(drawn(SamplingParams(min_p=1.0, seed=0), row, 60).nonzero().flatten().tolist()) == {3, 4}


def test_the_draw_never_takes_a_token_that_is_out() -> None:
    row = torch.full((V,), -math.inf)
    row[[5, 9]] = 0.0
    assert draw(row, 0.0) == 5 and draw(row, 1 - 2**-53) == 9 and draw(row, 1.0) == 9


# ── the seed


def text_of(seed: int | None, steps: int = 40, choice: int = 0) -> list[int]:
    sampler = Sampler(SamplingParams(seed=seed), [], V, index=choice)
    for step in range(steps):
        sampler.accept(sampler.sample(logits(step)))
    return sampler.output_ids


def test_the_same_seed_gives_the_same_text_and_another_another() -> None:
    assert text_of(42) == text_of(42)
    assert text_of(42) != text_of(43)
    assert text_of(42) != text_of(42, choice=1)
    assert text_of(None) != text_of(None)


def test_the_seed_does_not_care_about_other_requests() -> None:
    alone = text_of(7)
    ours, theirs = Sampler(SamplingParams(seed=7), [], V), Sampler(SamplingParams(seed=8), [], V)
    for step in range(40):
        torch.rand(step)
        theirs.accept(theirs.sample(logits(step)))
        ours.accept(ours.sample(logits(step)))
    assert ours.output_ids == alone


def test_the_uniform_numbers_are_uniform() -> None:
    values = torch.tensor([uniform(1, 0, i) for i in range(10_000)], dtype=torch.float64)
    assert abs(float(values.mean()) - 0.5) < 0.01 and float(values.min()) >= 0 and float(values.max()) < 1
    assert torch.histc(values.float(), 10, 0, 1).min() > 880


# ── what was said before


def test_penalties_follow_their_formulas() -> None:
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.7, temperature=0)
    sampler = Sampler(params, [1, 2], V)
    for id in (2, 3, 3):
        sampler.accept(id)
    row = logits(5)
    expected = row.clone()
    for id in (1, 2, 3):  # prompt and output
        expected[id] = expected[id] / 1.3 if expected[id] > 0 else expected[id] * 1.3
    for id, count in ((2, 1), (3, 2)):  # output only
        expected[id] -= 0.4 * count + 0.7
    torch.testing.assert_close(sampler._penalize(row), expected)


def test_a_strong_penalty_moves_the_greedy_choice() -> None:
    row = logits(6)
    first, second = row.topk(2).indices.tolist()
    sampler = Sampler(SamplingParams(temperature=0, repetition_penalty=100), [first], V)
    assert sampler.sample(row) != first
    sampler = Sampler(SamplingParams(temperature=0), [first], V)
    assert (sampler.sample(row), second) == (first, second)


# ── what may be said at all


def test_only_allowed_tokens_are_drawn() -> None:
    counts = drawn(SamplingParams(allowed_token_ids=[4, 9], seed=1, temperature=5), logits(7), 100)
    assert set(counts.nonzero().flatten().tolist()) == {4, 9}


def test_a_bias_is_added_to_the_logit() -> None:
    row = logits(8)
    lowest = int(row.argmin())
    assert Sampler(SamplingParams(temperature=0, logit_bias={lowest: 100}), [], V).sample(row) == lowest


def test_the_same_bias_on_all_tokens_changes_nothing() -> None:
    row = logits(9)
    biased = Sampler(SamplingParams(seed=1, logit_bias=dict.fromkeys(range(V), -100.0)), [], V)
    assert biased.sample(row) == Sampler(SamplingParams(seed=1), [], V).sample(row)


def test_min_tokens_holds_the_end_back_and_then_lets_it_come() -> None:
    row = logits(10)
    end = int(row.argmax())
    sampler = Sampler(SamplingParams(temperature=0, min_tokens=3), [], V, eos={end})
    for _ in range(3):
        token = sampler.sample(row)
        assert token != end
        sampler.accept(token)
    assert sampler.sample(row) == end


def test_min_tokens_holds_stop_tokens_back_too() -> None:
    row = logits(11)
    end = int(row.argmax())
    assert Sampler(SamplingParams(temperature=0, min_tokens=1, stop_token_ids=[end]), [], V).sample(row) != end


def test_a_bad_word_is_never_completed() -> None:
    row = torch.zeros(V)
    row[[1, 2, 3]] = torch.tensor([1.0, 3.0, 2.0])
    sampler = Sampler(SamplingParams(temperature=0, bad_words=["ab"]), [], V, bad_words=[[1, 2], [9]])
    assert sampler.sample(row) == 2  # on its own it is no bad word
    sampler.accept(1)
    assert sampler.sample(row) == 3
    row[9] = 10.0
    assert sampler.sample(row) == 3  # a bad word of one token is always out


def test_bad_words_are_spelled_with_and_without_a_space() -> None:
    ids = {"cat": [1], " cat": [2], "dog": [3, 4], " dog": [5, 4], "x": [6], " x": [7, 6]}
    assert bad_word_ids([" cat", "dog", "x"], lambda text: ids[text]) == [[1], [2], [3, 4], [5, 4], [6]]


def test_excluding_every_token_is_said() -> None:
    sampler = Sampler(SamplingParams(allowed_token_ids=[5], min_tokens=1), [], V, eos={5})
    with pytest.raises(RequestError, match="no token is left"):
        sampler.sample(logits())


@pytest.mark.parametrize("params", [{"allowed_token_ids": [V]}, {"logit_bias": {V: 1}}, {"stop_token_ids": [V]}])
def test_a_token_outside_the_vocabulary_is_refused(params: dict[str, object]) -> None:
    with pytest.raises(RequestError, match=next(iter(params))):
        Sampler(SamplingParams(**params), [], V)


def test_bad_words_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(RequestError, match="tokenizer"):
        Sampler(SamplingParams(bad_words=["x"]), [], V)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sick_row_is_an_error_and_not_token_zero(value: float, temperature: float) -> None:
    row = logits()
    row[13] = value
    with pytest.raises(TiercelError, match="the network produced"):
        Sampler(SamplingParams(temperature=temperature), [], V).sample(row)


def test_a_row_of_minus_infinity_is_an_error() -> None:
    with pytest.raises(TiercelError, match="no finite logit"):
        Sampler(SamplingParams(), [], V).sample(torch.full((V,), -math.inf))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_of_logits_is_taken(dtype: torch.dtype) -> None:
    row = logits(12)
    assert Sampler(SamplingParams(temperature=0), [], V).sample(row.to(dtype)) == int(row.to(dtype).argmax())


def test_the_row_of_the_network_is_left_as_it_was() -> None:
    row = logits(13)
    before = row.clone()
    params = SamplingParams(
        logit_bias={1: 5}, allowed_token_ids=[1, 2, 3], repetition_penalty=2, min_tokens=1, top_p=0.5
    )
    Sampler(params, [1], V, eos={3}).sample(row)
    assert torch.equal(row, before)


# ── log-probabilities


def test_logprobs_are_those_of_the_raw_logits() -> None:
    row = logits(14)
    sampler = Sampler(SamplingParams(logprobs=3, temperature=0.2, logit_bias={0: 100}), [], V)
    token = sampler.sample(row)
    expected = torch.log_softmax(row, -1)
    assert sampler.last_logprobs is not None and token == 0
    assert next(iter(sampler.last_logprobs)) == token and len(sampler.last_logprobs) == 4
    for id, entry in sampler.last_logprobs.items():
        assert entry.logprob == pytest.approx(float(expected[id]), abs=1e-6)
        assert entry.rank == 1 + int((row > row[id]).sum())


def test_zero_logprobs_give_the_chosen_one_and_none_gives_nothing() -> None:
    sampler = Sampler(SamplingParams(logprobs=0), [], V)
    assert sampler.last_logprobs is None
    token = sampler.sample(logits())
    assert sampler.last_logprobs is not None and list(sampler.last_logprobs) == [token]
    assert len(top_logprobs(logits(), int(logits().argmax()), 3)) == 3


def test_the_form_of_an_answer_goes_by_vllm_s_names_too() -> None:
    params = SamplingParams(structured_outputs={"choice": ["a", "b"]}, thinking_token_budget=5)
    assert params.structured == Structured(choice=("a", "b")) and params.thinking_budget == 5
    assert dataclasses.replace(params, n=2).structured == params.structured
    assert SamplingParams(thinking_token_budget=-1).thinking_budget is None
    assert SamplingParams(repetition_detection=True).repetition_detection == Repetition()
    assert SamplingParams(repetition_detection=False).repetition_detection is None


@pytest.mark.parametrize(
    "wanted",
    [{"structured": {}}, {"structured": {"json": {}, "regex": "a"}}, {"structured": {"jsn": {}}}, {"structured": "a"},
     {"structured": {"choice": []}}, {"structured": {"choice": ["a", ""]}}, {"structured": {"regex": 5}},
     {"structured": {"json": "{"}}, {"structured": {"json": "[" * 10**5}}, {"structured": {"json": [1]}},
     {"structured": {"json": {"a": object()}}}, {"structured": {"regex": "(" * 65}}, {"structured": {"json_object": 1}},
     {"structured": {"grammar": "x" * 600_000}}, {"thinking_budget": -2},
     {"thinking_budget": 1, "thinking_token_budget": 2},
     {"repetition_detection": 5}, {"repetition_detection": {"min_count": 1}}, {"repetition_detection": {"x": 1}},
     {"repetition_detection": {"max_pattern_size": 2, "min_pattern_size": 3}}],
)  # fmt: skip
def test_a_form_that_is_none_is_refused_in_one_short_line(wanted: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**wanted)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
