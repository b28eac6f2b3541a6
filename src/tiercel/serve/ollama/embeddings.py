"""/api/embed and /api/embeddings, its older form."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tiercel.serve.body import read
from tiercel.serve.embed import embed as vectors_of
from tiercel.serve.embed import normalized
from tiercel.serve.errors import APIError
from tiercel.serve.names import keep_alive_seconds
from tiercel.serve.ollama.chat import nanoseconds
from tiercel.serve.ollama.schemas import Embed, Embeddings
from tiercel.serve.service import service_of
from tiercel.serve.stream import JSONResponse


async def embed(request: Request) -> Response:
    """Vectors of texts, of length one."""
    body = await read(request, Embed)
    if not body.model.strip():
        raise APIError(400, "model is required")
    texts = [body.input] if isinstance(body.input, str) else body.input
    if texts is None or texts == [""]:
        texts = []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise APIError(400, "invalid input type")
    keep_alive = keep_alive_seconds(body.keep_alive)
    started = time.perf_counter()

    async def make() -> dict[str, Any]:
        service = service_of(request)
        async with service.lease(body.model, keep_alive) as lease:
            vectors, tokens = await vectors_of(lease, texts, service.settings, truncate=body.truncate is not False)
        return {"model": body.model, "embeddings": [normalized(vector, body.dimensions) for vector in vectors],
                "total_duration": nanoseconds(time.perf_counter() - started),
                "load_duration": nanoseconds(lease.load_seconds), "prompt_eval_count": tokens}  # fmt: skip

    return JSONResponse(request, make)


async def embeddings(request: Request) -> Response:
    """The vector of one text."""
    body = await read(request, Embeddings)
    if not body.model.strip():
        raise APIError(400, "model is required")
    keep_alive = keep_alive_seconds(body.keep_alive)

    async def make() -> dict[str, Any]:
        service = service_of(request)
        async with service.lease(body.model, keep_alive) as lease:
            texts = [body.prompt] if body.prompt else []
            vectors, _ = await vectors_of(lease, texts, service.settings, truncate=True)
        return {"embedding": vectors[0] if vectors else []}

    return JSONResponse(request, make)
