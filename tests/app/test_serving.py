"""The server as its clients meet it: the official ``openai`` package, unmodified, and what goes wrong."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time

import numpy as np
import openai
import pytest
import torch
from PIL import Image as PILImage

from nextflow_ar.app.serving.settings import ServerSettings
from nextflow_ar.generation import jobs
from nextflow_ar.generation.pipeline import NextFlowPipeline, fold_seed
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.types import Codes, ScaleReady
from tests.app.serving import Running, running


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return server.client()


def opened(b64: str | None) -> np.ndarray:
    assert b64 is not None
    return np.asarray(PILImage.open(io.BytesIO(base64.b64decode(b64))))


def png(picture: PILImage.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def same(found: np.ndarray, picture: PILImage.Image) -> bool:
    return np.array_equal(found, np.asarray(picture))


RED = PILImage.new("RGB", (40, 40), (220, 30, 30))
URL = "data:image/png;base64," + base64.b64encode(png(RED)).decode()


def test_pictures_are_the_pipelines_own(client: openai.OpenAI, pipeline: NextFlowPipeline) -> None:
    asked = {"seed": 5, "guidance_scale": [1.0, 2.0], "top_k": 12, "top_p": 0.9, "temperature": 6.0}
    found = client.images.generate(
        prompt="two dogs", model="tiny", n=2, size="40x40", response_format="b64_json", extra_body=asked
    )
    settings = pipeline.defaults.changed(guidance=(1.0, 2.0), top_k=12, top_p=0.9, temperature=6.0)
    wanted = pipeline.generate("two dogs", n=2, seed=5, settings=settings)
    assert found.data is not None and len(found.data) == 2 and not same(np.asarray(wanted[0]), wanted[1])
    assert all(same(opened(one.b64_json), picture) for one, picture in zip(found.data, wanted, strict=True))
    assert [one.model_extra["seed"] for one in found.data] == [5, fold_seed(5, 1)]
    assert found.size == "40x40" and found.usage is not None
    tokens = len(pipeline.bundle.vocab.encode("two dogs")) + 1  # and <boi>
    assert found.usage.input_tokens == tokens and found.usage.output_tokens == 2 * 55
    asked |= {"negative_prompt": "a cat", "guidance_scale": 30.0}
    other = client.images.generate(prompt="two dogs", extra_body=asked)
    wanted = pipeline.generate("two dogs", seed=5, settings=settings.changed(guidance=30.0))
    assert other.data is not None and not same(opened(other.data[0].b64_json), wanted[0])


def test_partial_pictures_are_the_scales(client: openai.OpenAI, pipeline: NextFlowPipeline) -> None:
    request = pipeline.requests(["two dogs"], [7])[0]
    scales: list[ScaleReady] = []
    picture = pipeline.draw(
        [request], on_event=lambda e: scales.append(e) if isinstance(e, ScaleReady) else None
    )
    stream = client.images.generate(
        prompt="two dogs", stream=True, partial_images=2, output_format="webp", output_compression=100,
        extra_body={"seed": 7},
    )  # fmt: skip
    events = list(stream)
    kinds = ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.type for event in events] == kinds
    assert [getattr(event, "partial_image_index", None) for event in events] == [0, 1, None]
    assert opened(events[0].b64_json).shape == (40, 40, 3) and events[0].output_format == "webp"
    lossless = client.images.generate(
        prompt="two dogs", stream=True, partial_images=2, extra_body={"seed": 7}
    )
    for event, k in zip(lossless, (2, 4, 5), strict=True):
        wanted = picture[0] if k == 5 else pipeline.preview(request.schedule, scales[k - 1].codes, k)
        assert same(opened(event.b64_json), wanted)
    assert event.type == "image_generation.completed" and event.usage.output_tokens == 55


def test_a_thought_comes_before_the_picture(client: openai.OpenAI, pipeline: NextFlowPipeline) -> None:
    found = client.images.generate(prompt="two dogs", extra_body={"seed": 3, "think": True})
    asked = pipeline.think(pipeline.requests(["two dogs"], [3]))
    assert found.data is not None
    assert found.data[0].model_extra["thought"] == asked[0].document.segments[-1].text
    assert same(opened(found.data[0].b64_json), pipeline.draw(asked)[0])
    assert found.usage is not None and found.usage.output_tokens_details is not None
    assert found.usage.output_tokens_details.text_tokens > 0


def test_edits_and_masks(client: openai.OpenAI, pipeline: NextFlowPipeline) -> None:
    found = client.images.edit(image=("a.png", png(RED)), prompt="make it blue", extra_body={"seed": 2})
    assert found.data is not None
    assert same(opened(found.data[0].b64_json), pipeline.edit(RED, "make it blue", seed=2)[0])
    blue = PILImage.new("RGB", (40, 40), (20, 40, 230))
    several = [("a.png", png(RED)), ("b.png", png(blue))]
    found = client.images.edit(image=several, prompt="both", extra_body={"seed": 2, "top_k": "3,9"})
    settings = pipeline.defaults.changed(top_k=(3, 9))
    assert found.data is not None and found.usage is not None
    assert same(
        opened(found.data[0].b64_json), pipeline.edit([RED, blue], "both", seed=2, settings=settings)[0]
    )
    assert found.usage.input_tokens_details.image_tokens == 2 * (54 + 25)
    clear = PILImage.new("RGBA", (40, 40), (0, 0, 0, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 20, 20))  # OpenAI's masks: transparent is redrawn
    area = np.zeros((40, 40), bool)
    area[:20, :20] = True
    wanted = pipeline.inpaint(RED, area, "two dogs", seed=4)[0]
    assert not same(opened(base64.b64encode(png(pipeline.reconstruct(RED))).decode()), wanted)
    white = PILImage.fromarray(area.astype(np.uint8) * 255)  # and white in masks without transparency
    for mask in (clear, white):
        events = list(
            client.images.edit(
                image=("a.png", png(RED)), mask=("m.png", png(mask)), prompt="two dogs", stream=True,
                partial_images=1, extra_body={"seed": 4},
            )
        )  # fmt: skip
        assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
        assert same(opened(events[-1].b64_json), wanted)


@pytest.fixture(autouse=True)
def nothing_in_work(server: Running) -> None:
    """What another test left behind takes no words of a script."""
    server.until_idle()


def writes(monkeypatch: pytest.MonkeyPatch, bundle: Bundle, *script: str) -> list[Codes]:
    """Let the model write the script: texts, and an image at each "<boi>"."""
    vocab, true_draw, drawn = bundle.vocab, jobs.draw, []
    ids = [i for part in script for i in ([vocab.boi] if part == "<boi>" else vocab.encode(part))]
    left = [*ids, vocab.end]

    def draw(scores: torch.Tensor, *settings: object) -> torch.Tensor:
        if scores.shape[1] == vocab.text_size:
            return torch.tensor([left.pop(0)])
        return true_draw(scores, *settings)  # type: ignore[arg-type]

    monkeypatch.setattr(jobs, "draw", draw)
    return drawn


def test_chat_reads_and_draws(
    client: openai.OpenAI, bundle: Bundle, pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "manner", type(pipeline.manner)(True))
    shown = {"type": "image_url", "image_url": {"url": URL}}
    messages: list = [{"role": "user", "content": [{"type": "text", "text": "two dogs"}, shown]}]
    writes(monkeypatch, bundle, "a cat", "<boi>", " the end")
    answer = client.chat.completions.create(model="tiny", messages=messages, seed=3, max_tokens=30)
    message = answer.choices[0].message
    assert message.content == "a cat the end" and answer.choices[0].finish_reason == "stop"
    image = message.model_extra["images"][0]
    assert image["offset"] == 5 and image["type"] == "image_url"
    assert opened(image["image_url"]["url"].partition(",")[2]).shape == (40, 40, 3)
    said = len(bundle.vocab.encode("a cat")) + len(bundle.vocab.encode(" the end"))
    assert answer.usage is not None and answer.usage.completion_tokens == said + 55
    assert answer.usage.prompt_tokens_details.image_tokens == 54 + 25

    writes(monkeypatch, bundle, "a cat", "<boi>", " the end")
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, seed=3, max_tokens=30, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant" and "".join(d.content or "" for d in deltas) == message.content
    drawn = [d.model_extra["images"][0] for d in deltas if "images" in (d.model_extra or {})]
    assert drawn == [image] and chunks[-1].usage == answer.usage
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"

    writes(monkeypatch, bundle, "two")  # the answer is given back as it came, its picture between its words
    asked = []
    true_job = pipeline.engine.job
    monkeypatch.setattr(pipeline.engine, "job", lambda n, r: asked.append(r) or true_job(n, r))
    once_more: list = [messages[0], message, {"role": "user", "content": "two"}]
    client.chat.completions.create(
        model="tiny", messages=once_more, max_tokens=2, extra_body={"max_pictures": 0}
    )
    kinds = [getattr(s, "text", type(s).__name__) for s in asked[-1].document.segments]
    at = kinds.index("a cat")
    assert kinds[at : at + 3] == ["a cat", "Image", "the end"]


def test_stop_texts_end_the_answer(
    server: Running, client: openai.OpenAI, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stream in (False, True):
        server.until_idle()  # an answer that is stopped is given before its row is dropped
        writes(monkeypatch, bundle, "two dogs and a cat and a frog")
        found = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "two"}], stop=["a c", "frog"], stream=stream,
            max_tokens=40,
        )  # fmt: skip
        whole = "" if stream else found.choices[0].message.content
        assert (
            "".join(c.choices[0].delta.content or "" for c in found) if stream else whole
        ) == "two dogs and "


def test_models_health_and_figures(server: Running, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "nextflow-ar"
    with server.http() as http:
        assert http.get("/health").json()["status"] == "ok"
        client.images.generate(prompt="a cat")
        page = http.get("/metrics").text
        line = 'nextflow_ar_requests_total{method="POST",route="/v1/images/generations",status="200"}'
        assert line in page and "nextflow_ar_orders_open 0.0" in page
        told = http.get("/openapi.json").json()
        assert told["components"]["schemas"]["ImageBody"]["required"] == ["prompt"]
        answer = http.get("/health", headers={"x-request-id": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        made_up = http.get("/health", headers={"x-request-id": 'a"b'}).headers["x-request-id"]
        assert made_up.startswith("req_")


WRONG = [
    ({"prompt": ""}, 400, None, "the prompt is empty"),
    ({"prompt": "a", "promt": 1}, 400, "unknown_parameter", "Unknown parameter: 'promt'."),
    ({}, 400, "missing_required_parameter", "Missing required parameter: 'prompt'."),
    ({"prompt": 3}, 400, "invalid_value", "prompt: Input should be a valid string"),
    ({"prompt": "a", "n": 0}, 400, "invalid_value", "n: "),
    ({"prompt": "a", "n": 10**9}, 400, "invalid_value", "n: at most 10"),
    ({"prompt": "a", "size": "1x1x1"}, 400, "invalid_value", "size: takes WIDTHxHEIGHT"),
    ({"prompt": "a", "size": "1024x1024"}, 400, None, "no scale schedule covers 1024x1024"),
    ({"prompt": "a", "model": "gpt-image-1"}, 404, "model_not_found", "The model 'gpt-image-1'"),
    ({"prompt": "a", "seed": -1}, 400, "invalid_value", "seed: "),
    ({"prompt": "a", "top_p": 2}, 400, None, "top-p is a number above 0"),
    ({"prompt": "a", "top_k": [1, 2, 3]}, 400, None, "top-k takes one value, two"),
    ({"prompt": "a", "response_format": "url"}, 400, "invalid_value", "response_format: "),
    ({"prompt": "two dogs " * 200}, 400, "context_length_exceeded", "the model's context holds 256"),
    ({"prompt": "a" * 40_000}, 400, "string_too_long", "prompt: at most 32000"),
]


@pytest.mark.parametrize(("body", "status", "code", "message"), WRONG, ids=[str(w[3]) for w in WRONG])
def test_wrong_requests_are_told_in_openais_shape(
    server: Running, body: dict, status: int, code: str | None, message: str
) -> None:
    with server.http() as http:
        answer = http.post("/v1/images/generations", json=body)
    error = answer.json()["error"]
    assert answer.status_code == status and set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code and error["message"].startswith(message.split("the model's")[0][:10])
    assert message in error["message"] and error["type"] == "invalid_request_error"


def test_other_wrong_requests(server: Running, client: openai.OpenAI) -> None:
    with server.http() as http:
        for made, status, code in (
            (lambda: http.get("/v1/nothing"), 404, "not_found"),
            (lambda: http.get("/v1/images/edits"), 405, "method_not_allowed"),
            (lambda: http.post("/v1/images/generations", content=b'{"prompt": "\\ud800"}'), 400, "invalid_json"),
            (lambda: http.post("/v1/images/generations", content=b"[" * 100_000), 400, "invalid_json"),
            (lambda: http.post("/v1/images/generations", content=b'{"prompt":"a","seed":NaN}'), 400, None),
            (lambda: http.post("/v1/images/edits", json={}), 400, "invalid_content_type"),
            (lambda: http.post("/v1/images/edits", files={"image": b"no picture"}, data={"prompt": "x"}), 400,
             "invalid_image"),
            (lambda: http.post("/v1/images/edits", files={"image": png(RED)}, data={}), 400,
             "missing_required_parameter"),
            (lambda: http.post("/v1/images/edits", files={"mask": png(RED)}, data={"prompt": "x"}), 400,
             "missing_required_parameter"),
        ):  # fmt: skip
            answer = made()
            assert answer.status_code == status, answer.text
            assert code is None or answer.json()["error"]["code"] == code
    parts = [
        ({"url": "data:image/png;base64,!!!"}, "invalid_base64"),
        ({"url": "data:image/png,abc"}, "invalid_image_url"),
        ({"url": "http://127.0.0.1/a.png"}, "invalid_image_url"),
        ({"url": "data:image/png;base64,AAAA"}, "invalid_image"),
    ]
    for address, code in parts:
        content: list = [{"type": "image_url", "image_url": address}]
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])
        assert caught.value.code == code and caught.value.param == "messages.0.content.0.image_url"
    with pytest.raises(openai.BadRequestError, match="the conversation is empty"):
        client.chat.completions.create(model="tiny", messages=[{"role": "system", "content": "hm"}])
    with pytest.raises(openai.BadRequestError, match="40x40; say auto"):
        client.images.edit(image=("a.png", png(RED)), prompt="x", size="24x24")


def test_keys_limits_and_pictures_too_large(pipeline: NextFlowPipeline) -> None:
    settings = ServerSettings(
        name="tiny", keys=("one", "zwei-ü"), max_body=3000, max_pixels=2000, max_inputs=2
    )
    with running(pipeline, settings) as up:
        for key in ("wrong", "", "onE"):
            with pytest.raises(openai.AuthenticationError) as caught:
                up.client(key or "x").images.generate(prompt="a cat")
            assert caught.value.code == "invalid_api_key"
        assert up.client("one").models.list().data[0].id == "tiny"
        with up.http() as http:
            assert http.get("/v1/models").status_code == 401 and http.get("/health").status_code == 200
            headers = {b"authorization": "bearer zwei-ü".encode()}
            assert http.get("/v1/models", headers=headers).status_code == 200
            headers = {"authorization": "Bearer one"}
            big = http.post("/v1/images/generations", content=b"x" * 3001, headers=headers)
            assert big.status_code == 413 and big.json()["error"]["code"] == "request_too_large"
            pieces = (b"x" * 1000 for _ in range(9))  # chunked: no length is told
            assert http.post("/v1/images/generations", content=pieces, headers=headers).status_code == 413
        large = png(PILImage.new("1", (50, 50)))
        with pytest.raises(
            openai.BadRequestError, match=r"50x50 pixels are too many; up to 0\.002 megapixels"
        ):
            up.client("one").images.edit(image=("a.png", large), prompt="x")
        with pytest.raises(openai.BadRequestError, match="at most 2 pictures"):
            up.client("one").images.edit(image=[("a.png", png(RED))] * 3, prompt="x")


class Gated:
    """The engine's steps, each let through by hand."""

    def __init__(self, up: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes = threading.Semaphore(0)
        true_feed = up.service.pipeline.engine.feed
        self.open = self.held = False

        def feed(tracks: object) -> None:
            while not self.open and not self.passes.acquire(timeout=0.02):
                self.held = True
            self.held = False
            true_feed(tracks)  # type: ignore[arg-type]

        monkeypatch.setattr(up.service.pipeline.engine, "feed", feed)


def wait(what: object, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.005)
    assert what()  # type: ignore[operator]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_leaves_frees_its_place_within_one_step(
    server: Running, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    gate, worker = Gated(server, monkeypatch), server.service.worker
    began = worker.steps
    body = {"prompt": "two dogs", "seed": 1, "stream": stream, "partial_images": 3, "guidance_scale": 1.0}
    text = json.dumps(body).encode()
    raw = socket.create_connection((server.host, server.port))
    raw.sendall(
        b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(text) + text
    )
    wait(lambda: worker.working == 1)
    for _ in range(2):
        gate.passes.release()
    wait(lambda: worker.steps == began + 2 and gate.held)  # the third step is under way
    assert worker.working == 1
    before = server.service.metrics.cancelled._value.get()
    raw.close()
    wait(
        lambda: not worker._inbox.empty()
    )  # the loop sees the closed connection while the third step is held
    assert gate.held and worker.steps == began + 2
    gate.passes.release()
    wait(lambda: worker.open == 0)
    assert worker.steps == began + 3 and worker.working == 0  # five scales were asked for
    assert server.service.metrics.cancelled._value.get() == before + 1
    gate.open = True


def test_a_full_queue_and_other_clients(pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(pipeline, ServerSettings(name="tiny", max_open=3, timeout=1.0)) as up:
        gate = Gated(up, monkeypatch)
        answers: list = []

        def ask(n: int) -> None:
            try:
                answers.append(up.client().images.generate(prompt="a cat", n=n))
            except openai.APIStatusError as error:
                answers.append(error)

        first = threading.Thread(target=ask, args=(2,))
        first.start()
        wait(lambda: up.service.worker.open == 2)
        ask(2)
        assert isinstance(answers[0], openai.RateLimitError) and answers[0].code == "queue_full"
        assert 1 <= int(answers[0].response.headers["retry-after"]) <= 60
        first.join()  # nothing moves: the time of a request ends
        assert isinstance(answers[1], openai.InternalServerError) and answers[1].status_code == 504
        gate.open = True
        up.until_idle()
        ask(3)
        assert len(answers[2].data) == 3


def test_a_failing_engine_is_a_500_and_the_server_goes_on(
    pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(pipeline) as up:
        with monkeypatch.context() as broken:
            broken.setattr(up.service.pipeline.engine, "feed", lambda tracks: 1 / 0)
            with pytest.raises(openai.InternalServerError) as caught:
                up.client().images.generate(prompt="a cat")
            assert caught.value.status_code == 500 and "ZeroDivision" not in str(caught.value)
            with pytest.raises(openai.APIError, match="the server failed"):
                list(up.client().images.generate(prompt="a cat", stream=True))
        assert up.client().images.generate(prompt="a cat").data
        assert up.service.metrics.failures._value.get() == 2


def test_stopping_finishes_or_fails_cleanly(
    pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, object] = {}

    def ask(up: Running, name: str, **given: object) -> None:
        try:
            got = up.client().images.generate(prompt="a cat", **given)  # type: ignore[call-overload]
            found[name] = list(got) if given else got
        except openai.OpenAIError as error:
            found[name] = error

    with running(pipeline, ServerSettings(name="tiny", grace=20)) as up:  # all is finished within the grace
        gate = Gated(up, monkeypatch)
        asking = [
            threading.Thread(target=ask, args=(up, "whole")),
            threading.Thread(target=ask, args=(up, "streamed"), kwargs={"stream": True}),
        ]
        [thread.start() for thread in asking]
        wait(lambda: up.service.worker.open == 2)
        up.server.should_exit = True
        wait(lambda: up.service.worker.draining)
        gate.open = True
        [thread.join() for thread in asking]
    assert found["whole"].data and found["streamed"][-1].type == "image_generation.completed"  # type: ignore
    with running(pipeline, ServerSettings(name="tiny", grace=0.3)) as up:  # it is not
        gate = Gated(up, monkeypatch)
        asking = [
            threading.Thread(target=ask, args=(up, "whole")),
            threading.Thread(target=ask, args=(up, "streamed"), kwargs={"stream": True}),
        ]
        [thread.start() for thread in asking]
        wait(lambda: up.service.worker.open == 2)
        up.server.should_exit = True
        time.sleep(1.0)
        gate.passes.release()  # the step under way ends, and with it the work
        [thread.join() for thread in asking]
        gate.open = True
    assert isinstance(found["whole"], openai.InternalServerError) and found["whole"].status_code == 503
    assert found["whole"].code == "shutting_down"
    assert isinstance(found["streamed"], openai.APIError) and "shutting down" in str(found["streamed"])
