"""The wide world: its words and knowledge, canvases and places by hand, looks pixel by pixel, captions that read back."""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from nextflow_ar.data.playground.canvases import (
    Canvas,
    Item,
    Word,
    canvas_sizes,
    combinations,
    fits,
    held_out,
    place_words,
    size_word,
    stands,
)
from nextflow_ar.data.playground.captions import caption, prompt
from nextflow_ar.data.playground.curriculum import episode
from nextflow_ar.data.playground.knowledge import CLUES, COLOUR_CLUES, WISHES
from nextflow_ar.data.playground.looks import render, word_box
from nextflow_ar.data.playground.maker import WORLD_LEVELS, Maker, Reject, world_level
from nextflow_ar.data.playground.reading import (
    Caption,
    Placed,
    number_words,
    read_choice,
    read_colour,
    read_full,
    read_name,
    read_number,
    read_place,
    read_plan,
    read_short,
    read_yes_no,
    truth_full,
    truth_short,
)
from nextflow_ar.data.playground.saying import as_people_write, full_caption, phrase, short_caption
from nextflow_ar.data.playground.scenes import LEVELS, SceneSampler, is_held_out, level
from nextflow_ar.data.playground.scenes import render as render_scene
from nextflow_ar.data.playground.words import COLOURS, NOUNS, SHAPES
from nextflow_ar.data.playground.world import (
    ALIKE_TURNED,
    COLOUR_NAMES,
    GROUP_OF,
    LIKE,
    MANY,
    NAMES,
    NATIVE,
    ONE_OF,
    SPRITES,
    UNCOUNTED,
    WRITTEN,
    colours_of,
)
from nextflow_ar.scales import ScaleSchedule


def made(
    count: int, level_name: str = "world", size: tuple[int, int] = (64, 64), seed: int = 0
) -> list[Canvas]:
    maker = Maker(random.Random(seed), world_level(level_name), size)
    out: list[Canvas] = []
    while len(out) < count:
        try:
            out.append(maker.party(1, 3, plain=False) if len(out) % 2 else maker.scene()[1])
        except Reject:
            continue
    return out


def test_the_old_levels_are_bit_for_bit_what_they_were() -> None:
    digests = {}
    for name in LEVELS:
        digest, sampler = hashlib.sha256(), SceneSampler(level(name), "train", 11)
        for k in range(60):
            scene = sampler.scene(k)
            digest.update(repr((scene, caption(scene), prompt(scene, sampler.rng(k, 1)))).encode())
            if name == "shapes":
                digest.update(render_scene(scene).tobytes())
        digests[name] = digest.hexdigest()[:12]
    assert digests == {
        "shapes": "dbea1cd19faf",
        "easy": "f28db6df7ef5",
        "hues": "3b6d692a43b8",
        "medium": "859a751ddb33",
        "hard": "79be001b33ed",
    }


def test_eighty_things_each_with_a_plural_a_group_and_four_clues() -> None:
    assert len(SPRITES) == 75 and SPRITES[:56] == NOUNS
    assert len(set(NAMES)) == 80 and len({noun.glyph for noun in SPRITES}) == 75
    assert set(GROUP_OF) == set(NAMES) == set(CLUES) == set(MANY)
    assert len(NATIVE) == 24 and all(colour in LIKE[name] for name, colour in NATIVE.items())
    clues = [clue for name in NAMES for clue in CLUES[name]]
    assert all(len(CLUES[name]) >= 4 for name in NAMES) and len(set(clues)) == len(clues)
    for name in NAMES:  # a clue never gives the name away
        assert not any(f" {word} " in f" {clue} " for clue in CLUES[name] for word in (name, MANY[name])), (
            name
        )
    assert set(COLOUR_CLUES) == set(COLOURS) and all(len(clues) >= 4 for clues in COLOUR_CLUES.values())
    assert all(name not in said for name, wishes in WISHES.items() for said in wishes)
    assert [MANY[n] for n in ("fish", "cross", "snowman", "star")] == ["fish", "crosses", "snowmen", "stars"]
    assert ONE_OF["butterflies"] == "butterfly" and ONE_OF["scissors"] == "scissors"


def test_colours_that_a_thing_can_have() -> None:
    assert colours_of("circle") == COLOUR_NAMES and colours_of("dog") == ()
    assert "red" in colours_of("apple") and len(colours_of("apple")) == 10
    assert "purple" in colours_of("umbrella") and "blue" not in colours_of("umbrella")


def test_one_written_word_in_eight_is_held_out() -> None:
    held = [word for word in WRITTEN if is_held_out("word", word)]
    assert len(set(WRITTEN)) == len(WRITTEN) == 48 and 3 <= len(held) <= 10


@pytest.mark.parametrize(("scales", "base", "count"), [(8, 64, 5), (10, 96, 11), (12, 128, 21)])
def test_canvas_sizes_are_what_the_schedule_covers(scales: int, base: int, count: int) -> None:
    sizes = canvas_sizes(scales)
    assert sizes[0] == (base, base) and len(sizes) == count
    for height, width in sizes:
        assert ScaleSchedule.nearest(height, width, scales).image_size(8) == (height, width)
        assert 0.5 <= height / width <= 2 and (width, height) in sizes
        assert Canvas(height, width, "red", ()).base == base
    assert (48, 80) in canvas_sizes(8) and (72, 120) in canvas_sizes(10)


@pytest.mark.parametrize(
    ("box", "size", "place"),
    [
        ((0, 0, 32, 32), (64, 64), "above left"),
        ((16, 16, 48, 48), (64, 64), "middle"),
        ((32, 16, 64, 48), (64, 64), "below"),
        ((0, 32, 32, 64), (64, 64), "above right"),
        ((16, 0, 48, 32), (64, 64), "left"),
        ((0, 64, 32, 96), (32, 96), "right"),  # no way up or down on a canvas as high as the thing
    ],
)
def test_places_by_hand(box: tuple[int, int, int, int], size: tuple[int, int], place: str) -> None:
    assert place_words(box, size) == place


def test_sizes_relations_and_fitting_by_hand() -> None:
    sides = (18, 19, 20, 32, 39, 40, 48)
    words = [size_word(Item("dog", None, 0, 0, side), 64) for side in sides]
    assert words == ["small", "small", "", "", "", "large", "large"]
    a, b = Item("dog", None, 0, 16, 32), Item("pig", None, 32, 16, 32)
    assert stands("left of", a, b) and stands("right of", b, a) and not stands("above", a, b)
    assert fits(Canvas(64, 64, "red", (a, b)))
    assert not fits(Canvas(64, 64, "red", (a, Item("pig", None, 31, 16, 32))))
    assert not fits(Canvas(64, 64, "red", (Item("pig", None, 33, 16, 32),)))
    assert not fits(Canvas(64, 64, "red", (a,), word=Word("HI", "white", 10, 20, 20, 12, 10)))


def test_combinations_leave_a_things_own_colour_out() -> None:
    items = (Item("apple", "red", 0, 0, 20), Item("star", "blue", 20, 0, 20), Item("dog", None, 40, 0, 20))
    canvas = Canvas(64, 64, "white", items, word=Word("HI", "black", 0, 40, 20, 12, 10))
    pairs = {("apple", "dog"), ("apple", "star"), ("dog", "star"), ("star", "blue"), ("word", "HI")}
    assert combinations(canvas) == pairs
    assert held_out(frozenset(pairs)) == sum(is_held_out(a, b) for a, b in pairs)


# --- looks -------------------------------------------------------------------------------------------------------------


def test_moods_and_lights_are_exact_pixels() -> None:
    plain = Canvas(64, 64, "red", ())
    assert render(plain)[5, 5].tolist() == [220, 40, 40]

    def look(**changes: object) -> list[int]:
        return render(Canvas(64, 64, "red", (), **changes))[5, 5].tolist()  # type: ignore[arg-type]

    assert look(mood="dark") == [84, 15, 15]  # 220 * 0.38 = 83.6
    assert look(mood="bright") == [238, 148, 148]  # half of the way to 255: 237.5, 147.5
    assert look(mood="gray") == [94, 94, 94]  # 0.299 * 220 + 0.701 * 40 = 93.8
    assert look(mood="warm") == [248, 43, 26]  # 220 + 28; 35.2 + 8; 26.4
    assert look(mood="cold") == [150, 43, 72]  # 149.6; 35.2 + 8; 40 + 32
    lit = render(Canvas(64, 64, "white", (), light="left"))[:, :, 0].astype(int)
    assert (lit[0] == lit[63]).all() and lit[0, 0] == 255 and (np.diff(lit[0]) <= 0).all()
    assert lit[0, 63] == round(245 * (1.15 - 0.75 * 63.5 / 64))
    assert (render(Canvas(64, 64, "white", (), light="below"))[::-1, 7, 0] == lit[0]).all()


def test_gradients_go_from_the_first_colour_to_the_second() -> None:
    picture = render(Canvas(64, 96, "red", (), second="blue"))
    assert picture.shape == (64, 96, 3) and picture.dtype == np.uint8
    assert picture[0, 3].tolist() == list(COLOURS["red"])
    assert picture[63, 90].tolist() == list(COLOURS["blue"])


def test_styles_have_one_ink() -> None:
    items = (Item("apple", "red", 4, 4, 32), Item("dog", None, 30, 30, 32))
    flat = render(Canvas(64, 64, "yellow", items, style="silhouette")).reshape(-1, 3)
    colours, counts = np.unique(flat, axis=0, return_counts=True)
    top = {tuple(colour) for colour in colours[np.argsort(counts)[-2:]].tolist()}
    assert top == {(30, 30, 30), COLOURS["yellow"]}
    drawn = render(Canvas(64, 64, "yellow", items, style="line"))
    assert (drawn.max(-1) == drawn.min(-1)).all()  # gray throughout
    assert drawn.max() == 245 and drawn.min() < 90
    assert 0.02 < (drawn < 128).mean() < 0.3


def test_recolouring_keeps_the_outline_and_takes_the_colour() -> None:
    for name in NATIVE:
        for colour in colours_of(name):
            ground = "green" if colour != "green" else "white"
            shown = render(Canvas(32, 32, ground, (Item(name, colour, 0, 0, 32),))).astype(int)
            own = render(Canvas(32, 32, ground, (Item(name, NATIVE[name], 0, 0, 32),))).astype(int)
            back = np.array(COLOURS[ground])
            assert (((shown == back).all(-1)) == ((own == back).all(-1))).mean() > 0.98, (name, colour)
            if colour != NATIVE[name]:
                assert np.abs(shown - own).max(-1).max() > 60, (name, colour)
                near = (((shown - COLOURS[colour]) ** 2).sum(-1) < 75**2).sum()
                assert near > 40, (name, colour, near)


def test_all_things_look_different() -> None:
    looks = {}
    for name in NAMES:
        item = Item(name, NATIVE.get(name, "red" if name in SHAPES else None), 0, 0, 32)
        looks[name] = render(Canvas(32, 32, "white", (item,))).astype(float)
    gaps = {(a, b): np.abs(looks[a] - looks[b]).mean() for a, b in itertools.combinations(NAMES, 2)}
    assert min(gaps.values()) > 8, min(gaps, key=gaps.__getitem__)


def test_turns_can_be_seen_and_are_exact() -> None:
    for name in NAMES:
        item = Item(name, NATIVE.get(name, "red" if name in SHAPES else None), 0, 0, 32)
        still = render(Canvas(32, 32, "white" if name != "moon" else "blue", (item,))).astype(float)
        gaps = [np.abs(still - np.rot90(still, k)).mean() for k in (1, 2, 3)]
        assert name in ALIKE_TURNED or min(gaps) > 6, (name, gaps)
    car = Canvas(64, 64, "white", (Item("car", "red", 8, 8, 32),))
    turned = Canvas(64, 64, "white", (Item("car", "red", 8, 8, 32, turn=1),))
    assert np.array_equal(render(turned)[8:40, 8:40], np.rot90(render(car)[8:40, 8:40]))


def test_written_words_stand_out_and_stay_in_their_box() -> None:
    width, height = word_box("HELLO", 19)
    canvas = Canvas(64, 96, "blue", (), word=Word("HELLO", "white", 5, 9, width, height, 19))
    picture = render(canvas)
    changed = (picture != np.array(COLOURS["blue"], np.uint8)).any(-1)
    rows, columns = np.nonzero(changed)
    assert rows.min() >= 9 and rows.max() < 9 + height and columns.min() >= 5 and columns.max() < 5 + width
    assert 0.15 < changed.sum() / (width * height) < 0.6


# --- sampling and words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(WORLD_LEVELS))
@pytest.mark.parametrize("size", [(64, 64), (80, 48), (72, 128), (128, 128)])
def test_canvases_fit_at_every_level_and_size(name: str, size: tuple[int, int]) -> None:
    for canvas in made(60, name, size):
        assert canvas.size == size and fits(canvas)
        assert render(canvas).shape == (*size, 3)
        for item in canvas.items:
            own = item.colour in (None, NATIVE.get(item.name))
            assert canvas.background not in (item.colour, *(LIKE.get(item.name, ()) if own else ()))
            assert name == "wide" or (item.x % 8 == 0 and item.y % 8 == 0)


def test_wide_has_gradients_many_sizes_and_shades() -> None:
    wide = made(300, "wide")
    assert 0.2 < np.mean([canvas.second is not None for canvas in wide]) < 0.5
    assert len({item.size for canvas in wide for item in canvas.items}) > 12
    assert len({canvas.tint for canvas in wide}) > 250
    assert all(canvas.second is None and canvas.tint == (0, 0, 0) for canvas in made(50))


def test_hues_are_shades_that_no_other_palette_colour_is_nearer_to() -> None:
    palette = np.array(list(COLOURS.values()))
    shaded = grounds = shapes = things = 0
    for canvas in made(300, "hues"):
        ground = np.array(COLOURS[canvas.background]) + canvas.tint
        assert list(COLOURS)[int(((palette - ground) ** 2).sum(1).argmin())] == canvas.background
        grounds += any(canvas.tint)
        for item in canvas.items:
            things, shapes = things + 1, shapes + (item.name in SHAPES)
            if item.rgb is None:
                assert item.name not in SHAPES
                continue
            nearest = int(((palette - np.array(item.rgb)) ** 2).sum(1).argmin())
            assert list(COLOURS)[nearest] == item.colour and item.name in SHAPES
            assert ((np.array(item.rgb) - ground) ** 2).sum() >= 70**2
            shaded += item.rgb != COLOURS[str(item.colour)]
            middle = render(canvas)[int(item.centre[1]), int(item.centre[0])]
            assert item.name == "ring" or canvas.style != "full" or tuple(middle) == item.rgb
    assert 0.4 < shapes / things < 0.6 and 0.5 < shaded / shapes < 0.7 and 150 < grounds < 210
    with pytest.raises(
        ValueError, match="the level hues is for captions and questions, not for 'edit_colour'"
    ):
        episode("edit_colour", 0, 1, level="hues")


def test_shades_are_for_sprites_too_and_some_pictures_are_black_and_white() -> None:
    palette = np.array(list(COLOURS.values()))
    sprites = gray = 0
    for number in range(300):
        canvas = episode("caption_short", number, 5, level="shades").pictures[0].canvas
        gray += canvas.mood == "gray"
        picture = render(canvas).astype(int)
        if canvas.mood == "gray":
            assert (picture.max(-1) == picture.min(-1)).all()
        for item in canvas.items:
            if item.rgb is None or item.name in SHAPES:
                continue
            assert item.colour not in (None, NATIVE.get(item.name))
            assert list(COLOURS)[int(((palette - np.array(item.rgb)) ** 2).sum(1).argmin())] == item.colour
            sprites += item.rgb != COLOURS[str(item.colour)]
            if canvas.style == "full" and canvas.mood is None and item.rgb != COLOURS[str(item.colour)]:
                plain = replace(item, rgb=None)
                other = render(replace(canvas, items=tuple(plain if i is item else i for i in canvas.items)))
                assert (other != picture).any()
    assert sprites > 40 and 15 < gray < 60


def test_captions_by_hand() -> None:
    items = (Item("car", "red", 0, 0, 40), Item("dog", None, 46, 0, 18), Item("dog", None, 46, 46, 18))
    canvas = Canvas(64, 64, "blue", items)
    assert short_caption(canvas) == "a large red car and two small dogs on a blue background"
    assert full_caption(canvas) == (
        "a large red car above left, a small dog above right, a small dog below right, blue background"
    )
    word = Word("HI", "white", 10, 46, 20, 12, 12)
    lined = Canvas(64, 64, "blue", items[:1], word=word, style="line")
    assert short_caption(lined) == 'a line drawing of a large car and the word "HI"'
    dark = Canvas(
        64, 64, "red", (Item("corn", None, 16, 16, 32),), second="black", mood="dark", light="above"
    )
    assert short_caption(dark) == "some corn on a red to black background, dark, light from above"
    gray = Canvas(64, 64, "red", (Item("ring", "blue", 16, 16, 32),), mood="gray")
    assert full_caption(gray) == "a ring middle, black and white"
    assert phrase(("apple", "orange")) == "an orange apple" and phrase(("cross", None), 2) == "two crosses"


def test_captions_read_back_by_hand() -> None:
    assert read_short("two small dogs and a large red car on a blue background") == Caption(
        ((("car", "red", "large"), 1), (("dog", None, "small"), 2)), "blue"
    )
    assert read_full('a ring middle, the word "HI" below right, red to blue background, dark') == Placed(
        ((("ring", None, ""), "middle"),), "red to blue", ("HI", "below right"), "full", ("dark",)
    )
    assert read_short("a silhouette of a cat on a red background") == Caption(
        ((("cat", None, ""), 1),), "red", None, "silhouette"
    )
    for nonsense in ("", "a unicorn on a red background", "some dogs", "a dog on a shiny background", "dog"):
        assert read_short(nonsense) is None, nonsense
    for nonsense in ("a dog", "a dog somewhere, red background", "two dogs left, red background"):
        assert read_full(nonsense) is None, nonsense
    assert read_plan("x is a dog. plan: a dog left, red background") == Placed(
        ((("dog", None, ""), "left"),), "red"
    )
    assert read_plan("a dog left, red background") is None


def test_answers_read_back() -> None:
    assert [read_number(t) for t in ("three", "3", "Twelve.", "thirty-four", "zero", "many")] == [
        3,
        3,
        12,
        34,
        0,
        None,
    ]
    assert all(read_number(number_words(n)) == n for n in range(100))
    assert [read_yes_no(t) for t in ("Yes.", "no", "no, there is none", "nothing")] == [
        True,
        False,
        False,
        None,
    ]
    assert [read_choice(t) for t in ("B", "c.", "D. dog", "dog", "E")] == ["B", "C", "D", None, None]
    assert [read_colour(t) for t in ("Red", "it is blue.", "red or blue", "loud")] == [
        "red",
        "blue",
        None,
        None,
    ]
    assert [read_place(t) for t in ("above left", "Middle.", "somewhere")] == ["above left", "middle", None]
    assert [read_name(t) for t in ("two dogs", "a butterfly", "a dog and a cat")] == [
        "dog",
        "butterfly",
        None,
    ]


@pytest.mark.parametrize("name", list(WORLD_LEVELS))
def test_every_caption_says_the_truth(name: str) -> None:
    for canvas in made(200, name, (72, 128)):
        assert read_short(short_caption(canvas)) == truth_short(canvas)
        assert read_full(full_caption(canvas)) == truth_full(canvas)


def test_people_write_as_they_like_but_quotes_are_kept() -> None:
    text = 'write the word "HELLO" below the strawberry, please'
    written = [as_people_write(random.Random(k), text) for k in range(400)]
    assert all('"HELLO"' in one for one in written)
    assert 0.4 < np.mean([one == text for one in written]) < 0.6
    plain = text.lower()
    slipped = [one for one in written if one.lower().rstrip(".") != plain]
    assert 0.04 < len(slipped) / len(written) < 0.13
    assert any(one.isupper() for one in written)
    options = "which?\nA. dog\nB. cat\nC. pig\nD. owl"
    assert all(
        "\nA. dog\nB. cat\nC. pig\nD. owl" in as_people_write(random.Random(k), options) for k in range(99)
    )


def test_uncounted_things_are_never_several() -> None:
    assert all(canvas.count(name) < 2 for canvas in made(400) for name in UNCOUNTED)
