"""The page's libraries are the ones of the lockfile (`make page` makes them again; CI compares where npm is)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
VENDOR = ROOT / "src/tiercel/serve/page/vendor"


def test_the_bundle_is_made_from_this_lockfile():
    manifest = json.loads((VENDOR / "manifest.json").read_text())
    assert {path.name for path in VENDOR.iterdir()} == {*manifest["outputs"], "manifest.json"}
    for folder, entries in ((ROOT / "web", manifest["inputs"]), (VENDOR, manifest["outputs"])):
        for name, digest in entries.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, f"{name}: run make page"


def test_each_library_has_its_licence():
    text = (VENDOR / "LICENSES.txt").read_text()
    wanted = json.loads((ROOT / "web/package.json").read_text())["devDependencies"]
    for name in wanted.keys() - {"esbuild"}:  # which bundles, and is not in the bundle
        assert f"{name} {wanted[name]} (" in text


def test_every_module_is_served_and_preloaded(server):
    page = (VENDOR.parent / "index.html").read_text()
    for path in VENDOR.parent.glob("*.js"):
        status, headers, data = server.raw("GET", f"/page/{path.name}")
        assert status == 200 and headers["content-type"].startswith("text/javascript") and data == path.read_bytes()
        assert f'"page/{path.name}"' in page
        assert server.raw("GET", f"/page/{path.name}", If_None_Match=headers["etag"])[0] == 304
    for name in ("KaTeX_Main-Regular.woff2", "katex.css", "katex.js", "highlight.js", "marked.js"):
        assert server.raw("GET", f"/page/{name}")[0] == 200
    for name in ("page.py", "manifest.json", "vendor"):
        assert server.raw("GET", f"/page/{name}")[0] == 404
