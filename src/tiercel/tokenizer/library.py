"""Opening and calling the `tokenizers` library, whose panics are no exceptions."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from tiercel.errors import FormatError
from tiercel.runtime.free_memory import check_free
from tiercel.tokenizer.control import Added

FILLER = "\U0010fffd"  # begins a token that stands for an id without one
BYTES_PER_CHAR = 240  # while a text is tokenized: an Encoding of tokenizers 0.23, each character a token
MAX_GAP = 1 << 16  # ids without a token


def fillers(tokenizer: dict[str, Any], added: list[Added]) -> dict[str, int]:
    """What the vocabulary lacks, where the ids of added tokens are not those that the library gives them.

    The library numbers added tokens on from the vocabulary's end, whatever ids the file gives them, unless the
    vocabulary has them: so it gets them, and a token that no text makes for each id without one.
    Raises FormatError for too many of these.
    """
    vocab, last = tokenizer["model"].get("vocab"), max((token.id for token in added), default=-1)
    if not isinstance(vocab, dict):
        return {}
    new = [token.id for token in added if token.content not in vocab]
    if new == list(range(len(vocab), len(vocab) + len(new))):
        return {}
    taken = {*vocab.values(), *(token.id for token in added)}
    if last + 1 - sum(id <= last for id in taken) > MAX_GAP:
        raise FormatError(
            f"tokenizer.json has an added token {last} and more than {MAX_GAP} ids below it without a token"
        )
    gaps = {f"{FILLER}{id}": id for id in range(last) if id not in taken}
    return gaps | {token.content: token.id for token in added if token.content not in vocab}


def without_prefix(part: Any) -> Any:
    """A tokenizer.json part in which nothing adds a space."""
    if isinstance(part, list):
        return [without_prefix(step) for step in part if not (isinstance(step, dict) and step.get("type") == "Prepend")]
    if not isinstance(part, dict):
        return part
    out = {k: without_prefix(v) if k not in ("model", "added_tokens", "decoder") else v for k, v in part.items()}
    if out.get("type") == "Metaspace":
        out["prepend_scheme"] = "never"
    if "add_prefix_space" in out:
        out["add_prefix_space"] = False
    if isinstance(out.get("normalizer"), dict) and out["normalizer"].get("type") == "Prepend":
        out["normalizer"] = None
    return out


def open_tokenizer(tokenizer: dict[str, Any]) -> HFTokenizer:
    """The library's tokenizer; whatever it says of the file, it says as a FormatError."""
    try:
        opened = HFTokenizer.from_str(json.dumps(tokenizer))
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library's panics are no Exceptions
        raise FormatError(f"tokenizer.json is not one: {str(error)[:200]}") from None
    opened.encode_special_tokens = True
    return opened


def ask(function: Any, argument: Any, **options: Any) -> Any:
    """Call the library; whatever goes wrong is a FormatError.  Raises DoesNotFit before memory runs out."""
    texts = argument if isinstance(argument, list) else [argument]
    characters = sum(len(text) for text in texts if isinstance(text, str))
    check_free(BYTES_PER_CHAR * characters, f"a text of {characters} characters")
    try:
        return function(argument, **options)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise FormatError(f"the model's tokenizer fails on this text: {str(error)[:200]}") from None
