"""What the playground's tasks put in front of the model."""

from __future__ import annotations

import re

from nextflow_ar.data.playground.episodes import Episode, Said, Truth
from nextflow_ar.data.playground.mixture import MixtureConfig, SceneMixture
from nextflow_ar.data.playground.scenes import is_held_out
from nextflow_ar.data.playground.words import COLOURS, NOUNS, SHAPES, plural
from nextflow_ar.data.tasks import WORD_CLASSES, plan_document, to_document
from nextflow_ar.types import Text


def test_plans_are_words_only_and_colour_sprites_without_held_out_pairs() -> None:
    mixture = SceneMixture(MixtureConfig({"easy": 1.0}, "train", 9))
    names = "|".join([n.name for n in NOUNS] + list(SHAPES))
    coloured_sprites = 0
    for index in range(300):
        asked, plan = plan_document(mixture, index).segments
        assert isinstance(asked, Text) and isinstance(plan, Text)
        assert (asked.supervised, plan.supervised) == (False, True)
        pairs = re.findall(rf"an? ({'|'.join(COLOURS)}) ({names})\b", plan.text)
        assert not any(is_held_out(name, colour) for colour, name in pairs), plan.text
        sprites = [(colour, name) for colour, name in pairs if name not in SHAPES]
        for colour, name in sprites:
            told = f"{colour} {name}" in asked.text or f"{colour} {plural(name)}" in asked.text
            assert told, (asked.text, plan.text)
        coloured_sprites += bool(sprites)
    assert coloured_sprites > 60
    assert plan_document(mixture, 7) is not None
    assert [s.text for s in plan_document(mixture, 7).segments] == [  # type: ignore[union-attr]
        s.text
        for s in plan_document(mixture, 7).segments  # type: ignore[union-attr]
    ]


def test_texts_of_one_role_stand_on_lines_of_their_own() -> None:
    """As they do in rows of data, and in what a model is asked."""
    said = (Said("two dogs", "user", False), Said("how many?", "user", False), Said("two", "assistant", True))
    segments = to_document(Episode("", said, Truth("exercise")), [], dialogue=False).segments
    assert segments == (Text("two dogs\nhow many?"), Text("two", supervised=True))


def test_word_classes_share_no_word() -> None:
    words = [word for words in WORD_CLASSES for word in words]
    assert len(words) == len(set(words))
    assert "red" in WORD_CLASSES[0] and "ring" in WORD_CLASSES[1] and "crosses" in WORD_CLASSES[2]
