"""What went wrong → status and body, in the dialect of the route.

    /api/…           {"error": "text"}                                            as Ollama
    /v1/…            {"error": {"message", "type", "param", "code"}}              as OpenAI
    /v1/messages     {"type": "error", "error": {"type", "message"}}             as Anthropic

No reply carries a path of this machine, a prompt or a traceback: our own errors are written for users, everything
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

PATH_PATTERN = re.compile(r"(?<![\w/:.])(/[^\s'\",;:]+){2,}|[A-Za-z]:\\[^\s'\",;]+|(?<!\w)~/\S+")
MAX_MESSAGE_CHARS = 2000
BUSY = "server busy, please try again.  maximum pending requests exceeded"

OPENAI_TYPES = {400: "invalid_request_error", 401: "invalid_request_error", 403: "permission_error",
                404: "not_found_error", 413: "invalid_request_error", 429: "rate_limit_error",
                431: "invalid_request_error"}  # fmt: skip
OPENAI_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


ANTHROPIC_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
                   413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
                   504: "timeout_error"}  # fmt: skip


class APIError(TiercelError):
    """A response other than 200.

    param: the field that is wrong.  code: OpenAI's code.  retry: seconds after which a client may try again.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry = status, param, code, retry


def to_json(value: Any) -> bytes:
    """Compact JSON in UTF-8; half of a surrogate pair, which UTF-8 cannot carry, is written as its escape."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace")


def status_of(error: BaseException) -> int:
    """The HTTP status of an error."""
    if isinstance(error, APIError):
        return error.status
    if isinstance(error, (RequestError, FormatError)):
        return 400
    if isinstance(error, ModelNotFound):
        return 404
    if isinstance(error, (Busy, DoesNotFit, MemoryError)):
        return 503
    return 502 if isinstance(error, Offline) else 500


def message_of(error: BaseException) -> str:
    """One line without paths and control characters."""
    if isinstance(error, MemoryError):
        return "memory ran out"
    if not isinstance(error, TiercelError):
        log.error("unexpected %s", type(error).__name__, exc_info=error)
        return "an error inside the server; its log has the details"
    if isinstance(error, Busy):
        return BUSY
    line = "".join(c if c.isprintable() else " " for c in str(error))[:MAX_MESSAGE_CHARS]
    return PATH_PATTERN.sub("(a file)", line)


def error_body(
    path: str, status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error in the dialect of the route."""
    if not path.startswith("/v1"):
        return {"error": message}
    if path.startswith("/v1/messages"):
        kind = ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}}
    kind = OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or OPENAI_CODES.get(status)}}


def error_response(
    path: str,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    retry: int | None = None,
) -> Response:
    """The response of an error.  retry: seconds for Retry-After."""
    response = Response(to_json(error_body(path, status, message, param, code)), status)
    response.headers["content-type"] = "application/json"
    if retry is not None:
        response.headers["retry-after"] = str(retry)
    return response


def response_to(error: BaseException, path: str) -> Response:
    """The response to an exception that ended a request before its first byte."""
    status = status_of(error)
    retry = getattr(error, "retry", None) or getattr(error, "retry_after", None)
    param, code = getattr(error, "param", None), getattr(error, "code", None)
    if isinstance(error, Busy) or code == "busy":
        status = 429 if path.startswith("/v1") else 503
    if status in (429, 503) and retry is None:
        retry = 1
    seconds = None if retry is None else max(1, round(retry))
    return error_response(path, status, message_of(error), param=param, code=code, retry=seconds)
