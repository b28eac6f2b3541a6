"""Texts in slots on a device give the logits of the plain network, however they come: prompts, pieces, steps, cuts.

Without a GPU the kernels run in Triton's interpreter.
"""

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

import tiny
from ops.triton.conftest import DEVICE
from tiercel.errors import RequestError
from tiercel.model.cuda_graphs import CUDAGraphRunner, prefill
from tiercel.model.pages import PAGE
from tiercel.model.state_cache import StateCache

WORDS = "attention+mamba2/- mamba2/moe"


@pytest.fixture(scope="module")
def network():
    return tiny.network(WORDS, native=False, head_dim=16, kv_heads=1, mamba_head_dim=16).to(DEVICE)


def words(n, seed=0):
    return torch.randint(0, 300, (n,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def whole(network, ids):
    """(L, V): no memory, no kernels of ours beyond the norms."""
    return network(ids)


def step(network, slots, numbers, tokens):
    return CUDAGraphRunner(network, slots, (1, 2, 4)).step(numbers, torch.stack(tokens))


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("pieces", [(33,), (17, 16), (16, 1, 16)])
def test_a_prompt_in_pieces_and_steps(network, pieces):
    slots, ids = StateCache(network, 2, 200), words(36)
    expected, slot, at = whole(network, ids), slots.take(), 0
    for n in pieces:
        got = prefill(network, slots, [slot], [ids[at : at + n]], logits_to_keep=3 if n > 2 else 1)
        at += n
        close(got, expected[at - len(got) : at])
    for i in range(at, 36):
        close(step(network, slots, [slot], [ids[i]])[0], expected[i])
    assert slots.length[slot] == 36 and slots.committed[slot] == 32
    assert slots.length_S[slot] == 36 and slots.committed_S[slot] == 32


def test_texts_share_a_step_and_rows_of_nobody_do_no_harm(network):
    slots, texts = StateCache(network, 4, 100), [words(6, 1), words(20, 2), words(3, 3)]
    numbers = [slots.take() for _ in texts]
    got = prefill(network, slots, numbers, [text[:-2] for text in texts])
    for i, text in enumerate(texts):
        close(got[i], whole(network, text)[-3])
    for i in range(2, 0, -1):
        got = step(network, slots, numbers, [text[-i] for text in texts])  # three rows in a graph of four
        assert len(got) == 3
        for row, text in zip(got, texts, strict=True):
            close(row, whole(network, text)[-i])


def test_what_was_cut_is_forgotten(network):
    slots, ids = StateCache(network, 1, 100), words(36)
    slot = slots.take()
    prefill(network, slots, [slot], [ids[:34]])
    for token in words(3, 5):
        step(network, slots, [slot], [token])
    assert not slots.trim(slot, 31) and not slots.trim(slot, 38) and slots.length[slot] == 37
    assert slots.trim(slot, 34)
    expected = whole(network, ids)
    for i in range(34, 36):
        close(step(network, slots, [slot], [ids[i]])[0], expected[i])


def test_a_slot_begins_anew(network):
    slots, ids = StateCache(network, 1, 100), words(20)
    for _ in range(2):
        slot = slots.take()
        close(prefill(network, slots, [slot], [ids])[0], whole(network, ids)[-1])
        slots.release(slot)
    assert len(slots.groups[0].free) == 2


def test_full_is_said(network):
    slots = StateCache(network, 1, 2 * PAGE, pages=1)
    slot = slots.take()
    with pytest.raises(RequestError, match="slots are taken"):
        slots.take()
    with pytest.raises(RequestError, match="1 are free"):
        prefill(network, slots, [slot], [words(PAGE + 1)])
    with pytest.raises(RequestError, match="do not fit"):
        prefill(network, slots, [slot], [words(2 * PAGE + 1)])
    assert slots.length[slot] == 0


def test_mamba1_says_that_it_cannot():
    with pytest.raises(RequestError, match="mamba1"):
        StateCache(tiny.network("mamba1", native=False), 1, 100)


@pytest.mark.parametrize("words_", ["gated_delta attention+gated_delta", "short_conv attention short_conv"])
def test_other_mixers_in_slots(words_):
    net = tiny.network(words_, native=False, repeat=1, head_dim=16).to(DEVICE)
    slots, ids = StateCache(net, 2, 200), words(41)
    expected, slot = whole(net, ids), slots.take()
    close(prefill(net, slots, [slot], [ids[:20]])[0], expected[19])
    close(prefill(net, slots, [slot], [ids[20:33]])[0], expected[32])
    for i in range(33, 41):
        close(step(net, slots, [slot], [ids[i]])[0], expected[i])
    assert slots.trim(slot, 36) and slots.committed[slot] <= 32
    for i in range(36, 41):
        close(step(net, slots, [slot], [ids[i]])[0], expected[i])
    other, more = slots.take(), words(70, 1)
    close(prefill(net, slots, [slot, other], [ids[:1], more])[1], whole(net, more)[-1])
