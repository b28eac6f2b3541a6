"""R18, R19, R31: freed memory is NaN, and no life of an engine shows in an answer: tokens and logits, bit for bit.

The lives are those of tests/engine/test_cache_is_invisible.py: random batches, chunks, prefixes, aborts, preemptions,
evictions, spilling, right and wrong drafts; each answer is compared with the same prompt alone on an empty state.
"""

from __future__ import annotations

import tiny
from engine.test_cache_is_invisible import Life, watched  # noqa: F401


def test_every_request_of_random_lives_is_what_it_is_alone(cases, figure, tmp_path):
    wanted, done, lives, reused, read = cases(60, 10_000), 0, 0, 0, 0
    for words in ("attention+mamba2", tiny.EVERY_KIND):
        network = tiny.network(words)
        before = done
        while done - before < wanted // 2:
            life = Life(network, f"reliability {words} {lives}", tmp_path / str(lives))
            for _ in range(life.dice.randrange(3, 12)):
                life.act()
            life.finish()
            lives += 1
            done += len(life.requests)
            for request in life.requests:
                reused += sum(choice.cached_tokens for choice in request.sequences)
                read += sum(len(choice.prompt_ids) for choice in request.sequences)
    assert done >= wanted // 2 * 2 and reused > 0
    what = f"{done} requests in {lives} lives: tokens and logits bit-equal to each alone"
    for goal in ("R18", "R19", "R31"):
        figure(goal, f"{what}, {100 * reused // read} % of the prompts from the cache")
