"""The front door: `load` gives a Model; `LLM` is the same with vLLM's names.

model = tiercel.load("smollm2")
print(model.generate("Why is the sky blue?"))
for text in model.stream("And why is it red at night?"): ...
model.logits([1, 2, 3])                                              # (L, V) float32

llm = LLM(model="smollm2", max_model_len=2048)
llm.generate(["Once upon a time"], SamplingParams(temperature=0.7))[0].outputs[0].text
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiercel.engine.engine import Engine
from tiercel.engine.request import Request
from tiercel.engine.session import Session
from tiercel.engine.speculative import prompt_lookup
from tiercel.errors import RequestError
from tiercel.families.family import Layout
from tiercel.generate import Times
from tiercel.hub import hub
from tiercel.model.config import ModelConfig
from tiercel.model.decoder import Decoder
from tiercel.model.gpu_layout import move
from tiercel.sampling.logprobs import Logprob
from tiercel.sampling.params import SamplingParams
from tiercel.tokenizer.stream import Piece
from tiercel.tokenizer.tokenizer import Tokenizer
from tiercel.voting import Vote, VoteSettings, vote
from tiercel.weights import load as weights
from tiercel.weights.checkpoint import generation_defaults
from tiercel.weights.export import NetworkSource, export

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]  # text, token ids, or messages


class Answer(str):
    """The answer's text, with what is known of it.

    thinking: the thoughts before it · token_ids · finish_reason: "stop" or "length" · logprobs (when asked for) ·
    prompt_tokens, cached_tokens: how many the prompt had, and how many of them were not read again · times (seconds)
    """

    thinking: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: str | int | None
    logprobs: list[dict[int, Logprob]] | None
    prompt_tokens: int
    cached_tokens: int
    times: Times

    @classmethod
    def of(cls, request: Request) -> Answer:
        said = request.choices[0]
        answer = cls(said.text)
        answer.thinking, answer.token_ids, answer.logprobs = said.thoughts, said.token_ids, said.logprobs
        answer.finish_reason, answer.stop_reason = said.finish_reason, said.stop_reason
        answer.prompt_tokens, answer.cached_tokens = len(request.prompt_ids), request.cached_tokens
        answer.times = request.times
        return answer


class Model:
    """A network and its tokenizer: made by `load`.

    network: the Decoder, a torch module · tokenizer: with the chat template; None without one · config: as data
    max_length: the context in tokens · adapter: the one that is used where none is named · text: alias of tokenizer
    """

    adapter: str | None = None

    def __init__(
        self,
        network: Decoder,
        tokenizer: Tokenizer | None,
        layout: Layout,
        *,
        name: str,
        max_length: int | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.network, self.tokenizer, self.layout, self.name = network, tokenizer, layout, name
        self.defaults = dict(defaults or {})
        self.max_length = self.config.max_length if max_length is None else max_length
        if not 0 < self.max_length <= self.config.max_length:
            raise RequestError(
                f"a context of {self.max_length} is asked for; {name} was made for 1 to {self.config.max_length}"
            )

    @property
    def text(self) -> Tokenizer | None:
        """Alias of `tokenizer`, its name in version 0.1."""
        return self.tokenizer

    @text.setter
    def text(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    @cached_property
    def engine(self) -> Engine:
        """What runs the prompts of `generate`, `stream` and sessions, and remembers them."""
        # on plain torch a row's bits depend on how many share its products, and a near tie on its bits
        return Engine(self, drafter=prompt_lookup if self.network.native else None)

    def load_adapter(self, name: str, path: str | Path, *, lock: AbstractContextManager[Any] | None = None) -> None:
        """Hold a LoRA adapter (a folder in PEFT's form) under a name, to be named by `generate(…, adapter=name)`.

        lock: of an engine that is not the model's own.  Raises ModelNotFound, FormatError, UnsupportedError.
        """
        from tiercel.weights.adapters import read

        adapter, held = read(path, self.layout), self.network.adapters
        with lock or self.engine.between_steps():
            if name in held and held[name].id != adapter.id:
                raise RequestError(f"another adapter is loaded as {name!r}: unload it first, or choose another name")
            held[name] = adapter

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter.  RequestError when there is none of that name, or an answer under way wears it."""
        with self.engine.between_steps():
            if name in self.network.adapters and self.engine.wears(name):
                raise RequestError(f"the adapter {name!r} is worn by an answer that is under way")
            self.network.adapters.pop(name)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that are loaded."""
        return list(self.network.adapters)

    def logits(self, ids: Sequence[int] | Tensor, *, adapter: str | None = None) -> Tensor:
        """Token ids (L,) → logits of every next token (L, V), float32, no gradients."""
        adapter = adapter or self.adapter
        with torch.no_grad():
            tokens = torch.as_tensor(ids, dtype=torch.long, device=self.network.embed.weight.device)
            return self.network(tokens, None if adapter is None else self.network.new_state(adapter))

    def session(self, *, adapter: str | None = None) -> Session:
        """A conversation's memory; see `engine.session.Session`."""
        return Session(self.engine, adapter=adapter or self.adapter)

    def encode(self, prompt: Prompt, *, raw: bool = False, **template: Any) -> list[int]:
        """Token ids of a prompt: messages, or text put as a user's message where the model has a chat template.

        raw: text as it is.  Token ids stay what they are.  Further arguments go to the template.
        """
        if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
            return list(prompt)  # type: ignore[arg-type]
        if self.tokenizer is None:
            raise RequestError(f"{self.name} has no tokenizer: give it token ids")
        if isinstance(prompt, str) and (raw or not self.tokenizer.has_template):
            return self.tokenizer.encode(prompt)
        messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.tokenizer.chat(messages, **template)

    def default_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json recommends, else temperature 0.8, top_p 0.9, top_k 40."""
        return SamplingParams(max_tokens=None, **(self.defaults or {"temperature": 0.8, "top_p": 0.9, "top_k": 40}))

    def pieces(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        think: bool | None = None,
        session: Session | None = None,
        adapter: str | None = None,
        **more: Any,
    ) -> tuple[Iterator[Piece], Session]:
        """The answer as it comes, thoughts apart, and the session whose `last` tells about it.

        think: asks the template for thoughts or against them (`enable_thinking`, the name templates use).
        """
        ids = self.encode(prompt, raw=raw, **({} if think is None else {"enable_thinking": think}))
        chat = not raw and self.tokenizer is not None and self.tokenizer.has_template and not _is_ids(prompt)
        session = session or Session(self.engine, "", adapter or self.adapter)  # remembered with all others
        starts = chat and self.tokenizer is not None and self.tokenizer.opens_thinking(ids)
        thinking = "auto" if chat else "off"
        return session.generate(
            ids, params or self.default_params(), thinking=thinking, starts_in_thinking=starts, **more
        ), session

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, raw: bool = False, adapter: str | None = None
    ) -> Answer:
        """The whole answer, a string that also knows its thoughts, tokens, times and why it ended."""
        pieces, session = self.pieces(prompt, params, raw=raw, adapter=adapter)
        for _ in pieces:
            pass
        assert session.last is not None
        return Answer.of(session.last.request)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, raw: bool = False, adapter: str | None = None
    ) -> Iterator[str]:
        """The answer's text as it comes (without the thoughts: `pieces` has both)."""
        pieces, _ = self.pieces(prompt, params, raw=raw, adapter=adapter)
        return (piece.text for piece in pieces if piece.kind == "text")

    def vote(
        self,
        prompt: Prompt,
        settings: VoteSettings,
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        think: bool | None = None,
        **more: Any,
    ) -> Vote:
        """Many answers to one prompt, and the one that they agree on; see `voting.vote` for the further arguments."""
        ids = self.encode(prompt, raw=raw, **({} if think is None else {"enable_thinking": think}))
        chat = not raw and self.tokenizer is not None and self.tokenizer.has_template and not _is_ids(prompt)
        starts = chat and self.tokenizer is not None and self.tokenizer.opens_thinking(ids)
        more.setdefault("adapter", self.adapter)
        return vote(self, ids, settings, params, thinking="auto" if chat else "off", starts_in_thinking=starts, **more)

    def export(self, out: str | Path, *, dtype: str | None = None) -> Path:
        """Write the network as it is now: a .gguf file or a Hugging Face folder."""
        return export(NetworkSource(self.network, self.layout, self.tokenizer), out, dtype=dtype, name=self.name)


def _is_ids(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt)


def load(
    name: str | Path = hub.BUNDLED,
    *,
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    exact: bool = False,
    max_length: int | None = None,
    device: str = "cpu",
    adapters: Mapping[str, str | Path] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """A model by path, short name or hub name; the small reasoner that comes with this package without one.

    name: a folder with config.json and safetensors, a .gguf file, a pattern file (.json, .toml: fresh weights), a
    short name such as "smollm2" (pulled when missing) or "org/repo".
    dtype: "auto" as stored, or float32, bfloat16, float16.  max_length: a smaller context than the model's.
    quantize: "q4_k_m", "q8_0", "int8", "nf4", …: packed while it is read, so that little more memory is needed.
    adapters: LoRA adapters to hold beside it, name → folder in PEFT's form; see `Model.load_adapter`.
    exact: inputs of packed matrices are not rounded to eight bits: slower, and as if the weights were unpacked.
    device: "cpu", or "cuda" for one GPU.
    Raises ModelNotFound, FormatError, UnsupportedError, DoesNotFit, Offline.
    """
    path = hub.resolve(name, pull=True)
    network, tokenizer, layout = weights.load(path, dtype=dtype, quantize=quantize, exact=exact, progress=progress)
    if device != "cpu":
        move(network, device)
    defaults = generation_defaults(path)
    model = Model(network, tokenizer, layout, name=str(name), max_length=max_length, defaults=defaults)
    for adapter, folder in (adapters or {}).items():
        model.load_adapter(adapter, folder)
    own = hub.adapter_of(name)  # what a Modelfile put on
    if own is not None:
        model.load_adapter(model.name, own)
        model.adapter = model.name
    return model


# ── vLLM's names ─────────────────────────────────────────────────────────────────────────────────────────


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
            self.model.tokenizer = Tokenizer.from_folder(hub.resolve(tokenizer, pull=True))
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
            choice.index,
            choice.text,
            choice.token_ids,
            choice.cumulative_logprob,
            choice.logprobs,
            choice.finish_reason,
            choice.stop_reason,
        )
        for choice in request.choices
    ]
