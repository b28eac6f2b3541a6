"""/api/show."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tiercel.runtime.stat_cache import StatCache
from tiercel.serve.body import read
from tiercel.serve.capabilities import capabilities
from tiercel.serve.models import Models
from tiercel.serve.names import timestamp
from tiercel.serve.ollama.models import described, details
from tiercel.serve.ollama.schemas import Show
from tiercel.serve.service import service_of
from tiercel.serve.stream import JSONResponse


async def show(request: Request) -> Response:
    """Describe a model."""
    body = await read(request, Show)
    name = body.wanted()
    models = service_of(request).models
    return JSONResponse(request, lambda: asyncio.to_thread(_shown, models, name, bool(body.verbose)))


def _shown(models: Models, name: str, verbose: bool) -> dict[str, Any]:
    served = models.find(name)
    found, about = described(served.local.path), details(served)
    arch, extras = found["architecture"], served.extras
    info: dict[str, Any] = {
        "general.architecture": arch, "general.parameter_count": found["parameters"],
        f"{arch}.context_length": found["context"], f"{arch}.embedding_length": found["width"],
        f"{arch}.block_count": found["layers"], f"{arch}.vocab_size": found["vocabulary"],
        "tiercel.pattern": found["pattern"], "tiercel.state_bytes": found["state_bytes"],
        "tiercel.kv_bytes_per_token": found["kv_bytes_per_token"],
    }  # fmt: skip
    template = extras.get("template") or chat_template(served.local.path)
    out: dict[str, Any] = {
        "modelfile": modelfile(name, extras), "template": template or "", "details": about, "model_info": info,
        "capabilities": capabilities(template), "modified_at": timestamp(served.local.modified),
    }  # fmt: skip
    if parameters := extras.get("parameters"):
        out["parameters"] = "\n".join(f"{key:<30} {value}" for key, value in _pairs(parameters))
    for key in ("system", "messages"):
        if extras.get(key):
            out[key] = extras[key]
    if licence := extras.get("license") or found.get("licence"):
        out["license"] = licence if isinstance(licence, str) else "\n".join(licence)
    if verbose:
        out["tensors"] = tensors_of(served.local.path)
    return out


def tensors_of(path: Path) -> list[dict[str, Any]]:
    """Name, type and shape of everything a model file or folder holds."""
    from tiercel.weights.gguf import GGUFFile
    from tiercel.weights.safetensors import SafetensorsFolder

    with (SafetensorsFolder if path.is_dir() else GGUFFile)(path) as opened:
        return [{"name": tensor.name, "type": tensor.type, "shape": list(tensor.shape)}
                for tensor in opened.tensors.values()]  # fmt: skip


def _read_template(path: Path) -> str:
    from tiercel.hub.download import read_json
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


chat_template = StatCache(_read_template)  # without loading the model; "" where there is none


def modelfile(name: str, extras: dict[str, Any]) -> str:
    """The Modelfile that makes this model."""
    lines = [f"FROM {extras.get('from') or name}"]
    lines += [f"ADAPTER {extras['adapter']}"] if extras.get("adapter") else []
    lines += [f"PARAMETER {key} {value}" for key, value in _pairs(extras.get("parameters") or {})]
    lines += [f'{key.upper()} """{extras[key]}"""' for key in ("template", "system") if extras.get(key)]
    for message in extras.get("messages") or ():
        content = str(message.get("content", ""))
        lines.append(f"MESSAGE {message['role']} " + (f'"""{content}"""' if "\n" in content else content))
    return "\n".join(lines) + "\n"


def _pairs(parameters: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (key, item) for key, value in parameters.items() for item in (value if isinstance(value, list) else [value])
    ]
