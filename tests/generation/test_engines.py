"""Engines in processes of their own: the same results as one engine, and what happens when one of them dies."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nextflow_ar.app.serving.settings import ServerSettings
from nextflow_ar.generation import tidying
from nextflow_ar.generation.base import best_dtype
from nextflow_ar.generation.engine import Engine, Failure, Figures
from nextflow_ar.generation.engines import Engines, EnginesError, Home, _rounds
from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.model.checkpoint import Bundle, load_bundle, save_bundle
from nextflow_ar.types import Done, Event, ImageReady, TextDelta
from nextflow_ar.wire import packed
from tests.app.serving import running


@pytest.fixture(scope="module")
def folder(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("engines") / "model"
    NextFlowPipeline(bundle).save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Iterator[NextFlowPipeline]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes: kernels are chosen by their number too
    place = torch.device("cpu")
    yield NextFlowPipeline(load_bundle(folder, place, best_dtype(place)))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def engines(folder: Path) -> Iterator[Engines]:
    two = Engines(Home(folder, rows=8), 2)
    yield two
    two.close()


def events_of(engines: Engines, seconds: float = 60) -> list[Event | Failure]:
    found: list[Event | Failure] = []
    end = time.monotonic() + seconds
    while engines.busy and time.monotonic() < end:
        found += engines.step()
    assert not engines.busy
    return found


def test_results_are_those_of_one_engine(engines: Engines, loaded: NextFlowPipeline) -> None:
    engine: Engine = loaded.engine
    requests = [
        *loaded.requests(["a dog"] * 5, [3, 4, 5, 6, 7]),
        loaded.thought_request(loaded.requests(["a cat"], [9])[0]),
    ]
    for number, request in enumerate(requests):
        engines.take(engine.job(number, request))
    assert engines.busy and engines.max_rows == 16
    found = events_of(engines)
    wanted = list(engine.run(requests))
    for number in range(5):
        one = [e.codes.target for e in found if isinstance(e, ImageReady) and e.row == number]
        other = [e.codes.target for e in wanted if isinstance(e, ImageReady) and e.row == number]
        assert len(one) == 1 and torch.equal(one[0], other[0])
    said = ["".join(e.text for e in events if isinstance(e, TextDelta)) for events in (found, wanted)]
    assert said[0] == said[1]
    ends = [
        sorted((e.row, e.reason, e.written) for e in events if isinstance(e, Done))
        for events in (found, wanted)
    ]
    assert ends[0] == ends[1] and ends[0][5][2] > 0 and len(ends[0]) == 6
    assert engines.figures.fed > 0


def test_cancelled_and_cleared_requests_are_not_heard_of(engines: Engines, loaded: NextFlowPipeline) -> None:
    requests = loaded.requests(["a dog"] * 4, [1, 2, 3, 4])
    for number, request in enumerate(requests):
        engines.take(loaded.engine.job(number, request))
    assert engines.cancel(2) and not engines.cancel(2) and not engines.cancel(77)
    assert {e.row for e in events_of(engines)} == {0, 1, 3}
    for number, request in enumerate(requests):
        engines.take(loaded.engine.job(number, request))
    engines.clear()
    assert not engines.busy
    engines.take(loaded.engine.job(9, requests[0]))
    assert {e.row for e in events_of(engines)} == {9}


def test_what_fails_is_told_in_one_line(engines: Engines, loaded: NextFlowPipeline) -> None:
    job = loaded.engine.job(0, loaded.requests(["a dog"], [1])[0])
    broken = loaded.engine.job(1, loaded.requests(["a dog"], [1])[0])
    object.__setattr__(broken.request, "schedule", None)
    engines.take(job)
    engines.take(broken)  # the other engine, which has less to do
    found = events_of(engines)
    assert any(isinstance(e, ImageReady) and e.row == 0 for e in found)  # whose request goes on
    (lost,) = [e for e in found if isinstance(e, Failure)]
    assert lost.row == 1 and str(lost.error).startswith("TypeError: ") and "\n" not in str(lost.error)
    assert "Traceback" in lost.error.__notes__[0]  # for the log of the first process
    engines.take(loaded.engine.job(2, job.request))
    engines.take(loaded.engine.job(3, job.request))
    assert {e.row for e in events_of(engines) if isinstance(e, ImageReady)} == {2, 3}


def test_a_request_that_fails_alone_is_done_with(folder: Path, tmp_path: Path) -> None:
    bundle = load_bundle(folder)
    with torch.no_grad():
        bundle.model.head.weight.fill_(torch.nan)
    save_bundle(tmp_path / "nan", bundle.model, bundle.image_tokenizer, bundle.vocab.tokenizer, {}, "# nan\n")
    pipeline = NextFlowPipeline(load_bundle(tmp_path / "nan"))
    one = Engines(Home(tmp_path / "nan"), 1)
    try:
        one.take(pipeline.engine.job(7, pipeline.requests(["a dog"], [1])[0]))
        (failed,) = events_of(one)
        assert isinstance(failed, Failure) and failed.row == 7
        assert not one.cancel(7)  # it is forgotten already
    finally:
        one.close()


def test_an_engine_that_died_is_replaced(folder: Path, loaded: NextFlowPipeline) -> None:
    one = Engines(Home(folder), 1)
    try:
        request = loaded.requests(["a dog"], [1])[0]
        one.take(loaded.engine.job(0, request))
        os.kill(one._lanes[0].process.pid or 0, signal.SIGKILL)
        (lost,) = [e for e in events_of(one) if isinstance(e, Failure)]
        assert lost.row == 0 and "died" in str(lost.error)
        one.take(loaded.engine.job(1, request))
        assert any(isinstance(e, ImageReady) for e in events_of(one))
        process = one._lanes[0].process  # and while nothing is to be done
        process.kill()
        process.join()
        one.take(loaded.engine.job(2, request))
        assert any(isinstance(e, ImageReady) for e in events_of(one))
    finally:
        one.close()
    assert not one._lanes[0].process.is_alive()


def test_what_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(EnginesError, match=r"^[^\n]*nothing[^\n]*$"):
        Engines(Home(tmp_path / "nothing"), 1)


class Loud:
    """Rounds that say a lot."""

    figures, left = Figures(), 0

    @property
    def engine(self) -> Loud:
        return self

    @property
    def busy(self) -> bool:
        return self.left > 0

    def job(self, number: int, request: str) -> str:
        return request

    def take(self, job: str) -> None:
        self.left += 1

    def step(self) -> list[Event]:
        self.left -= 1
        return [TextDelta(0, "x" * 2_000_000)]


def test_freed_memory_goes_back_for_a_hundredth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, trims = [100.0], []

    def trim() -> bool:
        trims.append(now[0])
        now[0] += 0.5
        return True

    monkeypatch.setattr(tidying, "trim", trim)
    monkeypatch.setattr(tidying.time, "monotonic", lambda: now[0])
    tidy = tidying.Tidy()
    for _ in range(200):
        tidy()
        now[0] += 1.0
    assert trims == [100.0, 150.5, 201.0, 251.5]


def test_neither_side_waits_for_the_other_to_read() -> None:
    """More than a pipe holds is handed in while as much comes back."""
    mine, theirs = multiprocessing.Pipe()
    worker = threading.Thread(target=_rounds, args=(theirs, Loud()), daemon=True)
    worker.start()
    assert pickle.loads(mine.recv_bytes())[0] == "ready"

    def hand_in() -> None:
        for number in range(3):
            mine.send_bytes(packed(("take", (number, "y" * 2_000_000))))

    handing = threading.Thread(target=hand_in, daemon=True)
    handing.start()
    handing.join(20)
    assert not handing.is_alive()
    assert [pickle.loads(mine.recv_bytes())[0] for _ in range(3)] == ["events"] * 3
    mine.send_bytes(packed(("end", None)))
    worker.join(20)
    assert not worker.is_alive()


def test_a_server_of_two_engines(folder: Path, loaded: NextFlowPipeline) -> None:
    engines = Engines(Home(folder), 2)
    with running(loaded, ServerSettings(name="tiny", grace=5), engines) as up:
        client = up.client()
        answer = client.images.generate(prompt="a dog", n=4, extra_body={"seed": 5, "think": True})
        assert answer.data is not None and len(answer.data) == 4
        with running(loaded) as plain:
            other = plain.client().images.generate(prompt="a dog", n=4, extra_body={"seed": 5, "think": True})
        assert other.data is not None
        assert [p.b64_json for p in answer.data] == [p.b64_json for p in other.data]
        said = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "hi"}], max_tokens=5
        )
        assert said.usage is not None and said.usage.completion_tokens > 0
        assert "nextflow_ar_prefix_fed_tokens_total" in up.http().get("/metrics").text
        os.kill(engines._lanes[0].process.pid or 0, signal.SIGKILL)
        os.kill(engines._lanes[1].process.pid or 0, signal.SIGKILL)
        again = [
            up.http().post("/v1/images/generations", json={"prompt": "a dog"}).status_code for _ in range(3)
        ]
        assert again[-1] == 200 and set(again) <= {200, 500}
        up.until_idle()
    assert not any(lane.process.is_alive() for lane in engines._lanes)
