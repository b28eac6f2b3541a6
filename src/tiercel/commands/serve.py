"""The commands `serve`, `ps` and `stop`; a command imports its module when it runs."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from tiercel.commands.options import Json, ModelName, print_json, print_table
from tiercel.errors import RequestError


def serve(
    models: Annotated[list[str] | None, typer.Argument(help="Models to load now; others load when requested.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 without it.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 11434 without it.", min=0, max=65535)] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Answer only clients with this key (better: TIERCEL_API_KEY).")
    ] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="A further name in Host; repeatable.")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="A further Origin that may call; repeatable.")] = None,
    manage: Annotated[
        bool | None,
        typer.Option("--manage/--no-manage", help="Let clients pull, create, delete; default: on loopback."),
    ] = None,
    slots: Annotated[int | None, typer.Option(help="Concurrent sequences.", min=1)] = None,
    queue: Annotated[int | None, typer.Option(help="Requests that may wait; more are refused.")] = None,
    keep_alive: Annotated[
        str | None, typer.Option(help='How long an unused model stays: "5m", "1h", -1 for ever.')
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, or cuda for one GPU.")] = None,
    draft_model: Annotated[
        str | None, typer.Option(help="A smaller model of the same vocabulary that proposes tokens; same answers.")
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(help="Processes that share each layer, on the CPU.", min=1)
    ] = None,
    drain: Annotated[float | None, typer.Option(help="Seconds that requests may continue after a signal.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER: a LoRA adapter, served as MODEL:NAME beside the first model; repeatable."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any limit, NAME=VALUE; see serve/settings.py.")
    ] = None,
) -> None:
    """Serve models: OpenAI's and Ollama's APIs, and a chat page.

    Every option is also a variable: TIERCEL_PORT=8080, TIERCEL_SLOTS=4.
    """
    from tiercel.serve.settings import from_environment, named

    given: dict[str, Any] = {
        "host": host, "port": port, "api_key": api_key, "manage": manage, "slots": slots, "queue": queue,
        "drain": drain, "device": device, "draft_model": draft_model,
        "tensor_parallel": tensor_parallel, "allow_hosts": tuple(allow_host) if allow_host else None,
        "allow_origins": tuple(allow_origin) if allow_origin else None,
        **named(set_ or []),
    }  # fmt: skip
    if tensor_parallel is not None and tensor_parallel > 1:
        given.setdefault("models", 1)
    if keep_alive is not None:
        from tiercel.serve.duration import seconds_of

        given["keep_alive"] = seconds_of(keep_alive)
    settings = from_environment(**given)
    from tiercel.serve.app import run as run_server

    adapters = {}
    for word in adapter or []:
        name, _, folder = word.partition("=")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name) or not folder:
            raise RequestError(f"--adapter is NAME=FOLDER, the name of small letters, digits and .-_, not {word!r}")
        adapters[name] = Path(folder).expanduser()
    run_server(settings, models or [], adapters)


def ps(json: Json = False) -> None:
    """List the models that the server has in memory."""
    from tiercel.plan import human_bytes
    from tiercel.serve.client import Client

    found = Client.running().get("/api/ps")["models"]
    if json:
        print_json(found)
        return
    rows = [("NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL")]
    rows += [
        (model["name"], model["digest"][:12], human_bytes(model["size"]), "100% CPU", str(model["context_length"]),
         _until(model["expires_at"]))
        for model in found
    ]  # fmt: skip
    print_table(rows)


def _until(stamp: str) -> str:
    """`4 minutes from now`, as Ollama writes it."""
    from datetime import datetime

    left = datetime.fromisoformat(stamp).timestamp() - time.time()
    if left > 10 * 31_557_600:
        return "Forever"
    if left <= 0:
        return "Stopping..."
    for unit, length in (("day", 86_400), ("hour", 3600), ("minute", 60), ("second", 1)):
        if left >= length:
            count = int(left // length)
            return f"{count} {unit}{'s' if count > 1 else ''} from now"
    return "Less than a second from now"


def stop(model: ModelName, json: Json = False) -> None:
    """Unload a model from the server's memory."""
    from tiercel.serve.client import Client

    Client.running().post("/api/generate", {"model": model, "keep_alive": 0})
    if json:
        print_json({"stopped": model})
