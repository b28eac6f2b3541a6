"""The chat page: three files, no build step, nothing fetched from elsewhere.

`/` is the page for a browser; other clients get the text that Ollama's own clients check for.
"""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

FILES = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def root(request: Request) -> Response:
    """The page, or one line for a client that is no browser."""
    if "text/html" not in request.headers.get("accept", ""):
        return Response("Ollama is running", media_type="text/plain", headers={"vary": "Accept"})
    return _send("index.html", "text/html")


async def file(request: Request) -> Response:
    """A file of the page."""
    name = request.path_params["name"]
    if name not in FILES:
        return Response(b'{"error":"there is no such file"}', 404, media_type="application/json")
    return _send(name, FILES[name])


def _send(name: str, media: str) -> Response:
    headers = {"content-security-policy": POLICY, "referrer-policy": "no-referrer", "vary": "Accept",
               "cache-control": "no-cache"}  # fmt: skip
    return Response((files(__package__) / name).read_bytes(), media_type=media, headers=headers)
