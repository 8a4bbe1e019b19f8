"""Several texts of one side in a row, and answers of nothing: server, command and page ask what training has in a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from nextflow_ar.app.chat_command import Talk
from nextflow_ar.app.ui.chat import chat_steps
from nextflow_ar.app.ui.history import History
from nextflow_ar.generation.engine import WriteRequest
from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.types import Document, Done, Text
from tests.app.serving import running
from tests.conftest import tiny_bundle


@pytest.fixture
def pipeline() -> NextFlowPipeline:
    bundle = tiny_bundle()
    bundle.generation["dialogue"] = True
    return NextFlowPipeline(bundle)


def said(document: Document) -> list[str]:
    """What is said in a document, without the marks of its turns."""
    kept = ("user\n", "assistant\n", "\n")
    return [one.text for one in document.segments if isinstance(one, Text) and one.text not in kept]


def silent(pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let the model answer nothing; returns what it is asked."""
    asked: list[list[str]] = []

    def run(requests: list[WriteRequest]) -> list[Done]:
        asked.append(said(requests[0].document))
        return [Done(0, "stop")]

    monkeypatch.setattr(pipeline.engine, "run", run)
    return asked


def test_the_server(pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    true_job = pipeline.engine.job
    monkeypatch.setattr(pipeline.engine, "job", lambda n, r: asked.append(said(r.document)) or true_job(n, r))
    conversations: list[Any] = [
        [{"role": "user", "content": [{"type": "text", "text": "two"}, {"type": "text", "text": "dogs"}]}],
        [{"role": "user", "content": "two"}, {"role": "user", "content": "dogs"}],
        [
            {"role": "user", "content": "two"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "dogs"},
        ],
    ]
    with running(pipeline) as up:
        for messages in conversations:
            more = {"max_pictures": 0}
            up.client().chat.completions.create(
                model="tiny", messages=messages, max_tokens=1, extra_body=more
            )
            assert asked.pop() == ["two\ndogs"]


def test_the_command(pipeline: NextFlowPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = silent(pipeline, monkeypatch)
    talk = Talk(pipeline, tmp_path, pipeline.defaults, None, 8, 1, 0, lambda *_, **__: None)
    for line in ("two", "dogs", "red"):
        assert talk.hear(line)
    assert asked == [["two"], ["two\ndogs"], ["two\ndogs\nred"]]


def test_the_page(pipeline: NextFlowPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    asked, turns = silent(pipeline, monkeypatch), []
    PILImage.new("RGB", (40, 40)).save(tmp_path / "a.png")
    for text, files in (("two", []), ("dogs", []), ("red", [str(tmp_path / "a.png")])):
        steps = chat_steps(
            pipeline, History(), [], turns, {"text": text, "files": files}, 8, 1, 0, False, 2.0, 1.0, 0, 0.95
        )
        turns = list(steps)[-1][2]
    assert asked == [["two"], ["two\ndogs"], ["two\ndogs", "red"]]  # a picture stands between
