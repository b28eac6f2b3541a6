"""Our models for lm-eval.

    from tiercel.evals.lm_eval import TiercelLM
    lm_eval.simple_evaluate(model=TiercelLM("smollm2"), tasks=["arc_challenge"])

Importing this file also registers the name `tiercel`: simple_evaluate(model="tiercel", model_args="model=smollm2").
Likelihoods read a context once for all its continuations; generation runs on the engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

import tiercel
from tiercel.errors import RequestError
from tiercel.evals.answers import Ask, Question
from tiercel.evals.local import LocalModel, Scorer
from tiercel.sampling.fields import MAX_STRING_BYTES, MAX_STRINGS

NEW_TOKENS = 256  # lm-eval's own default


@register_model("tiercel")
class TiercelLM(TemplateLM):
    """model: a name or path for `tiercel.load`, or a loaded `tiercel.Model` · loading: further arguments of `load`
    slots: answers made at once"""

    backend = "causal"

    def __init__(
        self, model: Any, *, slots: int = 8, batch_size: Any = None, device: Any = None, **loading: Any
    ) -> None:
        super().__init__()
        self.model = tiercel.load(model, **loading) if isinstance(model, str) else model
        if self.model.tokenizer is None:
            raise RequestError(f"{self.model.name} has no tokenizer")
        self.tokenizer = self.model.tokenizer
        self.slots = slots
        self.truncated = 0  # contexts that were cut on the left because they do not fit, as lm-eval's own models do

    # ── tokens ──

    @property
    def eot_token_id(self) -> int:
        return min(self.tokenizer.eos)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        return self.tokenizer.bos if self.tokenizer.bos is not None else self.eot_token_id

    @property
    def max_length(self) -> int:
        return int(self.model.max_length)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return list(
            self.tokenizer.encode(string, special=True, bos=None if add_special_tokens in (None, True) else False)
        )

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.name).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return str(self.tokenizer.templates.get("default", "")) if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(self.tokenizer.render(chat_history, add_generation_prompt=add_generation_prompt))

    # ── likelihoods ──

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        scorer, results = Scorer(self.model), list[tuple[float, bool]]()
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="likelihoods")
        for _context, same in itertools.groupby(requests, key=lambda request: request[1]):
            group = list(same)
            found = scorer.score([self._fit(context, continuation) for _, context, continuation in group])
            for request, each in zip(group, found, strict=True):
                results.append((each.logprob, each.greedy))
                if texts := request[0]:  # so that lm-eval's use_cache has it, should the run be interrupted
                    self.cache_hook.add_partial("loglikelihood", texts, results[-1])
            bar.update(len(group))
        bar.close()
        return results

    def _fit(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        room = self.max_length + 1 - len(continuation)
        if len(context) > room:
            self.truncated += 1
            context = context[-max(room, 1) :]
        return context, continuation

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        results = []
        for request in requests:
            windows = [
                make_disjoint_window(pair)
                for pair in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length, context_len=1,
                )
            ]  # fmt: skip
            found = self._loglikelihood_tokens([(None, *window) for window in windows], disable_tqdm=True)
            results.append(sum(logprob for logprob, _ in found))
        return results

    # ── writing ──

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        answers: list[str] = [""] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="answers")
        for kwargs, numbers in _alike(requests):
            until = [kwargs["until"]] if isinstance(kwargs.get("until"), str) else list(kwargs.get("until") or [])
            new = int(kwargs.get("max_gen_toks", kwargs.get("max_new_tokens", NEW_TOKENS)))
            sampled = kwargs.get("do_sample", float(kwargs.get("temperature") or 0) > 0)
            stops = [stop for stop in until if 0 < len(stop.encode()) <= MAX_STRING_BYTES][:MAX_STRINGS]
            ask = Ask(
                chat=False, samples=1, max_tokens=new,
                temperature=float(kwargs.get("temperature") or 1) if sampled else 0.0,
                top_p=float(kwargs.get("top_p", 1.0)), top_k=int(kwargs.get("top_k") or 0),
                min_p=float(kwargs.get("min_p", 0.0)), stop=tuple(stops), think=None, slots=self.slots,
            )  # fmt: skip
            questions = [Question(i, self._prompt(requests[i].args[0], new), seed=i) for i in numbers]
            for found in LocalModel(self.model).answer(questions, ask):
                if found.error is not None:
                    raise found.error
                text = found.samples[0].text
                for stop in until:  # those that are too many or too long for the engine
                    text = text.split(stop)[0] if stop else text
                answers[found.key] = text
                self.cache_hook.add_partial("generate_until", requests[found.key].args, text)
                bar.update()
        bar.close()
        return answers

    def _prompt(self, text: str, new: int) -> Any:
        ids = self.tok_encode(text)
        room = max(self.max_length - new, 1)
        self.truncated += len(ids) > room
        return ids[-room:]


def _alike(requests: Sequence[Any]) -> list[tuple[Mapping[str, Any], list[int]]]:
    """Requests by their arguments, which are mostly the same for all."""
    groups: dict[str, tuple[Mapping[str, Any], list[int]]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(repr(request.args[1]), (request.args[1], []))[1].append(number)
    return list(groups.values())
