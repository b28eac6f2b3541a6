"""/api/tags, /api/ps and /api/version."""

from __future__ import annotations

import asyncio
import hashlib
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

import tiercel
from tiercel.errors import FormatError
from tiercel.hub import local_models, store
from tiercel.hub.download import file_digest
from tiercel.runtime.stat_cache import StatCache
from tiercel.serve.errors import to_json
from tiercel.serve.models import Loaded, Models, ServedModel
from tiercel.serve.names import tagged, timestamp
from tiercel.serve.service import service_of
from tiercel.serve.stream import JSONResponse

OLLAMA_VERSION = "0.13.5"
CENTURY_SECONDS = 100 * 365 * 86400.0  # how far in the future "for ever" is written


async def tags(request: Request) -> Response:
    """List the models of this server."""
    models = service_of(request).models

    async def make() -> dict[str, Any]:
        return {"models": await asyncio.to_thread(lambda: entries(models.all()))}

    return JSONResponse(request, make)


async def ps(request: Request) -> Response:
    """List the models in memory."""
    models = service_of(request).models

    async def make() -> dict[str, Any]:
        entries = sorted(models.loaded.values(), key=lambda loaded: -loaded.expires)
        return {"models": await asyncio.to_thread(lambda: [_resident(models, loaded) for loaded in entries])}

    return JSONResponse(request, make)


async def version(request: Request) -> Response:
    """The version of Ollama whose API this is, which its clients compare, and the version of this server."""

    async def make() -> dict[str, Any]:
        return {"version": OLLAMA_VERSION, "tiercel": tiercel.__version__}

    return JSONResponse(request, make)


def _describe(path: Path) -> dict[str, Any]:
    from tiercel.hub.describe import describe

    return describe(path)


def _hash_adapter(folder: Path) -> str:
    sha256 = hashlib.sha256()
    for name in store.ADAPTER_FILES:
        sha256.update(file_digest(folder / name, lambda what, done, total: None).encode())
    return sha256.hexdigest()


described = StatCache(_describe)  # headers of model files, read once
_adapter_digest = StatCache(_hash_adapter)


def details(served: ServedModel) -> dict[str, Any]:
    """What a model is, in Ollama's fields.  Raises FormatError."""
    from tiercel.hub.describe import human_count

    about = described(served.local.path)
    types = about.get("types") or {"none": 1}
    return {
        "parent_model": str(served.extras.get("from") or ""), "format": about["format"],
        "family": about["architecture"], "families": [about["architecture"]],
        "parameter_size": human_count(about["parameters"]),
        "quantization_level": max(types, key=lambda name: types[name]),
        "context_length": about["context"], "embedding_length": about["width"],
    }  # fmt: skip


def digest(served: ServedModel) -> str:
    """What tells two models apart, 64 hexadecimal digits.

    The sha256 of a file from the store, with what a Modelfile added to it that of both; elsewhere the hub's commit, or
    one of the name.
    """
    folder = local_models.store_folder(served.name)
    found = local_models.manifest_of(folder).get("sha256")
    if not isinstance(found, str):
        return served.local.id or hashlib.sha256(served.name.encode()).hexdigest()
    added = {name: value for name, value in served.extras.items() if name != "from"}
    if not added:
        return found
    adapter = _adapter_digest(served.adapter) if served.adapter else ""
    return hashlib.sha256(to_json([found, dict(sorted(added.items())), adapter])).hexdigest()


class _Entries:
    """The entries of /api/tags: made once for each list, which changes with any of its files."""

    def __init__(self) -> None:
        self._kept: tuple[list[ServedModel], list[dict[str, Any]]] = [], []

    def __call__(self, served: list[ServedModel]) -> list[dict[str, Any]]:
        if self._kept[0] is not served:
            self._kept = served, [entry for entry in map(_listed, served) if entry]
        return self._kept[1]


entries = _Entries()


def _listed(served: ServedModel) -> dict[str, Any] | None:
    try:
        about = details(served)
    except (FormatError, OSError):  # a file that cannot be read is no model that can be asked
        return None
    name = tagged(served.name)
    return {"name": name, "model": name, "modified_at": timestamp(served.local.modified), "size": served.local.bytes,
            "digest": digest(served), "details": about}  # fmt: skip


def _resident(models: Models, loaded: Loaded) -> dict[str, Any]:
    served = models.find(loaded.name)
    left = min(loaded.expires - time.monotonic(), CENTURY_SECONDS)
    expires = datetime.now(UTC) + timedelta(seconds=left if loaded.users == 0 else max(left, 0))
    name = tagged(loaded.name)
    return {"name": name, "model": name, "size": loaded.size, "digest": digest(served), "details": details(served),
            "expires_at": timestamp(expires.timestamp()), "size_vram": 0,
            "context_length": loaded.model.max_length, "adapters": sorted(loaded.adapters.values())}  # fmt: skip
