"""/v1/models."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tiercel.serve.models import ServedModel
from tiercel.serve.names import tagged
from tiercel.serve.service import service_of
from tiercel.serve.stream import JSONResponse


def _entry(served: ServedModel, id: str | None = None) -> dict[str, Any]:
    return {"id": id or tagged(served.name), "object": "model", "created": int(served.local.modified),
            "owned_by": "library"}  # fmt: skip


async def models(request: Request) -> Response:
    """List the models of this server."""

    async def make() -> dict[str, Any]:
        found = await asyncio.to_thread(service_of(request).models.all)
        return {"object": "list", "data": [_entry(served) for served in found]}

    return JSONResponse(request, make)


async def model(request: Request) -> Response:
    """One model."""
    name = request.path_params["model"]

    async def make() -> dict[str, Any]:
        return _entry(await asyncio.to_thread(service_of(request).models.find, name), name)

    return JSONResponse(request, make)
