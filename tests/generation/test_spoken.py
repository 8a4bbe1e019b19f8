"""Plans among what a model writes: told apart from what is said, whatever the tokens; their length; films."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nextflow_ar.generation import jobs
from nextflow_ar.generation.engine import ContextError, Engine, WriteRequest
from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.generation.spoken import split
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.types import Document, Done, Event, ImageReady, Planned, ScaleReady, Text, TextDelta
from tests.conftest import TINY_MODEL, tiny_bundle

SQUARE = ScaleSchedule.square(5)
PLAIN = SamplingSettings()
CODES = [0] * SQUARE.num_tokens


@pytest.mark.parametrize(
    ("text", "said", "plan"),
    [
        ("", "", None),
        ("the dog goes away.", "the dog goes away.", None),
        ("the dog goes away. plan: a car left", "the dog goes away.", "plan: a car left"),
        ("plan:", "", "plan:"),
        ("plan: a dog", "", "plan: a dog"),
        ("\nplan: a dog plan: b", "", "plan: a dog plan: b"),
        ("my explan: here", "my explan: here", None),
        ("the planet", "the planet", None),
    ],
)
def test_a_text_is_taken_apart(text: str, said: str, plan: str | None) -> None:
    assert split(text, final=True) == (said, plan)
    shown = ""
    for end in range(len(text) + 1):  # however it grows, what was shown stays
        now, _ = split(text[:end], final=False)
        assert now.startswith(shown)
        shown = now
    assert said.startswith(shown) and said.removeprefix(shown).strip() in (
        "",
        "plan"[: len(said) - len(shown)],
    )


def test_an_end_that_may_become_a_plan_waits() -> None:
    for end in ("p", " pl", "a dog. plan", "a dog. ", "a dog.\n"):
        said, plan = split(end, final=False)
        assert plan is None and said == ("a dog." if end.startswith("a") else "")
        assert split(end, final=True) == (end, None)
    assert split("a lamp", final=False) == ("a lamp", None)  # in a word


@pytest.fixture
def bundle() -> Bundle:
    return tiny_bundle(replace(TINY_MODEL, max_positions=2048))


def written(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, ids: list[int], **changes: object
) -> tuple[list[Event], list[torch.Tensor], list[int]]:
    """Events of a request that is given what it chooses, the settings of every choice, what is left."""
    left, asked = list(ids), []

    def chosen(scores: torch.Tensor, *settings: object) -> torch.Tensor:
        asked.append((len(scores), settings[0]))
        return torch.tensor([left.pop(0) for _ in range(len(scores))])

    monkeypatch.setattr(jobs, "draw", chosen)
    values = {"max_tokens": 30, "max_images": 2, "thoughts": 20} | changes
    request = WriteRequest(
        Document((Text("two dogs"),)), schedule=SQUARE, seed=1, settings=PLAIN, image_settings=PLAIN, **values
    )  # type: ignore[arg-type]
    events = [e for e in Engine(bundle).run([request]) if not isinstance(e, ScaleReady)]
    return events, [warmth for count, warmth in asked if count == 1 and warmth != 0.75], left


def test_plans_are_no_part_of_what_is_said(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = bundle.vocab
    first, plan = vocab.encode("a dog."), vocab.encode(" plan: a dog left")
    second, end = vocab.encode("plan: a frog"), vocab.encode("the end")
    ids = [*first, *plan, vocab.boi, *CODES, *second, vocab.boi, *CODES, *end, vocab.end]
    events, _, left = written(bundle, monkeypatch, ids)
    assert not left
    kinds = [type(e) for e in events if not isinstance(e, TextDelta)]
    assert kinds == [Planned, ImageReady, Planned, ImageReady, Done]
    assert [e.text for e in events if isinstance(e, Planned)] == ["plan: a dog left", "plan: a frog"]
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == "a dog.the end"
    done = events[-1]
    assert isinstance(done, Done) and done.reason == "stop"
    assert done.written == len(first) + len(plan) + len(second) + len(end)
    events, _, _ = written(
        bundle, monkeypatch, ids, thoughts=0, max_tokens=60
    )  # a plan is text like any other
    said = "".join(e.text for e in events if isinstance(e, TextDelta))
    assert said == "a dog. plan: a dog leftplan: a frogthe end" and not any(
        isinstance(e, Planned) for e in events
    )


def test_a_plan_takes_none_of_the_words(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = bundle.vocab
    said, plan, rest = vocab.encode("a dog."), vocab.encode(" plan: a dog left"), vocab.encode(" and a frog")
    ids = [*said, *plan, vocab.boi, *CODES, *rest]
    events, _, left = written(bundle, monkeypatch, ids, max_tokens=len(said) + 2)
    assert len(left) == len(rest) - 2  # two words' tokens behind the picture were left
    assert events[-1] == Done(0, "length") and sum(isinstance(e, ImageReady) for e in events) == 1


def test_behind_too_long_a_plan_the_picture_begins(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = bundle.vocab
    plan = vocab.encode("plan: a dog left of a dog left of a dog left of a dog")
    assert len(plan) > 8
    events, _, _ = written(bundle, monkeypatch, [*plan[:8], *CODES, vocab.end], thoughts=8, max_images=1)
    (told,) = [e for e in events if isinstance(e, Planned)]
    assert told.text == vocab.decode(plan[:8]).strip() and sum(isinstance(e, ImageReady) for e in events) == 1


def test_a_plan_is_followed_by_its_picture(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a plan nothing ends before its picture, however likely the model finds that."""
    vocab, closed = bundle.vocab, []
    said, plan = vocab.encode("a dog."), vocab.encode(" plan: a")
    left = [*said, *plan, vocab.boi, *CODES, vocab.end]

    def chosen(scores: torch.Tensor, *_: object) -> torch.Tensor:
        if len(scores) == 1 and scores.shape[1] == vocab.text_size:
            closed.append((bool(torch.isinf(scores[0, vocab.end])), bool(torch.isinf(scores[0, vocab.boi]))))
        return torch.tensor([left.pop(0) for _ in range(len(scores))])

    monkeypatch.setattr(jobs, "draw", chosen)
    request = WriteRequest(Document((Text("two dogs"),)), 30, 1, SQUARE, 1, PLAIN, PLAIN, thoughts=9)
    list(Engine(bundle).run([request]))
    mark = len(vocab.encode(" plan:"))
    before, within = len(said) + mark, len(plan) - mark + 1
    assert [end for end, _ in closed] == [False] * before + [True] * within + [False]
    assert [boi for _, boi in closed[before:]] == [False] * within + [True]


def test_by_chance_no_picture_begins_without_a_plan(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, open_ = bundle.vocab, []

    def scored(boi: float) -> torch.Tensor:
        scores = torch.zeros(1, vocab.text_size)
        scores[0, vocab.boi] = boi
        return scores

    def chosen(scores: torch.Tensor, *_: object) -> torch.Tensor:
        open_.append(bool(torch.isfinite(scores[0, vocab.boi])))
        return torch.tensor([0])

    monkeypatch.setattr(jobs, "draw", chosen)
    request = WriteRequest(Document((Text("two dogs"),)), 30, 1, SQUARE, 1, PLAIN, PLAIN, thoughts=9)
    engine = Engine(bundle)
    for boi in (1.0, -1.0):
        for plan in (None, "plan: a"):
            job = engine.job(0, request)
            job.plan = plan
            job._next_token(scored(boi))
    engine.job(0, replace(request, thoughts=0))._next_token(scored(-1.0))
    assert open_ == [True, True, False, True, True]


def test_a_plan_for_which_no_picture_is_left_ends_the_answer(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = bundle.vocab
    more = vocab.encode(" nice. plan: a frog, a frog, a frog")
    ids = [*vocab.encode("plan: a dog"), vocab.boi, *CODES, *more]
    events, _, left = written(bundle, monkeypatch, ids, max_images=1)
    assert left and events[-1] == Done(0, "length") and sum(isinstance(e, ImageReady) for e in events) == 1
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == " nice."


def test_plans_have_settings_of_their_own(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = bundle.vocab
    said, mark, plan = vocab.encode("a dog."), vocab.encode(" plan:"), vocab.encode(" a dog")
    _, warmths, _ = written(
        bundle, monkeypatch, [*said, *mark, *plan, vocab.end], thought_settings=PLAIN.changed(temperature=0.3)
    )
    assert warmths == [1.0] * (len(said) + len(mark)) + [0.3] * (len(plan) + 1)


def test_frames_alone_may_be_planned(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """No words are wanted: all that is written is a plan, and the answer cannot end before its last picture."""
    vocab = bundle.vocab
    one, two = vocab.encode("plan: a dog 1"), vocab.encode("plan: a dog 2")
    ids = [*one, vocab.boi, *CODES, *two, vocab.boi, *CODES]
    events, _, left = written(bundle, monkeypatch, ids, max_tokens=0)
    assert not left and not any(isinstance(e, TextDelta) for e in events)
    assert [e.text for e in events if isinstance(e, Planned)] == ["plan: a dog 1", "plan: a dog 2"]
    assert sum(isinstance(e, ImageReady) for e in events) == 2
    monkeypatch.undo()
    hot = SamplingSettings(temperature=50.0)
    many = [
        WriteRequest(Document((Text("two dogs"),)), 0, 2, SQUARE, seed, hot, PLAIN, thoughts=6)
        for seed in range(6)
    ]
    events = list(Engine(bundle).run(many))
    assert [sum(isinstance(e, ImageReady) and e.row == k for e in events) for k in range(6)] == [2] * 6
    with pytest.raises(ContextError, match="takes"):
        list(Engine(bundle).run([replace(many[0], thoughts=1000)]))


def test_a_pipeline_whose_model_plans_what_it_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle(replace(TINY_MODEL, max_positions=2048))
    bundle.generation["think_told"] = True
    pipeline, vocab = NextFlowPipeline(bundle), bundle.vocab
    codes = [0] * pipeline.schedule_for().num_tokens
    left = [*vocab.encode("a dog. plan: a dog left"), vocab.boi, *codes]

    def chosen(scores: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.tensor([left.pop(0) for _ in range(len(scores))])

    monkeypatch.setattr(jobs, "draw", chosen)
    found = pipeline.story("a story about a dog", max_pictures=1)
    assert found[0] == "a dog." and len(found) == 2 and not left
    left += [
        *vocab.encode("plan: a dog 1"),
        vocab.boi,
        *codes,
        *vocab.encode("plan: a dog 2"),
        vocab.boi,
        *codes,
    ]
    assert len(pipeline.video("a dog moves left", frames=2)) == 2 and not left
    first = pipeline.encode(pipeline.decode(pipeline.encode(found[1])))  # type: ignore[arg-type]
    left += [*vocab.encode("plan: a dog 3"), vocab.boi, *codes]
    events: list[Event] = []
    assert len(pipeline.video(first=first, frames=2, on_event=events.append)) == 2 and not left
    assert Planned(0, "plan: a dog 3") in events and not any(isinstance(e, TextDelta) for e in events)
    left += [*vocab.encode("a dog"), vocab.end]
    assert pipeline.chat([{"role": "user", "content": "hello"}], max_pictures=0) == ["a dog"]
