"""Local models under further names: copied, made from a Modelfile, removed.

    <home>/models/<name>/<tag>/<file>.gguf, tiercel.json       what `hub` finds; a copy is a hard link, no new bytes
    <home>/blobs/sha256-<64 hex>                               files sent in, for `create`

tiercel.json may carry `extras`: the Modelfile's parameters, system, template (Jinja), messages, license.
No torch.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiercel.errors import FormatError, ModelNotFound, RequestError, TiercelError
from tiercel.hub import local_models
from tiercel.hub.download import file_digest, read_json
from tiercel.runtime.atomic import atomic_write, remove_leftovers

DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
EXTRAS = ("parameters", "system", "template", "messages", "license", "from", "adapter")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # in the folder `adapter` beside the model


def blob_path(digest: str) -> Path:
    """The only way from a digest to a path: 64 hex digits or RequestError."""
    found = DIGEST.fullmatch(digest)
    if not found:
        raise RequestError("a digest is sha256: and 64 hexadecimal digits")
    return local_models.home() / "blobs" / f"sha256-{found[1]}"


def copy(source: str, target: str) -> None:
    """Another name for a model.  Raises ModelNotFound, RequestError."""
    local = local_models.find(source)
    if local is None:
        raise ModelNotFound(f"{source} is not on this machine; type: tiercel pull {source}")
    old = local_models.store_folder(local.name)
    extras = read_json(old / "tiercel.json").get("extras") if old else None
    put(target, local, extras if isinstance(extras, dict) else {}, local_models.adapter_of(local.name))


def put(target: str, local: local_models.LocalModel, extras: Mapping[str, Any], adapter: Path | None = None) -> None:
    """Make `target` a name of the model, with what a Modelfile adds.  adapter: a folder in PEFT's form, copied."""
    folder = local_models.store_folder(target)
    if folder is None:
        raise RequestError(f"{target[:80]!r} cannot be a name: small letters, digits and .-_, with a tag after a colon")
    if not local.path.is_file():
        raise RequestError(f"{local.name} is a folder of several files; export it to one .gguf first: "
                           f"tiercel export {local.name} model.gguf")  # fmt: skip
    file = "model.gguf" if local.path.suffix.lower() != ".gguf" else local.path.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}", file):
        file = "model.gguf"
    real = local.path.resolve()
    known = read_json(real.parent / "tiercel.json").get("sha256")
    sha256 = known if isinstance(known, str) else file_digest(real, lambda what, done, total: None)
    try:
        file = _put_file(real, folder, file, sha256)
    except OSError as error:
        raise TiercelError(f"could not write {folder / file}: {error.strerror or error}") from error
    _put_adapter(adapter, folder / "adapter")
    manifest = {"name": target, "source": local.source or local.name, "file": file, "sha256": sha256,
                "bytes": (folder / file).stat().st_size, "extras": dict(extras)}  # fmt: skip
    with atomic_write(folder / "tiercel.json") as out:
        out.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    for other in folder.glob("*.gguf"):  # what the name stood for before
        if other.name != file:
            other.unlink(missing_ok=True)


def _put_file(real: Path, folder: Path, file: str, sha256: str) -> str:
    """Link or copy a file into a folder; its name there, which no other file has: the manifest decides."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    here = read_json(folder / "tiercel.json")
    if here.get("sha256") == sha256 and isinstance(here.get("file"), str) and (folder / here["file"]).is_file():
        return str(here["file"])
    if (folder / file).exists() and not real.samefile(folder / file):
        file = f"{sha256[:12]}-{file[-180:]}"
    if not (folder / file).exists():
        part = folder / f".{file}.{secrets.token_hex(4)}.part"
        try:
            os.link(real, part)
        except OSError:  # another file system
            try:
                shutil.copyfile(real, part)
            except OSError:
                part.unlink(missing_ok=True)
                raise
        part.replace(folder / file)
    return file


def _put_adapter(adapter: Path | None, place: Path) -> None:
    files = {} if adapter is None else {name: (adapter / name).read_bytes() for name in ADAPTER_FILES}
    shutil.rmtree(place, ignore_errors=True)
    for name, content in files.items():
        place.mkdir(exist_ok=True)
        with atomic_write(place / name) as out:
            out.write(content)


def checked_adapter(adapter: Path, model: Path) -> Path:
    """The adapter, once it is known to fit the model.  Raises FormatError, UnsupportedError, ModelNotFound."""
    from tiercel.weights.adapters import read
    from tiercel.weights.checkpoint import open_checkpoint

    read(adapter, open_checkpoint(model).layout)
    return adapter


def remove(name: str) -> None:
    """Take a model off this machine.  Raises ModelNotFound; RequestError for the one inside the package."""
    folder = local_models.store_folder(name)
    if folder is not None and (folder / "tiercel.json").is_file():
        (folder / "tiercel.json").unlink()
        shutil.rmtree(folder, ignore_errors=True)
        if folder.parent.is_dir() and not any(folder.parent.iterdir()):
            folder.parent.rmdir()
        return
    if name == local_models.BUNDLED:
        raise RequestError(f"{name} is a part of Tiercel itself, and goes only with it")
    repo = local_models.repo_name(name) if not local_models.is_path(name) else None
    local = local_models.find(name) if repo else None
    if repo is None or local is None or local.source == "path":
        raise ModelNotFound(f"no model {name[:80]!r}; type: tiercel list")
    local_models.forget(local)


# ── Modelfiles


def create(name: str, wanted: Modelfile, folder: Path) -> None:
    """Make `name` of a Modelfile; a FROM that is a path counts from the Modelfile's folder.

    Raises RequestError, ModelNotFound, FormatError.
    """
    extras = check_extras(wanted.extras)
    base = wanted.base
    if local_models.is_path(base):
        base = str((folder / Path(base).expanduser()).resolve())
    local = local_models.find(base)
    if local is None:
        raise ModelNotFound(f"{base} is not on this machine; type: tiercel pull {base}")
    old = None if local.source == "path" else local_models.store_folder(local.name)
    before = read_json(old / "tiercel.json").get("extras") if old else None
    adapter = local_models.adapter_of(local.name) if old else None
    if wanted.adapter:
        adapter = checked_adapter((folder / Path(wanted.adapter).expanduser()).resolve(), local.path)
        extras["adapter"] = adapter.name
    put(name, local, {**(before if isinstance(before, dict) else {}), **extras, "from": wanted.base}, adapter)


@dataclass
class Modelfile:
    """FROM, and what is added.  parameters: Ollama's option names; `stop` collects a list.
    adapter: a folder in PEFT's form, counted from the Modelfile's."""

    base: str = ""
    adapter: str = ""
    extras: dict[str, Any] = field(default_factory=dict)


WORDS = ("FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE", "REQUIRES")


def decode_modelfile(raw: bytes) -> str:
    """The text of a Modelfile in UTF-8 or UTF-16, with a byte-order mark or without.  Raises RequestError."""
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    if b"\0" in raw[:2]:
        encoding = "utf-16-be" if raw[:1] == b"\0" else "utf-16-le"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise RequestError(f"it is no text in UTF-8 or UTF-16 ({error.reason} at byte {error.start})") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_modelfile(text: str) -> Modelfile:
    """Read the instructions of a Modelfile.  Raises RequestError naming the line."""
    found = Modelfile()
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        line, at = lines[number].strip(), number + 1
        number += 1
        if not line or line.startswith("#"):
            continue
        word, value = _head(line)
        word, name = word.upper(), ""
        if word in ("MESSAGE", "PARAMETER"):
            name, value = _head(value)
        if value.startswith('"""'):
            value = value[3:]
            while '"""' not in value:
                if number >= len(lines):
                    raise RequestError(f'line {at}: the closing """ is missing')
                value += "\n" + lines[number]
                number += 1
            value = value[: value.index('"""')].strip("\n")
        elif len(value) > 1 and value[0] == value[-1] == '"':
            value = value[1:-1]
        _instruction(found, word, name, value, at)
    if not found.base:
        raise RequestError("a Modelfile needs a FROM line")
    return found


def _head(line: str) -> tuple[str, str]:
    """The first word, and what follows it."""
    word, *rest = line.split(maxsplit=1) or [""]
    return word, rest[0] if rest else ""


def _instruction(found: Modelfile, word: str, name: str, value: str, at: int) -> None:
    """name: the role of a MESSAGE, the name of a PARAMETER."""
    if word not in WORDS:
        raise RequestError(f"line {at}: {word[:40]!r} is no instruction; there are {', '.join(WORDS)}")
    if not (name or value):
        raise RequestError(f"line {at}: {word} needs a value")
    if word == "FROM":
        found.base = value
    elif word == "ADAPTER":
        if found.adapter:
            raise RequestError(f"line {at}: a model has one ADAPTER; make another model for another")
        found.adapter = value
    elif word in ("TEMPLATE", "SYSTEM"):
        found.extras[word.lower()] = value
    elif word == "LICENSE":
        found.extras["license"] = [*found.extras.get("license", ()), value]
    elif word == "MESSAGE":
        found.extras.setdefault("messages", []).append({"role": name.lower(), "content": value})
    elif word == "PARAMETER":
        _parameter(found.extras.setdefault("parameters", {}), name, value)


def _parameter(parameters: dict[str, Any], name: str, text: str) -> None:
    if name == "stop":
        parameters.setdefault("stop", []).append(text.strip('"'))
        return
    try:
        parameters[name] = json.loads(text)
    except ValueError:
        raise RequestError(f"PARAMETER {name[:40]} needs a number, not {text[:40]!r}") from None


def check_extras(extras: Mapping[str, Any]) -> dict[str, Any]:
    """What `create` may add, with its types.  Raises RequestError."""
    kinds: dict[str, Any] = {"parameters": dict, "system": str, "template": str, "messages": list,
                             "license": (str, list), "from": str, "adapter": str}  # fmt: skip
    found = {name: value for name, value in extras.items() if value not in (None, "", [], {})}
    for name, value in found.items():
        if name not in kinds or not isinstance(value, kinds[name]):
            raise RequestError(f"{name} has the wrong type")
    for message in found.get("messages", ()):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError("messages: each needs a role and a content")
    template = found.get("template")
    if template is not None:
        check_template(template)
    return found


def check_template(template: str) -> None:
    """A chat template is Jinja here; Ollama's are Go's, and are recognised."""
    if re.search(r"\{\{-?\s*(if|range|end|else|template|with)?\s*[.$]|\{\{-?\s*end\s*-?\}\}", template):
        raise RequestError("TEMPLATE is in Go's template language; models bring their own, leave it out (or use Jinja)")
    from tiercel.tokenizer.template import render

    sample = [{"role": "user", "content": "Hello"}]
    try:
        render(template, {"messages": sample, "tools": None, "add_generation_prompt": True, "bos_token": "",
                          "eos_token": ""})  # fmt: skip
    except FormatError as error:
        raise RequestError(f"the template is no Jinja: {error}") from None
