"""R11: whatever bytes come over the socket, the server refuses them and goes on."""

from __future__ import annotations

import contextlib
import random
import socket

import pytest

BODY = b'{"model":"tiny","prompt":"hi","max_tokens":1}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


def answer(port: int, data: bytes, half_close: bool = False) -> bytes:
    """The first bytes of what comes back; b"" where the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
        try:
            raw.sendall(data)
            if half_close:
                with contextlib.suppress(OSError):  # it may have closed already: what it said is still to be read
                    raw.shutdown(socket.SHUT_WR)
            raw.settimeout(30)
            return raw.recv(200)
        except (ConnectionError, BrokenPipeError):
            return b""


def chunked(size: int) -> bytes:
    parts = [BODY[at : at + size] for at in range(0, len(BODY), size)]
    return (
        HEAD
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in parts)
        + b"0\r\n\r\n"
    )


def test_chunks_of_a_byte_are_taken_for_a_while_and_then_refused(server):
    assert answer(server.port, chunked(1)).startswith(b"HTTP/1.1 200")
    data = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 100_000
    assert answer(server.port, data)[:12] in (b"HTTP/1.1 400", b"")
    padded = BODY + b" " * 300_000
    many = b"".join(b"64\r\n%s\r\n" % padded[at : at + 100] for at in range(0, len(padded) // 100 * 100, 100))
    data = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + many + b"0\r\n\r\n"
    assert answer(server.port, data).startswith(b"HTTP/1.1 200"), "a hundred bytes a chunk are a slow client's"


def hostile(random: random.Random) -> bytes:
    """A hostile request of a known kind, or noise in a sound one."""
    sound = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    kinds = [
        lambda: HEAD + b"X: " + b"a" * random.choice([60_000, 70_000, 300_000]) + b"\r\n\r\n",
        lambda: HEAD + b"A: b\r\n" * 10_000 + b"\r\n",
        lambda: HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + BODY,
        lambda: HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        lambda: HEAD + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n" + BODY,
        lambda: HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        lambda: HEAD + b"Content-Length: 99999999999999999999\r\n\r\n",
        lambda: HEAD + b"Content-Length: -1\r\n\r\n" + BODY,
        lambda: b"GET /\r\n",
        lambda: b"GET /%00%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        lambda: b"GET //x HTTP/1.1\r\nHost: a/?b\r\n\r\n",
        lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        lambda: sound * 3 + b"junk",
        lambda: sound[: random.randrange(len(sound))],
        lambda: random.randbytes(random.choice([1, 10, 100, 5000])),
        lambda: HEAD + b"Content-Length: 1000\r\nContent-Encoding: gzip\r\n\r\n" + random.randbytes(1000),
        lambda: b"\x16\x03\x01" + random.randbytes(200),
    ]
    if random.random() < 0.5:
        return random.choice(kinds)()
    data = bytearray(sound)
    for _ in range(random.randrange(1, 6)):
        at = random.randrange(len(data))
        data[at : at + random.choice([0, 1, 1, 4])] = random.choice([b"", b"\r\n", b"\0", b":", random.randbytes(3)])
    return bytes(data)


def test_raw_requests_do_no_harm(server, cases, figure):
    memory, threads = _memory(), len(__import__("threading").enumerate())
    count, seen = cases(150, 20_000), {}
    for case in range(count):
        data = hostile(random.Random(f"raw {case}"))
        status = answer(server.port, data, half_close=True)[9:12]
        seen[status] = seen.get(status, 0) + 1
        assert not status.startswith(b"5") or status == b"503", (case, status)
    assert server.ask("GET", "/health")[0] == 200
    grown = (_memory() - memory) >> 20
    assert grown < 32 and len(__import__("threading").enumerate()) - threads < 40
    figure(
        "R11", f"{count} raw requests: 0 deaths, 0 answers of 5xx, memory +{grown} MiB, {dict(sorted(seen.items()))}"
    )


def _memory() -> int:
    import psutil

    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("size", [64 << 10, 1 << 20])
def test_headers_beyond_the_limit_are_431_or_400(server, size):
    status = answer(server.port, HEAD + b"X: " + b"a" * size + b"\r\n\r\n")[9:12]
    assert status in (b"431", b"400", b"")
