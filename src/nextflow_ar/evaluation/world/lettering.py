"""Where the letters of a written word stand, and the box of a word whose letters were seen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from nextflow_ar.data.playground.canvases import Box
from nextflow_ar.data.playground.looks import font, word_box

_MARGIN = 2  # as looks.py lays words out
_FONTS = (0.36, 0.3, 0.25)
"""Sizes of the font that the maker tries, as shares of the base."""


@lru_cache(maxsize=8192)
def letter_centres(text: str, size: int) -> tuple[tuple[float, float], ...]:
    """(x, y) of every letter's middle in pixels, from the corner of the word's box."""
    face = font(size)
    stroke = size / 32
    left, top, _, _ = face.getbbox(text, stroke_width=stroke)
    found = []
    for k, letter in enumerate(text):
        box = face.getbbox(letter)
        start = face.getlength(text[:k])
        found.append((_MARGIN - left + start + (box[0] + box[2]) / 2, _MARGIN - top + (box[1] + box[3]) / 2))
    return tuple(found)


def box_of_letters(text: str, centres: Sequence[tuple[float, float]], base: int) -> Box:
    """(top, left, bottom, right) of a word from its letters' centres (x, y) in reading order, in the pixels of ``base``.

    The font's size is the one of the playground's three whose letters are as far apart as those seen.
    """
    span = centres[-1][0] - centres[0][0]
    sizes = [round(base * share) for share in _FONTS]
    size = min(
        sizes, key=lambda s: abs(span - letter_centres(text, s)[-1][0] + letter_centres(text, s)[0][0])
    )
    width, height = word_box(text, size)
    wanted = letter_centres(text, size)
    left = sum(seen[0] - own[0] for seen, own in zip(centres, wanted, strict=True)) / len(centres)
    top = sum(seen[1] - own[1] for seen, own in zip(centres, wanted, strict=True)) / len(centres)
    return round(top), round(left), round(top) + height, round(left) + width
