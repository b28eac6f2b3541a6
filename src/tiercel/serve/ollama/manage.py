"""/api/pull, create, copy, delete.

What changes the disk can be switched off (`--no-manage`), and is off where other machines reach the server.  Names
are never paths, digests are sha256 and nothing else, and a pull goes to the hub or to the package index that `hub`
has, never to an address a client names.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tiercel.errors import ModelNotFound
from tiercel.hub import local_models, store
from tiercel.serve.body import read
from tiercel.serve.defaults import sampling_params
from tiercel.serve.errors import APIError
from tiercel.serve.ollama.blobs import adapter_from_blobs, check_may_manage, model_from_blob
from tiercel.serve.ollama.options import options_to_params
from tiercel.serve.ollama.schemas import Copy, Create, ModelBody, Pull
from tiercel.serve.service import service_of
from tiercel.serve.stream import JSONResponse, NDJSONResponse


async def pull(request: Request) -> Response:
    """Fetch a model; progress as lines."""
    check_may_manage(request)
    body = await read(request, Pull)
    name = body.wanted()
    if local_models.is_path(name) or not (local_models.short_name(name) or local_models.repo_name(name)):
        raise APIError(400, "invalid model name")
    if service_of(request).models.is_given(name):
        return _progress(request, body.stream, _here())
    return _progress(request, body.stream, _pulling(name))


async def push(request: Request) -> Response:
    """Refuse: models are not pushed from here."""
    await read(request, Pull)
    raise APIError(400, "push is not supported")


def _progress(request: Request, stream: bool | None, events: AsyncGenerator[dict[str, Any], None]) -> Response:
    if stream is not False:
        return NDJSONResponse(request, events)

    async def last() -> dict[str, Any]:
        final: dict[str, Any] = {}
        async for event in events:
            final = event
        return final

    return JSONResponse(request, last)


async def _here() -> AsyncGenerator[dict[str, Any], None]:
    """A model that was given on the command line has nowhere to be fetched from: it is here."""
    yield {"status": "success"}


async def _pulling(name: str) -> AsyncGenerator[dict[str, Any], None]:
    yield {"status": "pulling manifest"}
    digest = "sha256:" + hashlib.sha256(name.encode()).hexdigest()
    async for what, done, total in _reports(lambda report: local_models.pull(name, progress=report)):
        if what.startswith("checking"):
            yield {"status": "verifying sha256 digest"}
        else:
            yield {"status": f"pulling {digest[7:19]}", "digest": digest, "total": total, "completed": done}
    yield {"status": "verifying sha256 digest"}
    yield {"status": "writing manifest"}
    yield {"status": "success"}


async def _reports(
    work: Callable[[Callable[[str, int, int], None]], Any],
) -> AsyncGenerator[tuple[str, int, int], None]:
    """Run `work` in a thread; its reports, at most ten a second."""
    latest: list[tuple[str, int, int]] = []
    task = asyncio.ensure_future(asyncio.to_thread(work, lambda what, done, total: latest.append((what, done, total))))
    while not task.done():
        await asyncio.wait({task}, timeout=0.1)
        if latest:
            report = latest[-1]
            latest.clear()
            yield report
    task.result()


async def create(request: Request) -> Response:
    """Make a model of another one or of files that were sent in."""
    check_may_manage(request)
    body = await read(request, Create)
    name = body.wanted()
    if local_models.store_folder(name) is None:
        raise APIError(400, "invalid model name")
    if body.adapters and set(body.adapters) != set(store.ADAPTER_FILES):
        raise APIError(400, f"adapters: the two files {' and '.join(store.ADAPTER_FILES)} make an adapter")
    if body.quantize:
        raise APIError(400, "quantize is not supported here; use: tiercel quantize MODEL OUT --to q4_k_m")
    if not body.from_ and not body.files:
        raise APIError(400, "neither 'from' or 'files' was specified")
    extras = store.check_extras({
        "parameters": body.parameters, "system": body.system, "template": body.template, "messages": body.messages,
        "license": body.license, "from": body.from_,
    })  # fmt: skip
    sampling_params(options_to_params(extras.get("parameters") or {})[0])
    return _progress(request, body.stream, _creating(request, name, body, extras))


async def _creating(
    request: Request, name: str, body: Create, extras: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    if body.files:
        yield {"status": "parsing GGUF"}
        local, adapter = await asyncio.to_thread(model_from_blob, body.files), None
    else:
        yield {"status": "using already created layer"}
        base = await asyncio.to_thread(service_of(request).models.find, body.from_ or "")
        local, adapter, extras = base.local, base.adapter, {**base.extras, **extras}
    if body.adapters:
        yield {"status": "checking adapter"}
        adapter = await asyncio.to_thread(adapter_from_blobs, body.adapters, local)
        extras = {**extras, "adapter": "adapter"}
    yield {"status": "writing manifest"}
    await asyncio.to_thread(store.put, name, local, extras, adapter)
    yield {"status": "success"}


async def copy(request: Request) -> Response:
    """Give a model another name."""
    check_may_manage(request)
    body = await read(request, Copy)
    if local_models.store_folder(body.destination) is None:
        raise APIError(400, "invalid destination name")
    service_of(request).models.find(body.source)
    await asyncio.to_thread(store.copy, body.source, body.destination)
    return Response(status_code=200)


async def delete(request: Request) -> Response:
    """Remove a model from the disk."""
    check_may_manage(request)
    body = await read(request, ModelBody)
    name = body.wanted()
    models = service_of(request).models
    models.find(name)
    if name in models.paths:
        raise APIError(403, "this model was given on the command line, and is not the server's to delete")
    await models.unload(name)
    try:
        await asyncio.to_thread(store.remove, name)
    except ModelNotFound:
        raise APIError(404, f"model '{name}' not found") from None
    return Response(status_code=200)
