"""GRPO: a network answers each problem several times; answers better than their group's mean become likelier.

Which GRPO this is:
    advantage    A = reward − mean of the group; not divided by its deviation (Dr. GRPO: no weight on lucky groups)
    loss         −Σ w · min(r A, clip(r, 1 − 0.2, 1 + 0.28) A) / tokens: a sum over all answers' tokens, divided by
                 their number (DAPO): long answers count by their length.  r = p_now / p_before, of each token
    w            min(p_before / p_rollout, 2), truncated importance sampling: the engine draws from packed bfloat16
                 weights, training computes in float32
    groups       with equal rewards have no gradient: skipped, counted, others drawn in their place
    no KL, no reference network, no critic, no bonus for entropy
Answers are drawn by our own engine at temperature 1 from the whole distribution, so that its log-probabilities are
those of what was drawn; the answers of a problem fork from one prefill.  One that does not end gets 0.

    grpo("reasoner", problems(["sorting"], sizes=(3,)), Settings(steps=50, lr=2e-5), tests=[…])
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tiercel.engine.engine import Engine
from tiercel.errors import RequestError, TiercelError
from tiercel.model.decoder import Decoder
from tiercel.model.layers import set_weight
from tiercel.sampling.params import SamplingParams
from tiercel.tokenizer.tokenizer import Tokenizer
from tiercel.train import start
from tiercel.train.data import Documents, Rows, make_rows, pack
from tiercel.train.loop import Settings, fit
from tiercel.train.loss import next_token_logprobs
from tiercel.train.rewards import Task, Tasks

MAX_FRUITLESS_ROUNDS = 10  # rounds' worth of problems whose groups all have equal rewards; then the run stops


@dataclass(frozen=True)
class Rules:
    """How a round goes.

    Args:
        prompts: groups of a round.
        answers: answers of a group, 2 to 16.
        max_tokens: of an answer.
        updates: optimizer steps of a round.
        low: the ratio is clipped to 1 − low …
        high: … 1 + high.
        cap: largest importance weight w.
        tries: a round draws at most `tries` · `prompts` groups.
        seed: of the draws.
    """

    prompts: int = 16
    answers: int = 8
    max_tokens: int = 256
    updates: int = 1
    low: float = 0.2
    high: float = 0.28
    cap: float = 2.0
    tries: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.answers <= 16:
            raise RequestError(f"a group has 2 to 16 answers, not {self.answers}")
        for name in ("prompts", "max_tokens", "updates", "tries"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass
class Sample:
    """One answer: its prompt, its tokens, the log-probability with which each was drawn, and its reward."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    reward: float
    advantage: float = 0.0


# ── loss ─────────────────────────────────────────────────────────────────────────────────────


def advantages(rewards: Sequence[float]) -> list[float]:
    """Return each reward minus the group's mean."""
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def surrogate(now_T: Tensor, before_T: Tensor, rollout_T: Tensor, advantage_T: Tensor, rules: Rules) -> Tensor:
    """Return −Σ w · min(r A, clip(r) A).

    Args:
        now_T: log-probabilities of the trained network, with gradient.
        before_T: those of the trained network before this round.
        rollout_T: those with which the engine drew.
        advantage_T: of each token's answer.
        rules: clip and cap.
    """
    r_T = (now_T - before_T).exp()
    w_T = (before_T - rollout_T).exp().clamp(max=rules.cap)
    clipped_T = r_T.clamp(1 - rules.low, 1 + rules.high)
    return -(w_T * torch.minimum(r_T * advantage_T, clipped_T * advantage_T)).sum()


@dataclass
class GradedRows(Rows):
    """Rows of answers; for every counted token its advantage and log-probabilities, (T,)."""

    advantage_T: Tensor
    rollout_T: Tensor
    before_T: Tensor | None = None  # None: one update a round, before is now


def make_loss(rules: Rules) -> Callable[[Decoder, Rows], Tensor]:
    def of(network: Decoder, rows: Rows) -> Tensor:
        assert isinstance(rows, GradedRows)
        now_T = next_token_logprobs(network, rows)
        before_T = now_T.detach() if rows.before_T is None else rows.before_T
        return surrogate(now_T, before_T, rows.rollout_T, rows.advantage_T, rules)

    return of


# ── rollouts ─────────────────────────────────────────────────────────────────────────────────────────────


class RolloutEngine:
    """The network as the engine runs it: a copy with packed weights, updated before every round."""

    def __init__(
        self, network: Decoder, tokenizer: Tokenizer | None, *, slots: int = 32, dtype: torch.dtype = torch.bfloat16
    ):
        self.tokenizer, self.max_length, self.dtype = tokenizer, network.config.max_length, dtype
        self.network: Any = Decoder(network.config).eval().requires_grad_(False)
        self.load_weights(network)
        # no prefix cache: what it holds would be of older weights, and the answers of a group fork without it
        self.engine = Engine(self, slots=slots, max_num_batched_tokens=max(512, slots), cache_bytes=0)

    @torch.no_grad()
    def load_weights(self, network: Decoder) -> None:
        """Copy and pack the network's present weights."""
        for ours, theirs in zip(self.network.modules(), network.modules(), strict=True):
            for name, p in theirs._parameters.items():
                if p is not None:
                    set_weight(
                        ours, name, nn.Parameter(p.detach().to("cpu", self.dtype, copy=True), requires_grad=False)
                    )
        self.network.pack()  # also ties the head, and drops captured steps
        self.network.__dict__.pop("_fingerprint", None)

    def generate(self, tasks: Sequence[Task], params: SamplingParams, seeds: Sequence[int] = ()) -> list[list[Sample]]:
        """Draw `params.n` answers to every task, the same for the same seeds."""
        requests = []
        for i, task in enumerate(tasks):
            ids, starts = self._prompt(task)
            one = params if not seeds else replace(params, seed=seeds[i])
            thinking = "off" if self.tokenizer is None else "auto"
            requests.append(self.engine.prepare(ids, one, thinking=thinking, starts_in_thinking=starts))
        for request in requests:
            self.engine.queue(request)
        groups = []
        for task, request in zip(tasks, requests, strict=True):
            for _ in self.engine.run(request):
                pass
            if request.error is not None:
                raise request.error
            group = []
            for choice in request.sequences:
                drawn = zip(choice.token_ids, choice.logprobs or [], strict=False)
                logprobs = [entry[token].logprob for token, entry in drawn]
                words = choice.text if self.tokenizer is not None else " ".join(map(str, choice.token_ids))
                ended = choice.finish_reason == "stop" or self.tokenizer is None  # no tokenizer: no end token
                reward = task.reward(words) if ended else 0.0
                group.append(Sample(request.prompt_ids, choice.token_ids, logprobs, reward))
            groups.append(group)
        return groups

    def _prompt(self, task: Task) -> tuple[list[int], bool]:
        if not isinstance(task.question, str):
            return list(task.question), False
        if self.tokenizer is None:
            raise RequestError("questions need a tokenizer, and this model has none")
        if not self.tokenizer.has_template:
            return self.tokenizer.encode(task.question), False
        ids = self.tokenizer.chat([{"role": "user", "content": task.question}])
        return ids, self.tokenizer.opens_thinking(ids)

    def score(self, tasks: Sequence[Task], max_tokens: int) -> dict[str, float]:
        """Return mean reward and length of greedy answers."""
        greedy = SamplingParams(temperature=0, max_tokens=max_tokens)
        samples = [group[0] for group in self.generate(tasks, greedy)]
        totals = {"reward": sum(s.reward for s in samples), "length": float(sum(len(s.tokens) for s in samples))}
        return {name: value / max(1, len(samples)) for name, value in totals.items()}


class Rollouts:
    """The stream of micro-batches that `fit` trains on: a round of rollouts, `updates` · `accumulate` of them.

    position: (round, number of the next task).
    """

    def __init__(
        self, network: Decoder, engine: RolloutEngine, tasks: Tasks, rules: Rules, accumulate: int = 1
    ) -> None:
        self.network, self.engine, self.tasks, self.rules = network, engine, tasks, rules
        self.parts = rules.updates * accumulate
        self.position = (0, 0)
        self._left: list[GradedRows] = []

    def __next__(self) -> Rows:
        if not self._left:
            self.engine.load_weights(self.network)
            samples, notes = self._round()
            parts = [samples[i :: self.parts] for i in range(self.parts)]
            self._left = [self._rows(part, notes) for part in parts]
        return self._left.pop(0)

    def _round(self) -> tuple[list[Sample], dict[str, float]]:
        """Return the samples of groups whose rewards differ, and notes for the log."""
        rules, (number, first) = self.rules, self.position
        params = SamplingParams(n=rules.answers, temperature=1.0, max_tokens=rules.max_tokens, logprobs=0)
        kept: list[list[Sample]] = []
        drawn: list[Sample] = []
        tried, limit = 0, rules.tries * rules.prompts
        while len(kept) < rules.prompts and (tried < limit or not kept):
            if tried >= MAX_FRUITLESS_ROUNDS * rules.prompts:
                raise TiercelError(
                    f"of {tried} problems none had answers of different worth: they are too hard or too easy for this "
                    "network; choose others, or more answers for each"
                )
            count = min(rules.prompts - len(kept), max(limit - tried, 1))
            numbers = range(first + tried, first + tried + count)
            seeds = [random.Random(f"{rules.seed} {n}").getrandbits(62) for n in numbers]
            for group in self.engine.generate([self.tasks(n) for n in numbers], params, seeds):
                drawn += group
                for sample, advantage in zip(group, advantages([s.reward for s in group]), strict=True):
                    sample.advantage = advantage
                if any(sample.advantage for sample in group):
                    kept.append(group)
            tried += count
        self.position = (number + 1, first + tried)
        notes = {
            "reward": sum(s.reward for s in drawn) / len(drawn),
            "length": sum(len(s.tokens) for s in drawn) / len(drawn),
            "signal": len(kept) / tried,
            "skipped": tried - len(kept),
        }
        return [sample for group in kept for sample in group], notes

    def _rows(self, samples: list[Sample], notes: dict[str, float]) -> GradedRows:
        """Pack samples into rows, with what belongs to each token in the order in which `make_rows` counts them."""
        if not samples:
            raise RequestError("a round has fewer answers than micro-batches: fewer updates, or less accumulation")
        documents = Documents.of(([*s.prompt, *s.tokens], [0] * len(s.prompt) + [1] * len(s.tokens)) for s in samples)
        lengths = np.diff(documents.starts)
        length = max(256, int(lengths.max()))
        layout = pack(lengths, np.arange(len(samples)), length)
        rows = make_rows(documents, layout, length)
        ordered = [samples[number] for row in layout for number in row]
        graded = GradedRows(
            **vars(rows),
            advantage_T=torch.tensor([s.advantage for s in ordered for _ in s.tokens]),
            rollout_T=torch.tensor([value for s in ordered for value in s.logprobs]),
        )
        graded.notes = notes
        if self.rules.updates > 1:
            with torch.no_grad():
                graded.before_T = next_token_logprobs(self.network, graded)
        return graded


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────


def grpo(
    config: str | Path,
    tasks: Tasks,
    settings: Settings,
    rules: Rules = Rules(),
    *,
    tests: Sequence[Task] = (),
    tokenizer: str | Path | None = None,
    slots: int = 32,
) -> dict[str, Any]:
    """Train on rewards.

    Args:
        config: a checkpoint, or a config for fresh weights.
        tasks: task number → problem with its reward.
        settings: steps, save_every and eval_every count rounds, each of `rules.updates` optimizer steps.
        rules: groups, answers, clip.
        tests: held-out problems, answered greedily before, every eval_every rounds and at the end.
        tokenizer: folder of a tokenizer, for a fresh network.
        slots: answers that are drawn at once.

    Returns:
        As `pretrain`, with "before" and "after": mean rewards of the tests.

    Raises:
        RequestError: another device than the CPU, or settings that do not fit.
        TiercelError: no problem has answers of different worth.
    """
    if settings.device != "cpu":
        raise RequestError("rollouts run on the CPU's engine, and GRPO beside it: leave --device out")
    start.prepare(settings.out, settings.resume)
    network, model_tokenizer, layout = start.open_network(config, tokenizer, seed=rules.seed)
    engine = RolloutEngine(network, model_tokenizer, slots=max(slots, rules.answers))
    steps = {name: getattr(settings, name) * rules.updates for name in ("steps", "save_every", "eval_every", "warmup")}
    settings = replace(settings, **steps)

    def test(network: Decoder) -> dict[str, float]:
        engine.load_weights(network)
        return {f"test_{name}": value for name, value in engine.score(tests, rules.max_tokens).items()}

    stream = Rollouts(network, engine, tasks, rules, settings.accumulate)
    result = fit(network, stream, settings, make_loss(rules), test=test if tests else None)
    if settings.out is not None:
        start.finish(network, model_tokenizer, layout, settings.out)
    tested = [line["test_reward"] for line in result.log if "test_reward" in line]
    ends = {"before": tested[0], "after": tested[-1]} if tested else {}
    return start.report(result, settings.out) | ends
