"""A model that plans what it tells: the server tells plans apart from words, at once and streamed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from nextflow_ar.generation import jobs
from nextflow_ar.generation.pipeline import NextFlowPipeline
from tests.app.serving import Running, running
from tests.conftest import TINY_MODEL, tiny_bundle

ASKED = {"role": "user", "content": "draw it"}


@pytest.fixture
def up(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    bundle = tiny_bundle(replace(TINY_MODEL, max_positions=4096))
    bundle.generation |= {"think_told": True, "dialogue": True}
    vocab, pipeline = bundle.vocab, NextFlowPipeline(bundle)
    codes = [0] * pipeline.schedule_for().num_tokens
    end = vocab.special("<|im_end|>")
    script = [*vocab.encode("here it is. plan: a dog left"), vocab.boi, *codes, *vocab.encode(" nice"), end]
    left: list[int] = []

    def chosen(scores: torch.Tensor, *_: object) -> torch.Tensor:
        left[:] = left or script
        taken = left[: len(scores)]
        del left[: len(scores)]
        return torch.tensor(taken)

    monkeypatch.setattr(jobs, "draw", chosen)
    with running(pipeline) as found:
        yield found


def test_an_answer_has_words_and_plans(up: Running) -> None:
    body = {"messages": [ASKED], "max_tokens": 30}
    found = up.http().post("/v1/chat/completions", json=body).json()
    message = found["choices"][0]["message"]
    assert message["content"] == "here it is. nice" and message["reasoning_content"] == "plan: a dog left"
    assert len(message["images"]) == 1 and message["images"][0]["offset"] == len("here it is.")
    assert found["usage"]["completion_tokens_details"]["text_tokens"] > 5
    again = {"messages": [ASKED, message, ASKED], "max_tokens": 30}  # given back as it came
    assert up.http().post("/v1/chat/completions", json=again).status_code == 200


def test_a_stream_has_them_apart(up: Running) -> None:
    stream = up.client().chat.completions.create(
        model="tiny",
        messages=[ASKED],
        max_tokens=30,
        stream=True,  # type: ignore[arg-type]
    )
    deltas = [chunk.choices[0].delta.model_dump() for chunk in stream if chunk.choices]
    assert "".join(d.get("content") or "" for d in deltas) == "here it is. nice"
    assert [d["reasoning_content"] for d in deltas if d.get("reasoning_content")] == ["plan: a dog left\n"]
    order = [key for d in deltas for key in ("reasoning_content", "images") if d.get(key)]
    assert order == ["reasoning_content", "images"]
