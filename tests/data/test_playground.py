"""The playground: seeds decide everything, splits hold combinations out, captions read back, sprites need
their font.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from nextflow_ar.data.playground.captions import Reading, caption, counts_of, prompt, read_caption
from nextflow_ar.data.playground.scenes import (
    LEVELS,
    TASKS,
    Scene,
    SceneSampler,
    Split,
    Task,
    Thing,
    held_out_pairs,
    is_held_out,
    level,
    relation_holds,
    render,
)
from nextflow_ar.data.playground.words import COLOURS, NOUNS, SHAPES

EASY = LEVELS["easy"]
PAIRED: tuple[Task, ...] = ("two_object", "colors", "position", "color_attr")


def scenes(count: int, split: Split = "any", seed: int = 8_900_000, name: str = "easy") -> list[Scene]:
    sampler = SceneSampler(level(name), split, seed)
    return [sampler.scene(index) for index in range(count)]


def test_seed_and_index_decide_the_scene_and_its_picture() -> None:
    once, again = scenes(60), scenes(60)
    assert once == again
    assert all(np.array_equal(render(a), render(b)) for a, b in zip(once[:20], again[:20], strict=True))
    assert SceneSampler(EASY, "any", 8_900_000).scene(41) == once[41]  # whatever was asked before
    differing = sum(a != b for a, b in zip(once, scenes(60, seed=8_900_001), strict=True))
    assert differing >= 59
    assert len(set(once)) >= 58


def test_prompts_come_from_their_own_stream_of_the_seed() -> None:
    sampler = SceneSampler(EASY, "any", 8_900_002)
    texts = [prompt(sampler.scene(k), sampler.rng(k, stream=1)) for k in range(50)]
    assert texts == [prompt(sampler.scene(k), sampler.rng(k, stream=1)) for k in range(50)]
    other = [prompt(sampler.scene(k), sampler.rng(k, stream=2)) for k in range(50)]
    assert sum(a != b for a, b in zip(texts, other, strict=True)) >= 20
    named = sum(f"{sampler.scene(k).background} background" in text for k, text in enumerate(texts))
    assert 28 <= named <= 46  # three prompts in four name the background


def test_all_six_types_come_equally_often() -> None:
    tally = Counter(scene.task for scene in scenes(600))
    assert set(tally) == set(TASKS)
    assert all(70 <= count <= 130 for count in tally.values())


def test_train_never_shows_a_held_out_combination_and_test_always_does() -> None:
    assert max(held_out_pairs(scene) for scene in scenes(600, "train")) == 0
    for task in PAIRED:
        sampler = SceneSampler(EASY, "test", 8_900_003)
        assert min(held_out_pairs(sampler.scene(k, task)) for k in range(100)) >= 1


def test_one_pair_in_eight_is_held_out_whatever_the_order() -> None:
    names = [*EASY.nouns, *SHAPES]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    held = [is_held_out(a, b) for a, b in pairs]
    assert held == [is_held_out(b, a) for a, b in pairs]
    assert 0.07 <= np.mean(held) <= 0.18
    coloured = [(shape, colour) for shape in SHAPES for colour in EASY.colours if is_held_out(shape, colour)]
    assert 2 <= len(coloured) <= 10


@pytest.mark.parametrize(
    ("a", "b", "relation", "holds"),
    [
        ((0, 16), (32, 16), "left of", True),
        ((0, 16), (32, 16), "right of", False),
        ((0, 16), (32, 16), "above", False),
        ((32, 0), (0, 16), "right of", True),
        ((0, 0), (32, 32), "left of", False),  # the diagonal belongs to neither axis
        ((0, 0), (32, 32), "above", False),
        ((16, 0), (16, 32), "above", True),
        ((16, 32), (32, 0), "below", True),
        ((16, 16), (32, 16), "left of", False),  # too close: 16 px of 64 wanted 25.6
        ((16, 16), (16, 16), "above", False),
    ],
)
def test_relations_by_hand(a: tuple[int, int], b: tuple[int, int], relation: str, holds: bool) -> None:
    first, second = Thing("dog", None, *a, 32), Thing("cat", None, *b, 32)
    assert relation_holds(relation, first, second) is holds
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation]
    assert relation_holds(opposite, second, first) is holds


def test_position_scenes_keep_their_relation() -> None:
    sampler = SceneSampler(EASY, "any", 8_900_004)
    shown = [sampler.scene(k, "position") for k in range(120)]
    assert all(s.relation is not None and relation_holds(s.relation, *s.things) for s in shown)
    assert set(Counter(s.relation for s in shown)) == {"left of", "right of", "above", "below"}


@pytest.mark.parametrize("name", ["easy", "medium"])
def test_things_stay_on_the_canvas_apart_and_visible(name: str) -> None:
    likes = {noun.name: noun.like for noun in NOUNS}
    for scene in scenes(200, name=name):
        for thing in scene.things:
            assert 0 <= thing.x <= 64 - thing.size and 0 <= thing.y <= 64 - thing.size
            assert thing.size in LEVELS[name].sizes
            assert thing.colour != scene.background
            assert scene.background not in likes.get(thing.name, ())
        for i, a in enumerate(scene.things):
            for b in scene.things[i + 1 :]:
                gap = max(abs(a.centre[0] - b.centre[0]), abs(a.centre[1] - b.centre[1]))
                assert gap >= (a.size + b.size) / 2


def test_easy_scenes_sit_on_the_lattice_in_palette_colours() -> None:
    for scene in scenes(200):
        assert all(t.size == 32 and t.x % 16 == 0 and t.y % 16 == 0 for t in scene.things)
        assert scene.rgb == (COLOURS[scene.background],)
        assert render(scene)[0, 0].tolist() == list(COLOURS[scene.background]) or any(
            t.x == 0 and t.y == 0 for t in scene.things
        )


def test_levels() -> None:
    assert (len(EASY.nouns), len(EASY.shapes), len(EASY.colours)) == (20, 5, 8)
    assert (len(LEVELS["hard"].nouns), len(LEVELS["hard"].colours)) == (56, 10)
    assert level("easy", max_count=2).max_count == 2 and EASY.max_count == 4
    with pytest.raises(
        ValueError, match="unknown playground level 'simple': one of shapes, easy, hues, medium, hard"
    ):
        level("simple")


def test_medium_moves_freely_with_sizes_and_jittered_colours() -> None:
    shown = scenes(150, name="medium")
    assert len({t.size for s in shown for t in s.things}) >= 6
    assert sum(t.x % 16 != 0 for s in shown for t in s.things) > 100
    spread = [np.abs(np.array(s.rgb[0]) - np.array(COLOURS[s.background])).max() for s in shown]
    assert 0 < max(spread) <= 25


def test_hard_has_gradients() -> None:
    gradients = sum(len(scene.rgb) == 2 for scene in scenes(100, name="hard"))
    assert 30 <= gradients <= 70


@pytest.mark.parametrize("name", ["easy", "medium", "hard"])
def test_captions_read_back_to_the_scene(name: str) -> None:
    for scene in scenes(300, name=name):
        assert read_caption(caption(scene)) == Reading(counts_of(scene), scene.background)


def test_captions_by_hand() -> None:
    circle = Thing("circle", "red", 0, 0, 32)
    dogs = (Thing("dog", None, 32, 0, 32), Thing("dog", None, 32, 32, 32))
    assert caption(Scene("counting", "orange", (*dogs, circle))) == (
        "a red circle and two dogs on an orange background"
    )
    butterfly = Scene("counting", "blue", tuple(Thing("butterfly", None, 0, 0, 32) for _ in range(3)))
    assert caption(butterfly) == "three butterflies on a blue background"
    assert read_caption("Two dogs and a red circle on an orange background.") == Reading(
        ((("circle", "red"), 1), (("dog", None), 2)), "orange"
    )
    assert read_caption("a dog") == Reading(((("dog", None), 1),), None)
    for nonsense in ("", "a unicorn on a red background", "many dogs on a red background", "a shiny dog"):
        assert read_caption(nonsense) is None


def test_relation_prompts_name_both_things_in_order() -> None:
    pair = (Thing("apple", None, 0, 16, 32), Thing("ring", "blue", 32, 16, 32))
    scene = Scene("position", "white", pair, "left of")
    texts = {prompt(scene, np.random.default_rng(k)) for k in range(60)}
    assert all("an apple left of a blue ring" in text for text in texts)
    assert any("white background" in text for text in texts)
    assert any("background" not in text for text in texts)


def without_font(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"NEXTFLOW_AR_EMOJI_FONT": "/nonexistent"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_without_the_font_shapes_work_and_sprites_say_what_to_install() -> None:
    code = (
        "from nextflow_ar.data.playground.scenes import LEVELS, SceneSampler, level, render\n"
        "from nextflow_ar.data.playground.sprites import SpritesMissing\n"
        "shapes = SceneSampler(level('easy', nouns=()), 'any', 8_900_005)\n"
        "print(sum(render(shapes.scene(k)).shape == (64, 64, 3) for k in range(30)))\n"
        "try:\n"
        "    render(SceneSampler(level('easy', shapes=()), 'any', 8_900_005).scene(0, 'two_object'))\n"
        "except SpritesMissing as error:\n"
        "    print(error)\n"
    )
    done = without_font(code)
    assert done.returncode == 0, done.stderr
    shapes, message = done.stdout.strip().split("\n")
    assert shapes == "30"
    assert "fonts-noto-color-emoji" in message and "shapes work without it" in message


def test_ordinary_words() -> None:
    assert [noun.name for noun in NOUNS[:20]] == list(EASY.nouns)
    assert len({noun.name for noun in NOUNS}) == len(NOUNS) == len({noun.many for noun in NOUNS})
    assert all(a != b for a, b in pairwise(sorted(COLOURS.values())))


def test_hues_are_named_after_the_nearest_colour_and_hold_pairs_out() -> None:
    sampler = SceneSampler(level("hues"), "train", 4)
    palette = {name: np.array(COLOURS[name]) for name in level("hues").colours}
    seen: dict[str, set] = {}
    for index in range(400):
        scene = sampler.scene(index)
        assert held_out_pairs(scene) == 0
        for colour, rgb in [(scene.background, scene.rgb[0])] + [
            (t.colour, t.rgb) for t in scene.things if t.colour is not None
        ]:
            nearest = min(palette, key=lambda name: int(((palette[name] - rgb) ** 2).sum()))
            assert nearest == colour
            seen.setdefault(colour, set()).add(rgb)
        for thing in scene.things:
            if thing.rgb is not None:
                assert sum((a - b) ** 2 for a, b in zip(thing.rgb, scene.rgb[0], strict=True)) >= 70**2
    assert set(seen) == set(palette) and all(len(shades) > 15 for shades in seen.values())
