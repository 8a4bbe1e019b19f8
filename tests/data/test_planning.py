"""Plans for episodes that have none: before every picture, in words that say what it shows; conversations; films."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from nextflow_ar.data.episodes import EpisodeSource
from nextflow_ar.data.loader import Packing
from nextflow_ar.data.playground.canvases import Canvas, Item, stands
from nextflow_ar.data.playground.curriculum import episode
from nextflow_ar.data.playground.episodes import Episode, Said, Shown
from nextflow_ar.data.playground.planning import (
    FILMS,
    TALKS,
    TOLD,
    frame_plan,
    plan_of,
    planned_throughout,
)
from nextflow_ar.data.playground.reading import read_plan, truth_full
from nextflow_ar.data.playground.saying import phrase

SEED = 8_960_000


def planned(task: str, number: int, drawn: float = 1.0) -> tuple[Episode, Episode]:
    found = episode(task, number, SEED)
    return found, planned_throughout(found, random.Random(number), drawn)


@pytest.mark.parametrize("task", [task for task in TOLD if task not in TALKS])
def test_every_picture_of_a_telling_is_laid_out_first(task: str) -> None:
    for number in range(12):
        plain, found = planned(task, number)
        assert found.pictures == plain.pictures and found.truth == plain.truth
        for k, part in enumerate(found.parts):
            if not isinstance(part, Shown) or not part.supervised:
                continue
            before = found.parts[k - 1]
            assert isinstance(before, Said) and before.supervised
            said, mark, _ = before.text.rpartition("plan: ")
            assert mark and (not said or said.endswith(". "))
            assert said.strip() in ("", *(text.text for text in plain.texts))
            if task in FILMS:
                assert before.text == frame_plan(part.canvas)
            else:
                assert read_plan(before.text) == truth_full(part.canvas)


def test_some_pictures_of_a_telling_are_only_seen() -> None:
    drawn = whole = 0
    for number in range(60):
        plain, found = planned("story", number, drawn=0.3)
        assert [replace(p, supervised=True) for p in found.pictures] == list(plain.pictures)
        kept = len(found.expected)
        assert kept >= 1 and sum("plan: " in text.text for text in found.texts) == len(plain.pictures)
        drawn, whole = drawn + kept, whole + len(plain.pictures)
    assert 0.35 < drawn / whole < 0.65  # one of them, and three in ten of the others


def test_one_picture_of_a_conversation_is_planned_and_those_before_it_are_there() -> None:
    cuts = set()
    for number in range(60):
        plain, found = planned("chat", number)
        if not plain.expected:
            assert found == plain
            continue
        (drawn,) = [k for k, part in enumerate(found.parts) if isinstance(part, Shown) and part.supervised]
        texts = [part.text for part in found.parts if isinstance(part, Said)]
        assert sum(text.startswith("plan: ") for text in texts) == 1
        plan, picture = found.parts[drawn - 1], found.parts[drawn]
        assert isinstance(plan, Said) and isinstance(picture, Shown)
        assert read_plan(plan.text) == truth_full(picture.canvas)
        earlier = [part for part in found.parts[:drawn] if isinstance(part, Shown)]
        assert all(not part.supervised for part in earlier)
        assert all(part.role == "assistant" for part in earlier[1:])
        assert found.parts[-1].supervised  # no request is left without its answer
        assert [p for p in found.parts if p is not plan] == [
            unlearnt if (unlearnt := replace(p, supervised=False)) in earlier else p
            for p in plain.parts[: len(found.parts) - 1]
        ]
        cuts.add(len(found.parts) - 1 == len(plain.parts))
    assert cuts == {True, False}


def test_plans_say_how_things_are_turned_and_a_film_where_they_stand() -> None:
    dog, car = Item("dog", None, 4, 4, 24, turn=1), Item("car", "red", 36, 36, 24, turn=2)
    canvas = Canvas(64, 64, "blue", (dog, car))
    assert (
        plan_of(canvas)
        == "plan: a dog above left turned left, a red car below right upside down, blue background"
    )
    assert read_plan(plan_of(canvas)) == truth_full(canvas)
    assert frame_plan(canvas) == (
        "plan: a dog 4 4 size 24 turned left, a red car 12 12 size 24 upside down, blue background"
    )
    twice = tuple(replace(i, x=2 * i.x, y=2 * i.y, size=2 * i.size) for i in (dog, car))
    larger = Canvas(128, 128, "blue", twice)
    assert frame_plan(larger) == frame_plan(canvas)


@pytest.mark.parametrize("task", ["relation", "riddle", "planned"])
def test_related_things_are_planned_in_the_order_in_which_they_are_named(task: str) -> None:
    some = 0
    for number in range(120):
        found = episode(task, number, SEED)
        canvas = found.expected[0]
        if canvas.relation is None:
            continue
        some += 1
        first, second = canvas.items
        assert stands(canvas.relation, first, second)
        plan = plan_of(canvas)
        assert plan.index(phrase(first.kind)) < plan.index(phrase(second.kind))
        asked = found.texts[0].text.lower()
        there = [asked.find(item.name) for item in canvas.items]
        if min(there) >= 0 and first.name not in second.name and second.name not in first.name:
            assert there[0] < there[1], asked
    assert some > 5


def test_frames_of_a_film_differ_in_their_plans() -> None:
    for number in range(20):
        _, found = planned("video_draw", number)
        plans = [text.text for text in found.texts if text.text.startswith("plan: ")]
        assert len(plans) == len(found.pictures) and all(a != b for a, b in pairwise(plans))


def source(**changes: object) -> EpisodeSource:
    values = {
        "kind": "episodes", "tasks": {"edit": 1.0}, "rows": 2, "packing": Packing(mode="pad", budget=200),
        "canvases": {"64x64": 1.0}, "seed": 1,
    }  # fmt: skip
    return EpisodeSource(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": 0}, "scales: 0 leaves only plans: planned has to be 1, got 0.0"),
        ({"scales": 0, "planned": 0.5}, "planned has to be 1, got 0.5"),
        ({"scales": 0, "planned": 1.0, "tasks": {"story": 1.0}}, "scales: 0 leaves only plans, which story has not"),
        ({"scales": -1}, "scales is at least 0, got -1"),
        ({"drawn": 0.5}, "drawn is for stories and films, not for edit_add"),
        ({"drawn": 1.5}, "drawn is a share from 0 to 1, got 1.5"),
        ({"planned": 1.0, "tasks": {"caption": 1.0}}, "planned is for tasks that draw or edit, not for caption_short"),
    ],
)  # fmt: skip
def test_sources_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        source(**changes)


def test_sources_of_plans_alone() -> None:
    assert source(scales=0, planned=1.0).scales == 0
    assert source(scales=0, tasks={"riddle": 1.0}).planned == 0  # has a plan of its own
    assert source(planned=1.0, drawn=0.4, tasks={"story": 1.0, "chat": 1.0}).drawn == 0.4
