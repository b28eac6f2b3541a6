"""What an engine promises beside the right tokens: nobody waits for ever, nothing is left, nothing is read twice."""

from types import SimpleNamespace

import pytest
import torch

import tiny
from by_hand import generate_reference
from tiercel.engine import snapshot_policy as policy
from tiercel.engine.engine import Engine
from tiercel.engine.scheduler import MIN_PREFILL_TOKENS, Scheduler
from tiercel.errors import RequestError
from tiercel.model.graph_cache import CapturedStep
from tiercel.ops.cpu import native
from tiercel.runtime.allocator import CachingAllocator
from tiercel.sampling.params import SamplingParams
from tiny import ids, run


def greedy(count, **more):
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **more)


@pytest.fixture(scope="module")
def net():
    return tiny.network(max_length=4096)


def engine(network, **changes):
    return tiny.engine(network, 4096, **({"cache_bytes": 1 << 28} | changes))


def read(engine):
    """Tokens that went through the network."""
    return sum(map(sum, engine.runner.calls))


def test_where_the_kernels_run_torch_has_one_thread_in_a_step_and_all_of_its_own_after_it():
    """Its loops on two threads wait for a core each, which stops a busy machine (docs/history.md, 2026-11-28)."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for kernels in (True, False):
            e = engine(tiny.network(native=kernels))
            request, seen = e.add(ids(40), greedy(3)), []
            e.runner.calls = SimpleNamespace(append=lambda call, seen=seen: seen.append(torch.get_num_threads()))
            while not request.finished:
                e.step()
                assert torch.get_num_threads() == 3
            assert set(seen) == {1 if e.runner.native else 3} and e.runner.native is (kernels and native.available)
    finally:
        torch.set_num_threads(before)


# ── fairness ──


def test_a_long_prompt_does_not_stop_a_stream(net):
    e = engine(net, max_decode_delay=0.0)
    stream = e.add(ids(10), greedy(40))
    e.step()
    long = e.add(ids(1500, seed=1), greedy(1))
    between = []
    while not long.finished:
        news = [update for update in e.step() if update.request is stream]
        if not stream.finished:
            between.append(len(news))
    assert min(between) == 1  # a token in every step
    assert max(sum(call) for call in e.runner.calls if len(call) > 1) <= MIN_PREFILL_TOKENS + 1


def test_beside_a_stream_as_much_is_read_as_its_patience_allows_and_never_less_than_is_worth_a_step():
    scheduler = Scheduler(slots=8, max_num_batched_tokens=512, max_decode_delay=0.2)
    assert scheduler.prefill_budget == MIN_PREFILL_TOKENS
    for _ in range(8):
        scheduler.record_prefill(256, seconds=0.25)  # 1024 tokens a second
    assert 190 <= scheduler.prefill_budget <= 204
    scheduler.record_prefill(MIN_PREFILL_TOKENS - 1, seconds=10.0)  # too few to say anything
    assert 190 <= scheduler.prefill_budget <= 204
    for _ in range(8):
        scheduler.record_prefill(64, seconds=1.0)  # a large network: 64 tokens a second
    assert scheduler.prefill_budget == MIN_PREFILL_TOKENS


def test_a_short_prompt_passes_the_rest_of_a_long_one(net):
    e = engine(net, max_num_batched_tokens=64)
    long = e.add(ids(1500), greedy(1))
    for _ in range(3):
        e.step()
    short = e.add(ids(30, seed=1), greedy(1))
    steps = 0
    while not short.finished:
        e.step()
        steps += 1
    assert steps <= 2 and not long.finished


def test_a_long_prompt_is_read_though_short_ones_keep_coming(net):
    e = engine(net, max_num_batched_tokens=64, cache_bytes=0)
    long = e.add(ids(400), greedy(1))
    for i in range(60):
        e.add(ids(60, seed=i + 1), greedy(1))
        e.step()
        if long.finished:
            break
    assert long.finished and i < 30


def test_a_request_of_many_answers_gets_its_slots(net):
    e = engine(net, slots=4)
    first = [e.add(ids(5, seed=i), greedy(30)) for i in range(4)]
    wide = e.add(ids(9), greedy(3, n=4))
    later = [e.add(ids(5, seed=i + 9), greedy(3)) for i in range(6)]
    done = [update.request for update in run(e) if update.finish_reason]
    assert set(done[:4]) == set(first) and set(done[4:8]) == {wide} and set(done[8:]) == set(later)


def test_step_tokens_bound_a_step(net):
    e = engine(net, max_num_batched_tokens=50, cache_bytes=0)
    for i in range(6):
        e.add(ids(200, seed=i), greedy(2))
    run(e)
    assert max(sum(call) for call in e.runner.calls) <= 50


# ── nothing is read twice ──


def test_n_answers_read_the_prompt_once(net):
    e = engine(net, cache_bytes=0)
    request = e.add(ids(100), SamplingParams(temperature=2.0, seed=3, n=4, max_tokens=6, ignore_eos=True))
    run(e)
    assert read(e) == 100 + 4 * 5
    assert len({tuple(choice.token_ids) for choice in request.sequences}) == 4


@pytest.mark.parametrize("words", [tiny.EVERY_KIND, "attention+mamba2", "mamba1/-", "attention"])
def test_a_conversation_is_read_once_with_its_branches(words):
    """Extend, another question under the same system prompt, two turns back, two talks in turn, an edit."""
    e = engine(tiny.network(words, max_length=4096))
    system, said = ids(403), []

    def ask(prompt):
        request = e.add(prompt, greedy(8))
        run(e)
        said.append(len(prompt) - request.cached_tokens)
        return said[-1]

    first = system + ids(20, seed=1)
    ask(first)
    second = first + ids(7, seed=2) + ids(19, seed=3)
    assert ask(second) <= 26  # another answer than ours stands in the history
    third = second + ids(7, seed=4) + ids(18, seed=5)
    assert ask(third) <= 25
    assert ask(system + ids(21, seed=6)) <= 21 + 64
    assert ask(second + ids(30, seed=7)) <= 30
    other = ids(410, seed=8)
    ask(other)
    assert ask(third + ids(26, seed=9)) <= 26 and ask(other + ids(24, seed=10)) <= 24
    assert ask([*first[:300], 299, *first[301:]]) <= len(first) - 300 + 64
    assert ask(list(third)) <= 1 + 64  # asked again


def test_where_two_prompts_part_the_third_goes_on(net, monkeypatch):
    """The second visit leaves a snapshot at the place, also where none of those on the way is near."""
    e = engine(net)
    monkeypatch.setattr(policy, "MAX_BYTES_PER_TOKEN", 1)  # so costly that a prompt gets none on the way
    system = ids(700)
    for i in range(3):
        request = e.add(system + ids(300, seed=i + 1), greedy(1))
        run(e)
    assert request.cached_tokens == 700


def test_snapshots_on_the_way_are_no_closer_than_they_are_worth(net, monkeypatch):
    """As many bytes for each token as a Transformer would keep, at most: large states leave few."""
    own = net.new_state().own_nbytes
    for tokens, places in ((64, [128, 256, 384, 512]), (256, [256, 512]), (300, [304])):
        monkeypatch.setattr(policy, "MAX_BYTES_PER_TOKEN", own / tokens)
        e = engine(net)
        e.add(ids(600), greedy(1))
        run(e)
        found = sorted(node.entry.length for node in e.cache.nodes)
        assert [length for length in found if length < 576] == places


def test_a_hint_where_the_last_turn_began(net, monkeypatch):
    e = engine(net)
    monkeypatch.setattr(policy, "MAX_BYTES_PER_TOKEN", 1)
    history, question = ids(700), ids(300, seed=1)
    e.add(history + question, greedy(1), turn=700)
    run(e)
    again = e.add(history + ids(50, seed=2), greedy(1))
    run(e)
    assert again.cached_tokens == 700


@pytest.mark.skipif(not native.available, reason="steps are recorded where there are kernels")
@pytest.mark.parametrize("slots", [1, 5])
def test_an_engine_that_was_warmed_up_has_recorded_the_steps_of_any_number_of_answers(slots):
    """The first two of a kind are slow: eight answers that end one after another would meet eight kinds."""
    network = tiny.network("attention+mamba2 mamba2")
    e = Engine(SimpleNamespace(network=network, tokenizer=None, max_length=512), slots=slots)
    e.warm_up()
    known = {key for key, step in e.runner.graphs.seen.items() if isinstance(step, CapturedStep)}
    for i in range(slots):
        e.add(ids(20, seed=i), greedy(4 + i))
    run(e)
    met = {key for key in e.runner.graphs.seen if set(key[0]) == {1}}
    assert met and met <= known and e.stats.requests == slots


def test_keys_do_not_see_each_other(net):
    e = engine(net)
    for key in ("a", "b", "a"):
        request = e.add(ids(90), greedy(1), key=key)
        run(e)
    assert request.cached_tokens == 89 and e.stats.hit_tokens == 89
    e.forget("a")
    request = e.add(ids(90), greedy(1), key="a")
    run(e)
    assert request.cached_tokens == 0 and "no earlier text" in request.cache_miss_reason


def test_why_nothing_was_reused_is_said(net, caplog):
    caplog.set_level("INFO", "tiercel.engine")
    off, on = engine(net, cache_bytes=0), engine(net)
    for e in (off, on):
        request = e.add(ids(40), greedy(1))
        run(e)
    assert "cache is off" in caplog.text and "no earlier text" in caplog.text
    assert request.cache_miss_reason and on.stats.not_cached == {"new": 1}
    assert on.stats.prompt_tokens == 40 and on.stats.hit_tokens == 0


def test_the_budget_holds_and_the_disk_takes_the_rest(net, tmp_path):
    e = engine(net, cache_bytes=600_000, spill=tmp_path / "spill")
    prompts = [ids(200, seed=i) for i in range(8)]
    for prompt in prompts:
        e.add(prompt, greedy(2))
        run(e)
        assert e.cache.nbytes <= 600_000
    assert e.stats.evictions and e.stats.cache_disk_bytes and list((tmp_path / "spill").iterdir())
    again = [e.add(prompt, greedy(5)) for prompt in prompts]
    run(e)
    assert sum(request.cached_tokens for request in again) > 800
    for prompt, request in zip(prompts, again, strict=True):
        assert request.sequences[0].token_ids == generate_reference(net, prompt, 5)
    e.cache.clear()
    assert e.cache.nbytes == e.cache.disk_bytes == 0 and not list((tmp_path / "spill").iterdir())


def test_a_damaged_file_in_the_spill_is_as_if_it_were_not_there(net, tmp_path):
    e = engine(net, cache_bytes=300_000, spill=tmp_path)
    prompts = [ids(100, seed=i) for i in range(6)]
    for prompt in prompts:
        e.add(prompt, greedy(2))
        run(e)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    for prompt in prompts:
        request = e.add(prompt, greedy(5))
        run(e)
        assert request.sequences[0].token_ids == generate_reference(net, prompt, 5)


# ── nothing is left behind, nobody suffers for another ──


@pytest.mark.parametrize("steps", [0, 1, 3, 12])
def test_an_abort_frees_everything_at_once(net, steps):
    e = engine(net, max_num_batched_tokens=64, slots=2)
    keeps = e.add(ids(20), greedy(30))
    goes, queued = e.add(ids(300, seed=1), greedy(30)), e.add(ids(300, seed=2), greedy(30))
    for _ in range(steps):
        e.step()
    e.abort(goes.id), e.abort(queued.id), e.abort("nobody")
    assert all(choice.state is None for request in (goes, queued) for choice in request.sequences)
    last = [update for update in run(e) if update.finish_reason]
    assert {update.request: update.finish_reason for update in last} == {
        goes: "abort", queued: "abort", keeps: "length",
    }  # fmt: skip
    assert (e.stats.running, e.stats.waiting, e.stats.kv_bytes, e.stats.aborted) == (0, 0, 0, 2)
    assert keeps.sequences[0].token_ids == generate_reference(net, ids(20), 30)


def test_an_abort_of_many_answers_frees_all_of_them(net):
    e = engine(net)
    request = e.add(ids(100), greedy(30, n=4))
    e.step(), e.step(), e.step()
    e.abort(request.id)
    assert [update.finish_reason for update in run(e)][-4:] == ["abort"] * 4
    assert e.stats.kv_bytes == 0 and e.scheduler.used_slots == 0


def test_a_row_of_nan_ends_with_an_error_and_its_neighbours_go_on(net):
    e = engine(net)
    forward = e.runner.forward

    def poisoned_forward(rows, states, **more):
        logits = forward(rows, states, **more)
        return [
            torch.full_like(row, torch.nan) if 99 in tokens else row for row, tokens in zip(logits, rows, strict=True)
        ]

    e.runner = poisoned(e.runner, poisoned_forward)
    good = e.add([token for token in ids(40) if token != 99], greedy(6))
    bad = e.add([5, 99], greedy(6))
    updates = run(e)
    (end,) = [update for update in updates if update.request is bad]
    assert end.finish_reason == "error" and "NaN" in str(end.error) and bad.error is end.error
    assert good.sequences[0].token_ids == generate_reference(net, good.prompt_ids, 6)
    assert e.stats.failed == 1 and e.stats.kv_bytes == 0


def poisoned(runner, forward):
    class Poisoned:
        def __getattr__(self, name):
            return getattr(runner, name)

        def forward(self, rows, states, **more):
            return forward(rows, states, **more)

    return Poisoned()


@pytest.mark.parametrize("place", [5, 200])
def test_a_row_that_raises_ends_alone(net, place):
    def raising(rows, states, **more):
        if any(299 in row for row in rows):
            raise RuntimeError("bad row")
        return forward(rows, states, **more)

    e = engine(net, max_num_batched_tokens=64)
    forward = e.runner.forward
    e.runner = poisoned(e.runner, raising)
    good = [e.add(ids(50, seed=i), greedy(20)) for i in range(3)]
    for _ in range(4):
        e.step()
    bad = e.add([*ids(place, seed=9), 299, 3], greedy(5))
    run(e)
    assert bad.sequences[0].finish_reason == "error" and "bad row" in str(bad.error)
    for i, request in enumerate(good):
        assert request.sequences[0].token_ids == generate_reference(net, ids(50, seed=i), 20)
    assert e.stats.kv_bytes == 0 and e.scheduler.used_slots == 0


def test_answers_that_outgrow_the_memory_wait_and_lose_nothing(net):
    e = engine(net, state_bytes=300_000)
    requests = [e.add(ids(60 + i, seed=i), greedy(60)) for i in range(5)]
    run(e)
    assert e.stats.preemptions
    for i, request in enumerate(requests):
        assert request.sequences[0].token_ids == generate_reference(net, ids(60 + i, seed=i), 60)


def test_what_cannot_be_served_is_refused_before_anything_runs(net):
    e = engine(net, slots=1, max_queue=1)
    for prompt, params, word in [
        ([], greedy(1), "empty"),
        ([300], greedy(1), "vocabulary of 300"),
        ([-1], greedy(1), "vocabulary of 300"),
        (ids(4096), greedy(1), "4096"),
        (ids(5), greedy(1, n=3), "n=3"),
        (ids(5), greedy(1, stop="x"), "stop strings"),
    ]:
        with pytest.raises(RequestError, match=word):
            e.add(prompt, params)
    assert e.idle
    with pytest.raises(RequestError, match="slots"):
        engine(net, slots=9, max_num_batched_tokens=4)


def test_updates_add_up_to_the_answer(net):
    e = engine(net)
    request = e.add(ids(30), SamplingParams(temperature=1, seed=1, n=2, max_tokens=9, ignore_eos=True, logprobs=1))
    updates = run(e)
    for choice in request.sequences:
        mine = [update for update in updates if update.index == choice.index]
        assert [token for update in mine for token in update.token_ids] == choice.token_ids
        assert [entry for update in mine for entry in update.logprobs] == choice.logprobs
        assert [update.finish_reason for update in mine] == [None] * (len(mine) - 1) + ["length"]
    times = request.times
    assert 0 <= times.queue <= times.first_token <= times.total and times.prompt > 0 and times.generation > 0


# ── memory ──


@pytest.fixture
def slabs_for_small_things(monkeypatch):
    monkeypatch.setattr(CachingAllocator, "SMALL_BLOCK_BYTES", 1)
    monkeypatch.setattr(CachingAllocator, "SEGMENT_BYTES", 1 << 20)
    monkeypatch.setattr(CachingAllocator, "PREFAULT_BYTES", 1 << 14)


def touched(pool):
    return sum(segment.touched for segment in pool.segments)


@pytest.mark.usefixtures("slabs_for_small_things")
def test_memory_for_all_slots_and_what_they_leave_is_there_before_they_come():
    """The system gives it slowly: an answer's first token came 50 ms late for that (docs/history.md, 2026-11-28)."""
    network = tiny.network()
    e = engine(network, slots=3)
    e.add(ids(4, seed=9), greedy(2)), run(e)  # a first one makes what lasts
    while e.prefault():
        pass
    before = touched(e.runner.allocator)
    assert e.runner.allocator.nbytes >= sum(e.memory_targets)
    for seed in range(3):
        e.add(ids(100, seed=seed), greedy(30))
    run(e)
    assert touched(e.runner.allocator) == before, "nothing was touched first, and nothing was given back"
    assert e.prefault(), "what the answers left in the cache is made up for"


@pytest.mark.usefixtures("slabs_for_small_things")
def test_no_more_memory_is_at_hand_than_slots_and_cache_may_take():
    network = tiny.network()
    e = engine(network, slots=3, cache_bytes=200_000)
    running, left = e.memory_targets
    assert left > 200_000
    for seed in range(12):  # more than the cache holds
        e.add(ids(100, seed=seed), greedy(30))
        run(e)
        while e.prefault():
            pass
        slack = CachingAllocator.PREFAULT_BYTES * torch.get_num_threads()
        assert e.runner.allocator.nbytes + e.cache.nbytes <= running + 200_000 + slack + CachingAllocator.SEGMENT_BYTES
    off = engine(tiny.network(), slots=3, cache_bytes=0)
    while off.prefault():
        pass
    assert running <= off.runner.allocator.nbytes <= running + slack
