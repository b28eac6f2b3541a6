"""Access control, in front of every route.

    headers too large → 431 · unknown Host → 403 · unknown Origin → 403 · no key or a wrong one → 401

Default deny: only `/health` is answered without a key and whatever the Host.  Decisions are made from the raw path
of the request line, never from a URL rebuilt with the Host header (CVE-2026-48746 came from that).

A foreign page in the user's browser cannot call: its Origin is not on the list, and a name that was rebound to
127.0.0.1 is no allowed Host.  The key comes as `Authorization: Bearer KEY`, or as the password of Basic, which is
what a browser asks the user for when the page is opened.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import re
import socket

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tiercel.serve.errors import error_response
from tiercel.serve.settings import Settings, is_loopback

HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)(:[0-9]{1,5})?")
OPEN = frozenset({"/health"})
ALLOW_HEADERS = (
    "Authorization, X-Api-Key, Anthropic-Version, Anthropic-Beta, Anthropic-Dangerous-Direct-Browser-Access, "
    "Content-Type, User-Agent, Accept, X-Requested-With, OpenAI-Beta, OpenAI-Organization, "
    "OpenAI-Project, x-stainless-arch, x-stainless-async, x-stainless-custom-poll-interval, x-stainless-helper-method, "
    "x-stainless-lang, x-stainless-os, x-stainless-package-version, x-stainless-poll-helper, x-stainless-retry-count, "
    "x-stainless-runtime, x-stainless-runtime-version, x-stainless-timeout"
)


class SecurityMiddleware:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self._keys = [_digest(key) for key in (settings.api_key, *settings.api_keys) if key]
        own = {name.lower() for name in settings.allow_hosts}
        self._hosts = own if settings.loopback else own | {socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, headers = scope["path"], scope["headers"]
        if sum(len(name) + len(value) for name, value in headers) > self.settings.header_bytes:
            await error_response(path, 431, "the headers are too large")(scope, receive, send)
            return
        if path in OPEN:
            await self.app(scope, receive, send)
            return
        hosts, origins = _values(headers, b"host"), _values(headers, b"origin")
        if len(hosts) != 1 or not self.allows_host(hosts[0]):
            await error_response(path, 403, "this Host is not served; see --allow-host")(scope, receive, send)
            return
        if len(origins) > 1 or (origins and not self.allows_origin(origins[0], hosts[0])):
            await error_response(path, 403, "this Origin may not call; see --allow-origin")(scope, receive, send)
            return
        cors = _cors(origins[0]) if origins else []
        send = _with_headers(send, cors)
        if scope["method"] == "OPTIONS" and origins and _values(headers, b"access-control-request-method"):
            await _preflight(send)
            return
        number = self.which_key(_credentials(headers))
        if number is None:
            await self._ask_for_key(scope, receive, send)
            return
        if len(self._keys) > 1:
            scope["tiercel.tenant"] = f"key {number}"
        await self.app(scope, receive, send)

    def allows_host(self, host: str) -> bool:
        """Whether a Host header names this server."""
        host = host.lower()
        if not HOST.fullmatch(host):
            return False
        name = re.sub(r":[0-9]{1,5}$", "", host)
        if is_loopback(name) or name in self._hosts:
            return True
        return not self.settings.loopback and _is_address(name)

    def allows_origin(self, origin: str, host: str) -> bool:
        """Whether pages of this origin may call: this server's own, loopback ones, and those that were allowed."""
        origin = origin.lower()
        if origin in (allowed.lower() for allowed in self.settings.allow_origins):
            return True
        scheme, separator, rest = origin.partition("://")
        if not separator:
            return False  # "null", a sandboxed frame, among them
        if scheme not in ("http", "https") or not HOST.fullmatch(rest):
            return False
        return rest == host.lower() or is_loopback(re.sub(r":[0-9]{1,5}$", "", rest))

    def which_key(self, values: list[str | None]) -> int | None:
        """The number of the key that was given; 0 where none is needed, None: refused."""
        if not self._keys:
            return 0
        given = _digest((values[0] if len(values) == 1 else None) or "")
        same = [hmac.compare_digest(given, key) for key in self._keys]  # all of them, in constant time
        return same.index(True) if any(same) else None

    async def _ask_for_key(self, scope: Scope, receive: Receive, send: Send) -> None:
        browser = any("text/html" in value for value in _values(scope["headers"], b"accept"))
        scheme = 'Basic realm="tiercel: the API key is the password"' if browser else "Bearer"
        response = error_response(scope["path"], 401, "an API key is needed, as Authorization: Bearer KEY")
        response.headers["www-authenticate"] = scheme
        await response(scope, receive, send)


def _digest(text: str) -> bytes:
    """Equal lengths for the comparison, whatever was sent."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _values(headers: list[tuple[bytes, bytes]], name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in headers if key == name]


def _credentials(headers: list[tuple[bytes, bytes]]) -> list[str | None]:
    """The keys of a request: of Authorization, or of X-Api-Key (Anthropic's clients)."""
    found = [_credential(value) for value in _values(headers, b"authorization")]
    return found or list(_values(headers, b"x-api-key"))


def _credential(header: str) -> str | None:
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None


def _is_address(name: str) -> bool:
    """An IP address cannot be rebound: only names can."""
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    return [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin"),
            (b"access-control-expose-headers", b"x-request-id, retry-after")]  # fmt: skip


def _with_headers(send: Send, more: list[tuple[bytes, bytes]]) -> Send:
    async def out(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *more, (b"x-content-type-options", b"nosniff")]
        await send(message)

    return out


async def _preflight(send: Send) -> None:
    headers = [(b"access-control-allow-methods", b"GET, POST, DELETE, HEAD, OPTIONS"),
               (b"access-control-allow-headers", ALLOW_HEADERS.encode()),
               (b"access-control-max-age", b"600")]  # fmt: skip
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
