"""At which lengths snapshots of a sequence's state are taken for the prefix cache.

A snapshot is wanted where a later prompt is likely to branch off: at the end of the prompt, at the start of the last
user turn, where two prompts parted, at intervals inside a long prompt, and at the end of the answer.  A state can be
trimmed by up to a chunk, so each snapshot is taken as late as it still serves: just before a forward would commit the
recurrent state past the position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as GenericSequence

from tiercel.engine.prefix_cache import PrefixCache
from tiercel.engine.request import Sequence
from tiercel.engine.scheduler import ScheduledSequence

MAX_PROMPT_CACHE_SHARE = 1 / 4  # of the cache's bytes, for the snapshots inside one prompt
MIN_INTERVAL_TOKENS = 128  # between two of them
MAX_BYTES_PER_TOKEN = 128 << 10  # of a snapshot, spread over the interval before it: about a Transformer's KV cache


def plan_snapshots(sequence: Sequence, shared: int, cache: PrefixCache) -> None:
    """Note the lengths that snapshots should restore, once the sequence has its state.

    The end of a prompt is two lengths: one to continue from, one to sample again.

    Args:
        shared: how many of its tokens an earlier sequence begins with.
    """
    request, state = sequence.request, sequence.state
    assert state is not None
    if cache.budget == 0:
        return
    prompt = len(request.prompt_ids)
    wanted = {prompt - 1, prompt} | ({request.turn} if request.turn else set())
    if shared > state.length:
        wanted.add(shared)  # two prompts part here for the second time
    sequence.snapshot_positions = sorted(at for at in wanted if state.length < at <= prompt)
    if state.rollback_tokens:
        nbytes = state.own_nbytes
        by_budget = nbytes * prompt / max(cache.budget * MAX_PROMPT_CACHE_SHARE, 1)
        interval = max(MIN_INTERVAL_TOKENS, nbytes / MAX_BYTES_PER_TOKEN, by_budget)
        sequence.snapshot_interval = math.ceil(interval / state.rollback_tokens) * state.rollback_tokens


def next_boundary(sequence: Sequence) -> int:
    """Return the length that a forward must not pass, so that the snapshots can be taken."""
    end, at = len(sequence.tokens), sequence.num_computed_tokens
    chunk = sequence.state.rollback_tokens if sequence.state else 0
    if not chunk or not sequence.snapshot_interval:
        return end
    prompt = len(sequence.request.prompt_ids)  # its end is a boundary anyway
    stops = [-(-position // chunk) * chunk for position in sequence.snapshot_positions if position < prompt - 1]
    stops.append((at // sequence.snapshot_interval + 1) * sequence.snapshot_interval)
    return min(end, *(stop for stop in stops if stop > at))


def take_due(rows: GenericSequence[ScheduledSequence], cache: PrefixCache) -> None:
    """Take the snapshots that are not possible any more after this step."""
    for row in rows if cache.budget else ():
        sequence, state = row.sequence, row.sequence.state
        assert state is not None
        at, min_pos = state.length, state.min_pos_after(row.num_tokens)
        planned = any(
            state.min_pos <= position <= at and min_pos > position for position in sequence.snapshot_positions
        )
        interval = sequence.snapshot_interval
        in_prompt = interval and at and at % interval == 0 and at <= len(sequence.request.prompt_ids)
        if planned or (in_prompt and min_pos >= at):
            take_snapshot(sequence, cache, turn_end=planned)


def take_snapshot(sequence: Sequence, cache: PrefixCache, *, turn_end: bool, ending: bool = False) -> None:
    """Put a snapshot of the state into the cache.  ending: the state is given up afterwards."""
    state = sequence.state
    if state is None or cache.budget == 0 or state.length == sequence.cached_length:
        return
    if state.length > len(sequence.tokens):
        return  # a step launched ahead has added a token that is not on the host yet
    sequence.cached_length = state.length
    snapshot = state.snapshot(ending=ending)
    sequence.add_snapshot(snapshot.min_pos, snapshot.length)
    cache.put(sequence.request.key, sequence.tokens[: state.length], snapshot, turn_end=turn_end)
