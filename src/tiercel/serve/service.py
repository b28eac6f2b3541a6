"""What the routes of a server share: settings, models, metrics, and the queue."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator

from starlette.requests import Request

from tiercel.serve.errors import BUSY, APIError
from tiercel.serve.metrics import Metrics
from tiercel.serve.models import Lease, Models, Opener, open_model
from tiercel.serve.running import RunningRequest
from tiercel.serve.settings import Settings


class Service:
    """State of a server.

    running: requests in the engines.  admitted: requests that have a place in the queue.  draining: no request is let
    in any more.  shutdown: why none may continue.
    """

    def __init__(self, settings: Settings, opener: Opener = open_model) -> None:
        self.settings = settings
        self.models = Models(settings, opener)
        self.metrics = Metrics()
        self.running: set[RunningRequest] = set()
        self.admitted = 0
        self.draining = False
        self.shutdown: APIError | None = None

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a place in the queue.  Raises APIError 503 at once when it is full."""
        if self.admitted >= self.settings.slots + self.settings.queue:
            raise APIError(503, BUSY, code="busy", retry=1)
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    @contextlib.asynccontextmanager
    async def lease(self, name: str, keep_alive: float | None = None) -> AsyncIterator[Lease]:
        """Hold a place in the queue and a model.  keep_alive: seconds.  Raises as `admit` and `Models.lease`."""
        with self.admit():
            lease = await self.models.lease(name)
            try:
                yield lease
            finally:
                lease.release(keep_alive)

    def expire(self) -> None:
        """End all running requests, and those that are still being prepared when they begin."""
        self.shutdown = APIError(503, "the server is going down; the answer was cut short", code="shutdown")
        for running in list(self.running):
            running.expire(self.shutdown)


def service_of(request: Request) -> Service:
    """The service of the application that received a request."""
    service: Service = request.app.state.service
    return service
