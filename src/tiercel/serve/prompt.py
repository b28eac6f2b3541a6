"""A prompt and what a request asks of its answer → a GenerationRequest.  Runs in a thread: templates and tokenizing
take time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

from tiercel import voting
from tiercel.errors import ContextOverflow, RequestError
from tiercel.sampling.params import SamplingParams, Structured
from tiercel.serve.capabilities import can_reason, template_text, tool_format
from tiercel.serve.defaults import sampling_params
from tiercel.serve.generic_tools import with_tools
from tiercel.serve.models import Lease
from tiercel.serve.tool_grammar import call_grammar
from tiercel.serve.types import GenerationRequest, Message, Prompt, Think, Tool
from tiercel.voting import VoteSettings

if TYPE_CHECKING:
    from tiercel.engine.structured_output import Grammar
    from tiercel.llm import Model
    from tiercel.tokenizer.tokenizer import Tokenizer

# Tokens of reasoning at each effort; None: no limit.
REASONING_TOKENS: dict[str, int | None] = {"minimal": 256, "low": 1024, "medium": 4096, "high": None, "xhigh": None,
                                           "ultra": None, "max": None}  # fmt: skip


MAX_COUNTED_CONTEXTS = 16
EXACT_TOKENS = 64  # of a prompt that is longer than the context by more only a beginning may have been read


@dataclass
class PromptOptions:
    """What a request asks for beside its prompt and sampling parameters.

    forced: the answer is one call of one of the tools.  structured: keywords of `Structured`.  context: tokens, where
    the request wants a smaller one than the model's.  continue_final: the last message is unfinished.
    scores_only: no token is generated.  template: variables for the chat template.
    """

    tools: Sequence[Tool] | None = None
    forced: bool = False
    think: Think = None
    structured: dict[str, Any] | None = None
    context: int | None = None
    continue_final: bool = False
    add_generation_prompt: bool = True
    scores_only: bool = False
    template: Mapping[str, Any] = field(default_factory=dict)
    vote: VoteSettings | None = None


def prepare(
    lease: Lease, prompt: Prompt, fields: Mapping[str, Any], options: PromptOptions | None = None
) -> GenerationRequest:
    """Render, tokenize, check and compile.

    Args:
        fields: keywords of SamplingParams.
    Raises:
        RequestError: what cannot be served, in one line.
        ContextOverflow: the prompt leaves no room for an answer.
    """
    model, options, fields = lease.loaded.model, options or PromptOptions(), dict(fields)
    tokenizer, chat = model.tokenizer, is_chat(prompt)
    from tiercel.tokenizer.tool_formats import HERMES, LLAMA

    form = (tool_format(template_text(tokenizer)) or HERMES) if options.tools else None  # HERMES: generic_tools.py
    if is_chat(prompt):
        prompt_ids, turn_start = _encode_chat(lease, prompt, fields, options)
    else:
        prompt_ids, turn_start = _ids(lease, prompt, _max_tokens(model, options)), None
        check_ids(model, prompt_ids)
    structured = options.structured
    if options.forced and options.tools:  # the call is the form of the answer
        structured, form = {"grammar": call_grammar(options.tools)}, LLAMA  # that form reads bare objects
    if structured is not None:
        fields["structured"] = Structured(**structured)
    params = sampling_params(fields)
    if options.vote is not None:
        if options.tools:
            raise RequestError("tools and a vote: calls cannot be voted on; leave one of them out")
        voting.check(options.vote, params)
    _limit_length(model, params, len(prompt_ids), options)
    grammar = _compile(lease, params)
    # a form binds the answer from its first token, unless the template has a place for reasoning, which comes before
    reasons = chat and (grammar is None or can_reason(template_text(tokenizer)))
    starts = chat and tokenizer is not None and tokenizer.opens_thinking(prompt_ids)
    return GenerationRequest(
        prompt_ids, params, "auto" if reasons else "off", starts, turn_start, form, grammar, options.vote
    )


def is_chat(prompt: Prompt) -> TypeGuard[list[Message]]:
    """Whether a prompt is a conversation."""
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)


def _ids(lease: Lease, prompt: Prompt, max_tokens: int) -> list[int]:
    """Token ids of a prompt that is no conversation; of one that is far too long only a beginning."""
    if isinstance(prompt, str):
        return lease.tokenizer.encode(lease.tokenizer.beginning(prompt, max_tokens))
    return [token for token in prompt if isinstance(token, int)]


def encode_chat(
    lease: Lease,
    messages: list[Message],
    variables: dict[str, Any],
    options: PromptOptions,
    max_tokens: int | None = None,
) -> list[int]:
    """Token ids of a conversation; what the template gets is put into `variables`.  Raises RequestError."""
    tokenizer = lease.tokenizer
    messages = template_messages(tokenizer, messages, options)
    variables |= options.template
    if options.think is not None and can_reason(template_text(tokenizer)):
        variables.setdefault("enable_thinking", options.think not in (False, "none"))
    if options.tools:
        variables["tools"] = list(options.tools)
    return tokenizer.chat(
        messages,
        continue_final=options.continue_final,
        add_generation_prompt=options.add_generation_prompt,
        max_tokens=max_tokens,
        **variables,
    )


def count_chat(lease: Lease, messages: list[Message], options: PromptOptions) -> int:
    """The number of a conversation's tokens.  Raises RequestError, ContextOverflow."""
    most = MAX_COUNTED_CONTEXTS * lease.loaded.model.max_length
    count = len(encode_chat(lease, messages, {}, options, most))
    if count > most:
        raise ContextOverflow(f"the conversation has more than {most} tokens: {MAX_COUNTED_CONTEXTS} contexts")
    return count


def _encode_chat(
    lease: Lease, messages: list[Message], fields: dict[str, Any], options: PromptOptions
) -> tuple[list[int], int | None]:
    """Token ids, and where the last user turn begins.  A reasoning effort sets its budget in `fields`."""
    tokenizer, think = lease.tokenizer, options.think
    max_tokens = _max_tokens(lease.loaded.model, options)
    variables: dict[str, Any] = {}
    ids = encode_chat(lease, messages, variables, options, max_tokens)
    budget = REASONING_TOKENS.get(think) if isinstance(think, str) else 0 if think is False else None
    if budget is not None and can_reason(template_text(tokenizer)):
        fields.setdefault("thinking_budget", budget)
    # a state whose rollback depth covers the prompt needs no snapshot at a turn
    splits = len(ids) <= max_tokens and 0 < lease.loaded.engine.engine.rollback_tokens < len(ids)
    return ids, _turn_start(
        tokenizer, template_messages(tokenizer, messages, options), ids, variables
    ) if splits else None


def template_messages(tokenizer: Tokenizer, messages: list[Message], options: PromptOptions) -> list[Message]:
    """The messages that the template gets: with tools as text where it takes none."""
    template = template_text(tokenizer)
    generic = options.tools and tool_format(template) is None
    return with_tools(messages, options.tools or (), template) if generic else messages


def check_ids(model: Model, ids: Sequence[int]) -> None:
    """Raise RequestError for an empty prompt and for ids outside the vocabulary."""
    size = model.config.vocab_size
    if not ids:
        raise RequestError("the prompt is empty: it needs at least one token")
    if min(ids) < 0 or max(ids) >= size:
        raise RequestError(f"token ids are from 0 to {size - 1}")


def _turn_start(tokenizer: Tokenizer, messages: list[Message], ids: list[int], variables: dict[str, Any]) -> int | None:
    """Index of the first token of the last user turn: the ids shared with the prompt without it."""
    if len(messages) < 2:
        return None
    try:
        before = tokenizer.chat(messages[:-1], add_generation_prompt=False, **variables)
    except RequestError:  # a template that wants the user to have the last word
        return None
    shared = 0
    for a, b in zip(before, ids, strict=False):
        if a != b:
            break
        shared += 1
    return shared or None


def _max_tokens(model: Model, options: PromptOptions) -> int:
    """The context of a request."""
    return min(options.context or model.max_length, model.max_length)


def _limit_length(model: Model, params: SamplingParams, prompt_tokens: int, options: PromptOptions) -> None:
    """Cut max_tokens to what the context has left.  Raises ContextOverflow when that is nothing."""
    context = _max_tokens(model, options)
    room = context - prompt_tokens
    count = f"at least {prompt_tokens}" if room < -EXACT_TOKENS else str(prompt_tokens)
    if room == 0 and options.scores_only:
        return
    if room < 1:
        raise ContextOverflow(
            f"the prompt has {count} tokens and the context holds {context}, "
            "one of them for the answer; shorten the prompt" + (" or raise num_ctx" if options.context else "")
        )
    if params.max_tokens is None or params.max_tokens > room:
        params.max_tokens = room
        params.min_tokens = min(params.min_tokens, room)


def _compile(lease: Lease, params: SamplingParams) -> Grammar | None:
    """The grammar of a structured answer: it may take two seconds, and a hostile one is refused."""
    if params.structured is None:
        return None
    compiler = lease.loaded.engine.engine.grammars
    if compiler is None:
        raise RequestError(f"{lease.served.name} has no tokenizer: its answers cannot be given a form")
    return compiler.compile(params.structured)
