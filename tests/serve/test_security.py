"""Who is let in.  Every route × keys × Hosts × Origins: nothing but health is answered to those who may not ask."""

from __future__ import annotations

import socket

import pytest

from tiercel.errors import RequestError
from tiercel.serve.routes import routes
from tiercel.serve.settings import Settings

KEY = "a-long-secret"
STRANGE = ["evil.example", "evil.example:11434", "localhost.evil.example", "127.0.0.1.evil.example", "x/?", "x/health?",
           "localhost/", "user@localhost", "local host", "[::1", "[::2]", "192.168.1.1", "0.0.0.0", "", "localhost:",
           "localhost:123456", "127.0.0.1\\@evil", "LOCALHOST.", "..", "10.0.0.1:11434",
           "[::ffff:8.8.8.8]"]  # fmt: skip
FINE = [
    "localhost",
    "localhost:11434",
    "127.0.0.1",
    "127.0.0.1:1",
    "127.9.9.9",
    "[::1]:11434",
    "LocalHost",
    "a.localhost",
]


def every_route():
    for route in routes():
        for method in route.methods:
            yield method, route.path.replace("{name}", "page.js").replace("{model:path}", "tiny").replace(
                "{digest}", "sha256:" + "0" * 64)  # fmt: skip


@pytest.fixture(scope="module")
def locked(start):
    return start(api_key=KEY)


def wrong_keys():
    yield {}
    for value in (f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", "Bearer ", f"Digest {KEY}", KEY, f"Basic {KEY}",
                  "Basic !!!", f"Bearer {KEY.upper()}", "Bearer \xff"):  # fmt: skip
        yield {"Authorization": value}


def test_without_the_key_only_health_is_answered(locked):
    for method, path in every_route():
        for headers in wrong_keys():
            for host in ("localhost", "x/health?", "/health"):
                status, _, data = locked.raw(method, path, b"" if method == "POST" else None, Host=host, **headers)
                assert status == (200 if path == "/health" else 401 if host == "localhost" else 403), (method, path)
                if method != "HEAD" and path != "/health":
                    assert b"error" in data and len(data) < 300
    assert locked.raw("GET", "/health/../api/tags")[0] == 401
    assert locked.raw("GET", "//health")[0] == 401


def test_the_key_opens_as_bearer_and_as_a_browsers_password(locked):
    import base64

    basic = base64.b64encode(f"anybody:{KEY}".encode()).decode()
    for value in (f"Bearer {KEY}", f"bearer {KEY}", f"Basic {basic}"):
        assert locked.raw("GET", "/api/version", Authorization=value)[0] == 200
    status, headers, _ = locked.raw("GET", "/", Accept="text/html")
    assert status == 401 and headers["www-authenticate"].startswith("Basic")


@pytest.mark.parametrize("host", STRANGE)
def test_a_strange_host_is_refused(server, host):
    for method, path in [("GET", "/"), ("GET", "/api/tags"), ("POST", "/v1/chat/completions"), ("GET", "/metrics")]:
        assert server.raw(method, path, b"{}" if method == "POST" else None, Host=host)[0] in (400, 403)
    assert server.raw("GET", "/health", Host=host)[0] in (200, 400)


@pytest.mark.parametrize("host", FINE)
def test_our_own_names_are_known(server, host):
    assert server.raw("GET", "/api/version", Host=host)[0] == 200


def test_two_hosts_are_none(server):
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(b"GET /api/tags HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert raw.recv(100).split()[1] in (b"400", b"403")


def test_pages_of_others_cannot_call(server):
    for origin in ("http://evil.example", "https://localhost.evil.example", "null", "http://localhost@evil", "*",
                   "http://127.0.0.1.evil.example", "chrome-extension://abc", "ftp://localhost",
                   "app://obsidian.md", "file://", "tauri://localhost", "vscode-webview://x",
                   "http://"):  # fmt: skip
        status, headers, _ = server.raw("POST", "/api/generate", {"model": "tiny"}, Origin=origin)
        assert status == 403 and "access-control-allow-origin" not in headers
    for origin in ("http://localhost:3000", "http://127.0.0.1"):
        status, headers, _ = server.raw("GET", "/api/version", Origin=origin)
        assert status == 200 and headers["access-control-allow-origin"] == origin
        assert "access-control-allow-credentials" not in headers


def test_a_preflight_names_the_headers_clients_send(server):
    status, headers, _ = server.raw("OPTIONS", "/v1/chat/completions", Origin="http://localhost:3000",
                                    Access_Control_Request_Method="POST")  # fmt: skip
    allowed = headers["access-control-allow-headers"].lower()
    assert status == 204 and "authorization" in allowed and "x-stainless-lang" in allowed


def test_other_machines_need_a_key(monkeypatch):
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(RequestError, match="set a key"):
            Settings(host=host)
        assert not Settings(host=host, api_key="x").may_manage, "and may not change models"
    assert Settings(host="127.0.0.1").may_manage and Settings(host="::1").loopback


def test_models_cannot_be_changed_where_that_is_off(start):
    server = start(manage=False)
    for method, path in [("POST", "/api/pull"), ("POST", "/api/create"), ("POST", "/api/copy"),
                         ("DELETE", "/api/delete"), ("POST", "/api/blobs/sha256:" + "0" * 64)]:  # fmt: skip
        assert server.raw(method, path, {"model": "tiny"})[0] == 403


def test_too_much_is_refused(start):
    server = start(body_bytes=1000)
    assert server.raw("POST", "/api/generate", b"x" * 1001)[0] == 413
    assert server.raw("GET", "/health", None, **{f"X-{n}": "y" * 4000 for n in range(16)})[0] == 200
    assert server.raw("GET", "/health", None, **{f"X-{n}": "y" * 4000 for n in range(17)})[0] in (400, 431)


def test_a_body_that_does_not_arrive_is_given_up(start):
    server = start(body_timeout=0.3)
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        raw.settimeout(5)
        assert b" 408 " in raw.recv(100)


def test_no_error_names_a_file_or_a_prompt(server, checkpoints):
    """R17: what is broken is said without paths, prompts and traces."""
    (checkpoints["tiny"].parent / "broken").mkdir(exist_ok=True)
    (checkpoints["tiny"].parent / "broken" / "config.json").write_text("{}")
    server.service.models.paths["broken"] = checkpoints["tiny"].parent / "broken"
    try:
        for path in ("/api/generate", "/v1/completions", "/api/show"):
            status, _, data = server.raw("POST", path, {"model": "broken", "prompt": "my secret words"})
            assert status == 400
            assert not any(word in data for word in (b"/tmp", b"secret", b"Traceback", b".py"))
        for name in ("a\r\nX-Evil: 1", "a\x1b[31m", "../../etc/passwd", "x" * 500):
            status, headers, data = server.raw("POST", "/api/show", {"model": name})
            assert status == 404 and "x-evil" not in headers and b"\x1b" not in data and b"\r" not in data
    finally:
        del server.service.models.paths["broken"]


def test_the_page_may_only_load_its_own_files(server):
    status, headers, data = server.raw("GET", "/", Accept="text/html")
    assert status == 200 and headers["content-security-policy"].startswith("default-src 'none'")
    assert b"http://" not in data and b"https://" not in data and b"<script>" not in data
    for name in ("page.js", "page.css", "icon.svg"):
        status, headers, data = server.raw("GET", f"/page/{name}")
        assert status == 200 and (b"://" not in data or name == "icon.svg")
        assert headers["x-content-type-options"] == "nosniff"
    for name in ("__init__.py", "..%2f__init__.py", "%2e%2e/app.py"):
        assert server.raw("GET", f"/page/{name}")[0] == 404
