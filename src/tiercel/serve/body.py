"""A request's body: bounded in bytes, time, depth and number of values, then checked field by field.

The parser and the checks hold Python's lock, for at most as long as their largest body takes: the values are counted
before any object is made, and large bodies are read one after the other, in a thread.

Unknown fields are not an error (clients add their own); their names come back in the response header
`x-tiercel-ignored`, so that nothing is ignored in silence.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError
from starlette.requests import Request

from tiercel.serve.errors import APIError
from tiercel.serve.settings import Settings
from tiercel.voting.settings import VoteSettings

HEADER_NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")
MAX_IGNORED_NAMES = 16
MAX_UNKNOWN_FIELDS = 1000  # that are looked at for the header
MAX_VALUES = 300_000  # of a body, as `cost_of` counts them: a prompt of 2^18 token ids is within
MAX_NUMBER_CHARS = 400
THREAD_BYTES = 64 << 10  # from this size a body is read in a thread
LARGE_BYTES = 1 << 20  # from this size its prompt is prepared there too: one at a time
_reader = ThreadPoolExecutor(1, "body")
T = TypeVar("T")


class _FirstError(FailFast):
    """As its base, which cannot stand in a union: it has no hash."""

    __hash__ = object.__hash__


Items = Annotated[list[T], _FirstError()]  # validation ends at the first wrong item


def _first_wrong(kinds: type | tuple[type, ...]) -> BeforeValidator:
    def check(value: Any) -> Any:
        for key, item in value.items() if isinstance(value, dict) else ():
            if not isinstance(item, kinds) or isinstance(item, bool):
                raise ValueError(f"the value of {key[:40]!r} has the wrong type")
        return value

    return BeforeValidator(check)


Texts = Annotated[dict[str, str], _first_wrong(str)]  # validation ends at the first wrong value
Numbers = Annotated[dict[str, float], _first_wrong((int, float))]
VoteMethod = Literal[
    "majority", "weighted", "filtered-low", "filtered-high", "deepconf-low", "deepconf-high", "deepconf"
]


class Body(BaseModel):
    """Base of every request body: types are not converted (a number is no string), unknown fields are kept apart."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    def ignored(self) -> list[str]:
        """Names of the fields that this server does not read."""
        return sorted(islice(self.model_extra or (), MAX_UNKNOWN_FIELDS))


class VoteField(Body):
    """Many answers to the prompt, and the one that they agree on: `vote`, an extension of this server.

    usage counts the tokens of all answers; the response's own `vote` has the table and what each answer did.
    In a stream the text comes when the vote is decided; until then `vote` has the standings.
    """

    k: int = Field(default=16, ge=1, description="answers at most")
    method: VoteMethod = Field(default="majority", description="how they are counted, and which are stopped early")
    keep: float | None = Field(default=None, gt=0, le=100, description="percent of the answers that stay")
    weight: Literal["one", "mean", "lowest", "bottom", "tail"] | None = Field(default=None, description="confidence")
    window: int = Field(default=2048, ge=1, le=1 << 20, description="tokens of a group")
    top_k: int = Field(default=20, ge=1, le=100, description="likeliest tokens that make a token's confidence")
    warmup: int | None = Field(default=None, ge=1, description="answers in full before any is stopped")
    consensus: float | None = Field(default=None, ge=0, le=1, description="share that ends the vote; 0: none does")

    def settings(self, limits: Settings) -> VoteSettings:
        """The checked settings.  Raises APIError 400, RequestError."""
        if self.k > limits.vote_traces:
            raise APIError(400, f"vote.k may be {limits.vote_traces} on this server, not {self.k}", param="vote")
        return VoteSettings.of(self.model_dump() | (self.model_extra or {}))


B = TypeVar("B", bound=Body)


async def read(request: Request, kind: type[B]) -> B:
    """The checked body; raises APIError 400, 408, 413."""
    settings: Settings = request.app.state.settings
    raw = await read_bytes(request, settings.body_bytes, settings.body_timeout)
    if not raw.strip():
        raise APIError(400, "missing request body")
    request.state.large = len(raw) >= LARGE_BYTES
    if len(raw) < THREAD_BYTES:
        body = validate(raw, kind, settings.json_depth)
    else:
        body = await asyncio.get_running_loop().run_in_executor(_reader, validate, raw, kind, settings.json_depth)
    ignore(request, body.ignored())
    return body


async def aside(request: Request, function: Callable[..., T], *arguments: Any) -> T:
    """Call a function whose time grows with the body, in a thread; for large bodies one at a time."""
    if not getattr(request.state, "large", False):
        return await asyncio.to_thread(function, *arguments)
    return await asyncio.get_running_loop().run_in_executor(_reader, function, *arguments)


def validate(raw: bytes, kind: type[B], depth: int) -> B:
    """JSON → the checked body.  Raises APIError 400 for the first thing that is wrong."""
    value = parse(raw, depth)
    if not isinstance(value, dict):
        raise APIError(400, "the request body must be a JSON object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _error(error) from None


def ignore(request: Request, names: Iterable[str]) -> None:
    """Name fields in the response header `x-tiercel-ignored`: those that can stand there, 16 at most."""
    named = getattr(request.state, "ignored", [])
    written = [name for name in names if HEADER_NAME.fullmatch(name) and name not in named]
    request.state.ignored = [*named, *written][:MAX_IGNORED_NAMES]


async def read_bytes(request: Request, limit: int, seconds: float) -> bytes:
    """The raw body, at most `limit` bytes within `seconds`.  Raises APIError 408, 413."""
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise APIError(413, f"the request body is larger than {limit} bytes")
    chunks, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise APIError(413, f"the request body is larger than {limit} bytes")
                chunks.append(chunk)
    except TimeoutError:
        raise APIError(408, f"the request did not arrive within {seconds:g} s") from None
    return b"".join(chunks)


def parse(raw: bytes, depth: int) -> Any:
    """JSON as the standard has it: no NaN, no infinity, no endless numbers, nesting and number of values bounded.

    Raises APIError 400.
    """
    if cost_of(raw, MAX_VALUES) > MAX_VALUES:
        raise APIError(400, f"the JSON has more than {MAX_VALUES} values (a field, list or object counts as four)")
    try:
        value = json.loads(raw, parse_constant=_no_number, parse_float=_finite, parse_int=_whole)
    except RecursionError:
        raise APIError(400, f"the JSON is nested deeper than {depth}") from None
    except ValueError as error:
        raise APIError(400, f"the body is not JSON: {str(error)[:200]}") from None
    level, pending = 0, [value] if isinstance(value, (dict, list)) else []
    while pending:
        level += 1
        if level > depth:
            raise APIError(400, f"the JSON is nested deeper than {depth}")
        inner = [item.values() if isinstance(item, dict) else item for item in pending]
        pending = [item for items in inner for item in items if isinstance(item, (dict, list))]
    return value


def cost_of(raw: bytes, limit: int) -> int:
    """The commas, and four for each colon and bracket, outside the strings of a JSON text; it ends beyond `limit`."""
    if _weight(raw, 0, len(raw)) <= limit:  # an upper bound: those inside strings are counted too
        return 0
    if b"\\" in raw:
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")  # what is left of `"` begins or ends a string
    cost = position = 0
    while cost <= limit and position < len(raw):
        start = raw.find(b'"', position)
        start = len(raw) if start < 0 else start
        cost += max(1, _weight(raw, position, start))
        position = raw.find(b'"', start + 1) + 1 or len(raw)
    return cost


def _weight(raw: bytes, start: int, stop: int) -> int:
    return raw.count(b",", start, stop) + 4 * sum(raw.count(sign, start, stop) for sign in (b":", b"[", b"{"))


def _whole(text: str) -> int:
    if len(text) > MAX_NUMBER_CHARS:
        raise ValueError(f"a number may have {MAX_NUMBER_CHARS} digits")
    return int(text)


def _no_number(text: str) -> float:
    raise ValueError(f"{text[:40]} is no JSON number")


def _finite(text: str) -> float:
    number = float(text) if len(text) <= MAX_NUMBER_CHARS else math.inf
    return number if math.isfinite(number) else _no_number(text)


def _error(error: ValidationError) -> APIError:
    """The first error as one line; missing fields in Ollama's sentence."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:200]
    if first["type"] == "missing":
        return APIError(400, f"{where} is required", param=where)
    return APIError(400, f"{where}: {first['msg']}" if where else first["msg"], param=where or None)
