"""A conversation says what fresh runs say, and is read once."""

import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import tiercel
import tiny
from by_hand import generate_reference
from tiercel import version
from tiercel.engine.engine import Engine
from tiercel.engine.session import Session
from tiercel.errors import FormatError, RequestError
from tiercel.sampling.params import SamplingParams
from tiny import GREEDY, ids


def conversation(net):
    return Session(Engine(SimpleNamespace(network=net, tokenizer=None, max_length=512), cache_bytes=1 << 28))


def answer(session, prompt, params=GREEDY):
    for _ in session.generate(prompt, params):
        pass
    return session.last


def test_a_next_turn_reads_only_what_is_new(net):
    session = conversation(net)
    first = answer(session, ids(60))
    second_prompt = ids(60) + first.token_ids + ids(10, seed=1)
    second = answer(session, second_prompt)
    assert second.cached_tokens >= 60 + 11  # all but the last sampled token, which was never read
    assert second.token_ids == generate_reference(net, second_prompt, 12)


def test_asking_again_reads_one_token(net):
    session = conversation(net)
    first = answer(session, ids(60))
    again = answer(session, ids(60))
    assert again.cached_tokens == 59 and again.token_ids == first.token_ids


def test_an_answer_that_changed_in_the_history_goes_back_to_the_end_of_its_prompt(net):
    """What chat templates do to thoughts: the next prompt holds another text where the answer was."""
    session = conversation(net)
    answer(session, ids(60), SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    prompt = ids(60) + ids(25, seed=3)
    second = answer(session, prompt)
    assert second.cached_tokens == 60
    assert second.token_ids == generate_reference(net, prompt, 12)


def test_a_conversation_goes_back_several_turns(net):
    session, prompt = conversation(net), ids(20)
    ends = []
    for turn in range(3):
        run = answer(session, prompt)
        ends.append(list(prompt))
        prompt = prompt + run.token_ids + ids(9, seed=turn + 5)
    other = ends[1] + ids(6, seed=77)
    run = answer(session, other)
    assert run.cached_tokens == len(ends[1])
    assert run.token_ids == generate_reference(net, other, 12)


def test_any_sequence_of_prompts_gives_what_fresh_runs_give(net):
    g = torch.Generator().manual_seed(4)
    session, history = conversation(net), ids(30)
    for step in range(25):
        cut = int(torch.randint(1, len(history) + 1, (1,), generator=g))
        if step % 3 == 0:
            history = history[:cut]
        history = history[:150] + ids(int(torch.randint(1, 25, (1,), generator=g)), seed=step)
        params = SamplingParams(temperature=0, max_tokens=int(torch.randint(1, 9, (1,), generator=g)), ignore_eos=True)
        run = answer(session, history, params)
        assert run.token_ids == generate_reference(net, history, params.max_tokens), step
        history = history + run.token_ids


def test_an_unrelated_prompt_starts_over(net):
    session = conversation(net)
    answer(session, ids(60))
    run = answer(session, ids(50, seed=9))
    assert run.cached_tokens == 0 and run.token_ids == generate_reference(net, ids(50, seed=9), 12)


def test_leaving_an_answer_half_way_loses_nothing(net):
    """Ctrl+C: the iterator is closed, and the conversation goes on from what was read."""
    session = conversation(net)
    asked = []
    for _ in session.generate(ids(60), GREEDY, stopping=lambda: len(asked) > 3 or asked.append(1)):
        pass
    assert session.last.finish_reason == "abort" and len(session.last.token_ids) == 5
    prompt = ids(60) + session.last.token_ids + ids(5, seed=2)
    run = answer(session, prompt)
    assert run.cached_tokens >= 64
    assert run.token_ids == generate_reference(net, prompt, 12)


def test_an_interrupt_inside_the_network_leaves_a_state_that_goes_on(net, monkeypatch):
    session = conversation(net)
    answer(session, ids(60))
    block = net.layers[2]
    forward, calls = block.forward, []

    def interrupted(*arguments):
        calls.append(1)
        raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr(block, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer(session, ids(60) + ids(7, seed=1))
    monkeypatch.undo()
    prompt = ids(60) + ids(7, seed=1) + ids(3, seed=8)
    assert answer(session, prompt).token_ids == generate_reference(net, prompt, 12)


# ── saved and loaded ──


def saved(net, tmp_path, turns=2):
    """A conversation of some turns in a file: its last prompt, the answer, the file."""
    session, prompt = conversation(net), ids(70)
    for turn in range(turns):
        run = answer(session, prompt, SamplingParams(temperature=0, max_tokens=90, ignore_eos=True))
        asked, prompt = prompt, prompt + run.token_ids + ids(9, seed=turn)
    session.save(tmp_path / "talk")
    return asked, run.token_ids, tmp_path / "talk"


@pytest.mark.parametrize("words", [tiny.EVERY_KIND, "attention+mamba2", "mamba1/-", "attention"])
def test_a_loaded_conversation_reads_only_the_new_suffix(words, tmp_path):
    net = tiny.network(words)
    asked, said, path = saved(net, tmp_path)
    session = conversation(net)
    assert session.load(path) == (asked + said)[:-1]
    prompt = asked + said + ids(8, seed=3)
    run = answer(session, prompt)
    assert run.cached_tokens == len(asked + said) - 1
    assert run.token_ids == generate_reference(net, prompt, 12)


def test_a_loaded_conversation_can_ask_its_last_question_again(net, tmp_path):
    asked, said, path = saved(net, tmp_path)
    session = conversation(net)
    session.load(path)
    run = answer(session, asked)
    assert run.cached_tokens == len(asked) - 1 and run.token_ids == said[:12]


def test_another_process_goes_on(tmp_path):
    folder = tiny.checkpoint(tmp_path / "model")
    model = tiercel.load(folder)
    session = model.session()
    first = answer(session, ids(70))
    session.save(tmp_path / "talk")
    prompt = ids(70) + first.token_ids + ids(5, seed=1)
    code = f"""
import tiercel
from tiercel import SamplingParams
model = tiercel.load({str(folder)!r})
session = model.session()
session.load({str(tmp_path / "talk")!r})
for _ in session.generate({prompt}, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)): pass
print(session.last.cached_tokens, session.last.token_ids)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == f"81 {answer(session, prompt).token_ids}"


def test_every_changed_byte_is_noticed(tmp_path):
    net = tiny.network("attention+mamba2", width=8, vocab_size=300, state=2, mamba_head_dim=4, head_dim=4, chunk=2)
    session = conversation(net)
    answer(session, ids(5), SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    session.save(tmp_path / "talk")
    whole = (tmp_path / "talk").read_bytes()
    fresh, dice = conversation(net), random.Random(1)
    with (tmp_path / "talk").open("r+b", buffering=0) as file:
        for at in range(len(whole)):
            for byte in (whole[at] ^ (1 << dice.randrange(8)), whole[at]):  # changed, and after the look as it was
                file.seek(at)
                file.write(bytes([byte]))
                if byte != whole[at]:
                    with pytest.raises(FormatError):
                        fresh.load(tmp_path / "talk")
    for cut in (0, 7, 100, len(whole) - 1):
        (tmp_path / "talk").write_bytes(whole[:cut])
        with pytest.raises(FormatError):
            fresh.load(tmp_path / "talk")
    (tmp_path / "talk").write_bytes(whole + b"x")
    with pytest.raises(FormatError):
        fresh.load(tmp_path / "talk")
    assert not fresh.engine.cache.nodes  # nothing of it is remembered
    (tmp_path / "talk").write_bytes(whole)
    assert len(fresh.load(tmp_path / "talk")) == 7


def test_another_model_dtype_or_version_is_refused(net, tmp_path, monkeypatch):
    _, _, path = saved(net, tmp_path)
    other = tiny.network(seed=5)
    with pytest.raises(FormatError, match="another model"):
        conversation(other).load(path)
    narrow = tiny.network(native=False).to(torch.bfloat16)
    narrow.pack()
    with pytest.raises(FormatError, match="bfloat16"):
        conversation(narrow).load(path)
    monkeypatch.setattr(version, "__version__", "9.9.9")
    with pytest.raises(FormatError, match="version"):
        conversation(net).load(path)


def test_a_conversation_without_an_answer_has_nothing_to_save(net, tmp_path):
    with pytest.raises(RequestError, match="nothing to save"):
        conversation(net).save(tmp_path / "talk")
