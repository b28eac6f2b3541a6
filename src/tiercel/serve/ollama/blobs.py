"""/api/blobs: files that are sent in, for `create`."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from tiercel.errors import RequestError
from tiercel.hub import local_models, store
from tiercel.runtime.atomic import open_part, sync_folder
from tiercel.serve.errors import APIError
from tiercel.serve.service import service_of


def check_may_manage(request: Request) -> None:
    """Raise APIError 403 where clients may not change models."""
    if not service_of(request).settings.may_manage:
        raise APIError(403, "changing models over HTTP is off on this server; see tiercel serve --manage")


async def blob(request: Request) -> Response:
    """Receive a file, or say whether it is here."""
    check_may_manage(request)
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


async def _receive(request: Request, path: Path, digest: str) -> None:
    """The body into a file that gets its name only when its digest is right."""
    settings = service_of(request).settings
    path.parent.mkdir(parents=True, exist_ok=True)
    part, file = open_part(path)
    sha256, size = hashlib.sha256(), 0
    chunks = request.stream()
    try:
        with file:
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
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())
            part.replace(path)
        await asyncio.to_thread(sync_folder, path.parent)
    finally:
        part.unlink(missing_ok=True)


def adapter_from_blobs(files: dict[str, str], local: local_models.LocalModel) -> Path:
    """Two files that were sent in as blobs, as a folder.  Raises APIError 400, FormatError (they do not fit)."""
    paths = {name: store.blob_path(digest) for name, digest in files.items()}
    for name, path in paths.items():
        if not path.is_file():
            raise APIError(400, f'blob "{files[name]}" not found')
    both = " ".join(paths[name].name for name in store.ADAPTER_FILES)
    folder = local_models.home() / "blobs" / f"adapter-{hashlib.sha256(both.encode()).hexdigest()}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in paths.items():
        if not (folder / name).exists():
            (folder / name).hardlink_to(path)
    return store.checked_adapter(folder, local.path)


def model_from_blob(files: dict[str, str]) -> local_models.LocalModel:
    """One GGUF file that was sent in as a blob; it is opened.  Raises APIError 400, FormatError."""
    from tiercel.hub.describe import describe

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
    return local_models.LocalModel(digest, link, stat.st_size, digest[7:19], stat.st_mtime, "blob")
