"""Names, digests and listings of models; Modelfiles in any encoding."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from tiercel.errors import FormatError, RequestError
from tiercel.hub import local_models, store
from tiercel.runtime.stat_cache import StatCache
from tiercel.serve.models import Models
from tiercel.serve.ollama import models as routes
from tiercel.serve.settings import Settings

MODELFILE = 'FROM x\nPARAMETER stop "<|x|>"\nSYSTEM """You are\nkind."""\nMESSAGE user say "hi"\n'
MARK = "\ufeff"


@pytest.mark.parametrize("raw", [
    MODELFILE.encode(), (MARK + MODELFILE).encode(), MODELFILE.replace("\n", "\r\n").encode(),
    MODELFILE.replace("\n", "\r").encode(), (MARK + MODELFILE).encode("utf-16-le"), MODELFILE.encode("utf-16-le"),
    (MARK + MODELFILE).encode("utf-16-be"), MODELFILE.encode("utf-16-be"),
    MODELFILE.replace("FROM ", "FROM\t").replace("PARAMETER stop ", "PARAMETER\tstop\t\t").encode(),
    MODELFILE.replace("PARAMETER stop ", "parameter  stop  ").encode(),
])  # fmt: skip
def test_a_modelfile_is_the_same_in_every_encoding(raw):
    found = store.parse_modelfile(store.decode_modelfile(raw))
    assert found.base == "x" and found.extras == {
        "parameters": {"stop": ["<|x|>"]}, "system": "You are\nkind.",
        "messages": [{"role": "user", "content": 'say "hi"'}]}  # fmt: skip


def test_values_over_several_lines_and_what_is_no_text():
    text = 'FROM x\nMESSAGE user """a\nb"""\nPARAMETER stop """c\nd"""\nPARAMETER seed "3"\n'
    extras = store.parse_modelfile(text).extras
    assert extras == {"messages": [{"role": "user", "content": "a\nb"}], "parameters": {"stop": ["c\nd"], "seed": 3}}
    with pytest.raises(RequestError, match="UTF-8 or UTF-16"):
        store.decode_modelfile(b"FROM \xff\xfe\xfd")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TIERCEL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    store.put("plain", local_models.find(str(tmp_path / "m.gguf")), {})
    return tmp_path


def digests():
    return {served.name: routes.digest(served) for served in Models(Settings()).all()}


def test_a_made_model_has_a_digest_and_a_date_of_its_own(home):
    plain = local_models.find("plain")
    os.utime(plain.path, (1, 1))
    store.put("pirate", plain, {"system": "a", "from": "plain"})
    store.put("seed", plain, {"parameters": {"seed": 1}, "from": "plain"})
    store.copy("pirate", "same")
    store.copy("plain", "plain2")
    found = digests()
    assert found["pirate"] == found["same"] and found["plain"] == found["plain2"]
    assert len({found["plain"], found["pirate"], found["seed"]}) == 3
    assert all(len(found[name]) == 64 for name in ("plain", "pirate", "seed"))
    assert local_models.find("pirate").modified > 1


def test_listing_reads_headers_once_and_again_when_a_file_changed(home, monkeypatch):
    from tiercel.hub import describe

    calls = []
    about = {"format": "gguf", "architecture": "llama", "parameters": 1, "context": 1, "width": 1}
    monkeypatch.setattr(describe, "describe", lambda path: calls.append(path) or about)
    for number in range(5):
        store.put(f"m{number}", local_models.find("plain"), {})
    listed = [routes._listed(served) for served in Models(Settings()).all() if served.local.source != "package"]
    assert len(listed) == 6 and len(calls) == 6
    assert [routes._listed(s) for s in Models(Settings()).all() if s.local.source != "package"] == listed
    assert len(calls) == 6, "nothing was read again"
    os.utime(local_models.find("m1").path)
    list(map(routes._listed, Models(Settings()).all()))
    assert len([path for path in calls if "reasoner" not in str(path)]) >= 7


def test_a_list_is_made_once_until_a_file_changes(home, monkeypatch):
    models, made = Models(Settings()), []
    whole = local_models.list_models
    monkeypatch.setattr(local_models, "list_models", lambda: made.append(1) or whole())
    first = models.all()
    assert models.all() is first and len(made) == 1
    manifest = local_models.store_folder("plain") / "tiercel.json"
    for change in (
        lambda: store.put("another", local_models.find("plain"), {"system": "x", "from": "plain"}),
        lambda: manifest.write_text(manifest.read_text() + " "),
        lambda: os.utime(local_models.find("another").path, (5, 5)),
        lambda: shutil.rmtree(local_models.store_folder("another")),
        lambda: models.paths.update(here=home / "m.gguf"),
        lambda: (home / "m.gguf").write_bytes(b"GGUF2"),
    ):
        change()
        before, names = len(made), {served.name for served in models.all()}
        assert len(made) == before + 1
        assert names == {model.name for model in whole()} | set(models.paths)
        assert models.all() is models.all() and len(made) == before + 1


def test_a_cache_of_files_keeps_errors_and_sees_changes(tmp_path):
    calls = []

    def read(path):
        calls.append(path)
        text = path.read_text() if path.is_file() else str(sorted(p.name for p in path.iterdir()))
        if text == "bad":
            raise FormatError("bad")
        return text

    cache, file = StatCache(read), tmp_path / "a"
    file.write_text("bad")
    for _ in range(2):
        with pytest.raises(FormatError):
            cache(file)
    assert len(calls) == 1
    file.write_text("good")
    assert cache(file) == cache(file) == "good" and len(calls) == 2
    assert cache(tmp_path) == cache(tmp_path) == "['a']"
    shutil.copy(file, tmp_path / "b")
    assert cache(tmp_path) == "['a', 'b']"
    with pytest.raises(OSError):
        cache(tmp_path / "none")
    assert json.dumps(cache(file))
