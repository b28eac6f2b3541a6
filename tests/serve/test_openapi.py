"""/openapi.json is true: every route is on it, and requests nobody would write get only what it promises."""

from __future__ import annotations

import os
import re

import pytest

from tiercel.serve.routes import routes


def test_every_route_is_described(server):
    page = server.ask("GET", "/openapi.json")[1]
    for route in routes():
        path = route.path.replace("{model:path}", "{model}")
        if path == "/page/{name}":
            continue  # the page's own files
        methods = {method.lower() for method in route.methods} - {"head"}
        assert methods <= set(page["paths"][path]), path
    words = str(page)
    assert not re.search(r"#/\$defs", words)
    names = set(re.findall(r"#/components/schemas/(\w+)", words))
    assert names <= set(page["components"]["schemas"])


@pytest.mark.slow
def test_no_case_of_schemathesis_surprises(start, checkpoints, tmp_path, monkeypatch):
    """All routes, also those that change the disk: its models are in a folder of the test's, its hub is nowhere."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    monkeypatch.setenv("TIERCEL_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr("tiercel.hub.local_models.KNOWN", {})
    # requests come one at a time, and a model has its own place: nobody is ever sent away
    patient = {"first_token_timeout": 3600, "token_timeout": 3600, "body_timeout": 300}
    server = start(slots=4, models=4, cache_bytes=1 << 26, **patient)
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    cases = int(os.environ.get("TIERCEL_CASES", "2000"))
    operations = [result.ok() for result in schema.get_all_operations()]
    seen = 0
    with_body = sum(operation.method != "get" for operation in operations)

    def try_out(operation):
        each = max(cases // with_body, 1) if operation.method != "get" else 20  # the others have nothing to vary
        allowed = {int(status) for status in operation.definition.raw["responses"]}

        @given(case=operation.as_strategy())
        @settings(max_examples=each, deadline=None, database=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        def check(case):
            nonlocal seen
            seen += 1
            if isinstance(case.body, dict):
                case.body["model"] = "tiny" if seen % 3 else case.body.get("model", "tiny")
                for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                    if case.body.get(name) is None and operation.path.startswith("/v1"):
                        case.body[name] = 4
                if operation.path.startswith("/api"):
                    case.body["options"] = {"num_predict": 4}
            try:
                response = case.call(timeout=300)
            except ValueError:  # a header or body that no HTTP client would send
                return
            offline = operation.path == "/api/pull" and response.status_code == 502
            assert response.status_code < 500 or offline, (operation.label, response.status_code, response.text)
            assert response.status_code in allowed, (operation.label, response.status_code, response.text)

        check()

    for operation in operations:
        try_out(operation)
    assert seen >= cases * 0.9
    assert (
        server.ask("POST", "/api/generate", {"model": "tiny", "options": {"num_predict": 2}, "prompt": "x"})[0] == 200
    )
