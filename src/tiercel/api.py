"""The front door: `load` gives a Model.

model = tiercel.load("smollm2")
print(model.generate("Why is the sky blue?"))
for text in model.stream("And why is it red at night?"): ...
model.logits([1, 2, 3])                                              # (L, V) float32
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiercel.engine.draft_model import drafter_for
from tiercel.engine.engine import Engine
from tiercel.engine.request import Request
from tiercel.engine.session import Session
from tiercel.engine.speculative import Drafter, draft_lengths
from tiercel.errors import RequestError
from tiercel.families.family import Layout
from tiercel.hub import local_models
from tiercel.model.config import ModelConfig
from tiercel.model.decoder import Decoder
from tiercel.model.gpu_layout import to_device
from tiercel.model.mirrored import MirroredDecoder
from tiercel.runtime.timing import Times
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

    thinking: the reasoning before it · token_ids · finish_reason: "stop" or "length" · logprobs (when asked for) ·
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
        sequence = request.sequences[0]
        answer = cls(sequence.text)
        answer.thinking, answer.token_ids, answer.logprobs = sequence.reasoning, sequence.token_ids, sequence.logprobs
        answer.finish_reason, answer.stop_reason = sequence.finish_reason, sequence.stop_reason
        answer.prompt_tokens, answer.cached_tokens = len(request.prompt_ids), request.cached_tokens
        answer.times = request.times
        return answer


class Model:
    """A network and its tokenizer: made by `load`.

    network: the Decoder, a torch module · tokenizer: with the chat template; None without one · config: as data
    max_length: the context in tokens · adapter: the one that is used where none is named · text: alias of tokenizer
    draft: the model that drafts for it, or None · num_speculative_tokens: drafted at once at most; None: 7
    """

    adapter: str | None = None
    path: Path | None = None  # where it was loaded from
    draft: Model | None = None
    num_speculative_tokens: int | None = None
    drafter: Callable[[Any], Drafter] | None = None  # in place of the usual one; set before the first request

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
        """Return `tokenizer`, by its name in version 0.1."""
        return self.tokenizer

    @text.setter
    def text(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer

    @property
    def config(self) -> ModelConfig:
        """Return the network as data."""
        return self.network.config

    @cached_property
    def engine(self) -> Engine:
        """Runs the prompts of `generate`, `stream` and sessions, and caches them."""
        drafter = self.drafter or drafter_for(self, self.draft)
        return Engine(self, drafter=drafter, num_speculative_tokens=self.num_speculative_tokens)

    def load_adapter(self, name: str, path: str | Path, *, lock: AbstractContextManager[Any] | None = None) -> None:
        """Load a LoRA adapter, to be named by `generate(…, adapter=name)`.

        Args:
            name: what requests call it.
            path: a folder in PEFT's form.
            lock: held while it is put in; of an engine that is not the model's own.

        Raises:
            ModelNotFound: there is no such folder.
            FormatError: it is no LoRA adapter, or of another model.
            UnsupportedError: it holds what is not understood, by name.
            RequestError: another adapter has that name, or the model is tensor-parallel.
        """
        from tiercel.weights.adapters import read

        self._check_whole("takes no adapters")
        adapter, held = read(path, self.layout), self.network.adapters
        with lock or self.engine.between_steps():
            if name in held and held[name].id != adapter.id:
                raise RequestError(f"another adapter is loaded as {name!r}: unload it first, or choose another name")
            held[name] = adapter

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter.

        Args:
            name: as given to `load_adapter`.

        Raises:
            RequestError: there is none of that name, or a running request uses it.
        """
        with self.engine.between_steps():
            if name in self.network.adapters and self.engine.adapter_in_use(name):
                raise RequestError(f"the adapter {name!r} is in use by a running request")
            self.network.adapters.pop(name)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that are loaded."""
        return list(self.network.adapters)

    def logits(self, ids: Sequence[int] | Tensor, *, adapter: str | None = None) -> Tensor:
        """Compute the logits of every next token, without gradients.

        Args:
            ids: token ids (L,).
            adapter: name of a loaded LoRA adapter.

        Returns:
            (L, V) float32.

        Raises:
            RequestError: an id outside the vocabulary, or no such adapter.
        """
        adapter = adapter or self.adapter
        with torch.no_grad():
            tokens = torch.as_tensor(ids, dtype=torch.long, device=self.network.embed.weight.device)
            state = None if adapter is None else self.network.new_state(adapter)
            logits_LV: Tensor = self.network(tokens, state)
            return logits_LV

    def session(self, *, adapter: str | None = None) -> Session:
        """Begin a conversation whose state is kept between turns.

        Args:
            adapter: name of a loaded LoRA adapter.

        Returns:
            A session of this model's engine (`engine.session.Session`).
        """
        return Session(self.engine, adapter=adapter or self.adapter)

    def encode(self, prompt: Prompt, *, raw: bool = False, **template: Any) -> list[int]:
        """Tokenize a prompt; text becomes a user's message where the model has a chat template.

        Args:
            prompt: text, messages, or token ids, which stay what they are.
            raw: leave the chat template out.
            template: variables of the template (enable_thinking, tools, …).

        Returns:
            Token ids.

        Raises:
            RequestError: the model has no tokenizer, or messages that its template refuses.
        """
        if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
            return list(prompt)  # type: ignore[arg-type]
        if self.tokenizer is None:
            raise RequestError(f"{self.name} has no tokenizer: give it token ids{self._why_no_tokenizer()}")
        if isinstance(prompt, str) and (raw or not self.tokenizer.has_template):
            return self.tokenizer.encode(prompt)
        messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.tokenizer.chat(messages, **template)

    def _why_no_tokenizer(self) -> str:
        """What its folder has instead, and what to do about it; "" where nothing is known."""
        path = self.path
        return f" ({Tokenizer.why_none(path)})" if path is not None and path.is_dir() else ""

    def default_params(self) -> SamplingParams:
        """Return what generation_config.json recommends, else temperature 0.8, top_p 0.9, top_k 40."""
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
        """Stream an answer in pieces, reasoning apart.

        Args:
            prompt: text, messages for the chat template, or token ids.
            params: sampling parameters; the model's defaults without.
            raw: leave the chat template out.
            think: ask the template for reasoning, or for none (`enable_thinking`, the name templates use).
            session: the conversation to go on with; a new one without.
            adapter: name of a loaded LoRA adapter, of a new session.
            more: further arguments of `Session.generate`.

        Returns:
            The pieces, and the session, whose `last` describes the answer.

        Raises:
            RequestError: parameters or a prompt that cannot be served.
            ContextOverflow: a prompt longer than the context.
        """
        ids = self.encode(prompt, raw=raw, **({} if think is None else {"enable_thinking": think}))
        chat = not raw and self.tokenizer is not None and self.tokenizer.has_template and not _is_ids(prompt)
        session = session or Session(self.engine, "", adapter or self.adapter)  # cached with all others
        starts = chat and self.tokenizer is not None and self.tokenizer.opens_thinking(ids)
        thinking = "auto" if chat else "off"
        return session.generate(
            ids, params or self.default_params(), thinking=thinking, starts_in_thinking=starts, **more
        ), session

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, raw: bool = False, adapter: str | None = None
    ) -> Answer:
        """Generate a whole answer.

        Args:
            prompt: text, messages for the chat template, or token ids.
            params: sampling parameters; the model's defaults without.
            raw: leave the chat template out.
            adapter: name of a loaded LoRA adapter.

        Returns:
            The text, with its reasoning, tokens, times and finish reason.

        Raises:
            RequestError: parameters or a prompt that cannot be served.
            ContextOverflow: a prompt longer than the context.
        """
        pieces, session = self.pieces(prompt, params, raw=raw, adapter=adapter)
        for _ in pieces:
            pass
        assert session.last is not None
        return Answer.of(session.last.request)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, raw: bool = False, adapter: str | None = None
    ) -> Iterator[str]:
        """Stream an answer's text, without the reasoning (`pieces` has both).

        Args:
            prompt: text, messages for the chat template, or token ids.
            params: sampling parameters; the model's defaults without.
            raw: leave the chat template out.
            adapter: name of a loaded LoRA adapter.

        Returns:
            Parts of the text, never half a character.

        Raises:
            RequestError: parameters or a prompt that cannot be served.
            ContextOverflow: a prompt longer than the context.
        """
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
        """Sample several answers to one prompt and choose by vote.

        Args:
            prompt: text, messages for the chat template, or token ids.
            settings: how many answers, and how they are weighed.
            params: sampling parameters; the model's defaults without.
            raw: leave the chat template out.
            think: ask the template for reasoning, or for none.
            more: further arguments of `voting.vote`.

        Returns:
            The answer that wins, the table of the others, and what each cost.

        Raises:
            RequestError: parameters or a prompt that cannot be served.
        """
        ids = self.encode(prompt, raw=raw, **({} if think is None else {"enable_thinking": think}))
        chat = not raw and self.tokenizer is not None and self.tokenizer.has_template and not _is_ids(prompt)
        starts = chat and self.tokenizer is not None and self.tokenizer.opens_thinking(ids)
        more.setdefault("adapter", self.adapter)
        return vote(self, ids, settings, params, thinking="auto" if chat else "off", starts_in_thinking=starts, **more)

    def export(self, out: str | Path, *, dtype: str | None = None) -> Path:
        """Write the network as it is now.

        Args:
            out: a name that ends in .gguf, or a Hugging Face folder.
            dtype: of the matrices; as they are held without.

        Returns:
            The path that was written.

        Raises:
            UnsupportedError: the format cannot express the model.
            RequestError: the model is tensor-parallel, or `out` is what it was loaded from.
        """
        self._check_whole("cannot be written")
        return export(NetworkSource(self.network, self.layout, self.tokenizer), out, dtype=dtype, name=self.name)

    def _check_whole(self, why: str) -> None:
        """Refuse what needs all weights in this process."""
        if isinstance(self.network, MirroredDecoder):
            raise RequestError(f"a tensor-parallel model {why}: load {self.name} without tensor_parallel")


def _is_ids(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt)


def load(
    name: str | Path = local_models.BUNDLED,
    *,
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    exact: bool = False,
    max_length: int | None = None,
    device: str = "cpu",
    adapters: Mapping[str, str | Path] | None = None,
    draft_model: str | Path | None = None,
    num_speculative_tokens: int | None = None,
    tensor_parallel: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Load a model by path, short name or hub name; without one the small reasoner of this package.

    Args:
        name: a folder with config.json and safetensors, a .gguf file, a pattern file (.json, .toml: fresh weights), a
            short name such as "smollm2" (pulled when missing) or "org/repo".
        dtype: "auto" as stored, or float32, bfloat16, float16.
        quantize: "q4_k_m", "q8_0", "int8", "nf4", …: packed while it is read, so that little more memory is needed;
            "fp8", on a GPU alone: e4m3 with a scale for each output, and inputs with one for each token.
        exact: inputs of packed matrices are not rounded to eight bits: slower, and as if the weights were unpacked.
        max_length: a smaller context than the model's, in tokens.
        device: "cpu", or "cuda" for one GPU.
        adapters: LoRA adapters to hold beside it, name → folder in PEFT's form; see `Model.load_adapter`.
        draft_model: a smaller model of the same vocabulary, by any such name: it proposes tokens that this one
            verifies; no token of an answer changes.
        num_speculative_tokens: proposed at once, 1 to 7; by default as many as pay.
        tensor_parallel: processes of this machine that share each layer of an unquantized model on the CPU, by torch.
        progress: called with (bytes done, bytes in all).

    Returns:
        The network and its tokenizer, ready to run.

    Raises:
        ModelNotFound: there is no such path or name.
        Offline: it must be pulled, and there is no network.
        FormatError: a file is damaged or no model.
        UnsupportedError: a model or field that is not understood, by name.
        RequestError: arguments that do not go together.
        DoesNotFit: there is less free memory than it takes.
    """
    fp8 = quantize == "fp8"
    if fp8 and device == "cpu":
        raise RequestError("quantize='fp8' needs a GPU: load with device='cuda', or choose 'q8_0' or 'int8'")
    path = local_models.resolve(name, pull=True)
    network: Decoder
    if tensor_parallel != 1:
        network, tokenizer, layout = _load_parallel(path, tensor_parallel, dtype, quantize, device, progress)
    else:
        packing = None if fp8 else quantize
        network, tokenizer, layout = weights.load(path, dtype=dtype, quantize=packing, exact=exact, progress=progress)
    if device != "cpu":
        to_device(network, device, fp8=fp8)
    defaults = generation_defaults(path)
    model = Model(network, tokenizer, layout, name=str(name), max_length=max_length, defaults=defaults)
    model.path, model.num_speculative_tokens = path, num_speculative_tokens
    draft_lengths(num_speculative_tokens)  # refuses what is no such number
    if draft_model is not None:
        model.draft = load(draft_model, device=device)
        drafter_for(model, model.draft)  # refuses another vocabulary
    for adapter, folder in (adapters or {}).items():
        model.load_adapter(adapter, folder)
    own = local_models.adapter_of(name)  # what a Modelfile put on
    if own is not None:
        model.load_adapter(model.name, own)
        model.adapter = model.name
    return model


def _load_parallel(
    path: Path,
    size: int,
    dtype: str | torch.dtype,
    quantize: str | None,
    device: str,
    progress: Callable[[int, int], None] | None,
) -> tuple[Decoder, Tokenizer | None, Layout]:
    """`load` with tensor_parallel: refuse what does not go with it."""
    from tiercel.weights.parallel import load_parallel

    if quantize is not None:
        raise RequestError(f"choose one: quantize={quantize!r} or tensor_parallel={size}")
    if device != "cpu":
        raise RequestError(f"tensor_parallel runs on the CPU; leave out device={device!r} or tensor_parallel={size}")
    return load_parallel(path, size, dtype=dtype, progress=progress)
