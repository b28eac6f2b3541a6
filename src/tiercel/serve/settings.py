"""Every limit of the server; each is an option of `tiercel serve` or a TIERCEL_… variable.

Seconds and bytes.  What a single request may ask for (n, stop strings, logprobs, …) is bounded in `sampling.py`.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

from tiercel.errors import RequestError

PORT = 11434


@dataclass(frozen=True)
class Settings:
    """Limits of a server.  Raises RequestError for a value out of range, and for an open address without a key."""

    host: str = "127.0.0.1"
    port: int = PORT
    api_key: str = ""  # empty: none is needed; then only loopback addresses may be bound
    api_keys: tuple[str, ...] = ()  # further keys; cached prefixes are not shared between keys
    allow_hosts: tuple[str, ...] = ()  # further names that a Host header may carry
    allow_origins: tuple[str, ...] = ()  # further origins whose pages may call
    manage: bool | None = None  # pull, create, copy, delete over HTTP; None: on loopback only

    body_bytes: int = 8 << 20
    header_bytes: int = 64 << 10
    blob_bytes: int = 256 << 30  # of a model file that a client sends
    json_depth: int = 64
    schema_bytes: int = 512 << 10  # schemas, grammars and all tools of a request
    messages: int = 4096
    embed_inputs: int = 512
    connections: int = 4096

    slots: int = 8  # sequences that run at once; fewer where memory has no room for them
    context: int = 0  # tokens of a sequence; 0: the model's own, as far as memory allows
    queue: int = 64  # requests that wait for a slot
    queue_contexts: int = 4  # prompt tokens of all requests in flight, in contexts of the model
    vote_traces: int = 64  # samples of one vote
    models: int = 3  # loaded at once
    keep_alive: float = 300.0
    cache_bytes: int | None = None  # prefix cache of each model; None: an eighth of the free memory
    spill: str = ""  # a folder for cached prefixes that do not fit in memory
    device: str = "cpu"  # or cuda: one GPU
    draft_model: str = ""  # a smaller model that drafts for the models of its vocabulary
    tensor_parallel: int = 1  # processes that share each layer of the models, on the CPU

    body_timeout: float = 30.0  # for a request to arrive
    head_timeout: float = 10.0  # for its first lines, before that
    queue_timeout: float = 300.0  # for a slot; then 429 or 503
    first_token_timeout: float = 600.0  # queue and prefill
    token_timeout: float = 120.0  # between two steps
    total_timeout: float = 3600.0  # of an answer
    stall_timeout: float = 30.0  # a reader that takes nothing
    drain: float = 30.0  # how long requests may continue after SIGTERM
    ping: float = 15.0  # a comment in silent event streams, so that proxies keep them

    def __post_init__(self) -> None:
        for part in dataclasses.fields(self):
            value = getattr(self, part.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not value >= 0:
                raise RequestError(f"{part.name} must not be negative, not {value}")
        if self.tensor_parallel > 1 and (self.spill or self.device != "cpu" or self.models > 1):
            raise RequestError("tensor_parallel serves one model at a time on the CPU: set models=1, no spill")
        if self.api_keys and not (self.api_key and all(self.api_keys)):
            raise RequestError("api_keys are further keys: set api_key too, and leave none empty")
        if not self.loopback and not self.api_key:
            raise RequestError(
                f"{self.host} can be reached from other machines: set a key (--api-key or TIERCEL_API_KEY), "
                "or bind 127.0.0.1"
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @property
    def may_manage(self) -> bool:
        """Whether clients may pull, create, copy and delete models."""
        return self.loopback if self.manage is None else self.manage


def is_loopback(host: str) -> bool:
    """Whether a name or address can only be this machine."""
    import ipaddress

    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def from_environment(**given: object) -> Settings:
    """Settings from TIERCEL_<NAME> variables (TIERCEL_DRAIN=60, TIERCEL_API_KEY=…); what is given wins.

    TIERCEL_HOST and OLLAMA_HOST may carry a port: `0.0.0.0:8080`.
    """
    found: dict[str, object] = {}
    for part in dataclasses.fields(Settings):
        text = os.environ.get(f"TIERCEL_{part.name.upper()}")
        if text is not None and part.name != "host":
            found[part.name] = _value(part.name, str(part.type), text)
    host, port = address(os.environ.get("TIERCEL_HOST") or os.environ.get("OLLAMA_HOST") or "")
    found = {"host": host, "port": port} | found | {name: value for name, value in given.items() if value is not None}
    return Settings(**found)  # type: ignore[arg-type]


def named(pairs: list[str]) -> dict[str, object]:
    """Settings of NAME=VALUE pairs of the command line.  Raises RequestError."""
    found: dict[str, object] = {}
    kinds = {part.name: str(part.type) for part in dataclasses.fields(Settings)}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in kinds:
            raise RequestError(f"there is no limit {name!r}; there are {', '.join(kinds)}")
        found[name] = _value(name, kinds[name], text)
    return found


def _value(name: str, kind: str, text: str) -> object:
    try:
        if kind.startswith("int"):
            return int(text)
        if kind == "float":
            return float(text)
    except ValueError as error:
        raise RequestError(f"{name} (TIERCEL_{name.upper()}) must be a number, not {text!r}") from error
    if kind.startswith("bool"):
        return text.lower() in ("1", "true", "yes", "on")
    return tuple(word for word in text.split(",") if word) if kind.startswith("tuple") else text


def address(text: str) -> tuple[str, int]:
    """`host`, `host:port`, `:port`, `http://host:port` → (host, port), with the defaults for what is missing."""
    text = text.removeprefix("http://").rstrip("/")
    host, colon, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
    if not colon or (":" in host and not host.startswith("[")):
        host, port = text, ""
    try:
        number = int(port) if port else PORT
    except ValueError as error:
        raise RequestError(f"{text!r} is no address; write host:port") from error
    if not 0 <= number < 65536:
        raise RequestError(f"{number} is no port; choose 1 to 65535")
    return host.strip("[]") or "127.0.0.1", number
