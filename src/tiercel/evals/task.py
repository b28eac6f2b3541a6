"""What a benchmark is: items, what is asked of each, and when an answer counts.

A `Task` has items; how they are asked depends on its kind:

    "generate"   the model writes, `grade` looks at what it wrote (several samples of one question share its prefill)
    "choose"     the model never writes: the likeliest of the given continuations is its choice, as in lm-eval:
                 acc by the sum of log-probabilities, acc_norm and acc_bytes by that per character and byte
    "continue"   one continuation: right when each of its tokens is the likeliest

An answer is read only from the text after the reasoning.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tiercel.errors import RequestError

if TYPE_CHECKING:
    from tiercel.voting.settings import VoteSettings

Kind = Literal["generate", "choose", "continue"]
Messages = list[dict[str, str]]
Prompt = str | Messages
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Settings:
    """What a run may choose; None: what the task or the model recommends.

    chat: the model's chat template, or the plain text · shots: solved examples before the question
    choices: "likelihood", or "letters": the model writes the letter of its choice (all that an endpoint can)
    limit: number of items, drawn with `seed`; a larger limit contains a smaller one · data: the folder of the files
    vote: `vote.k` answers to each question, and the one that they agree on is graded
    """

    chat: bool | None = None
    system: str | None = None
    think: bool | None = None
    shots: int | None = None
    samples: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    choices: str | None = None
    limit: int | None = None
    seed: int = 0
    slots: int = 8
    data: str | None = None
    vote: VoteSettings | None = None

    def __post_init__(self) -> None:
        bounds = {"shots": (0, 64), "samples": (1, 1024), "max_tokens": (1, 1 << 20), "limit": (1, 1 << 31),
                  "slots": (1, 1024), "seed": (0, 2**63)}  # fmt: skip
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and low <= value <= high):
                raise RequestError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
        if self.choices not in (None, "likelihood", "letters"):
            raise RequestError(f"choices must be likelihood or letters, not {self.choices!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Item:
    """id: names it in files, never twice in a task · question: as it is put · gold: the right answer, as text
    choices: of a task that has them; `gold` is then the index of one · group: reported apart (a subject, a level)
    more: what else the task needs of the row"""

    id: str
    question: str
    gold: str
    choices: tuple[str, ...] = ()
    group: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """answer: what was read from the text, None where there was none · correct
    scores: further judgements of the same text, by name · note: why, where that is not obvious"""

    answer: str | None
    correct: bool
    scores: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


class Task:
    """A benchmark; its file overrides what differs.

    samples, max_tokens, temperature, top_p: what its numbers are usually made with
    shots: of the plain prompt; chat_shots: of the chat prompt · stop: where a plain answer ends
    """

    name = ""
    title = ""
    kind: Kind = "generate"
    samples = 1
    max_tokens = 1024
    temperature = 0.0
    top_p = 1.0
    shots = 0
    chat_shots = 0
    most_shots = 0
    stop: Sequence[str] = ()
    normalized = False  # the score that is usually quoted is acc_norm
    spread_over = ""  # what `group` is, for the report
    from_model = False  # made by rules, not read from a file
    votes = True  # two answers can be equal

    def load(self, folder: str | None) -> list[Item]:
        """All items, and `self.sources` for the report.  Raises FormatError, RequestError, Offline."""
        raise NotImplementedError

    sources: Sequence[Mapping[str, Any]] = ()

    # ── what is asked ──

    def prompt(self, item: Item, shots: int, *, chat: bool) -> Prompt:
        """The question as a chat or as plain text to go on from, after `shots` solved examples."""
        raise NotImplementedError

    def continuations(self, item: Item) -> Sequence[str]:
        """What follows the plain prompt, for each choice."""
        return [f" {choice}" for choice in item.choices]

    # ── when it counts ──

    def grade(self, item: Item, text: str) -> Verdict:
        """Grade an answer without its reasoning."""
        raise NotImplementedError

    def chance(self, items: Sequence[Item]) -> float | None:
        """Return the score of random choices; None where there are no choices."""
        return sum(1 / len(item.choices) for item in items) / len(items) if items and items[0].choices else None

    def majority(self, items: Sequence[Item]) -> tuple[str, float] | None:
        """What always giving the commonest answer would score, and that answer."""
        golds = [item.gold for item in items]
        if not golds:
            return None
        best = max(sorted(set(golds)), key=golds.count)
        shown = LETTERS[int(best)] if items[0].choices else best
        return shown, golds.count(best) / len(golds)


def letters_prompt(item: Item, system: str | None = None) -> Messages:
    """A question with its choices for a model that writes the letter."""
    listed = "\n".join(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(item.choices))
    last = LETTERS[len(item.choices) - 1]
    end = f'Answer with the letter of the right choice (A to {last}), as in "The answer is B."'
    return [{"role": "user", "content": f"{item.question}\n\n{listed}\n\n{end}"}]


def draw_items(items: list[Item], limit: int | None, seed: int) -> list[Item]:
    """A random part in the order of the file, the same for the same seed; a larger part contains a smaller one."""
    if limit is None or limit >= len(items):
        return items
    order = list(range(len(items)))
    random.Random(f"items {seed}").shuffle(order)
    return [items[i] for i in sorted(order[:limit])]
