"""Models over HTTP: show, pull, create, copy, delete, blobs (Ollama's routes).

What changes the disk can be switched off (`--no-manage`), and is off where other machines reach the server.  Names
are never paths, digests are sha256 and nothing else, and a pull goes to the hub or to the package index that `hub`
knows, never to an address a client names.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from tiercel.errors import ModelNotFound, RequestError
from tiercel.hub import hub, store
from tiercel.serve import generation as talk
from tiercel.serve.errors import APIError
from tiercel.serve.ollama import details, stamp
from tiercel.serve.requests import Body, read
from tiercel.serve.stream import JSONResponse, NDJSONResponse


class Named(Body):
    model: str = Field(default="", max_length=512)
    name: str = Field(default="", max_length=512)  # its older name

    def wanted(self) -> str:
        found = (self.model or self.name).strip()
        if not found:
            raise APIError(400, "model is required")
        return found


class Show(Named):
    verbose: bool | None = None
    system: str | None = None
    template: str | None = None
    options: dict[str, Any] | None = None


class Pull(Named):
    insecure: bool | None = None
    stream: bool | None = None


class Create(Named):
    from_: str | None = Field(default=None, alias="from", max_length=512)
    files: dict[str, str] | None = None
    adapters: dict[str, str] | None = None
    template: str | None = None
    license: str | list[str] | None = None
    system: str | None = None
    parameters: dict[str, Any] | None = None
    messages: list[dict[str, Any]] | None = None
    quantize: str | None = None
    stream: bool | None = None


class Copy(Body):
    source: str = Field(max_length=512)
    destination: str = Field(max_length=512)


def _may_manage(request: Request) -> None:
    if not request.app.state.settings.may_manage:
        raise APIError(403, "changing models over HTTP is off on this server; see tiercel serve --manage")


# ── show


async def show(request: Request) -> Response:
    body = await read(request, Show)
    name = body.wanted()
    models = request.app.state.service.models
    return JSONResponse(request, lambda: asyncio.to_thread(_shown, models, name, bool(body.verbose)))


def _shown(models: Any, name: str, verbose: bool) -> dict[str, Any]:
    from tiercel.commands.show import describe

    named = models.find(name)
    found, about = describe(named.local.path), details(named)
    arch, extras = found["architecture"], named.extras
    info: dict[str, Any] = {
        "general.architecture": arch, "general.parameter_count": found["parameters"],
        f"{arch}.context_length": found["context"], f"{arch}.embedding_length": found["width"],
        f"{arch}.block_count": found["layers"], f"{arch}.vocab_size": found["vocabulary"],
        "tiercel.pattern": found["pattern"], "tiercel.state_bytes": found["state_bytes"],
        "tiercel.kv_bytes_per_token": found["kv_bytes_per_token"],
    }  # fmt: skip
    template = extras.get("template") or chat_template(named.local.path)
    out: dict[str, Any] = {
        "modelfile": modelfile(name, extras), "template": template or "", "details": about, "model_info": info,
        "capabilities": capabilities(template), "modified_at": stamp(named.local.modified),
    }  # fmt: skip
    if parameters := extras.get("parameters"):
        out["parameters"] = "\n".join(f"{key:<30} {value}" for key, value in _pairs(parameters))
    for key in ("system", "messages"):
        if extras.get(key):
            out[key] = extras[key]
    if licence := extras.get("license") or found.get("licence"):
        out["license"] = licence if isinstance(licence, str) else "\n".join(licence)
    if verbose:
        out["tensors"] = tensors_of(named.local.path)
    return out


def tensors_of(path: Any) -> list[dict[str, Any]]:
    """Name, type and shape of everything a model file or folder holds."""
    from tiercel.weights.gguf import GGUFFile
    from tiercel.weights.safetensors import SafetensorsFolder

    with (SafetensorsFolder if path.is_dir() else GGUFFile)(path) as opened:
        return [{"name": tensor.name, "type": tensor.type, "shape": list(tensor.shape)}
                for tensor in opened.tensors.values()]  # fmt: skip


def chat_template(path: Any) -> str:
    """The chat template of a file, without loading the model; "" where there is none."""
    from tiercel.hub.fetch import read_json
    from tiercel.weights.gguf import GGUFFile

    if path.is_dir():
        file = path / "chat_template.jinja"
        if file.is_file() and file.stat().st_size < 1 << 20:
            return file.read_text(encoding="utf-8", errors="replace")
        found = read_json(path / "tokenizer_config.json").get("chat_template")
        return found if isinstance(found, str) else ""
    if path.suffix.lower() != ".gguf":
        return ""
    with GGUFFile(path) as gguf:
        found = gguf.metadata.get("tokenizer.chat_template")
    return found if isinstance(found, str) else ""


def capabilities(template: str) -> list[str]:
    from tiercel.tokenizer.tools import ToolForm

    found = ["completion", "embedding"]
    if "tools" in template and ToolForm.of(template):
        found.append("tools")
    return [*found, "thinking"] if talk.can_think(template) else found


def modelfile(name: str, extras: dict[str, Any]) -> str:
    lines = [f"FROM {extras.get('from') or name}"]
    lines += [f"ADAPTER {extras['adapter']}"] if extras.get("adapter") else []
    lines += [f"PARAMETER {key} {value}" for key, value in _pairs(extras.get("parameters") or {})]
    lines += [f'{key.upper()} """{extras[key]}"""' for key in ("template", "system") if extras.get(key)]
    lines += [f"MESSAGE {message['role']} {message.get('content', '')}" for message in extras.get("messages") or ()]
    return "\n".join(lines) + "\n"


def _pairs(parameters: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (key, item) for key, value in parameters.items() for item in (value if isinstance(value, list) else [value])
    ]


# ── pull and create


async def pull(request: Request) -> Response:
    _may_manage(request)
    body = await read(request, Pull)
    name = body.wanted()
    if hub.is_path(name) or not (hub.short_name(name) or hub.repo_name(name)):
        raise APIError(400, "invalid model name")
    return _progress(request, body.stream, _pulling(name))


async def push(request: Request) -> Response:
    await read(request, Pull)
    raise APIError(400, "push is not supported")


def _progress(request: Request, stream: bool | None, events: AsyncGenerator[dict[str, Any], None]) -> Response:
    if stream is not False:
        return NDJSONResponse(request, events)

    async def last() -> dict[str, Any]:
        last_one: dict[str, Any] = {}
        async for event in events:
            last_one = event
        return last_one

    return JSONResponse(request, last)


async def _pulling(name: str) -> AsyncGenerator[dict[str, Any], None]:
    yield {"status": "pulling manifest"}
    digest = "sha256:" + hashlib.sha256(name.encode()).hexdigest()
    async for what, done, total in _reports(lambda report: hub.pull(name, progress=report)):
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
    """Run `work` in a thread; what it reports, at most ten times a second."""
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
    _may_manage(request)
    body = await read(request, Create)
    name = body.wanted()
    if hub.store_folder(name) is None:
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
    talk.params_of(talk.options_to_params(extras.get("parameters") or {})[0])
    return _progress(request, body.stream, _creating(request, name, body, extras))


async def _creating(
    request: Request, name: str, body: Create, extras: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    if body.files:
        yield {"status": "parsing GGUF"}
        local = await asyncio.to_thread(_from_blob, body.files)
    else:
        yield {"status": "using already created layer"}
        base = await asyncio.to_thread(request.app.state.service.models.find, body.from_)
        local, extras = base.local, {**base.extras, **extras}
    worn = None if body.files else base.adapter
    if body.adapters:
        yield {"status": "checking adapter"}
        worn = await asyncio.to_thread(_adapter_from_blobs, body.adapters, local)
        extras = {**extras, "adapter": "adapter"}
    yield {"status": "writing manifest"}
    await asyncio.to_thread(store.put, name, local, extras, worn)
    yield {"status": "success"}


def _adapter_from_blobs(files: dict[str, str], local: hub.LocalModel) -> Path:
    """Two files that were sent in as blobs, as a folder; it must fit the model."""
    paths = {name: store.blob_path(digest) for name, digest in files.items()}
    for name, path in paths.items():
        if not path.is_file():
            raise APIError(400, f'blob "{files[name]}" not found')
    both = " ".join(paths[name].name for name in store.ADAPTER_FILES)
    folder = hub.home() / "blobs" / f"adapter-{hashlib.sha256(both.encode()).hexdigest()}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in paths.items():
        if not (folder / name).exists():
            (folder / name).hardlink_to(path)
    return store.checked_adapter(folder, local.path)


def _from_blob(files: dict[str, str]) -> hub.LocalModel:
    """One GGUF file that was sent in as a blob; it is opened, and must be a model we know."""
    from tiercel.commands.show import describe

    if len(files) != 1:
        raise APIError(400, "files: one GGUF file makes a model")
    digest = next(iter(files.values()))
    path = store.blob_path(digest)
    if not path.is_file():
        raise APIError(400, f'blob "{digest}" not found')
    link = path.with_name(path.name + ".gguf")
    if not link.exists():
        link.hardlink_to(path)
    describe(link)
    stat = link.stat()
    return hub.LocalModel(digest, link, stat.st_size, digest[7:19], stat.st_mtime, "blob")


# ── copy, delete, blobs


async def copy(request: Request) -> Response:
    _may_manage(request)
    body = await read(request, Copy)
    if hub.store_folder(body.destination) is None:
        raise APIError(400, "invalid destination name")
    request.app.state.service.models.find(body.source)
    await asyncio.to_thread(store.copy, body.source, body.destination)
    return Response(status_code=200)


async def delete(request: Request) -> Response:
    _may_manage(request)
    body = await read(request, Named)
    name = body.wanted()
    models = request.app.state.service.models
    models.find(name)
    if name in models.paths:
        raise APIError(403, "this model was given on the command line, and is not the server's to delete")
    await models.unload(name)
    try:
        await asyncio.to_thread(store.remove, name)
    except ModelNotFound:
        raise APIError(404, f"model '{name}' not found") from None
    return Response(status_code=200)


async def blob(request: Request) -> Response:
    _may_manage(request)
    digest = request.path_params["digest"]
    try:
        path = store.blob_path(digest)
    except RequestError as error:
        raise APIError(400, str(error)) from None
    if request.method == "HEAD":
        if not path.is_file():
            raise APIError(404, f'blob "{digest}" not found')
        return Response(status_code=200)
    if path.is_file():
        return Response(status_code=200)
    await _receive(request, path, digest)
    return Response(status_code=201)


async def _receive(request: Request, path: Any, digest: str) -> None:
    """The body into a file that gets its name only when its digest is right."""
    settings = request.app.state.settings
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    sha256, size = hashlib.sha256(), 0
    chunks = request.stream()
    try:
        with part.open("xb") as file:
            while True:
                try:
                    async with asyncio.timeout(settings.body_timeout):  # for each chunk: the whole may be large
                        chunk = await anext(chunks)
                except StopAsyncIteration:
                    break
                except TimeoutError:
                    raise APIError(408, "the blob stopped arriving") from None
                size += len(chunk)
                if size > settings.blob_bytes:
                    raise APIError(413, f"a blob may have {settings.blob_bytes} bytes")
                sha256.update(chunk)
                file.write(chunk)
        got = f"sha256:{sha256.hexdigest()}"
        if got != digest.replace("-", ":"):
            raise APIError(400, f'digest mismatch, expected "{digest}", got "{got}"')
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
