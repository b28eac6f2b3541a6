"""Where snapshots of a text are taken.

A text is read once.  Snapshots of its state go into the prefix cache (prefix_cache.py) where somebody may come back
to: the end of the prompt, the start of the last user turn, where two texts parted, every so often in a long prompt,
and the end of the answer.  A state can be cut back by a chunk, so each is taken as late as it still serves: just
before a forward would move the committed state past the place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as GenericSequence

from tiercel.engine.prefix_cache import PrefixCache
from tiercel.engine.request import Sequence
from tiercel.engine.scheduler import ScheduledSequence

PROMPT_SHARE = 4  # one prompt's snapshots on the way take at most this part of the cache
MIN_INTERVAL = 128  # tokens between them, at least
MAX_BYTES_PER_TOKEN = (
    128 << 10
)  # and bytes of one for each token since the one before, at most: about a Transformer's cache


def mark(choice: Sequence, shared: int, cache: PrefixCache) -> None:
    """Note which lengths somebody may come back to.  The end of a prompt is two: to go on, and to ask again.

    shared: so many tokens are those of an earlier text.
    """
    request, state = choice.request, choice.state
    assert state is not None
    if cache.budget == 0:
        return
    prompt = len(request.prompt_ids)
    wanted = {prompt - 1, prompt} | ({request.turn} if request.turn else set())
    if shared > choice.length:
        wanted.add(shared)  # two texts part here, for the second time
    choice.marks = sorted(mark for mark in wanted if choice.length < mark <= prompt)
    if state.rollback_tokens:
        one, room = state.own_nbytes, max(cache.budget / PROMPT_SHARE, 1)
        spacing = max(MIN_INTERVAL, one / MAX_BYTES_PER_TOKEN, one * prompt / room)
        choice.spacing = math.ceil(spacing / state.rollback_tokens) * state.rollback_tokens


def stop(choice: Sequence) -> int:
    """The length a forward must not pass, so that a snapshot can be taken for what is marked."""
    end, rollback_tokens, at = len(choice.tokens), choice.state.rollback_tokens if choice.state else 0, choice.length
    if not rollback_tokens or not choice.spacing:
        return end
    prompt = len(choice.request.prompt_ids)  # its end needs no stop: it is one
    stops = [-(-mark // rollback_tokens) * rollback_tokens for mark in choice.marks if mark < prompt - 1]
    stops.append((at // choice.spacing + 1) * choice.spacing)
    return min(end, *(stop for stop in stops if stop > at))


def keep(rows: GenericSequence[ScheduledSequence], cache: PrefixCache) -> None:
    """Take the snapshots that could not be taken any more after this step."""
    for row in rows:
        choice, state = row.choice, row.choice.state
        assert state is not None
        at, min_pos = state.length, state.min_pos_after(row.count + len(row.drafts))
        place = any(state.min_pos <= mark <= at and min_pos > mark for mark in choice.marks)
        reading = choice.spacing and at and at % choice.spacing == 0 and at <= len(choice.request.prompt_ids)
        if place or (reading and min_pos >= at):
            remember(choice, cache, place=place)


def remember(choice: Sequence, cache: PrefixCache, *, place: bool, ending: bool = False) -> None:
    """A snapshot of the state as it is, into the cache.  ending: the state is given up after this."""
    state = choice.state
    if state is None or cache.budget == 0 or state.length == choice.kept:
        return
    if state.length > len(choice.tokens):
        return  # a device is ahead of what was handed out
    choice.kept = state.length
    snapshot = state.snapshot(ending=ending)
    choice.kept_by(snapshot.min_pos, snapshot.length)
    cache.put(choice.request.key, choice.tokens[: state.length], snapshot, place=place)
