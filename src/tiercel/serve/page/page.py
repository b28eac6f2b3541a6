"""The chat page: HTML, CSS and plain ES modules, and the libraries that `make page` bundled into vendor/.

`/` is the page for a browser; other clients get the text that Ollama's own clients check for.  Nothing is fetched from
elsewhere, and no script or style is inline.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response

MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".woff2": "font/woff2",
               ".txt": "text/plain", ".html": "text/html"}  # fmt: skip
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def root(request: Request) -> Response:
    """The page, or one line for a client that is no browser."""
    if "text/html" not in request.headers.get("accept", ""):
        return Response("Ollama is running", media_type="text/plain", headers={"vary": "Accept"})
    return _send(request, "index.html")


async def file(request: Request) -> Response:
    """A file of the page."""
    name = request.path_params["name"]
    if name not in _files():
        return Response(b'{"error":"there is no such file"}', 404, media_type="application/json")
    return _send(request, name)


@cache
def _files() -> dict[str, Traversable]:
    """The files a browser may have, those of vendor/ beside our own."""
    folder = files(__package__)
    found = [*(folder / "vendor").iterdir(), *folder.iterdir()]
    return {entry.name: entry for entry in found if entry.is_file() and _media_type(entry.name)}


def _media_type(name: str) -> str | None:
    return MEDIA_TYPES.get("." + name.rpartition(".")[2])


@cache
def _read(name: str) -> tuple[bytes, str]:
    """The bytes of a file and its entity tag."""
    content = _files()[name].read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'


def _send(request: Request, name: str) -> Response:
    content, tag = _read(name)
    headers = {"content-security-policy": POLICY, "referrer-policy": "no-referrer", "vary": "Accept",
               "cache-control": "no-cache", "etag": tag}  # fmt: skip
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=_media_type(name), headers=headers)
