"""Writes public_api.json: names, arguments and defaults of the Python API, the command line and the settings.

    PYTHONPATH=<checkout>/src python tests/golden/make_public_api.py > tests/golden/public_api.json

The file was made of commit 002aba0; what it lists stays.  Run it again only when something is taken out on purpose.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
from typing import Any

import tiercel
from tiercel import llm
from tiercel.serve.settings import Settings

INSTANCE = ("network", "text", "layout", "name", "defaults", "max_length", "adapter", "config", "engine")  # of a Model


def arguments(function: Any) -> dict[str, str]:
    """{name: default}, in their order."""
    shown = {}
    for p in inspect.signature(function).parameters.values():
        if p.name not in ("self", "cls"):
            starred = p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            shown[p.name] = str(p.kind) if starred else "required" if p.default is p.empty else repr(p.default)
    return shown


def members(cls: type) -> dict[str, dict[str, str] | None]:
    """Methods with their arguments, other attributes with None."""
    public = [name for name in sorted(dir(cls)) if not name.startswith("_")]
    return {name: arguments(getattr(cls, name)) if callable(getattr(cls, name)) else None for name in public}


def options(command: Any) -> Any:
    """{name: [kind, default, required, repeatable]} of a command, {name: …} of a group."""
    if hasattr(command, "commands"):
        return {name: options(each) for name, each in sorted(command.commands.items())}
    found = {}
    for p in command.params:
        name = " ".join([*p.opts, *p.secondary_opts]) if p.param_type_name == "option" else p.name.upper()
        default = "computed" if callable(p.default) else repr(p.default)
        found[name] = [p.param_type_name, default, p.required, getattr(p, "multiple", False)]
    return found


def command_line() -> Any:
    try:
        cli = importlib.import_module("tiercel.commands.cli")
    except ImportError:
        cli = importlib.import_module("tiercel.cli")
    return options(importlib.import_module("typer.main").get_command(cli.app))


def public_api() -> dict[str, Any]:
    errors = {name: getattr(tiercel, name) for name in tiercel.__all__}
    errors = {n: e for n, e in errors.items() if isinstance(e, type) and issubclass(e, Exception)}
    return {
        "tiercel": sorted(tiercel.__all__),
        "errors": {n: [*(b.__name__ for b in e.__mro__ if b is not e), e.exit_code] for n, e in errors.items()},
        "load": arguments(llm.load),
        "pattern": arguments(tiercel.pattern),
        "SamplingParams": arguments(tiercel.SamplingParams),
        "Model": members(llm.Model),
        "LLM": members(llm.LLM) | {"__init__": arguments(llm.LLM.__init__)},
        "Answer": sorted(llm.Answer.__annotations__),
        "CompletionOutput": arguments(llm.CompletionOutput),
        "RequestOutput": arguments(llm.RequestOutput),
        "settings": {part.name: repr(part.default) for part in dataclasses.fields(Settings)},
        "commands": command_line(),
    }


if __name__ == "__main__":
    json.dump(public_api(), sys.stdout, indent=1)
    sys.stdout.write("\n")
