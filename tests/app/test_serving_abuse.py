"""Hostile requests, a few hundred of those that benchmarks/serving_abuse.py sends by the thousand, and arbitrary JSON."""

from __future__ import annotations

import importlib.util
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nextflow_ar.app.serving.settings import ServerSettings
from nextflow_ar.model.checkpoint import Bundle
from tests.app.serving import Running, running

LIMITS = ServerSettings(
    name="tiny", grace=5, max_body=3_000_000, header_timeout=1.0, body_timeout=2.0, max_open=32
)


@pytest.fixture(scope="module")
def server(bundle: Bundle) -> Iterator[Running]:
    with running(bundle, LIMITS) as up:
        yield up


@pytest.fixture(scope="module")
def abuse() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "serving_abuse.py"
    spec = importlib.util.spec_from_file_location("serving_abuse", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hostile_requests_get_honest_answers(server: Running, abuse: ModuleType) -> None:
    address, found = (server.host, server.port), []
    kinds = [kind for kind in abuse.ATTACKS for _ in range(3 if kind is abuse.slow else 24)]

    def work(numbers: range) -> None:
        found.extend((kinds[i].__name__, abuse.attack(address, kinds[i], random.Random(i))) for i in numbers)

    threads = [threading.Thread(target=work, args=(range(t, len(kinds), 6),)) for t in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == len(kinds)
    assert [one for one in found if not abuse.accepted(one[1])] == []
    assert {"400", "404", "413", "closed"} <= {result for _, result in found}
    server.until_idle()
    with server.http() as http:
        assert http.get("/health").json() == {"status": "ok", "model": "tiny", "open": 0, "working": 0}
        assert http.post("/v1/images/generations", json={"prompt": "a cat"}).status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        "prompt",
        "n",
        "size",
        "stream",
        "partial_images",
        "seed",
        "top_k",
        "top_p",
        "temperature",
        "guidance_scale",
        "think",
        "negative_prompt",
        "messages",
        "max_tokens",
        "max_pictures",
        "stop",
        "modalities",
        "output_format",
    ]
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.dictionaries(FIELDS, JSON, max_size=5) | JSON, chat=st.booleans(), words=st.booleans())
def test_any_json_is_answered(
    server: Running, abuse: ModuleType, body: object, chat: bool, words: bool
) -> None:
    if isinstance(body, dict) and words:
        body = (
            {**body, "messages": [{"role": "user", "content": "two"}]} if chat else {**body, "prompt": "two"}
        )
    path = "/v1/chat/completions" if chat else "/v1/images/generations"
    sent = abuse.post(path, json.dumps(body).encode())
    result = abuse.attack((server.host, server.port), lambda _: sent, random.Random(0))
    assert abuse.accepted(result) and result != "closed"


def test_those_who_dawdle_are_left(server: Running) -> None:
    """Heads that never end are cut off, bodies that never end are told so; both within their time."""
    begun = time.monotonic()
    with socket.create_connection((server.host, server.port), timeout=10) as s:
        s.sendall(b"GET /health HT")
        assert s.recv(100) == b"" and 0.5 < time.monotonic() - begun < 5
    with socket.create_connection((server.host, server.port), timeout=10) as s:
        s.sendall(b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        answer = b""
        while part := s.recv(10_000):  # to the end: head and body may come apart
            answer += part
        assert answer.startswith(b"HTTP/1.1 408") and b'"request_timeout"' in answer
        assert b"connection: close" in answer.lower()
    with socket.create_connection((server.host, server.port), timeout=10) as s:  # idle between two requests
        for _ in range(2):
            s.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += s.recv(10_000)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(1.5)  # longer than a head may take: uvicorn's own five seconds hold here
