"""What guessing the next tokens brings where a text is copied, and what it costs where every guess is wrong.

    python benchmarks/speculation.py [--rounds 5] [--tokens 256] [--model FILE]

0.5B      the shape of Falcon-H1-0.5B in Q4_K_M with random weights, a prompt of 64 tokens said four times.  Such a
          model copies in parts only, so what lookup brings is not what it brings on a copy: `right` says that
smollm2   the real model (tiercel pull smollm2), asked to repeat a text; left out where it is not here

In turn: without guesses, with prompt lookup, with guesses that are always right (what lookup is where all is copied)
and always wrong.  Tokens a second of the answer, the prompt's reading left out.  The texts must be equal.  The ratio
is the median of the rounds' ratios; guessed and right are tokens of one answer.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from collections.abc import Callable
from collections.abc import Sequence as GenericSequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiercel
from tiercel.bench.models import random_source
from tiercel.bench.run import cores
from tiercel.engine import Engine
from tiercel.engine.request import Sequence
from tiercel.engine.speculative import Drafter, prompt_lookup
from tiercel.errors import ModelNotFound
from tiercel.sampling.params import SamplingParams
from tiercel.weights.export import export

TEXT = """The river begins in three springs below the pass, where 14 shepherds keep 230 goats. In June the snow water \
fills the upper ponds; by September two of them are dry. Anna Kovalenko measured the flow every Monday from 1962 to \
1981 and wrote it in green notebooks. The largest flood came on 9 May 1970, when the mill at Orlova lost its wheel. \
Her brother Petro built the new one from larch, seven metres across, and it still turns."""


@dataclass
class Knows:
    """Says what comes, or always something else."""

    text: GenericSequence[int]  # prompt and answer
    shift: int  # to another token; 0: none
    vocabulary: int

    def match_class(self, tokens: GenericSequence[int]) -> int:
        return 2

    def propose(self, tokens: GenericSequence[int], k: int) -> list[int]:
        return [(token + self.shift) % self.vocabulary for token in self.text[len(tokens) : len(tokens) + k]]

    def release(self) -> None:
        pass


@dataclass
class Runs:
    speeds: list[float] = field(default_factory=list)  # tokens a second
    proposed: int = 0
    accepted: int = 0


def answer(engine: Engine, prompt: list[int], tokens: int) -> Sequence:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
    request = engine.prepare(prompt, params)
    engine.queue(request)
    for _ in engine.run(request):
        pass
    return request.sequences[0]


def measure(model: Any, prompt: list[int], tokens: int, rounds: int) -> dict[str, Any]:
    def engine(drafter: Callable[[Sequence], Drafter] | None) -> Engine:
        return Engine(model, slots=1, cache_bytes=0, drafter=drafter)

    plain = engine(None)
    truth = answer(plain, prompt, tokens).token_ids
    right, wrong = (Knows([*prompt, *truth], shift, model.config.vocab_size) for shift in (0, 1))
    engines = {
        "none": plain, "lookup": engine(prompt_lookup), "right": engine(lambda _: right),
        "wrong": engine(lambda _: wrong),
    }  # fmt: skip
    found = {name: Runs() for name in engines}
    for number in range(rounds + 1):  # the first one records each kind of step and is not counted
        for name, each in engines.items():
            choice = answer(each, prompt, tokens)
            assert choice.token_ids == truth, f"{name}: guesses changed the text"
            if number:
                found[name].speeds.append((tokens - 1) / choice.times.generation)  # the first comes with the prompt
                if choice.speculation is not None:
                    found[name].proposed += choice.speculation.proposed
                    found[name].accepted += choice.speculation.accepted
    table = {}
    for name, runs in found.items():
        ratios = [a / b for a, b in zip(runs.speeds, found["none"].speeds, strict=True)]
        table[name] = {
            "tok/s": round(statistics.median(runs.speeds), 1), "ratio": round(statistics.median(ratios), 2),
            "ratios": [round(min(ratios), 2), round(max(ratios), 2)],
            "guessed": runs.proposed // rounds, "right": runs.accepted // rounds,
        }  # fmt: skip
    return {"prompt": len(prompt), "tokens": tokens, **table}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--model", type=Path, help="a GGUF file of the 0.5B, else one is written")
    options = parser.parse_args()
    result: dict[str, Any] = {"cores": cores(), "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as scratch:
        if options.model is None:
            options.model = Path(scratch) / "plain.gguf"
            export(random_source("falcon-h1:0.5b", "q4_k_m"), options.model, name="falcon-h1:0.5b")
        model = tiercel.load(options.model, max_length=4096)
        rng = random.Random(3)
        prompt = [rng.randrange(30000) for _ in range(64)] * 4
        result["0.5B"] = measure(model, prompt, options.tokens, options.rounds)
    try:
        model = tiercel.load("smollm2", max_length=4096)
    except ModelNotFound:
        pass
    else:
        assert model.tokenizer is not None
        prompt = model.tokenizer.chat([{"role": "user", "content": f"Repeat this text word for word:\n\n{TEXT}"}])
        result["smollm2"] = measure(model, prompt, min(options.tokens, 110), options.rounds)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
