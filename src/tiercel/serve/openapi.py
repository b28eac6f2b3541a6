"""/openapi.json: what the routes take and answer, made from the classes that check the requests."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

import tiercel
from tiercel.serve.anthropic import schemas as anthropic
from tiercel.serve.errors import to_json
from tiercel.serve.ollama import schemas as ollama
from tiercel.serve.openai import schemas as openai

# path, method, what it does, body, its own statuses, media types of its answer
RouteInfo = tuple[str, str, str, type[BaseModel] | None, tuple[int, ...], tuple[str, ...]]
JSON, NDJSON, SSE = "application/json", "application/x-ndjson", "text/event-stream"
TABLE: list[RouteInfo] = [
    ("/", "get", "The chat page, or `Ollama is running`", None, (), ("text/html", "text/plain")),
    ("/health", "get", "ok, or draining: answered without a key", None, (), (JSON,)),
    ("/metrics", "get", "Prometheus' figures", None, (), ("text/plain",)),
    ("/openapi.json", "get", "This page", None, (), (JSON,)),
    ("/api/version", "get", "The version", None, (), (JSON,)),
    ("/api/tags", "get", "The models that are here", None, (), (JSON,)),
    ("/api/ps", "get", "The models in memory", None, (), (JSON,)),
    (
        "/api/generate",
        "post",
        "Answer a prompt; without one, load or unload",
        ollama.Generate,
        (404, 504),
        (JSON, NDJSON),
    ),
    ("/api/chat", "post", "Answer a conversation", ollama.Chat, (404, 504), (JSON, NDJSON)),
    ("/api/embed", "post", "Vectors of texts, of length one", ollama.Embed, (404,), (JSON,)),
    ("/api/embeddings", "post", "The vector of a text (older form)", ollama.Embeddings, (404,), (JSON,)),
    ("/api/show", "post", "What a model is", ollama.Show, (404,), (JSON,)),
    ("/api/pull", "post", "Bring a model here", ollama.Pull, (404, 502), (JSON, NDJSON)),
    ("/api/push", "post", "Not supported", ollama.Pull, (), (JSON,)),
    ("/api/create", "post", "Make a model of another one, or of files", ollama.Create, (404,), (JSON, NDJSON)),
    ("/api/copy", "post", "Another name for a model", ollama.Copy, (404,), (JSON,)),
    ("/api/delete", "delete", "Remove a model", ollama.ModelBody, (404,), (JSON,)),
    ("/v1/chat/completions", "post", "Chat", openai.ChatCompletion, (404, 429, 504), (JSON, SSE)),
    ("/v1/completions", "post", "Completions", openai.Completion, (404, 429, 504), (JSON, SSE)),
    ("/v1/embeddings", "post", "Embeddings", openai.EmbeddingsRequest, (404, 429), (JSON,)),
    ("/v1/responses", "post", "Responses, stored in memory", openai.ResponsesRequest, (404, 429, 504), (JSON, SSE)),
    ("/v1/responses/input_tokens", "post", "Tokens of an input", openai.ResponsesRequest, (404, 429), (JSON,)),
    ("/v1/messages", "post", "Messages (Anthropic)", anthropic.Messages, (404, 429, 504), (JSON, SSE)),
    ("/v1/messages/count_tokens", "post", "Tokens of messages", anthropic.CountTokens, (404, 429), (JSON,)),
    ("/v1/models", "get", "The models that are here", None, (), (JSON,)),
]
COMMON = {400: "the request is refused; the body says why", 401: "an API key is needed", 403: "Host, Origin or this "
          "operation is not allowed", 408: "the request did not arrive in time", 413: "the body is too large",
          431: "the headers are too large", 503: "busy or going down; see Retry-After", 404: "no such model",
          429: "busy; see Retry-After", 502: "the hub could not be reached", 504: "a time limit passed"}  # fmt: skip


@cache
def table() -> dict[str, Any]:
    """The whole document."""
    schemas: dict[str, Any] = {"Error": {"type": "object", "required": ["error"], "properties": {"error": {}}}}
    paths: dict[str, Any] = {}
    for path, method, summary, body, statuses, media in TABLE:
        entry: dict[str, Any] = {"summary": summary, "responses": _responses(path, statuses, media)}
        if body is not None:
            schema = body.model_json_schema(ref_template="#/components/schemas/{model}", by_alias=True)
            schemas |= schema.pop("$defs", {})
            schemas[body.__name__] = schema
            content = {JSON: {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}}
            entry["requestBody"] = {"required": True, "content": content}
        paths.setdefault(path, {})[method] = entry
    id = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    answers = _responses("/v1/responses", (404,), (JSON,))
    paths["/v1/responses/{id}"] = {
        "get": {"summary": "A stored response", "parameters": [id], "responses": answers},
        "delete": {"summary": "Drop a stored response", "parameters": [id], "responses": answers},
    }
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{model}"] = {
        "get": {"summary": "One model", "parameters": [name], "responses": _responses("/v1/models", (404,), (JSON,))}
    }
    digest = {"name": "digest", "in": "path", "required": True, "schema": {"type": "string"}}
    answers = _responses("/api/blobs", (404,), (JSON,)) | {"201": {"description": "created"}}
    binary = {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
    paths["/api/blobs/{digest}"] = {
        "post": {"summary": "Send a file in", "parameters": [digest], "requestBody": binary, "responses": answers}
    }
    description = (
        "Fields that are not listed are ignored; the response header x-tiercel-ignored names them. "
        "Each error is a JSON object with `error`."
    )
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tiercel", "version": tiercel.__version__, "description": description},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _responses(path: str, statuses: tuple[int, ...], media: tuple[str, ...]) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    found: dict[str, Any] = {"200": {"description": "done", "content": {kind: {} for kind in media}}}
    for status in sorted({400, 401, 403, 408, 413, 431, 503, *statuses}):
        found[str(status)] = {"description": COMMON[status], "content": error}
    return found


async def document(request: Request) -> Response:
    """Send the document."""
    return Response(to_json(table()), media_type="application/json")
