"""A draft model changes how fast tokens come, and no token; one of another vocabulary is refused."""

from types import SimpleNamespace

import pytest

import tiny
from by_hand import generate_reference
from tiercel import SamplingParams, load
from tiercel.engine.draft_model import DraftModel, drafter_for
from tiercel.engine.engine import Engine
from tiercel.engine.speculative import prompt_lookup
from tiercel.errors import RequestError
from tiercel.ops.cpu import native
from tiny import ids, run

KINDS = [tiny.EVERY_KIND, "mamba2", "attention+mamba2"]


def model(network, name="large", max_length=512, tokenizer=None):
    return SimpleNamespace(network=network, tokenizer=tokenizer, max_length=max_length, name=name)


def always(engine):
    """Drafts pay in every step, whatever this machine measures."""
    engine.costs.of = lambda rows: 1.0 + 0.01 * rows
    return engine


def greedy(count):
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


@pytest.mark.parametrize("words", KINDS)
@pytest.mark.parametrize("draft", ["itself", "another"])
def test_tokens_are_those_without_it(words, draft):
    net = tiny.network(words, seed=3)
    small = net if draft == "itself" else tiny.network("mamba2", seed=9)
    e = always(Engine(model(net), slots=2, drafter=DraftModel(model(net), model(small, "small"), 2)))
    requests = [e.add(ids(20 + 30 * i, seed=i), greedy(40)) for i in range(3)]
    run(e)
    for request in requests:
        assert request.sequences[0].token_ids == generate_reference(net, request.prompt_ids, 40)
    assert e.stats.drafts_proposed > 0
    assert e.stats.drafts_accepted == e.stats.drafts_proposed or draft == "another"


def test_sampled_tokens_too_and_an_equal_network_is_always_right():
    net = tiny.network("mamba2", seed=3)
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=60, ignore_eos=True)
    outputs = []
    for drafter in (None, DraftModel(model(net), model(net), 1)):
        e = always(Engine(model(net), slots=1, drafter=drafter))
        request = e.add(ids(30), params)
        run(e)
        outputs.append(request.sequences[0].token_ids)
    assert outputs[0] == outputs[1] and 0 < e.stats.drafts_accepted == e.stats.drafts_proposed


def test_states_of_drafts_are_free_when_a_sequence_finishes_or_is_preempted():
    net = tiny.network("mamba2", seed=3)
    e = always(Engine(model(net), slots=2, drafter=DraftModel(model(net), model(net), 2)))
    request = e.add(ids(20), greedy(30))
    for _ in range(3):
        e.step()
    drafter = request.sequences[0].speculation.drafter
    assert drafter._state is not None
    e.preempt(request.sequences[0])
    assert drafter._state is None
    run(e)
    assert drafter._state is None
    assert request.sequences[0].token_ids == generate_reference(net, request.prompt_ids, 30)


def test_a_sequence_that_outgrows_the_draft_model_goes_on_without_it():
    net = tiny.network("mamba2", seed=3)
    e = always(Engine(model(net), slots=1, drafter=DraftModel(model(net), model(net, "short", max_length=40), 1)))
    request = e.add(ids(20), greedy(60))
    run(e)
    assert request.sequences[0].token_ids == generate_reference(net, request.prompt_ids, 60)
    assert 0 < e.stats.drafts_proposed <= 20


def test_another_vocabulary_is_refused_in_one_line_with_the_reason():
    net, other = tiny.network("mamba2"), tiny.network("mamba2", vocab_size=280)
    with pytest.raises(RequestError, match="small cannot draft for large: its vocabulary has 280 tokens, and 300 are"):
        DraftModel(model(net), model(other, "small"))


def test_tokenizers_count_where_there_are_some_and_padding_does_not(tmp_path):
    target = load(tiny.checkpoint(tmp_path / "a", "mamba2"))
    padded = load(tiny.checkpoint(tmp_path / "b", "mamba2", vocab_size=320))
    assert target.tokenizer.vocab_size == padded.tokenizer.vocab_size
    V = target.tokenizer.vocab_size
    for prompt in ([1, 2, 3], [1, 2, 299]):  # 299 is padding: nothing is drafted before it is read
        e = always(Engine(target, slots=1, drafter=DraftModel(target, padded)))
        request = e.add(prompt, greedy(20))
        run(e)
        assert request.sequences[0].token_ids == generate_reference(target.network, prompt, 20, V)
        assert (e.stats.drafts_proposed > 0) == (299 not in prompt)
    text = (tmp_path / "b" / "tokenizer.json").read_text()
    (tmp_path / "b" / "tokenizer.json").write_text(text.replace("<|bot|>", "<|tob|>"))
    with pytest.raises(RequestError, match=r"its token 258 is b'<\|tob\|>', and b'<\|bot\|>' is needed"):
        DraftModel(target, load(tmp_path / "b"))


def test_the_number_of_draft_tokens_can_be_limited():
    net = tiny.network("mamba2", seed=3)
    draft = DraftModel(model(net), model(net), 1)
    e = always(tiny.engine(net, 512, slots=1, drafter=draft, num_speculative_tokens=2))
    e.add(ids(20), greedy(30))
    run(e)
    assert max(sum(call) for call in e.runner.calls[1:]) == 3
    for wrong in (0, 8, 1.5):
        with pytest.raises(RequestError, match="num_speculative_tokens must be a whole number from 1 to 7"):
            Engine(model(net), num_speculative_tokens=wrong)


def test_without_a_draft_model_it_is_prompt_lookup_where_there_are_kernels():
    net = tiny.network("mamba2")
    assert drafter_for(model(net)) is (prompt_lookup if native.available else None)
    assert drafter_for(model(tiny.network("mamba2", native=False))) is None
    assert isinstance(drafter_for(model(net), model(net, "small")), DraftModel)
