"""vLLM's offline interface over `tiercel.api`.

llm = LLM(model="smollm2", max_model_len=2048)
llm.generate(["Once upon a time"], SamplingParams(temperature=0.7))[0].outputs[0].text
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tiercel.api import Answer, Model, Prompt, load
from tiercel.engine.request import Request
from tiercel.engine.speculative import NgramDrafter
from tiercel.errors import RequestError
from tiercel.hub import local_models
from tiercel.sampling.logprobs import Logprob
from tiercel.sampling.params import SamplingParams
from tiercel.tokenizer.tokenizer import Tokenizer

__all__ = ["LLM", "Answer", "CompletionOutput", "LoRARequest", "Model", "Prompt", "RequestOutput", "load"]


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


@dataclass(frozen=True)
class LoRARequest:
    """An adapter for a request: its name, vLLM's number for it (not used here), and its folder in PEFT's form."""

    lora_name: str
    lora_int_id: int
    lora_path: str


# Arguments of vllm.LLM that mean something only to its engine: what each does not do here.
ELSEWHERE = {
    "trust_remote_code": "no code from a model folder is ever run",
    "gpu_memory_utilization": "memory is taken as it is needed",
    "swap_space": "snapshots of prefixes are kept in memory only",
    "cpu_offload_gb": "weights stay on one device",
    "enforce_eager": "small steps are captured all the same",
    "tokenizer_mode": "the model's own tokenizer is used",
    "enable_prefix_caching": "what prompts share is always read once",
    "disable_log_stats": "there are no log statistics",
    "max_loras": "any number of adapters may be at work",
    "max_lora_rank": "adapters may have any rank",
}
HARMLESS_VALUES = {
    "trust_remote_code": False,
    "tokenizer_mode": "auto",
    "enforce_eager": False,
    "enable_prefix_caching": True,
}
SPECULATIVE_KEYS = {"method", "model", "num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max"}


class LLM:
    """vLLM's offline interface: `LLM(model=…).generate(prompts, params)`, answers in the order of the prompts.

    Arguments that have no meaning here are named in one warning; unknown ones are refused.

    Args:
        model: as for `tiercel.load`.
        tokenizer: another model's tokenizer.
        dtype: "auto", "float32", "bfloat16" or "float16".
        max_model_len: tokens of the context.
        seed: of requests that have none.
        device: "auto" (a GPU where there is one), "cuda" or "cpu"; "cpu" by default.
        quantization: packs the weights while they are read: "q4_k_m", "q8_0", "int8", "nf4", …; vLLM's
            "bitsandbytes" is nf4.  None: as stored.
        enable_lora: `generate` and `chat` take a `lora_request`.
        speculative_config: {"method": "draft_model", "model": …} or {"method": "ngram", "prompt_lookup_min": …,
            "prompt_lookup_max": …}, with "num_speculative_tokens" from 1 to 7.  No token of an answer changes by it.
        tensor_parallel_size: processes of this machine that share each layer, on the CPU.

    Raises:
        RequestError: an argument or value that is not known, or a combination that is not served.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | None = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
        seed: int | None = None,
        device: str = "cpu",
        quantization: str | None = None,
        enable_lora: bool = False,
        speculative_config: Mapping[str, Any] | None = None,
        tensor_parallel_size: int = 1,
        **others: Any,
    ) -> None:
        unknown = [name for name in others if name not in ELSEWHERE]
        if unknown:
            raise RequestError(
                f"LLM has no argument {unknown[0]!r}; it takes model, tokenizer, dtype, max_model_len, seed, device, "
                "quantization, enable_lora, speculative_config, tensor_parallel_size"
            )
        idle = [name for name, value in others.items() if HARMLESS_VALUES.get(name, object()) != value]
        if idle:
            warnings.warn("; ".join(f"{name}: {ELSEWHERE[name]}" for name in idle), stacklevel=2)
        lookup, drafting = _speculation(speculative_config)
        self.model = load(
            model,
            dtype=dtype,
            max_length=max_model_len,
            device=_device(device),
            quantize="nf4" if quantization == "bitsandbytes" else quantization,
            tensor_parallel=tensor_parallel_size,
            **drafting,
        )
        if lookup is not None:
            self.model.drafter = lookup
        self.enable_lora = enable_lora
        if tokenizer is not None and str(tokenizer) != str(model):
            self.model.tokenizer = Tokenizer.from_folder(local_models.resolve(tokenizer, pull=True))
        self.seed, self._count = seed, 0

    def get_tokenizer(self) -> Tokenizer | None:
        """Return the tokenizer; None without one."""
        return self.model.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return what the checkpoint recommends."""
        return self.model.default_params()

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, all at once.

        Args:
            prompts: one or a list of: text (as it is, no template), {"prompt": …}, {"prompt_token_ids": […]}.
            sampling_params: of all prompts, or one for each; vLLM's defaults without.
            use_tqdm: show a progress bar.
            lora_request: the adapter of all prompts, or one for each.

        Returns:
            One output for each prompt, in their order.

        Raises:
            RequestError: a prompt or parameters that cannot be served.
        """
        if isinstance(prompts, (str, dict)):
            prompts = [prompts]
        return self._all([self._read(prompt) for prompt in prompts], sampling_params, use_tqdm, lora_request)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer conversations, all at once.

        Args:
            messages: one conversation or a list of them; rendered with the model's chat template.
            sampling_params: of all conversations, or one for each; vLLM's defaults without.
            use_tqdm: show a progress bar.
            lora_request: the adapter of all conversations, or one for each.
            template: variables of the template (tools, enable_thinking, …).

        Returns:
            One output for each conversation, in their order.

        Raises:
            RequestError: no tokenizer, or messages or parameters that cannot be served.
        """
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            raise RequestError(f"{self.model.name} has no tokenizer: use generate with prompt_token_ids")
        read = [
            (tokenizer.render(list(talk), **template), tokenizer.chat(list(talk), **template)) for talk in conversations
        ]
        return self._all(read, sampling_params, use_tqdm, lora_request)

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
        lora: LoRARequest | Sequence[LoRARequest | None] | None,
    ) -> list[RequestOutput]:
        adapters = self._adapters(lora, len(prompts))
        wanted = params if isinstance(params, Sequence) else [params or SamplingParams()] * len(prompts)
        if len(wanted) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts need as many sampling params, not {len(wanted)}")
        engine = self.model.engine
        requests = []
        for (_, ids), p, adapter in zip(prompts, wanted, adapters, strict=True):
            seeded = p if p.seed is not None or self.seed is None else replace(p, seed=self.seed)
            requests.append(engine.prepare(ids, seeded, adapter=adapter))
        self._run(requests, bar)
        self._count += len(requests)
        numbers = range(self._count - len(requests), self._count)
        return [
            RequestOutput(str(number), prompt, request.prompt_ids, _outputs(request), True, request.cached_tokens)
            for number, (prompt, _), request in zip(numbers, prompts, requests, strict=True)
        ]

    def _adapters(self, lora: LoRARequest | Sequence[LoRARequest | None] | None, count: int) -> list[str | None]:
        """The name of every prompt's adapter, loaded where it is not yet."""
        each = list(lora) if isinstance(lora, Sequence) else [lora] * count
        if len(each) != count:
            raise RequestError(f"{count} prompts need as many LoRA requests, not {len(each)}")
        if lora is not None and not self.enable_lora:
            raise RequestError("a LoRA request needs LLM(enable_lora=True)")
        for request in dict.fromkeys(request for request in each if request is not None):
            self.model.load_adapter(request.lora_name, request.lora_path)
        return [self.model.adapter if request is None else request.lora_name for request in each]

    def _run(self, requests: list[Request], bar: bool) -> None:
        """Run all of them together; none stays queued when one fails or the user interrupts."""
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


def _device(device: str) -> str:
    if device == "auto":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise RequestError(f"device is auto, cpu or cuda, not {device!r}")
    return device


def _speculation(config: Mapping[str, Any] | None) -> tuple[Callable[[Any], NgramDrafter] | None, dict[str, Any]]:
    """What makes prompt-lookup drafters of other lengths than usual, and the arguments of `load`."""
    if config is None:
        return None, {}
    unknown = [key for key in config if key not in SPECULATIVE_KEYS]
    if unknown:
        raise RequestError(
            f"speculative_config has no {unknown[0]!r} here; it takes {', '.join(sorted(SPECULATIVE_KEYS))}"
        )
    model = config.get("model")
    method = config.get("method") or ("ngram" if model in (None, "ngram", "[ngram]") else "draft_model")
    arguments = {"num_speculative_tokens": config.get("num_speculative_tokens")}
    if method == "draft_model":
        if not isinstance(model, (str, Path)):
            raise RequestError("speculative_config needs the draft model's name: {'method': 'draft_model', 'model': …}")
        return None, arguments | {"draft_model": model}
    if method != "ngram":
        raise RequestError(f"the speculative method {method!r} is not served; use ngram or draft_model")
    longest = config.get("prompt_lookup_max", 4)
    shortest = config.get("prompt_lookup_min", min(2, longest))
    if not (type(shortest) is int and type(longest) is int and 1 <= shortest <= longest <= 64):
        raise RequestError(f"prompt_lookup_min and prompt_lookup_max are from 1 to 64, not {shortest} and {longest}")
    return lambda sequence: NgramDrafter(shortest, longest), arguments


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
