"""Tasks of the wide world: pure, split, balanced, true; targets equal sources but where the instruction says otherwise."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from nextflow_ar.data.code_shards import as_document
from nextflow_ar.data.playground.canvases import (
    Canvas,
    Item,
    canvas_sizes,
    combinations,
    fits,
    held_out,
    place_words,
    size_word,
    stands,
)
from nextflow_ar.data.playground.curriculum import (
    GROUPED,
    PLANNED,
    TASK_NAMES,
    UNSPLIT,
    Mix,
    corpus,
    episode,
    held_out_of,
)
from nextflow_ar.data.playground.edits import EDITS, GLOBAL, VIEW, Edit, apply, region
from nextflow_ar.data.playground.episodes import Answer, Episode, Said, Shown
from nextflow_ar.data.playground.knowledge import CLUES
from nextflow_ar.data.playground.looks import render
from nextflow_ar.data.playground.maker import Maker, Reject, world_level
from nextflow_ar.data.playground.planning import with_plan
from nextflow_ar.data.playground.reading import (
    read_choice,
    read_full,
    read_number,
    read_plan,
    read_short,
    read_yes_no,
    truth_full,
    truth_short,
)
from nextflow_ar.data.playground.saying import full_caption, short_caption
from nextflow_ar.data.playground.scoring import READERS, is_right
from nextflow_ar.data.playground.telling import MOTIONS, read_motion
from nextflow_ar.data.playground.words import COLOURS
from nextflow_ar.data.playground.world import ONE_OF, POPULAR
from nextflow_ar.data.tasks import to_document
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.layout import LayoutOptions, build
from nextflow_ar.sequence.vocab import TURN_END, TURN_START
from nextflow_ar.types import Codes, Image, Mark, Text
from tests.conftest import tiny_bundle

SEED = 8_950_000
DRAWN = ("draw_scene", "draw_sizes", "draw_places", "draw_word", "draw_style", "draw_mood")


def episodes(task: str, count: int, **settings: object) -> list[Episode]:
    return [episode(task, k, SEED, **settings) for k in range(count)]  # type: ignore[arg-type]


def test_the_names() -> None:
    assert sum(len(tasks) for tasks in GROUPED.values()) == len(TASK_NAMES) == len(set(TASK_NAMES)) == 51
    assert set(UNSPLIT) < set(TASK_NAMES) and {f"edit_{kind}" for kind in EDITS} < set(TASK_NAMES)
    with pytest.raises(ValueError, match="unknown playground task 'dance': one of draw_scene"):
        episode("dance", 0, 0)
    with pytest.raises(
        ValueError, match="unknown world level 'easy': one of world, blocks, hues, shades, wide"
    ):
        episode("draw_scene", 0, 0, level="easy")


@pytest.mark.parametrize("task", TASK_NAMES)
def test_an_episode_is_a_pure_function_of_its_arguments(task: str) -> None:
    once = episodes(task, 8)
    assert [episode(task, k, SEED) for k in reversed(range(8))] == once[::-1]
    assert sum(a != b for a, b in zip(once, [episode(task, k, SEED + 1) for k in range(8)], strict=True)) >= 7
    assert all(found.task == task for found in once)
    for shown in once[0].pictures:
        assert np.array_equal(shown.render(), render(shown.canvas))


@pytest.mark.parametrize("task", TASK_NAMES)
@pytest.mark.parametrize(("level", "size"), [("world", (64, 64)), ("wide", (88, 104)), ("wide", (80, 48))])
def test_every_episode_is_whole(task: str, level: str, size: tuple[int, int]) -> None:
    for found in episodes(task, 12, level=level, canvas=size):
        assert any(part.supervised for part in found.parts)
        assert found.parts[0].role == "user" and found.parts[-1].role == "assistant"
        assert all(part.supervised == (part.role == "assistant") for part in found.parts)
        assert len(found.pictures) <= 6 and len(found.expected) <= 5
        for shown in found.pictures:
            assert shown.canvas.size == size and fits(shown.canvas)
        said = [text.text for text in found.texts]
        assert all(text.strip() == text and text for text in said)
        for text in said:
            assert "  " not in text and "{" not in text and "None" not in text and " ," not in text, text
        for answer in found.truth.answers:
            assert answer.text in said
            if answer.kind != "free":
                assert READERS[answer.kind](answer.text) is not None, answer
            assert is_right(answer, answer.text) and not is_right(answer, "nobody knows")


@pytest.mark.parametrize("task", TASK_NAMES)
def test_splits_never_leak(task: str) -> None:
    train, test = episodes(task, 25), episodes(task, 25, split="test")
    assert all(held_out_of(found) == 0 for found in train)
    assert all(held_out(combinations(shown.canvas)) == 0 for found in train for shown in found.pictures)
    shows = np.mean([held_out_of(found) > 0 for found in test])
    bare = task in UNSPLIT or task in (
        "draw_scene",
        "relation",
        "draw_mood",
        "draw_sizes",
        "draw_style",
        "draw_places",
    )
    assert shows == 1 or (bare and shows > 0.1) or shows > 0.7 or task == "clue", shows  # has no pair at all


def test_crowds_show_many_things_of_all_sizes() -> None:
    found = [one.pictures[-1].canvas for one in episodes("crowd", 200)]
    assert min(len(c.items) for c in found) >= 3 and sum(len(c.items) for c in found) / 200 > 3.4
    assert all(len({i.name for i in c.items}) == len(c.items) for c in found)
    sizes = Counter(size_word(i, c.base) for c in found for i in c.items)
    assert min(sizes["small"], sizes["large"], sizes[""]) > 60
    styles = Counter(c.style for c in found)
    assert min(styles["line"], styles["silhouette"]) > 5 and styles["full"] > 100
    assert sum(c.mood is not None for c in found) > 5
    assert sum(c.light is not None for c in found) > 5 and all(
        c.light is None or c.background != "black" for c in found
    )


def test_relations_stand() -> None:
    for found in episodes("relation", 50):
        canvas = found.pictures[-1].canvas
        assert found.truth.kind == "position" and canvas.relation is not None
        assert stands(canvas.relation, *canvas.items)


# --- reading -----------------------------------------------------------------------------------------------------------


def test_captions_say_what_is_shown() -> None:
    for found in episodes("caption_short", 150, level="wide"):
        assert read_short(found.texts[-1].text) == truth_short(found.pictures[0].canvas)
    for found in episodes("caption_full", 150, level="wide"):
        assert read_full(found.texts[-1].text) == truth_full(found.pictures[0].canvas)


PLAIN_WORDS = {
    "is", "there", "a", "an", "some", "in", "the", "picture", "this", "image", "do", "does", "you", "see", "can", "here",
    "show", "it", "yes", "or", "no",
}  # fmt: skip


def test_yes_and_no_are_balanced_and_true_and_of_popes_three_kinds() -> None:
    asked = episodes("ask_yes_no", 600)
    said = [read_yes_no(found.texts[-1].text) for found in asked]
    assert abs(np.mean([bool(answer) for answer in said]) - 0.5) <= 0.02
    kinds = Counter(found.truth.kind for found in asked)
    assert kinds == {"yes": 300, "random": 100, "popular": 100, "adversarial": 100}
    checked = 0
    for found, answer in zip(asked, said, strict=True):
        words = re.findall(r"\w+", found.texts[0].text.lower())
        names = {word for word in words if word in ONE_OF}
        if len(names) != 1 or set(words) - PLAIN_WORDS - set(ONE_OF) - set(COLOURS):  # a slip of the pen
            continue
        name, canvas = names.pop(), found.pictures[0].canvas
        colour = next((word for word in words if word in COLOURS), None)
        assert (canvas.count(name, colour) > 0) == answer, found.texts
        if found.truth.kind == "popular":
            assert name in POPULAR
        checked += 1
    assert checked > 520


def test_counts_colours_and_places_are_true() -> None:
    numbers = Counter()
    for found in episodes("ask_count", 200):
        canvas, number = found.pictures[0].canvas, read_number(found.texts[-1].text)
        numbers[number] += 1
        names = {ONE_OF[word] for word in re.findall(r"\w+", found.texts[0].text.lower()) if word in ONE_OF}
        if len(names) == 1:
            assert canvas.count(names.pop()) == number
    assert numbers == dict.fromkeys(range(5), 40)
    for found in episodes("ask_colour", 100):
        canvas, colour = found.pictures[0].canvas, found.texts[-1].text
        names = [word for word in re.findall(r"\w+", found.texts[0].text.lower()) if word in ONE_OF]
        if names:
            assert canvas.count(names[0], colour) == canvas.count(names[0]) == 1
        elif "background" in found.texts[0].text.lower():
            assert canvas.background == colour
    answers = Counter(
        found.texts[-1].text for found in episodes("ask_place", 300) if found.truth.kind == "relation"
    )
    assert set(answers) == {"left", "right", "above", "below"} and min(answers.values()) > 15


def test_letters_are_balanced_and_lead_to_the_truth() -> None:
    letters = Counter()
    for found in episodes("ask_choice", 280):
        letter = read_choice(found.texts[-1].text)
        options = dict(re.findall(r"\n([A-D])\. ([^\n]+)", found.texts[0].text))
        assert len(set(options.values())) == 4 and letter is not None
        letters[letter] += 1
        canvas, right = found.pictures[0].canvas, options[letter]
        shown = {item.name for item in canvas.items}
        if found.truth.kind == "thing":
            assert {name for name in options.values() if name in shown} == {right}
        elif found.truth.kind == "absent":
            assert {name for name in options.values() if name not in shown} == {right}
        elif found.truth.kind == "count":
            assert len(canvas.items) == read_number(right)
        elif found.truth.kind == "colour":
            assert right in {item.colour for item in canvas.items}
    assert letters == {"A": 70, "B": 70, "C": 70, "D": 70}


def test_questions_about_one_picture_are_each_answered_truly() -> None:
    kinds, yes = Counter(), Counter()
    for found in episodes("examine", 200):
        canvas, (shown, *said) = found.pictures[0].canvas, found.parts
        assert isinstance(shown, Shown) and not shown.supervised and len(said) == 10
        assert [part.supervised for part in said] == [False, True] * 5
        asked = [part.text for part in said[::2] if isinstance(part, Said)]
        assert len(set(asked)) == 5
        for question, answer in zip(asked, found.truth.answers, strict=True):
            kinds[answer.kind] += 1
            names = {ONE_OF[word] for word in re.findall(r"\w+", question.lower()) if word in ONE_OF}
            colours = set(re.findall(r"\w+", question.lower())) & set(COLOURS)
            if answer.kind == "yes_no":
                yes[answer.text] += 1
                if len(names) == 1 and not set(re.findall(r"\w+", question.lower())) - PLAIN_WORDS - set(
                    ONE_OF
                ):
                    assert (canvas.count(names.pop()) > 0) == (answer.text == "yes")
            elif answer.kind == "number" and len(names) == 1:
                assert canvas.count(names.pop()) == read_number(answer.text)
            elif answer.kind == "colour" and len(names) == 1 and not colours:
                assert {item.colour for item in canvas.items if item.name in names} == {answer.text}
            elif answer.kind == "choice":
                options = dict(re.findall(r"\n([A-D])\. ([^\n]+)", question))
                assert len(set(options.values())) == 4 and options[answer.text]
                there = {name for name in options.values() if canvas.count(name)}
                if "not in the picture" in question.lower():
                    assert options[answer.text] not in there and len(there) == 3
                elif "which of these" in question.lower():
                    assert there == {options[answer.text]}
        last = found.truth.answers[-1]
        assert last.text in (short_caption(canvas), full_caption(canvas))
    assert set(kinds) == {"yes_no", "number", "colour", "place", "choice", "short_caption", "full_caption"}
    assert 0.4 < yes["yes"] / yes.total() < 0.6


def test_answers_are_scored_by_what_they_mean() -> None:
    caption = Answer("a dog and two red cars on a blue background", "short_caption")
    assert is_right(caption, "two red cars and a dog on a blue background.")
    assert not is_right(caption, "two red cars and a dog on a red background")
    assert is_right(Answer("three", "number"), "3") and not is_right(Answer("three", "number"), "4")
    assert is_right(Answer("yes", "yes_no"), "Yes, there is.") and not is_right(Answer("no", "yes_no"), "yes")
    assert is_right(Answer("good bye!", "free"), "Good bye! ") and not is_right(
        Answer("good bye!", "free"), "bye"
    )
    moves = Answer("a dog moves right and a red car turns", "motion")
    assert is_right(moves, "a red car turns and a dog moves right") and not is_right(
        moves, "a dog moves right"
    )


# --- drawing and changing ----------------------------------------------------------------------------------------------


def test_prompts_name_what_is_to_be_drawn() -> None:
    for found in episodes("draw_scene", 200):
        canvas, text = found.expected[0], found.texts[0].text.lower()
        told = [colour for colour in COLOURS if re.search(rf"\b{colour}\b", text)]
        seen = {canvas.background} | {item.colour for item in canvas.items}
        assert all(colour in seen for colour in told), (text, canvas)
    for found in episodes("draw_word", 60):
        word = found.expected[0].word
        assert word is not None and f'"{word.text}"' in found.texts[0].text
    assert {found.expected[0].style for found in episodes("draw_style", 10)} == {"line", "silhouette"}
    for found in episodes("draw_sizes", 40, level="wide"):
        sides = [item.size for item in found.expected[0].items]
        assert len(sides) == 1 or max(sides) > 2 * min(sides)
    assert sum(len(found.expected[0].items) == 2 for found in episodes("draw_sizes", 40)) > 12


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("level", ["world", "wide"])
def test_targets_equal_their_sources_outside_the_region(kind: str, level: str) -> None:
    for found in episodes(f"edit_{kind}", 15, level=level):
        before, after = (shown.render().astype(int) for shown in found.pictures)
        assert found.truth.region is not None and found.truth.kind == kind
        top, left, bottom, right = found.truth.region
        moved = (before != after).any(-1)
        assert moved.any(), found.texts
        outside = moved.copy()
        outside[top:bottom, left:right] = False
        assert not outside.any()
        if kind not in GLOBAL + VIEW:
            assert (bottom - top) * (right - left) < moved.size
        source, target = (shown.canvas for shown in found.pictures)
        if kind in ("mood", "light", "style", "background"):
            assert source.items == target.items and source.word == target.word
        if kind not in (*GLOBAL, *VIEW):
            assert (source.background, source.second, source.style) == (
                target.background,
                target.second,
                target.style,
            )


MAKER = Maker(random.Random(0), world_level("world"), (64, 64))
DOG, CAR = Item("dog", None, 0, 8, 32), Item("car", "red", 32, 32, 32)
PAIR = Canvas(64, 64, "white", (DOG, CAR))


@pytest.mark.parametrize(
    ("edit", "items", "box"),
    [
        (Edit("remove", DOG.kind), (CAR,), (8, 0, 40, 32)),
        (Edit("colour", CAR.kind, "blue"), (DOG, replace(CAR, colour="blue")), (32, 32, 64, 64)),
        (Edit("replace", DOG.kind, ("owl", None)), (Item("owl", None, 0, 8, 32), CAR), (8, 0, 40, 32)),
        (Edit("size", DOG.kind, how="smaller"), (Item("dog", None, 6, 14, 20), CAR), (8, 0, 40, 32)),
        (Edit("rotate", CAR.kind, how="upside down"), (DOG, replace(CAR, turn=2)), (32, 32, 64, 64)),
        (Edit("move", CAR.kind, replace(CAR, y=0), "above right"), (DOG, replace(CAR, y=0)), (0, 32, 64, 64)),
        (
            Edit("view_rotate", how="left"),
            (Item("dog", None, 8, 32, 32, 1), Item("car", "red", 32, 0, 32, 1)),
            (0, 0, 64, 64),
        ),
        (Edit("zoom_out"), (Item("dog", None, 12, 17, 20), Item("car", "red", 32, 32, 20)), (0, 0, 64, 64)),
    ],
)  # fmt: skip
def test_edits_by_hand(edit: Edit, items: tuple[Item, ...], box: tuple[int, int, int, int]) -> None:
    after = apply(edit, PAIR, MAKER)
    assert after.items == items
    assert region(edit, PAIR, after) == box


def test_edits_that_do_not_fit_are_refused() -> None:
    for edit in (
        Edit("remove", ("cat", "red")),
        Edit("background", new="red"),  # hides the car
        Edit("rotate", ("cat", None), how="left"),
        Edit("size", CAR.kind, how="larger"),  # into the dog
        Edit("word_replace", new="HI"),
        Edit("mood", new="bright"),  # a white background has no brighter one
    ):
        with pytest.raises(Reject):
            apply(edit, PAIR, MAKER)


@pytest.mark.parametrize("how", ["left", "right", "upside down"])
def test_a_turned_view_is_the_turned_picture(how: str) -> None:
    turns = {"left": 1, "upside down": 2, "right": 3}[how]
    after = apply(Edit("view_rotate", how=how), PAIR, MAKER)
    assert np.array_equal(render(after), np.rot90(render(PAIR), turns))


def test_in_context_every_pair_shows_the_one_change() -> None:
    for found in episodes("in_context", 60):
        pairs = list(zip(found.pictures[::2], found.pictures[1::2], strict=True))
        assert len(pairs) in (2, 3) and found.pictures[-1].supervised
        outcomes = [(a.canvas, b.canvas) for a, b in pairs]
        kind = found.truth.kind
        if kind in ("background", "mood", "light", "style"):
            assert len({getattr(after, kind) for _, after in outcomes}) == 1
            assert all(before.items == after.items for before, after in outcomes)
        elif kind in ("add", "remove"):
            changed = [set(after.items) ^ set(before.items) for before, after in outcomes]
            assert len({frozenset(item.kind for item in items) for items in changed}) == 1


def test_subjects_keep_their_looks() -> None:
    for found in episodes("subject_extract", 30):
        before, after = (shown.canvas for shown in found.pictures)
        assert after.background == "white" and len(after.items) == 1
        assert after.items[0].kind in {item.kind for item in before.items}
        assert place_words(after.items[0].box, after.size) == "middle"
    for found in episodes("subject_place", 30):
        before, after = (shown.canvas for shown in found.pictures)
        assert after.items[0].kind in {item.kind for item in before.items}
    for found in episodes("subject_three", 30):
        before, after = (shown.canvas for shown in found.pictures)
        assert {item.kind for item in after.items} == {before.items[0].kind} and len(after.items) >= 2
        assert after.background == before.background


# --- several pictures, thoughts, talk ----------------------------------------------------------------------------------


def test_stories_change_only_what_they_tell() -> None:
    lengths = Counter()
    for found in episodes("story", 80):
        canvases = found.expected
        lengths[len(canvases)] += 1
        told = [part.text for part in found.texts if part.supervised]
        assert len(told) == len(canvases)
        for text, before, after in zip(told[1:], canvases, canvases[1:], strict=False):
            assert before != after
            if "appears" in text or "goes away" in text:
                assert abs(len(after.items) - len(before.items)) == 1
            if "appears" not in text and "goes away" not in text:
                assert len(after.items) == len(before.items)
            if "everything behind" in text:
                assert before.items == after.items and text.endswith(f"{after.background}.")
            else:
                assert before.background == after.background
    assert lengths == {2: 20, 3: 20, 4: 20, 5: 20}


def test_recipes_add_one_thing_a_step_and_end_with_the_outcome() -> None:
    for found in episodes("recipe", 60):
        *steps, last = found.expected
        for k, canvas in enumerate(steps):
            assert len(canvas.items) == k + 1 and canvas.items == steps[-1].items[: k + 1]
        assert len(last.items) == 1 and last.background == steps[0].background
        assert f"the {last.items[0].name} is ready." in found.texts[-1].text


def test_films_move_as_they_say() -> None:
    told = Counter()
    for found in episodes("video_caption", 120):
        canvases = [shown.canvas for shown in found.pictures]
        moving = read_motion(found.texts[-1].text)
        assert moving is not None and 2 <= len(canvases) <= 4
        for name, _, motion in moving:
            told[motion] += 1
            first, last = (next(i for i in c.items if i.name == name) for c in (canvases[0], canvases[-1]))
            (x0, y0), (x1, y1) = first.centre, last.centre
            assert {
                "moves right": x1 > x0 and y1 == y0,
                "moves left": x1 < x0 and y1 == y0,
                "moves up": y1 < y0 and x1 == x0,
                "moves down": y1 > y0 and x1 == x0,
                "grows": last.size > first.size,
                "shrinks": last.size < first.size,
                "turns": last.turn != first.turn,
            }[motion]
        still = {name for name, _, _ in moving}
        for item in canvases[0].items:
            assert item.name in still or item in canvases[-1].items
    assert set(told) == set(MOTIONS.values())
    for found in episodes("video_next", 30):
        assert len(found.expected) == 1 and 3 <= len(found.pictures) <= 5
    assert read_motion("a dog moves sideways") is None


def test_thoughts_end_with_the_plan_of_the_picture() -> None:
    for task in ("riddle", "wish", "sum_drawn", "odd_one", "planned"):
        for found in episodes(task, 40):
            thought = found.parts[1]
            assert isinstance(thought, Said) and thought.supervised and isinstance(found.parts[2], Shown)
            assert read_plan(thought.text) == truth_full(found.expected[0])
    assert all(
        len(CLUES[item.name]) >= 4 for found in episodes("riddle", 20) for item in found.expected[0].items
    )


@pytest.mark.parametrize("task", PLANNED)
def test_what_is_drawn_or_edited_can_be_laid_out_in_words_first(task: str) -> None:
    for found in episodes(task, 4):
        planned = with_plan(found)
        *before, plan, drawn = planned.parts
        assert (*before, drawn) == found.parts and isinstance(plan, Said) and plan.supervised
        assert read_plan(plan.text) == truth_full(found.expected[0])
        assert planned.truth.answers == (*found.truth.answers, Answer(plan.text, "plan"))
        assert planned.truth.region == found.truth.region


def test_test_riddles_join_clues_that_training_never_joins() -> None:
    train = {pair for found in episodes("riddle", 300) for pair in found.truth.combinations}
    test = episodes("riddle", 60, split="test")
    assert all(held_out_of(found) for found in test)
    assert not train & {
        pair for found in test for pair in found.truth.combinations if held_out(frozenset([pair]))
    }


def test_plain_words_begin_a_picture_only_where_one_is_asked_for() -> None:
    found = episodes("plain", 90)
    assert [len(one.expected) for one in found] == [1, 0, 0] * 30
    turns = Counter(sum(part.role == "user" for part in one.parts) for one in found)
    assert set(turns) == {1, 2, 3}
    for one in found:  # question and answer in turn
        assert [part.role for part in one.parts] == ["user", "assistant"] * (len(one.parts) // 2)


def test_chats_draw_ask_change_and_talk() -> None:
    found = episodes("chat", 60)
    assert all(1 <= len(one.pictures) <= 3 and len(one.truth.answers) >= 1 for one in found)
    assert all(any(not one.texts[k].supervised for k in range(len(one.texts))) for one in found)
    assert sum(len(one.expected) >= 2 for one in found) > 30
    assert {sum(part.role == "user" for part in one.parts) for one in found} >= {3, 4, 5, 6}


# --- documents ---------------------------------------------------------------------------------------------------------


def coded(found: Episode, scales: int = 5) -> list[Codes]:
    out = []
    for shown in found.pictures:
        schedule = ScaleSchedule.nearest(shown.canvas.height, shown.canvas.width, scales)
        out.append(Codes.plain(schedule, torch.arange(schedule.num_tokens) % 24))
    return out


def test_a_document_in_dialogue_by_hand() -> None:
    found = episode("edit_background", 3, SEED)
    codes = coded(found)
    segments = to_document(found, codes).segments
    kinds = [s.token if isinstance(s, Mark) else s.text if isinstance(s, Text) else "image" for s in segments]
    asked = found.texts[0].text
    assert kinds == [
        TURN_START, "user\n", "image", asked, TURN_END, "\n", TURN_START, "assistant\n", "image", TURN_END,
    ]  # fmt: skip
    assert [s.supervised for s in segments] == [False] * 8 + [True, True]
    assert segments[2].codes is codes[0] and segments[8].codes is codes[1]  # type: ignore[union-attr]
    bare = to_document(found, codes, dialogue=False, scales=3).segments
    assert len(bare) == 3 and isinstance(bare[-1], Image) and bare[-1].scales == 3
    cut = to_document(found, codes, scales=3).segments
    assert isinstance(cut[-1], Image) and cut[-1].scales == 3
    with pytest.raises(ValueError, match="has 2 pictures, got 1 codes"):
        to_document(found, codes[:1])


@pytest.mark.parametrize("task", ["chat", "story", "in_context", "riddle", "plain"])
def test_documents_are_as_extraction_lays_rows_out(task: str) -> None:
    found = episode(task, 4, SEED)
    parts = []
    for part in found.parts:
        one = {"role": part.role, "supervised": part.supervised, "text": None, "input": None}
        if isinstance(part, Said):
            one["text"] = part.text
        else:
            schedule = ScaleSchedule.square(5)
            one |= {
                "final": (64, 64),
                "scales": 5,
                "target": (torch.arange(schedule.num_tokens) % 24).tolist(),
            }
        parts.append(one)
    for dialogue in (True, False):
        ours = to_document(found, coded(found), dialogue=dialogue).segments
        theirs = as_document(parts, dialogue=dialogue).segments
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            if isinstance(a, Image) and isinstance(b, Image):
                assert a.supervised == b.supervised and torch.equal(a.codes.target, b.codes.target)
            else:
                assert a == b


@pytest.mark.parametrize("task", TASK_NAMES)
def test_every_task_can_be_laid_out(task: str) -> None:
    found, vocab = episode(task, 1, SEED), BUNDLE.vocab
    sample = build(to_document(found, coded(found)), vocab, LayoutOptions(12.0))
    assert len(sample.images) == len(found.pictures) and bool((sample.weights > 0).any())


BUNDLE = tiny_bundle()


def test_mixes_are_pure_and_use_every_canvas_of_their_level() -> None:
    mix = Mix({"draw_scene": 1.0, "ask_count": 3.0}, seed=SEED, scales=10)
    found = [mix.episode(k) for k in range(120)]
    assert found == [
        Mix({"draw_scene": 1.0, "ask_count": 3.0}, seed=SEED, scales=10).episode(k) for k in range(120)
    ]
    tasks = Counter(one.task for one in found)
    assert 70 <= tasks["ask_count"] <= 105
    sizes = Counter(one.pictures[0].canvas.size for one in found)
    assert set(sizes) <= set(canvas_sizes(10)) and 45 <= sizes[96, 96] <= 85 and len(sizes) > 6
    with pytest.raises(ValueError, match="unknown playground task 'dance'"):
        Mix({"dance": 1.0}, seed=0)
    with pytest.raises(ValueError, match="at least one task"):
        Mix({}, seed=0)
    assert len(list(corpus(["draw_scene", "chat"], 3, SEED))) > 9
