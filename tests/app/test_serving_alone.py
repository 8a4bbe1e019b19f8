"""What one client asks wrongly, or what fails of it, is nobody else's: their requests in work are answered as ever."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from nextflow_ar.app.serving.settings import ServerSettings
from nextflow_ar.generation import jobs
from nextflow_ar.generation.engines import Engines, Home
from nextflow_ar.generation.jobs import Drawing, Job
from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.generation.sampling import SamplingSettings
from tests.app.serving import Running, running
from tests.app.test_serving import Gated, wait

DRAW, CHAT = "/v1/images/generations", "/v1/chat/completions"
OTHERS = {"prompt": "two dogs", "n": 2, "seed": 1}
SAID = {"messages": [{"role": "user", "content": "two dogs"}], "seed": 1, "max_tokens": 8}
ALONE = {"prompt": "a cat", "seed": 77, "temperature": 4.0}


@pytest.fixture(scope="module")
def wanted(server: Running) -> list[str]:
    """The other client's pictures, drawn alone."""
    return pictures(post(server, DRAW, OTHERS))


def post(up: Running, path: str, body: dict[str, Any]) -> httpx.Response:
    with up.http() as http:
        return http.post(path, json=body)


def pictures(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [one["b64_json"] for one in answer.json()["data"]]


def beside(up: Running, monkeypatch: pytest.MonkeyPatch, ask: Callable[[], None]) -> httpx.Response:
    """What another client, whose pictures are in work meanwhile, is answered. ``ask`` may leave requests behind."""
    found: list[httpx.Response] = []
    with monkeypatch.context() as patch:
        gate, before = Gated(up, patch), up.service.worker.open
        other = threading.Thread(target=lambda: found.append(post(up, DRAW, OTHERS)))
        other.start()
        wait(lambda: up.service.worker.working == before + 2 and gate.held)
        gate.passes.release()
        wait(lambda: gate.held)  # its first scale is drawn, the second one is held
        try:
            ask()
        finally:
            gate.open = True
            other.join(30)
    return found[0]


def logged(caplog: pytest.LogCaptureFixture) -> str:
    """The one error that the worker logged of an order, with its trace."""
    (record,) = [each for each in caplog.records if each.getMessage() == "an order failed"]
    assert record.exc_info is not None and record.exc_info[0] is not None
    return logging.Formatter().formatException(record.exc_info)


PICTURES = [
    ({"temperature": [1.0, 0.5, 0.2]}, "temperature takes one value, two (first and last scale) or one for each of the 5"),
    ({"guidance_scale": [1.0, 2.0, 3.0]}, "guidance takes one value, two (first and last scale) or one for each of the 5"),
    ({"temperature": 1e300}, "temperature is a number from 0 to 100, got 1e+300"),
    ({"guidance_scale": 1e38}, "guidance is a number from 0 to 100, got 1e+38"),
    ({"guidance_scale": [1.0, 1e300]}, "guidance is a number from 0 to 100, got 1e+300"),
]  # fmt: skip
WORDS = [
    ({"temperature": [1.0, 0.5, 0.2]}, "temperature: takes one value in a conversation, got 3"),
    ({"temperature": [1.0, 0.0]}, "temperature: takes one value in a conversation, got 2"),
    ({"top_p": [0.9, 0.9, 0.9]}, "top_p: takes one value in a conversation, got 3"),
    ({"top_k": [3, 2, 1]}, "top_k: takes one value in a conversation, got 3"),
    *(one for one in PICTURES if not isinstance(one[0].get("temperature"), list)),
]
WRONG = [(DRAW, {"prompt": "a cat"}, *one) for one in PICTURES] + [(CHAT, SAID, *one) for one in WORDS]


@pytest.mark.parametrize(("path", "body", "wrong", "line"), WRONG, ids=[f"{w[0][4:8]}-{w[2]}" for w in WRONG])
def test_wrong_settings_are_a_400_and_nobody_else_notices(
    server: Running,
    wanted: list[str],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, Any],
    wrong: dict[str, Any],
    line: str,
) -> None:
    failures = server.service.metrics.failures._value.get()

    def ask() -> None:
        answer = post(server, path, {**body, **wrong})  # refused while the engine stands still
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["type"] == "invalid_request_error", answer.text
        assert error["message"].startswith(line) and "\n" not in error["message"]

    assert pictures(beside(server, monkeypatch, ask)) == wanted
    assert server.service.metrics.failures._value.get() == failures


@pytest.mark.parametrize("path", [DRAW, CHAT])
@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-38, 1e-6])
def test_next_to_no_temperature_is_none(
    server: Running, wanted: list[str], monkeypatch: pytest.MonkeyPatch, path: str, temperature: float
) -> None:
    body = SAID if path == CHAT else {"prompt": "a cat", "seed": 3}
    greedy = post(server, path, {**body, "temperature": 0}).json()
    found: list[httpx.Response] = []
    asking = threading.Thread(
        target=lambda: found.append(post(server, path, {**body, "temperature": temperature}))
    )

    def ask() -> None:
        asking.start()
        wait(lambda: server.service.worker.open == 3)

    assert pictures(beside(server, monkeypatch, ask)) == wanted
    asking.join(30)
    assert found[0].status_code == 200, found[0].text
    answer = found[0].json()
    if path == CHAT:
        assert answer["choices"] == greedy["choices"]
    else:
        assert answer["data"] == greedy["data"]


def test_a_list_of_guidance_is_the_pictures(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    take = server.service.worker.engine.job
    monkeypatch.setattr(
        server.service.worker.engine, "job", lambda n, request: seen.append(request) or take(n, request)
    )
    for given in ([3.0, 1.0], [1.0, 2.0, 3.0, 2.0, 1.0]):
        answer = post(server, CHAT, {**SAID, "guidance_scale": given, "temperature": [0.5]})
        assert answer.status_code == 200, answer.text
        assert seen[-1].image_settings.guidance == tuple(given) and seen[-1].settings.temperature == (0.5,)
        assert seen[-1].settings.guidance == 1.0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_fails_of_one_request_fails_it_alone(
    server: Running,
    wanted: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stream: bool,
) -> None:
    true_sample, failures = Drawing.sample, server.service.metrics.failures._value.get()

    def sample(drawing: Drawing, generator: torch.Generator) -> None:
        if drawing.k == 2 and drawing.settings.temperature == ALONE["temperature"]:
            raise IndexError("index out of range in self")
        true_sample(drawing, generator)

    monkeypatch.setattr(Drawing, "sample", sample)
    found: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: found.append(post(server, DRAW, {**ALONE, "stream": stream})))

    def ask() -> None:
        asking.start()
        wait(lambda: server.service.worker.open == 3)

    with caplog.at_level(logging.ERROR, "nextflow_ar.serving"):
        assert pictures(beside(server, monkeypatch, ask)) == wanted
        asking.join(30)
    assert "the server failed at this request" in found[0].text and "index out of range" not in found[0].text
    assert found[0].status_code == (200 if stream else 500)
    assert "IndexError: index out of range in self" in logged(caplog)
    assert server.service.metrics.failures._value.get() == failures + 1
    server.until_idle()


def test_scores_that_are_no_numbers_fail_one_request(
    server: Running, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words' scores are broken here: whoever has words written fails, pictures go on."""
    true_draw = jobs.draw

    def draw(scores: torch.Tensor, *settings: Any) -> torch.Tensor:
        words = scores.shape[1] == server.service.pipeline.bundle.vocab.text_size
        return true_draw(scores * float("nan") if words else scores, *settings)

    monkeypatch.setattr(jobs, "draw", draw)
    found: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: found.append(post(server, CHAT, SAID)))

    def ask() -> None:
        asking.start()
        wait(lambda: server.service.worker.open == 3)

    assert pictures(beside(server, monkeypatch, ask)) == wanted
    asking.join(30)
    assert found[0].status_code == 500


def test_an_engines_process_goes_on_with_the_others(
    pipeline: NextFlowPipeline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    engines = Engines(Home(tmp_path / "model"), 1)
    loaded = NextFlowPipeline.from_pretrained(tmp_path / "model")
    true_take, held = engines.take, []

    def take(job: Job) -> None:
        """Hand in all three together, the other client's before it."""
        held.append(job)
        if len(held) == 3:
            for each in sorted(held, key=lambda each: each.request.seed == ALONE["seed"]):
                if each.request.seed == ALONE["seed"]:  # no request can be made so: its first scale fails
                    object.__setattr__(
                        each.request, "settings", SamplingSettings(temperature=(1.0, 0.5, 0.2))
                    )
                true_take(each)

    with running(loaded, ServerSettings(name="tiny", grace=5), engines) as up:
        wanted = pictures(post(up, DRAW, OTHERS))
        found: dict[int, httpx.Response] = {}

        def ask(body: dict[str, Any]) -> None:
            found[body["seed"]] = post(up, DRAW, body)

        asking = [threading.Thread(target=ask, args=(body,)) for body in (OTHERS, ALONE)]
        with caplog.at_level(logging.ERROR, "nextflow_ar.serving"), monkeypatch.context() as patch:
            patch.setattr(engines, "take", take)
            [thread.start() for thread in asking]
            [thread.join(60) for thread in asking]
        assert found[ALONE["seed"]].status_code == 500 and pictures(found[OTHERS["seed"]]) == wanted
        assert "SettingError: temperature takes one value" in logged(caplog)  # of the other process
        up.until_idle()
        assert not engines.busy and up.service.metrics.failures._value.get() == 1
        assert pictures(post(up, DRAW, OTHERS)) == wanted
