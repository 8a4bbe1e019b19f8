"""What the pipeline asks the engine is laid out as training lays out the playground's tasks, token by token."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from nextflow_ar.config import from_dict
from nextflow_ar.data.episodes import EpisodeSource
from nextflow_ar.data.playground.curriculum import episode
from nextflow_ar.data.playground.episodes import Episode, Said, Shown
from nextflow_ar.data.playground.planning import planned_throughout, with_plan
from nextflow_ar.data.tasks import to_document
from nextflow_ar.generation.engine import ImageRequest, Request, TextRequest
from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.sequence.layout import IGNORED, Sample, build, image_prefix
from nextflow_ar.training.episode_sources import EpisodeBatches
from nextflow_ar.types import Codes, TextDelta
from tests.conftest import TINY_MODEL, tiny_bundle

LONG = replace(TINY_MODEL, max_positions=8192)
CLOSING = replace(LONG, closing_input="accumulated", context_images="closing")


class Asked(Exception):
    """The engine was asked; no work is done."""


@pytest.fixture(
    scope="module",
    params=[(False, LONG), (True, LONG), (False, CLOSING), (True, CLOSING)],
    ids=["raw", "dialogue", "raw, closing blocks", "dialogue, closing blocks"],
)
def pipeline(request: pytest.FixtureRequest) -> NextFlowPipeline:
    dialogue, config = request.param
    bundle = tiny_bundle(config)
    # Sizes that the tiny tokenizer has, under the names of the playground's: 64x64 is its eighth level.
    bundle.generation |= {"dialogue": dialogue, "canvases": ["64x64"]}
    return NextFlowPipeline(bundle)


def asked_for(
    pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch, *call: Any, thought: str = "", **options: Any
) -> Request:
    """The first request that a method gives the engine, but for thoughts: those are answered with ``thought``."""
    name, *given = call
    found: list[Request] = []

    def answer(requests: list[Request]) -> Iterator[TextDelta]:
        found.append(requests[0])
        if not thought or not isinstance(requests[0], TextRequest):
            raise Asked
        yield TextDelta(0, thought)

    monkeypatch.setattr(pipeline.engine, "run", answer)
    with pytest.raises(Asked):
        getattr(pipeline, name)(*given, **options)
    return found[-1]


def laid(pipeline: NextFlowPipeline, request: Request) -> Sample:
    """What the engine feeds before it first samples."""
    vocab, layout = pipeline.bundle.vocab, pipeline.bundle.layout
    if isinstance(request, ImageRequest):
        return image_prefix(request.document, request.schedule, vocab, layout)
    return build(request.document, vocab, layout, close_last=True)


def same_start(prefix: Sample, whole: Sample) -> None:
    """The prefix is the beginning of the whole."""
    n = len(prefix)
    for name in ("tokens", "blocks", "scales", "lengths"):
        assert torch.equal(getattr(prefix, name), getattr(whole, name)[:n]), name
    assert torch.equal(prefix.positions, whole.positions[:, :n])
    for mine, theirs in zip(prefix.images, whole.images, strict=False):
        assert (mine.boi, mine.scales, mine.closed) == (theirs.boi, theirs.scales, theirs.closed)
        assert torch.equal(mine.codes.target, theirs.codes.target)


class Lesson:
    """An episode with codes, and its sample as training lays it out."""

    def __init__(
        self, pipeline: NextFlowPipeline, task: str, index: int = 0, found: Episode | None = None
    ) -> None:
        self.found: Episode = found or episode(task, index, seed=3)
        generator = torch.Generator().manual_seed(index)
        schedule = pipeline.schedule_for((64, 64))
        self.codes = [
            Codes.plain(schedule, torch.randint(0, 24, (schedule.num_tokens,), generator=generator))
            for _ in self.found.pictures
        ]
        self.pipeline = pipeline
        dialogue = pipeline.manner.dialogue
        document = to_document(self.found, self.codes, dialogue=dialogue)
        self.sample = build(document, pipeline.bundle.vocab, pipeline.bundle.layout)

    @property
    def said(self) -> list[str]:
        return [part.text for part in self.found.texts if not part.supervised]

    @property
    def given(self) -> list[Codes]:
        pairs = zip(self.found.pictures, self.codes, strict=True)
        return [codes for shown, codes in pairs if not shown.supervised]

    def begins_with(self, request: Request) -> None:
        """The request is the episode up to the first thing that is learnt, and a picture's ``<boi>``."""
        prefix = laid(self.pipeline, request)
        same_start(prefix, self.sample)
        first = int((self.sample.targets != IGNORED).nonzero()[0])
        in_turn = (
            not isinstance(request, ImageRequest)
            or self.sample.targets[first] != self.pipeline.bundle.vocab.boi
        )
        assert len(prefix) == first + (1 if in_turn else 2)


SIZE = {"size": (64, 64)}


def test_requests_to_draw(pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in ("draw_scene", "draw_word", "draw_mood"):
        lesson = Lesson(pipeline, task)
        lesson.begins_with(asked_for(pipeline, monkeypatch, "generate", lesson.said[0], **SIZE))


def test_thoughts_and_what_follows_them(pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in ("riddle", "planned", "sum_drawn"):
        lesson = Lesson(pipeline, task)
        thinking = asked_for(pipeline, monkeypatch, "generate", lesson.said[0], think=True, **SIZE)
        assert isinstance(thinking, TextRequest) and "<boi>" in thinking.ends and thinking.min_tokens == 1
        lesson.begins_with(thinking)
        thought = lesson.found.texts[-1].text
        drawing = asked_for(
            pipeline, monkeypatch, "generate", lesson.said[0], think=True, thought=thought, **SIZE
        )
        prefix = laid(pipeline, drawing)
        same_start(prefix, lesson.sample)
        assert len(prefix) == lesson.sample.images[-1].boi + 1


def test_edits(pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in ("edit_colour", "edit_word_add", "edit_zoom_in", "subject_extract", "subject_place"):
        lesson = Lesson(pipeline, task)
        lesson.begins_with(asked_for(pipeline, monkeypatch, "edit", lesson.given[0], lesson.said[0]))


def test_edits_by_example(pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = set()
    for index in range(6):
        lesson = Lesson(pipeline, "in_context", index)
        *shown, last = lesson.given
        pairs = list(zip(shown[::2], shown[1::2], strict=True))
        lengths.add(len(pairs))
        asked = asked_for(pipeline, monkeypatch, "edit", last, lesson.said[-1], examples=pairs)
        lesson.begins_with(asked)
    assert lengths == {1, 2}


def test_captions_and_answers(pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in ("caption_short", "caption_full", "ask_count", "ask_choice"):
        lesson = Lesson(pipeline, task)
        asked = asked_for(pipeline, monkeypatch, "describe", lesson.given[0], question=lesson.said[0])
        lesson.begins_with(asked)
        assert asked.ends == pipeline.manner.ends  # type: ignore[union-attr]
    lesson = Lesson(pipeline, "caption_short")
    monkeypatch.setitem(pipeline.bundle.generation, "caption", lesson.said[0])
    lesson.begins_with(asked_for(pipeline, monkeypatch, "describe", lesson.given[0]))


def test_stories_and_recipes(pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in ("story", "recipe"):
        lesson = Lesson(pipeline, task)
        lesson.begins_with(asked_for(pipeline, monkeypatch, "story", lesson.said[0], **SIZE))


def test_moving_pictures(pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    lesson = Lesson(pipeline, "video_draw")
    lesson.begins_with(asked_for(pipeline, monkeypatch, "video", lesson.said[0], frames=3, **SIZE))
    for index in range(3):  # two, three, four frames are shown
        lesson = Lesson(pipeline, "video_next", index)
        shown = lesson.given
        assert len(shown) == 2 + index
        options = {"first": shown, "frames": len(shown) + 1}
        lesson.begins_with(asked_for(pipeline, monkeypatch, "video", lesson.said[0], **options))
    lesson = Lesson(pipeline, "video_caption")
    content = [*lesson.given, lesson.said[0]]
    lesson.begins_with(asked_for(pipeline, monkeypatch, "chat", [{"role": "user", "content": content}]))


@pytest.mark.parametrize("task", ["chat", "plain"])
def test_conversations_before_every_answer(
    task: str, pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = 0
    for index in range(4):
        lesson = Lesson(pipeline, task, index)
        codes, messages = iter(lesson.codes), []
        for part in lesson.found.parts:
            if part.supervised:
                asked = asked_for(pipeline, monkeypatch, "chat", messages, **SIZE)
                prefix = laid(pipeline, asked)
                same_start(prefix, lesson.sample)
                learnt = int(lesson.sample.targets[len(prefix) - 1])
                if isinstance(part, Shown):
                    assert learnt == pipeline.bundle.vocab.boi
                    drawn += 1
                else:
                    assert learnt == pipeline.bundle.vocab.encode(part.text)[0]
            content = part.text if isinstance(part, Said) else [next(codes)]
            messages.append({"role": part.role, "content": content})
    assert drawn > 0


def test_planned_conversations_before_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of earlier turns are not shown again, and what was drawn there is seen as any other picture is."""
    bundle = tiny_bundle(CLOSING)
    bundle.generation |= {"dialogue": True, "canvases": ["64x64"], "think_told": True}
    pipeline, vocab = NextFlowPipeline(bundle), bundle.vocab
    earlier = drawn = 0
    for index in range(12):
        plain = episode("chat", index, seed=3)
        found = planned_throughout(plain, random.Random(index))
        lesson = Lesson(pipeline, "chat", index, found)
        codes, messages = iter(lesson.codes), []
        for part in found.parts:
            plan = isinstance(part, Said) and part.text.startswith("plan: ")
            if part.supervised and not isinstance(part, Shown):
                asked = asked_for(pipeline, monkeypatch, "chat", messages, **SIZE)
                prefix = laid(pipeline, asked)
                same_start(prefix, lesson.sample)
                assert int(lesson.sample.targets[len(prefix) - 1]) == vocab.encode(part.text)[0]
                drawn += plan
                earlier += plan and any(
                    m["role"] == "assistant" and not isinstance(m["content"], str) for m in messages
                )
            if isinstance(part, Shown) and part.supervised:
                break  # behind it the answer has its scales, a later turn would only see it
            if not plan:
                content = part.text if isinstance(part, Said) else [next(codes)]
                messages.append({"role": part.role, "content": content})
    assert drawn > 4 and earlier > 1


def test_a_plan_alone_learns_to_begin_the_picture(pipeline: NextFlowPipeline) -> None:
    vocab, layout = pipeline.bundle.vocab, pipeline.bundle.layout
    for task in ("edit_colour", "draw_scene"):
        lesson = Lesson(pipeline, task, found=with_plan(episode(task, 0, seed=3)))
        left = replace(lesson.found, parts=lesson.found.parts[:-1])
        document = to_document(left, lesson.codes[:-1], dialogue=pipeline.manner.dialogue, scales=0)
        sample = build(document, vocab, layout)
        assert torch.equal(sample.tokens, lesson.sample.tokens[: len(sample)])
        assert torch.equal(sample.targets[:-1], lesson.sample.targets[: len(sample) - 1])
        assert sample.tokens[-1] == vocab.boi == sample.targets[-2] and sample.targets[-1] == IGNORED


def test_a_picture_that_is_only_seen_is_begun(pipeline: NextFlowPipeline) -> None:
    """Words of the assistant's end where the next picture begins, whether it is to be learnt or not."""
    vocab = pipeline.bundle.vocab
    some = 0
    for task in ("story", "video_draw"):
        for index in range(4):
            found = planned_throughout(episode(task, index, seed=3), random.Random(index), drawn=0.0)
            targets = Lesson(pipeline, task, index, found).sample.targets.tolist()
            assert targets.count(vocab.boi) == len(found.pictures) > len(found.expected) == 1
            learns_to_end = targets.count(vocab.end)
            assert learns_to_end == 0  # the last thing is a picture
            some += 1
    assert some == 8


def test_guidance_contrasts_with_what_condition_dropout_leaves(
    pipeline: NextFlowPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = pipeline.bundle
    values = {
        "kind": "episodes", "rows": 1, "seed": 4, "tasks": {"draw": 1, "think": 1, "edit": 1, "story": 1},
        "canvases": {"64x64": 1.0}, "packing": {"mode": "length", "budget": 900, "open_rows": 2},
        "condition_dropout": 1.0, "dialogue": pipeline.manner.dialogue,
    }  # fmt: skip
    source = from_dict(EpisodeSource, values)
    config = bundle.model.config
    made = EpisodeBatches(source, bundle.image_tokenizer.config, bundle.vocab, bundle.layout, config)
    lesson = Lesson(pipeline, "edit_colour")
    asked = [
        asked_for(pipeline, monkeypatch, "edit", lesson.given[0], lesson.said[0]),
        asked_for(pipeline, monkeypatch, "generate", "two dogs", **SIZE),
        asked_for(pipeline, monkeypatch, "chat", [{"role": "user", "content": "two dogs"}], **SIZE),
        asked_for(pipeline, monkeypatch, "story", "two dogs", **SIZE),
        asked_for(pipeline, monkeypatch, "video", "two dogs", **SIZE),
    ]
    for document in made.peek(6):
        whole = build(document, bundle.vocab, bundle.layout)
        for request in asked:
            assert not isinstance(request, TextRequest)
            without = image_prefix(request.unconditional, request.schedule, bundle.vocab, bundle.layout)
            same_start(without, whole)
            assert len(without) == whole.images[0].boi + 1
