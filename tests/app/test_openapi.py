"""The server against its own OpenAPI description: schemathesis makes requests of it, right ones and wrong ones."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from nextflow_ar.app.serving.settings import ServerSettings
from nextflow_ar.model.checkpoint import Bundle
from tests.app.serving import Running, running

LIMITS = ServerSettings(name="tiny", grace=5, max_tokens=4, max_pictures=1, max_n=2)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
OPERATIONS = {
    "GET /v1/models", "GET /v1/models/{model}", "GET /health", "GET /metrics", "POST /v1/images/generations",
    "POST /v1/images/edits", "POST /v1/chat/completions",
}  # fmt: skip
FAST = settings(
    max_examples=30, deadline=timedelta(seconds=20), derandomize=True, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def server(bundle: Bundle) -> Iterator[Running]:
    with running(bundle, LIMITS) as up:
        yield up


@pytest.fixture(scope="module")
def told(server: Running) -> Any:
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


def test_all_operations_are_described(told: Any) -> None:
    found = {operation.ok().label: operation.ok() for operation in told.get_all_operations()}
    assert set(found) == OPERATIONS
    for name, operation in found.items():
        codes = set(operation.definition.raw["responses"])
        assert "200" in codes and (
            not name.startswith("POST") or {"400", "413", "429", "503", "504"} <= codes
        )


ASKED = [(name, mode) for name in sorted(OPERATIONS) for mode in ("POSITIVE", "NEGATIVE")]


@pytest.mark.parametrize(
    ("name", "mode"), [each for each in ASKED if each[1] == "POSITIVE" or each[0].startswith("POST")]
)
def test_answers_are_as_described(server: Running, told: Any, name: str, mode: str) -> None:
    """No 5xx but documented ones, no undocumented status, every body of the described kind and shape."""
    method, path = name.split(" ")
    operation = told[path][method]
    kind = schemathesis.GenerationMode[mode]
    answered: list[int] = []

    @FAST
    @given(data=st.data())
    def hold(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=kind))
        if mode == "POSITIVE" and isinstance(
            case.body, dict
        ):  # what the description cannot know: names and sizes
            case.body = {
                k: v for k, v in case.body.items() if k not in ("model", "size", "n", "max_pictures")
            }
        response = case.call(base_url=server.url)
        answered.append(response.status_code)
        case.validate_response(response, checks=CHECKS)

    hold()
    assert len(answered) >= (20 if method == "POST" else 1)
    if mode == "NEGATIVE":
        assert sum(400 <= status < 500 for status in answered) > len(answered) / 2
    elif name in ("POST /v1/images/generations", "GET /v1/models", "GET /health", "GET /metrics"):
        assert 200 in answered
    server.until_idle()
    assert httpx.get(server.url + "/health").json()["status"] == "ok"
