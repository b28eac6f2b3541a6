"""/v1/embeddings."""

from __future__ import annotations

import base64
import struct
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tiercel.serve.body import read
from tiercel.serve.embed import embed, normalized
from tiercel.serve.errors import APIError
from tiercel.serve.openai.completions import prompts_of
from tiercel.serve.openai.schemas import EmbeddingsRequest
from tiercel.serve.service import service_of
from tiercel.serve.stream import JSONResponse


async def embeddings(request: Request) -> Response:
    """Vectors of texts, of length one."""
    body = await read(request, EmbeddingsRequest)
    if body.encoding_format not in (None, "float", "base64"):
        raise APIError(400, "encoding_format must be float or base64", param="encoding_format")
    inputs = prompts_of(body.input)

    async def make() -> dict[str, Any]:
        service = service_of(request)
        async with service.lease(body.model) as lease:
            vectors, tokens = await embed(lease, inputs, service.settings, truncate=False)
        data = []
        for index, vector in enumerate(vectors):
            value: Any = normalized(vector, body.dimensions)
            if body.encoding_format == "base64":
                value = base64.b64encode(struct.pack(f"<{len(value)}f", *value)).decode()
            data.append({"object": "embedding", "index": index, "embedding": value})
        return {"object": "list", "data": data, "model": body.model,
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}  # fmt: skip

    return JSONResponse(request, make)
