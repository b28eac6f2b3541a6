"""The command line's own client.  Standard library only."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from typing import Any

from tiercel.errors import ModelNotFound, RequestError, TiercelError
from tiercel.serve.settings import address

PROBE_SECONDS = 0.5  # to find out whether a server listens


class Client:
    """Speaks Ollama's API at TIERCEL_HOST (or OLLAMA_HOST), with TIERCEL_API_KEY."""

    def __init__(self, host: str, port: int, key: str = "") -> None:
        self.host, self.port, self.key = host, port, key

    @classmethod
    def find(cls) -> Client | None:
        """The server of this machine, if it is a Tiercel and answers."""
        host, port = address(os.environ.get("TIERCEL_HOST") or os.environ.get("OLLAMA_HOST") or "")
        if os.environ.get("TIERCEL_PORT", "").isdecimal():
            port = int(os.environ["TIERCEL_PORT"])
        host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        client = cls(host, port, os.environ.get("TIERCEL_API_KEY", ""))
        try:
            status, body = client._exchange("GET", "/health", None, PROBE_SECONDS)
        except (OSError, http.client.HTTPException, ValueError):
            return None
        return client if status == 200 and body.get("server") == "tiercel" else None

    @classmethod
    def running(cls) -> Client:
        """As `find`; raises TiercelError where there is none."""
        client = cls.find()
        if client is None:
            raise TiercelError("no server is running; start one with: tiercel serve")
        return client

    def get(self, path: str) -> Any:
        """The body of a GET.  Raises TiercelError."""
        return self._request("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The body of a POST that is not streamed.  Raises TiercelError."""
        return self._request("POST", path, {"stream": False, **body})

    def unload(self, model: str) -> None:
        """Unload a model; no error where it is not loaded, or not there."""
        try:
            self.post("/api/generate", {"model": model, "keep_alive": 0})
        except (ModelNotFound, RequestError):
            return

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Lines as they come; leaving the iterator hangs up, which ends the answer."""
        connection = self._connect(None)
        try:
            self._send(connection, "POST", path, {"stream": True, **body})
            response = connection.getresponse()
            if response.status != 200:
                raise _error(response.status, json.loads(response.read()))
            for line in response:
                found = json.loads(line)
                if "error" in found:
                    raise TiercelError(str(found["error"]))
                yield found
        except (OSError, http.client.HTTPException) as error:
            raise TiercelError(f"the server went away ({error})") from None
        finally:
            connection.close()

    def _request(self, method: str, path: str, body: Any) -> Any:
        try:
            status, found = self._exchange(method, path, body, None)
        except (OSError, http.client.HTTPException) as error:
            raise TiercelError(f"the server at {self.host}:{self.port} does not answer ({error})") from None
        if status != 200:
            raise _error(status, found)
        return found

    def _exchange(self, method: str, path: str, body: Any, timeout: float | None) -> tuple[int, Any]:
        connection = self._connect(timeout)
        try:
            self._send(connection, method, path, body)
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"{}")
        finally:
            connection.close()

    def _connect(self, timeout: float | None) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout)

    def _send(self, connection: http.client.HTTPConnection, method: str, path: str, body: Any) -> None:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        connection.request(method, path, None if body is None else json.dumps(body).encode(), headers)


def _error(status: int, body: Any) -> TiercelError:
    message = str(body.get("error", f"status {status}")) if isinstance(body, dict) else f"status {status}"
    if status == 404:
        return ModelNotFound(message)
    if status == 401:
        return TiercelError(f"{message}; set TIERCEL_API_KEY")
    return RequestError(message) if status == 400 else TiercelError(message)
