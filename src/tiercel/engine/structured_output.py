"""Structured output: answers that follow a JSON schema, a regular expression, a Lark grammar, or are one of some texts.

    compiler = GrammarCompiler(tokenizer)         one for each tokenizer
    grammar = compiler.compile(structured)        RequestError for an invalid or too large grammar; cached
    matcher = grammar.start()                     one for each sequence
    matcher.mask(V)                               (V,) bool: which tokens may come next
    matcher.accept(token)

`llguidance` does the work.  This module gives it the vocabulary (control tokens are never text, so that no answer can
hold one), and sets bounds.  Every new grammar is first compiled in a process of its own (`grammar_worker.py`), because
some hang, some use all memory and some crash the process; it is compiled here only when that succeeded.  Compile
outside of the thread that runs the network.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tiercel.errors import RequestError, TiercelError
from tiercel.runtime.subprocess import call, terminate
from tiercel.sampling.json_schema import close_objects
from tiercel.sampling.params import Structured

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from tiercel.tokenizer.tokenizer import Tokenizer

COMPILE_CPU_SECONDS, COMPILE_WALL_SECONDS = 1.2, 1.4  # of one grammar, in the worker
WORKER_START_SECONDS = 60.0
MAX_ANSWER_BYTES = 1 << 16  # of the worker
MAX_CACHE_BYTES = 64 << 20  # of compiled grammars
BYTES_PER_CHARACTER = 40  # of a compiled grammar, estimated
TOO_LARGE = f"it is too large, or takes more than {COMPILE_CPU_SECONDS:g} s to compile"
# white space is bounded, because small models repeat line breaks; oneOf becomes anyOf
SCHEMA_OPTIONS: Any = {"whitespace_pattern": r" |\n{1,2}[ \t]{0,20}", "coerce_one_of": True}
MASK_CPU_SECONDS, MASK_CPU_SECONDS_PER_TOKEN = 1.0, 0.01  # for all masks of one sequence
GBNF_RULE = re.compile(r"^\s*[A-Za-z][\w-]*\s*::=", re.MULTILINE)
MAX_GBNF_CHARACTERS = 64 << 10  # the translator reads them one by one


class Vocabulary:
    """The interface that LLTokenizer expects; as in grammar_worker.py, but for `__call__`."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, words: dict[str, Any]) -> None:
        self.tokenizer, self.tokens = tokenizer, [bytes.fromhex(piece) for piece in words["pieces"]]
        self.special_token_ids, self.eos_token_id, self.bos_token_id = words["special"], words["ends"][0], None

    def __call__(self, text: str) -> list[int]:
        """Return the tokens of text that a grammar forces, as the model's tokenizer splits it."""
        return self.tokenizer.encode_inside(text)


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and caches them.

    Raises:
        RequestError: the tokens are words, not pieces of text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not tokenizer.spells:
            raise RequestError(
                "structured answers need a tokenizer whose tokens are pieces of text; this one's are words"
            )
        self.tokenizer = tokenizer
        self.ends = sorted(id for id in tokenizer.eos if id < tokenizer.vocab_size)
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, Grammar] = OrderedDict()
        self._num_characters = 0  # of the cached grammars
        self._tokenizer: LLTokenizer | None = None
        self._worker = _Worker()
        weakref.finalize(self, self._worker.stop)

    def compile(self, structured: Structured) -> Grammar:
        """Return the compiled grammar, from any thread.

        Raises:
            RequestError: the grammar is invalid, too large or not supported; within about two seconds (more for the
                first: the worker reads the vocabulary).
        """
        source = to_llguidance(structured)
        with self._lock:
            found = self._cache.get(source)
            if found is None:
                found = self._compile(source, structured)
                self._cache[source] = found
                self._num_characters += len(source)
                while self._num_characters * BYTES_PER_CHARACTER > MAX_CACHE_BYTES and len(self._cache) > 1:
                    self._num_characters -= len(self._cache.popitem(last=False)[0])
            self._cache.move_to_end(source)
            return found

    def close(self) -> None:
        """End the worker process."""
        with self._lock:
            self._worker.stop()

    def _compile(self, source: str, structured: Structured) -> Grammar:
        error = self._worker.attempt(source, self._words)
        ignored: list[str] = []
        if error and error != TOO_LARGE and structured.json is not None:  # ignore unsupported keywords
            lenient = to_llguidance(structured, lenient=True)
            if not self._worker.attempt(lenient, self._words):
                source, error, ignored = lenient, "", [_line(error)]
        raise_for(error)
        return Grammar(self._matcher(source), self.ends, ignored)

    def _matcher(self, source: str) -> LLMatcher:
        from llguidance import LLMatcher, LLTokenizer

        if self._tokenizer is None:
            words = self._words()
            vocabulary: Any = Vocabulary(self.tokenizer, words)
            self._tokenizer = LLTokenizer(vocabulary, n_vocab=len(words["pieces"]), eos_token=words["ends"])
        matcher = LLMatcher(self._tokenizer, source, log_level=0)
        raise_for(matcher.get_error())
        return matcher

    def _words(self) -> dict[str, Any]:
        """Return the vocabulary for the worker; an end token is added where the tokenizer has none."""
        tokenizer = self.tokenizer
        pieces = [b"" if id in tokenizer.control_ids else tokenizer.piece(id) for id in range(tokenizer.vocab_size)]
        names = {id: f"<control {id}>".encode() for id in tokenizer.control_ids}
        spelled = [names.get(id, piece) for id, piece in enumerate(pieces)]
        ends = self.ends or [len(spelled)]
        if not self.ends:
            spelled.append(b"<end>")
        return {
            "pieces": [piece.hex() for piece in spelled],
            "special": sorted({*tokenizer.control_ids, *ends}),
            "ends": ends,
        }


class Grammar:
    """A compiled grammar; immutable.  ignored: lines on the keywords of a schema that are not enforced."""

    def __init__(self, matcher: LLMatcher, ends: list[int], ignored: list[str]) -> None:
        self._matcher, self._ends, self.ignored = matcher, ends, ignored

    def start(self) -> Matcher:
        """Return a matcher at the start of the grammar."""
        return Matcher(self._matcher.deep_copy(), self._ends)


class Matcher:
    """The position of one sequence in its grammar."""

    def __init__(self, matcher: LLMatcher, ends: list[int]) -> None:
        self._matcher, self._ends = matcher, ends
        self._mask_seconds_left = MASK_CPU_SECONDS

    @property
    def complete(self) -> bool:
        """Whether the form is complete: only an end token may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def mask(self, V: int) -> Tensor:
        """Return which of V tokens may come next, (V,) bool; end tokens where the answer may end.

        Raises:
            RequestError: the grammar takes too long to follow.
        """
        began = time.thread_time()
        if self._matcher.is_stopped():
            self._check()
            bits = np.zeros(V, dtype=bool)
            bits[[id for id in self._ends if id < V]] = True
        else:
            packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            self._check()
            bits = np.zeros(V, dtype=bool)
            known = np.unpackbits(packed, bitorder="little")[:V]
            bits[: len(known)] = known
        self._mask_seconds_left += MASK_CPU_SECONDS_PER_TOKEN - (time.thread_time() - began)
        if self._mask_seconds_left < 0:
            raise RequestError("this grammar takes too long to follow; make its repetitions and alternatives smaller")
        return torch.from_numpy(bits)

    def allows(self, token: int) -> bool:
        """Whether a token may come next."""
        return bool(self._matcher.validate_tokens([token]) == 1)

    def accept(self, token: int) -> None:
        """Append a token."""
        if token not in self._ends and not self._matcher.consume_token(token):
            self._check()

    def restart(self) -> None:
        """Go back to the start of the grammar."""
        self._matcher.reset()

    def _check(self) -> None:
        error = self._matcher.get_error()
        if error and self._matcher.stop_reason() not in ("NoExtension", "NoExtensionBias", "EndOfSentence"):
            raise RequestError(f"the grammar cannot be followed any further: {_line(error)}")


def to_llguidance(structured: Structured, *, lenient: bool = False) -> str:
    """Return a grammar in llguidance's form.  lenient: ignore unsupported keywords of a schema."""
    from llguidance import LLMatcher

    try:
        if structured.json is not None:
            schema = json.loads(structured.json) if isinstance(structured.json, str) else structured.json
            closed = json.dumps(close_objects(schema))
            return str(LLMatcher.grammar_from_json_schema(closed, SCHEMA_OPTIONS | {"lenient": lenient}))
        if structured.json_object:
            return str(LLMatcher.grammar_from_json_schema('{"type": "object"}', SCHEMA_OPTIONS))
        if structured.regex is not None:
            return str(LLMatcher.grammar_from_regex(structured.regex))
        if structured.choice is not None:
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in structured.choice)
            return str(LLMatcher.grammar_from_lark(f"start: {texts}"))
        return str(LLMatcher.grammar_from_lark(_as_lark(str(structured.grammar))))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the structure of the answer cannot be read: {_line(str(error))}") from None


def _as_lark(grammar: str) -> str:
    """Return a Lark grammar as it is; translate llama.cpp's GBNF (`root ::= …`)."""
    if not GBNF_RULE.search(grammar):
        return grammar
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if len(grammar) > MAX_GBNF_CHARACTERS:
        raise RequestError(
            f"a GBNF grammar may have {MAX_GBNF_CHARACTERS} characters, not {len(grammar)}; write it in Lark"
        )
    try:
        return str(gbnf_to_lark(grammar))
    except Exception as error:  # some of its errors have no class of their own
        raise ValueError(str(error)) from None


def raise_for(error: str) -> None:
    """Raise RequestError for an error of the compiler."""
    if error:
        raise RequestError(f"the structure of the answer cannot be followed: {_line(error)}")


def _line(error: str) -> str:
    return " ".join(error.split("<state>")[0].split())[:300]


class _Worker:
    """The process that compiles grammars first; started when needed, and again after it died."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def attempt(self, grammar: str, words: Callable[[], dict[str, Any]]) -> str:
        """Compile a grammar in the worker; return the error, "" for none."""
        self.ensure_started(words)
        error = self._exchange({"grammar": grammar, "seconds": COMPILE_CPU_SECONDS}, COMPILE_WALL_SECONDS)
        if error is None:
            self.stop()
            return TOO_LARGE
        return error

    def ensure_started(self, words: Callable[[], dict[str, Any]]) -> None:
        """Start the process where there is none."""
        if self.process is None or self.process.poll() is not None:
            self.stop()
            self.start(words())

    def start(self, words: dict[str, Any]) -> None:
        """Start the process and send it the vocabulary."""
        spec = importlib.util.find_spec("llguidance")
        if spec is None or spec.origin is None:
            raise TiercelError("structured answers need the package llguidance: pip install llguidance")
        worker = str(Path(__file__).with_name("grammar_worker.py"))
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", worker, str(Path(spec.origin).parents[1])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
        )
        if self._exchange(words, WORKER_START_SECONDS) is None:
            self.stop()
            raise TiercelError(f"the process that compiles grammars did not start ({sys.executable})")

    def stop(self) -> None:
        """End the process."""
        process, self.process = self.process, None
        if process is not None:
            terminate(process)

    def _exchange(self, job: dict[str, Any], timeout: float) -> str | None:
        """Send a job and return the answer's error; None where the process died or was killed."""
        assert self.process is not None
        answer = call(self.process, json.dumps(job).encode("ascii"), timeout, MAX_ANSWER_BYTES)
        return None if answer is None else str(answer["error"])
