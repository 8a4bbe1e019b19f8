"""What the semantic teacher learns from: numbered pairs of both worlds, and which thing covers which patch."""

from __future__ import annotations

import numpy as np
import pytest

from nextflow_ar.data.grounded import CLASSES, SmallWorld, WideWorld, WorldPairs, canvas_labels
from nextflow_ar.data.playground.canvases import Canvas, Item, Word
from nextflow_ar.data.playground.mixture import MixtureConfig, SceneMixture
from nextflow_ar.data.playground.world import COLOUR_NAMES, MANY

WORLD = WorldPairs({"draw_scene": 2, "edit": 1}, {"blocks": 1.0, "world": 1.0}, 5)


def test_labels_of_a_canvas_by_hand() -> None:
    car = Item("car", "red", 8, 16, 24)
    word = Word("HI", "green", 40, 40, 16, 16, 12)
    names, colours = canvas_labels(Canvas(64, 64, "blue", (car,), word=word), 8)
    expected = np.zeros((8, 8), np.int64)
    expected[2:5, 1:4] = CLASSES.index("car") + 1
    expected[5:7, 5:7] = CLASSES.index("word") + 1
    assert (names == expected).all()
    assert (colours[2:5, 1:4] == COLOUR_NAMES.index("red") + 1).all()
    assert (colours[5:7, 5:7] == COLOUR_NAMES.index("green") + 1).all()
    assert (colours[names == 0] == COLOUR_NAMES.index("blue") + 1).all()


@pytest.mark.parametrize(
    "changes", [{"mood": "dark"}, {"second": "red"}, {"light": "left"}, {"style": "line"}]
)
def test_a_background_without_one_plain_colour_has_none(changes: dict[str, str]) -> None:
    names, colours = canvas_labels(Canvas(64, 64, "blue", (Item("dog", None, 0, 0, 16),), **changes), 8)  # type: ignore[arg-type]
    assert (names[:2, :2] == CLASSES.index("dog") + 1).all() and not colours.any()


def test_pairs_of_both_worlds_are_numbered() -> None:
    wide = WideWorld(WORLD, 8)
    small = SmallWorld(SceneMixture(MixtureConfig({"easy": 1.0}, "train", 3)), 8)
    for source in (wide, small):
        one, two = source.pairs(0, 6), source.pairs(2, 4)
        assert one.pictures.shape == (6, 64, 64, 3) and one.names.shape == one.colours.shape == (6, 8, 8)
        assert one.texts[2:] == two.texts and (one.pictures[2:] == two.pictures).all()
        assert (one.names[2:] == two.names).all() and one.names.any() and all(list(source.corpus(3)))


def test_the_text_of_a_wide_picture_names_all_that_covers_its_patches() -> None:
    batch = WideWorld(WORLD, 8).pairs(0, 40)
    for text, names in zip(batch.texts, batch.names, strict=True):
        seen = {CLASSES[n - 1] for n in set(names.flatten()) if n}
        assert seen
        assert all(name in text or MANY[name] in text for name in seen), text


def test_pairs_that_cannot_be_made_say_so() -> None:
    with pytest.raises(ValueError, match="plain has no pictures"):
        WorldPairs({"plain": 1.0}, {"world": 1.0}, 0)
    with pytest.raises(ValueError, match="levels needs weights"):
        WorldPairs({"draw": 1.0}, {"easy": 1.0}, 0)
