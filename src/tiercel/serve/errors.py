"""What went wrong → status and body, in the dialect of the route.

    /api/…   {"error": "text"}                                            as Ollama
    /v1/…    {"error": {"message", "type", "param", "code"}}              as OpenAI

No reply carries a path of this machine, a prompt or a traceback: our own errors are written for people, everything
else becomes one sentence and a line in the log.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from starlette.responses import Response

from tiercel.errors import Busy, DoesNotFit, FormatError, ModelNotFound, Offline, RequestError, TiercelError

log = logging.getLogger("tiercel.serve")

PATHS = re.compile(r"(?<![\w/:.])(/[^\s'\",;:]+){2,}|[A-Za-z]:\\[^\s'\",;]+|(?<!\w)~/\S+")


BUSY = "server busy, please try again.  maximum pending requests exceeded"


class APIError(TiercelError):
    """An answer other than 200, with everything a dialect may want to say of it."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry = status, param, code, retry


def plain(value: Any) -> bytes:
    """JSON; half of a surrogate pair, which UTF-8 cannot carry, is written as its escape."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def status_of(error: BaseException) -> int:
    if isinstance(error, APIError):
        return error.status
    if isinstance(error, RequestError):
        return 400
    if isinstance(error, ModelNotFound):
        return 404
    if isinstance(error, (Busy, DoesNotFit, MemoryError)):
        return 503
    if isinstance(error, Offline):
        return 502
    if isinstance(error, FormatError):
        return 400
    return 500


def message_of(error: BaseException) -> str:
    """One line without paths and control characters."""
    if isinstance(error, MemoryError):
        return "memory ran out"
    if not isinstance(error, TiercelError):
        log.error("unexpected %s", type(error).__name__, exc_info=error)
        return "an error inside the server; its log has the details"
    if isinstance(error, Busy):
        return BUSY
    line = "".join(c if c.isprintable() else " " for c in str(error))[:2000]
    return PATHS.sub("(a file)", line)


KINDS = {400: "invalid_request_error", 401: "invalid_request_error", 403: "permission_error", 404: "not_found_error",
         413: "invalid_request_error", 429: "rate_limit_error", 431: "invalid_request_error"}  # fmt: skip
CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


def body(openai: bool, status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    if not openai:
        return {"error": message}
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}}


def reply(path: str, status: int, message: str, **more: Any) -> Response:
    retry = more.pop("retry", None)
    response = Response(plain(body(path.startswith("/v1"), status, message, **more)), status)
    response.headers["content-type"] = "application/json"
    if retry is not None:
        response.headers["retry-after"] = str(retry)
    return response


def reply_to(error: BaseException, path: str) -> Response:
    """The response to an error that ended a request before its first byte."""
    status = status_of(error)
    retry = getattr(error, "retry", None) or getattr(error, "retry_after", None)
    if isinstance(error, Busy) or getattr(error, "code", None) == "busy":
        status = 429 if path.startswith("/v1") else 503
    if status in (429, 503) and retry is None:
        retry = 1
    return reply(
        path,
        status,
        message_of(error),
        param=getattr(error, "param", None),
        code=getattr(error, "code", None),
        retry=None if retry is None else max(1, round(retry)),
    )
