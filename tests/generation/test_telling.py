"""Chat, stories, moving pictures: what is written comes back in order, and ends where it has to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from nextflow_ar.data.rows import TextPart, parse_row
from nextflow_ar.generation import jobs
from nextflow_ar.generation.engine import (
    ContextError,
    Engine,
    ImageRequest,
    Rounds,
    TextRequest,
    WriteRequest,
)
from nextflow_ar.generation.pipeline import NextFlowPipeline, RequestError
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.sequence.dialogue import turns
from nextflow_ar.sequence.layout import build
from nextflow_ar.types import Codes, Document, Done, Image, ImageReady, Text, TextDelta
from tests.conftest import TINY_MODEL, tiny_bundle

HOT = SamplingSettings(temperature=8.0)


@pytest.fixture(params=[False, True], ids=["raw", "dialogue"])
def pipeline(request: pytest.FixtureRequest) -> NextFlowPipeline:
    bundle = tiny_bundle(replace(TINY_MODEL, max_positions=2048))
    bundle.generation["dialogue"] = request.param
    return NextFlowPipeline(bundle)


def drawn(seed: int) -> Codes:
    schedule = NextFlowPipeline(tiny_bundle()).schedule_for()
    generator = torch.Generator().manual_seed(seed)
    return Codes.plain(schedule, torch.randint(0, 24, (schedule.num_tokens,), generator=generator))


def script(monkeypatch: pytest.MonkeyPatch, *ids: int) -> list[int]:
    """Let the model choose these, in order; returns what is left of them."""
    left = list(ids)

    def chosen(scores: torch.Tensor, *_: object) -> torch.Tensor:
        taken = [left.pop(0) for _ in range(len(scores))]
        return torch.tensor(taken)

    monkeypatch.setattr(jobs, "draw", chosen)
    return left


def test_a_chat_answers_in_words_and_pictures(
    pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab, codes = pipeline.bundle.vocab, [drawn(1), drawn(2)]
    end = vocab.special("<|im_end|>") if pipeline.manner.dialogue else vocab.end
    said = [vocab.encode(text) for text in (" two dogs", "a cat ", "red")]
    first = [*said[0], vocab.boi, *codes[0].target.tolist()]
    second = [*said[1], vocab.boi, *codes[1].target.tolist(), *said[2], end]
    left = script(monkeypatch, *first, *second)
    events = []
    found = pipeline.chat([{"role": "user", "content": "draw them"}], on_event=events.append)
    pictures = [pipeline.decode(one) for one in codes]
    if pipeline.manner.dialogue:
        assert [one if isinstance(one, str) else "picture" for one in found] == [
            "two dogs", "picture", "a cat", "picture", "red",
        ]  # fmt: skip
        assert not left and events[-1] == Done(0, "stop")
    else:  # never learnt where an answer ends behind a picture: the first ends it
        assert found[:-1] == ["two dogs"] and len(left) == len(second)
    got = [one for one in found if not isinstance(one, str)]
    assert all(np.array_equal(a, b) for a, b in zip(got, pictures, strict=False))
    shown = [e.image for e in events if isinstance(e, ImageReady)]
    assert all(a is b for a, b in zip(shown, got, strict=True))


def test_conversations_hold_pictures_of_both_sides(pipeline: NextFlowPipeline) -> None:
    picture = PILImage.new("RGB", (40, 40), (200, 30, 30))
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [picture, "make it green"]},
        {"role": "assistant", "content": [drawn(1)]},
        {"role": "user", "content": ("and now", " ", np.asarray(picture))},
    ]
    request = pipeline.chat_requests(messages, seed=3, settings=HOT, max_tokens=7, max_pictures=4)
    segments = request.document.segments
    images = [one for one in segments if isinstance(one, Image)]
    assert [one.supervised for one in images] == [False, True, False]  # what it drew has its scales
    assert torch.equal(images[1].codes.target, drawn(1).target)
    assert torch.equal(images[0].codes.target, pipeline.encode(picture).target)
    texts = [one.text for one in segments if isinstance(one, Text)]
    if pipeline.manner.dialogue:
        starts = [one for one in texts if one in ("system\n", "user\n", "assistant\n")]
        assert starts == ["system\n", "user\n", "assistant\n", "user\n", "assistant\n"]
        assert request.max_images == 4 and request.ends == ("<|endoftext|>", "<|im_end|>")
    else:
        assert texts == ["be brief", "make it green", "and now"]
        assert request.max_images == 1 and request.last_image_ends
    assert request.max_tokens == 7 and request.image_settings == HOT and request.settings.temperature == 0
    small = pipeline.chat_requests([{"role": "user", "content": "a cat"}], size=(24, 24))
    assert small.schedule.final == (3, 3)


def test_texts_in_pieces_are_what_rows_of_data_make_of_them(pipeline: NextFlowPipeline) -> None:
    picture = PILImage.new("RGB", (40, 40), (200, 30, 30))

    def content(*parts: str | PILImage.Image) -> list[dict[str, object]]:
        return [
            {"type": "text", "text": one} if isinstance(one, str) else {"type": "image", "image": one}
            for one in parts
        ]

    asked = [
        ("system", ["be brief"]),
        ("user", ["two", " dogs ", picture, "a cat", "red"]),
        ("assistant", ["a", "cat"]),
        ("user", ["hello", picture]),
        ("user", ["so", "what"]),  # two messages of one role
    ]
    answer = [("assistant", ["two dogs"])]
    rows = [{"role": role, "content": content(*parts)} for role, parts in [*asked, *answer]]
    parts = [
        (one.role, Text(one.text, one.supervised))
        if isinstance(one, TextPart)
        else (one.role, Image(pipeline.encode(one.picture.open()), one.supervised))
        for one in parse_row({"messages": rows}, "a row").parts
    ]
    taught = turns(parts) if pipeline.manner.dialogue else tuple(segment for _, segment in parts)
    vocab, layout = pipeline.bundle.vocab, pipeline.bundle.layout
    whole = build(Document(taught), vocab, layout).tokens.tolist()

    def fed(messages: list[tuple[str, list[str | PILImage.Image]]]) -> list[int]:
        request = pipeline.chat_requests([{"role": role, "content": said} for role, said in messages])
        return build(request.document, vocab, layout, close_last=True).tokens.tolist()

    found, said = fed(asked), vocab.encode("two dogs")
    assert found + said == whole[: len(found) + len(said)]
    silent = [("user", ["hello"]), ("assistant", []), ("user", ["two dogs"])]
    assert fed(silent) == fed([("user", ["hello\ntwo dogs"])]) == fed([("user", ["hello", "", "two dogs"])])


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        ([], "the conversation is empty"),
        ([{"role": "user", "content": "  "}], "the conversation is empty"),
        ([{"role": "robot", "content": "hi"}], "role is system, user or assistant, got 'robot'"),
        ([{"role": "user"}], "a message has content"),
    ],
)
def test_bad_conversations(messages: list[dict[str, str]], line: str) -> None:
    with pytest.raises(RequestError, match=line):
        NextFlowPipeline(tiny_bundle()).chat(messages)


def test_chats_have_seeds_and_do_not_depend_on_their_batch(pipeline: NextFlowPipeline) -> None:
    asked = [{"role": "user", "content": "two dogs"}]
    options = {"max_tokens": 30, "max_pictures": 2, "settings": HOT, "text_settings": HOT}
    requests = [pipeline.chat_requests(asked, seed=seed, **options) for seed in range(4)]

    def told(events: list[object], row: int) -> tuple[str, list[bytes]]:
        text = "".join(e.text for e in events if isinstance(e, TextDelta) and e.row == row)
        images = [e for e in events if isinstance(e, ImageReady) and e.row == row]
        return text, [e.codes.target.numpy().tobytes() for e in images]

    together = list(pipeline.engine.run(requests))
    found = [told(together, row) for row in range(4)]
    assert len({text for text, _ in found}) == 4
    for row, request in enumerate(requests):
        assert told(list(pipeline.engine.run([request])), 0) == found[row]
    rounds = Rounds(Engine(pipeline.bundle))
    for row, request in enumerate(requests):
        rounds.submit(row, request)
    events = [e for _ in range(8) for e in rounds.step()]
    assert rounds.cancel(2)
    while rounds.busy:
        events += list(rounds.step())
    assert all(told(events, row) == found[row] for row in (0, 1, 3))
    assert told(events, 2) != found[2]


def test_a_story_stops_at_its_last_picture(
    pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab, text = pipeline.bundle.vocab, pipeline.bundle.vocab.encode("a cat.")
    part = [*text, vocab.boi, *drawn(1).target.tolist()]
    left = script(monkeypatch, *part * 5)
    found = pipeline.story("tell me of a cat", max_pictures=3)
    assert [isinstance(one, str) for one in found] == [True, False] * 3
    assert len(left) == 2 * len(part)
    script(monkeypatch, *part, *text, vocab.end)  # or before it, where the model ends
    found = pipeline.story("tell me of a cat", max_pictures=3)
    assert [isinstance(one, str) for one in found] == [True, False, True]
    with pytest.raises(RequestError, match="say what to tell"):
        pipeline.story(" ")
    with pytest.raises(ContextError):
        pipeline.story("tell", max_pictures=40)


def test_a_video_is_frames_and_nothing_else(pipeline: NextFlowPipeline) -> None:
    events = []
    found = pipeline.video("two dogs", frames=4, seed=2, settings=HOT, on_event=events.append)
    assert [one.size for one in found] == [(40, 40)] * 4
    assert len({np.asarray(one).tobytes() for one in found}) == 4
    assert not any(isinstance(e, TextDelta) for e in events) and events[-1] == Done(0, "stop")
    again = pipeline.video("two dogs", frames=4, seed=2, settings=HOT)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    # The second frame is drawn behind the first as a request of its own would draw it, but for its noise.
    codes = [e.codes for e in events if isinstance(e, ImageReady)]
    behind = Document(
        (*pipeline.manner.document([("user", Text("two dogs"))]).segments, Image(codes[0], True))
    )
    cold = replace(HOT, temperature=0.0)
    first = ImageRequest(behind, codes[0].schedule, 2, cold)
    greedy = WriteRequest(behind, 0, 1, codes[0].schedule, 2, cold, cold)
    one, other = (
        next(e.codes.target for e in pipeline.engine.run([r]) if isinstance(e, ImageReady))
        for r in (first, greedy)
    )
    assert torch.equal(one, other)


def test_a_video_goes_on_from_frames(pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [PILImage.new("RGB", (24, 24), (200, 30 * i, 30)) for i in range(2)]
    found = pipeline.video(first=given, frames=6, seed=2, settings=HOT)
    assert [one.size for one in found] == [(40, 40)] * 6
    assert all(np.array_equal(a, pipeline.reconstruct(b)) for a, b in zip(found, given, strict=False))
    assert len({np.asarray(one).tobytes() for one in found[2:]}) == 4
    monkeypatch.setitem(pipeline.bundle.generation, "video", "{frames} frames of {prompt}")
    asked: list[str] = []

    def hear(requests: list[WriteRequest]) -> list[Done]:
        asked.extend(one.text for one in requests[0].document.segments if isinstance(one, Text))
        return []

    monkeypatch.setattr(pipeline.engine, "run", hear)
    assert pipeline.video("a cat", frames=3) == [] and "three frames of a cat" in asked
    assert pipeline.video("a cat", frames=12) == [] and "12 frames of a cat" in asked
    for wrong, line in (
        ({"frames": 0}, "at least one frame"),
        ({}, "say what moves"),
        ({"first": []}, "no first frame"),
    ):
        with pytest.raises(RequestError, match=line):
            pipeline.video(**wrong)


def test_a_thought_says_something(pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = pipeline.bundle.vocab
    word = vocab.encode("a")[0]

    def in_haste(scores: torch.Tensor, *_: object) -> torch.Tensor:
        ends = [vocab.boi, vocab.end]
        return torch.tensor([next((e for e in ends if scores[0, e] > float("-inf")), word)])

    monkeypatch.setattr(jobs, "draw", in_haste)
    document = Document((Text("two dogs"),))
    for least, text in ((0, ""), (1, "a"), (3, "aaa")):
        request = TextRequest(document, 9, 0, HOT, ("<|endoftext|>", "<boi>"), least)
        events = list(pipeline.engine.texts([request]))
        assert "".join(e.text for e in events if isinstance(e, TextDelta)) == text
        assert events[-1] == Done(0, "stop")
    with pytest.raises(ValueError, match="at least one token or one image"):
        WriteRequest(document, 0, 0, drawn(1).schedule, 0, HOT, HOT)
