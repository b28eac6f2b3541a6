"""/openapi.json is true: every route is on it, and requests nobody would write get only what it promises."""

from __future__ import annotations

import os
import re

import pytest

from tiercel.serve.app import routes


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
def test_no_case_of_schemathesis_surprises(server):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    cases = int(os.environ.get("TIERCEL_CASES", "2000"))
    operations = [result.ok() for result in schema.get_all_operations()]
    operations = [op for op in operations if op.path not in ("/api/pull", "/api/delete")]  # these reach for the world
    each = max(cases // len(operations), 1)
    seen = 0

    def try_out(operation):
        allowed = {int(status) for status in operation.definition.raw["responses"]} | {404, 405}

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
                response = case.call()
            except ValueError:  # a header or body that no HTTP client would send
                return
            assert response.status_code < 500 or response.status_code in (503,), (operation.label, response.text)
            assert response.status_code in allowed, (operation.label, response.status_code, response.text)

        check()

    for operation in operations:
        try_out(operation)
    assert seen >= cases // 2
