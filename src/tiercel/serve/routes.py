"""The table of routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tiercel.serve import openapi
from tiercel.serve.anthropic import messages
from tiercel.serve.errors import to_json
from tiercel.serve.ollama import blobs, manage, show
from tiercel.serve.ollama import chat as ollama_chat
from tiercel.serve.ollama import embeddings as ollama_embeddings
from tiercel.serve.ollama import models as ollama_models
from tiercel.serve.openai import chat, completions, embeddings, models, responses
from tiercel.serve.page import page
from tiercel.serve.service import service_of

Endpoint = Callable[[Request], Awaitable[Response]]


async def health(request: Request) -> Response:
    """200 while the server takes requests, 503 while it drains."""
    service = service_of(request)
    status = "draining" if service.draining else "ok"
    return Response(
        to_json({"status": status, "server": "tiercel"}),
        503 if service.draining else 200,
        media_type="application/json",
    )


async def metrics(request: Request) -> Response:
    """Prometheus' figures."""
    service = service_of(request)
    return Response(
        service.metrics.render(len(service.running), service.models.loaded.values()),
        media_type="text/plain; version=0.0.4; charset=utf-8",
    )


def routes() -> list[Route]:
    """Path, function, methods.  `openapi.py` describes the same table."""
    table: list[tuple[str, Endpoint, list[str]]] = [
        ("/", page.root, ["GET", "HEAD"]),
        ("/page/{name}", page.file, ["GET"]),
        ("/health", health, ["GET"]),
        ("/metrics", metrics, ["GET"]),
        ("/openapi.json", openapi.document, ["GET"]),
        ("/api/version", ollama_models.version, ["GET", "HEAD"]),
        ("/api/tags", ollama_models.tags, ["GET", "HEAD"]),
        ("/api/ps", ollama_models.ps, ["GET"]),
        ("/api/generate", ollama_chat.generate, ["POST"]),
        ("/api/chat", ollama_chat.chat, ["POST"]),
        ("/api/embed", ollama_embeddings.embed, ["POST"]),
        ("/api/embeddings", ollama_embeddings.embeddings, ["POST"]),
        ("/api/show", show.show, ["POST"]),
        ("/api/pull", manage.pull, ["POST"]),
        ("/api/push", manage.push, ["POST"]),
        ("/api/create", manage.create, ["POST"]),
        ("/api/copy", manage.copy, ["POST"]),
        ("/api/delete", manage.delete, ["DELETE"]),
        ("/api/blobs/{digest}", blobs.blob, ["HEAD", "POST"]),
        ("/v1/chat/completions", chat.chat_completions, ["POST"]),
        ("/v1/completions", completions.completions, ["POST"]),
        ("/v1/embeddings", embeddings.embeddings, ["POST"]),
        ("/v1/responses", responses.responses, ["POST"]),
        ("/v1/responses/input_tokens", responses.input_tokens, ["POST"]),
        ("/v1/responses/{id}", responses.retrieve, ["GET"]),
        ("/v1/responses/{id}", responses.delete, ["DELETE"]),
        ("/v1/messages", messages.messages, ["POST"]),
        ("/v1/messages/count_tokens", messages.count_tokens, ["POST"]),
        ("/v1/models", models.models, ["GET"]),
        ("/v1/models/{model:path}", models.model, ["GET"]),
    ]
    return [Route(path, function, methods=methods) for path, function, methods in table]
