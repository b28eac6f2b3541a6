"""vLLM's offline interface over `tiercel.api`.

llm = LLM(model="smollm2", max_model_len=2048)
llm.generate(["Once upon a time"], SamplingParams(temperature=0.7))[0].outputs[0].text
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tiercel.api import Answer, Model, Prompt, load
from tiercel.engine.request import Request
from tiercel.errors import RequestError
from tiercel.hub import local_models
from tiercel.sampling.logprobs import Logprob
from tiercel.sampling.params import SamplingParams
from tiercel.tokenizer.tokenizer import Tokenizer

__all__ = ["LLM", "Answer", "CompletionOutput", "Model", "Prompt", "RequestOutput", "load"]


@dataclass
class CompletionOutput:
    """One of the `n` answers to a prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A prompt and its answers."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
    num_cached_tokens: int = 0


# Arguments of vllm.LLM that mean something only to its engine: what each does not do here.
ELSEWHERE = {
    "trust_remote_code": "no code from a model folder is ever run",
    "gpu_memory_utilization": "memory is taken as it is needed",
    "tensor_parallel_size": "one device is used",
    "swap_space": "nothing is swapped out",
    "cpu_offload_gb": "weights stay on one device",
    "enforce_eager": "nothing is captured or compiled",
    "tokenizer_mode": "the model's own tokenizer is used",
    "enable_prefix_caching": "what prompts share is always read once",
    "disable_log_stats": "there are no log statistics",
}
HARMLESS_VALUES = {
    "trust_remote_code": False,
    "tensor_parallel_size": 1,
    "tokenizer_mode": "auto",
    "enforce_eager": False,
    "enable_prefix_caching": True,
}


class LLM:
    """vLLM's offline interface: `LLM(model=…).generate(prompts, params)`, answers in the order of the prompts.

    Arguments that have no meaning here are named in one warning; unknown ones are refused.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | None = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
        seed: int | None = None,
        **others: Any,
    ) -> None:
        unknown = [name for name in others if name not in ELSEWHERE]
        if unknown:
            raise RequestError(f"LLM has no argument {unknown[0]!r}; it takes model, dtype, max_model_len, seed")
        idle = [name for name, value in others.items() if HARMLESS_VALUES.get(name, object()) != value]
        if idle:
            warnings.warn("; ".join(f"{name}: {ELSEWHERE[name]}" for name in idle), stacklevel=2)
        self.model = load(model, dtype=dtype, max_length=max_model_len)
        if tokenizer is not None and str(tokenizer) != str(model):
            self.model.tokenizer = Tokenizer.from_folder(local_models.resolve(tokenizer, pull=True))
        self.seed, self._count = seed, 0

    def get_tokenizer(self) -> Tokenizer | None:
        return self.model.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        return self.model.default_params()

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """prompts: one or a list of: text (as it is, no template), {"prompt": …}, {"prompt_token_ids": […]}."""
        if isinstance(prompts, (str, dict)):
            prompts = [prompts]
        return self._all([self._read(prompt) for prompt in prompts], sampling_params, use_tqdm)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """messages: one conversation or a list of them; rendered with the model's chat template."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            raise RequestError(f"{self.model.name} has no tokenizer: use generate with prompt_token_ids")
        read = [
            (tokenizer.render(list(talk), **template), tokenizer.chat(list(talk), **template)) for talk in conversations
        ]
        return self._all(read, sampling_params, use_tqdm)

    def _read(self, prompt: Any) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), list(prompt["prompt_token_ids"])
            prompt = prompt.get("prompt")
        if not isinstance(prompt, str):
            raise RequestError('a prompt is text, {"prompt": text} or {"prompt_token_ids": [ids]}')
        return prompt, self.model.encode(prompt, raw=True)

    def _all(
        self,
        prompts: Sequence[tuple[str | None, list[int]]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        bar: bool,
    ) -> list[RequestOutput]:
        wanted = params if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        if len(wanted) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts need as many sampling params, not {len(wanted)}")
        engine = self.model.engine
        requests = []
        for (_, ids), p in zip(prompts, wanted, strict=True):
            seeded = p if p.seed is not None or self.seed is None else replace(p, seed=self.seed)
            requests.append(engine.prepare(ids, seeded))
        self._run(requests, bar)
        self._count += len(requests)
        numbers = range(self._count - len(requests), self._count)
        return [
            RequestOutput(str(number), prompt, request.prompt_ids, _outputs(request), True, request.cached_tokens)
            for number, (prompt, _), request in zip(numbers, prompts, requests, strict=True)
        ]

    def _run(self, requests: list[Request], bar: bool) -> None:
        """All of them together; none stays behind when one fails or somebody interrupts."""
        from rich.console import Console
        from rich.progress import track

        engine, console = self.model.engine, Console(stderr=True)
        shown = bar and console.is_terminal and len(requests) > 1
        for request in requests:
            engine.queue(request)
        try:
            for request in track(requests, "generating", console=console, transient=True, disable=not shown):
                for _ in engine.run(request):
                    pass
                if request.error is not None:
                    raise request.error
        finally:
            for request in requests:
                engine.abort(request.id)


def _outputs(request: Request) -> list[CompletionOutput]:
    return [
        CompletionOutput(
            sequence.index,
            sequence.text,
            sequence.token_ids,
            sequence.cumulative_logprob,
            sequence.logprobs,
            sequence.finish_reason,
            sequence.stop_reason,
        )
        for sequence in request.sequences
    ]
