"""Responses that later ones continue: in memory, bounded, each for its own API key."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from tiercel.serve.defaults import tenant_of
from tiercel.serve.errors import APIError, to_json

MAX_RESPONSES = 1024
MAX_STORE_BYTES = 64 << 20


@dataclass
class StoredResponse:
    """items: the whole conversation, input and output, as input items.  size: bytes of its JSON."""

    response: dict[str, Any]
    items: list[dict[str, Any]]
    tenant: str
    size: int = 0


class ResponseStore:
    """The last responses of a server; the oldest are dropped."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_STORE_BYTES) -> None:
        self.max_responses, self.max_bytes, self.size = max_responses, max_bytes, 0
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()

    def put(self, stored: StoredResponse) -> None:
        """Keep a response."""
        stored.size = len(to_json([stored.response, stored.items]))
        self._kept[stored.response["id"]] = stored
        self.size += stored.size
        while self._kept and (len(self._kept) > self.max_responses or self.size > self.max_bytes):
            self.size -= self._kept.popitem(last=False)[1].size

    def get(self, id: str, tenant: str) -> StoredResponse | None:
        """A response of this tenant, None where it is not kept."""
        stored = self._kept.get(id)
        return stored if stored is not None and stored.tenant == tenant else None

    def find(self, request: Request, id: str) -> StoredResponse:
        """As `get`; raises APIError 404."""
        stored = self.get(id, tenant_of(request))
        if stored is None:
            raise APIError(404, f"response '{id[:100]}' not found: it was not stored, or dropped for later ones",
                           code="response_not_found")  # fmt: skip
        return stored

    def remove(self, request: Request, id: str) -> None:
        """Drop a response.  Raises APIError 404."""
        self.find(request, id)
        self.size -= self._kept.pop(id).size


def store_of(request: Request) -> ResponseStore:
    """The store of the application that received a request."""
    state = request.app.state
    if not hasattr(state, "responses"):
        state.responses = ResponseStore()
    store: ResponseStore = state.responses
    return store
