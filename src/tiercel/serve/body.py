"""A request's body: bounded in bytes, time and depth, then checked field by field.

Unknown fields are not an error (clients add their own); their names come back in the response header
`x-tiercel-ignored`, so that nothing is ignored in silence.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterable
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
MAX_CONTAINERS = 1 << 20  # arrays and objects of a body: each takes 64 bytes and more
THREAD_BYTES = 64 << 10  # from this size a body is read in a thread
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
    if len(raw) < THREAD_BYTES:
        body = validate(raw, kind, settings.json_depth)
    else:
        body = await asyncio.to_thread(validate, raw, kind, settings.json_depth)
    ignore(request, body.ignored())
    return body


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
    """JSON as the standard has it: no NaN, no infinity, no endless integers, nesting and number of containers bounded.

    Raises APIError 400.
    """
    if raw.count(b"[") + raw.count(b"{") > MAX_CONTAINERS:
        raise APIError(400, f"the JSON has more than {MAX_CONTAINERS} arrays and objects")
    try:
        value = json.loads(raw, parse_constant=_no_number, parse_float=_finite)
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


def _no_number(text: str) -> float:
    raise ValueError(f"{text[:40]} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _error(error: ValidationError) -> APIError:
    """The first error as one line; missing fields in Ollama's sentence."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:200]
    if first["type"] == "missing":
        return APIError(400, f"{where} is required", param=where)
    return APIError(400, f"{where}: {first['msg']}" if where else first["msg"], param=where or None)
