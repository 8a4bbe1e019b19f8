"""Pictures of the wide world as values: items, a word, a background, a style, a mood, a light, on any canvas size.

Lengths are in pixels. A canvas has a *base*, the side of the square level that it belongs to (64, 96 or 128 px for 8,
10 or 12 scales at downsampling 8), and everything on it is sized in proportion to that.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache

from nextflow_ar.data.playground.scenes import RGB, is_held_out
from nextflow_ar.data.playground.world import NATIVE, Light, Mood, Size, Style
from nextflow_ar.scales import FINAL_GRIDS, ScaleSchedule

DOWNSAMPLE = 8
Kind = tuple[str, str | None]
Box = tuple[int, int, int, int]
"""(top, left, bottom, right) in pixels, ends exclusive."""


@dataclass(frozen=True)
class Item:
    """One thing: name, colour (None: it has but its own look), corner and side of its square box, quarter turns
    counterclockwise. ``rgb``: of a shape, the shade of its colour (None: the palette's).
    """

    name: str
    colour: str | None
    x: int
    y: int
    size: int
    turn: int = 0
    rgb: RGB | None = None

    @property
    def kind(self) -> Kind:
        """What it is, without where it is."""
        return self.name, self.colour

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the box's centre."""
        return self.x + self.size / 2, self.y + self.size / 2

    @property
    def box(self) -> Box:
        """Its box."""
        return self.y, self.x, self.y + self.size, self.x + self.size


@dataclass(frozen=True)
class Word:
    """A written word: its box's corner, width and height, the font's size, a palette colour."""

    text: str
    colour: str
    x: int
    y: int
    width: int
    height: int
    font: int

    @property
    def box(self) -> Box:
        """Its box."""
        return self.y, self.x, self.y + self.height, self.x + self.width


@dataclass(frozen=True)
class Canvas:
    """Ground truth of one picture.

    ``second``: the lower colour of a vertical gradient that starts with ``background``. ``tint``: added to the
    background's palette colour. ``relation``: how items 0 and 1 stand to each other, where that is the point of the
    picture.
    """

    height: int
    width: int
    background: str
    items: tuple[Item, ...]
    second: str | None = None
    tint: tuple[int, int, int] = (0, 0, 0)
    word: Word | None = None
    style: Style = "full"
    mood: Mood | None = None
    light: Light | None = None
    relation: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    @property
    def box(self) -> Box:
        """All of it."""
        return 0, 0, self.height, self.width

    @property
    def base(self) -> int:
        """Side of the square level that it belongs to."""
        return base_of(self.size)

    @cached_property
    def counts(self) -> tuple[tuple[Kind, int], ...]:
        """How many of each kind, sorted by name, then colour."""
        tally = Counter(item.kind for item in self.items)
        return tuple(sorted(tally.items(), key=lambda entry: (entry[0][0], entry[0][1] or "")))

    @property
    def shows_colours(self) -> bool:
        """Whether the colours of the items can be seen."""
        return self.style == "full" and self.mood != "gray"

    def count(self, name: str, colour: str | None = None) -> int:
        """Items of this name (and colour, if one is given)."""
        return sum(i.name == name and (colour is None or i.colour == colour) for i in self.items)


@lru_cache(maxsize=1024)
def base_of(size: tuple[int, int]) -> int:
    """Side of the square canvas of about this area, a multiple of 32."""
    return max(32, round(math.sqrt(size[0] * size[1]) / 32) * 32)


@lru_cache(maxsize=32)
def canvas_sizes(num_scales: int) -> tuple[tuple[int, int], ...]:
    """The canvases (height, width) of a level at downsampling 8, from 1:2 to 2:1, square first.

    Each is the size that ``ScaleSchedule.nearest(height, width, num_scales)`` covers exactly, so a picture of it is
    encoded without being cut. 8 scales: around 64x64; 10: around 96x96; 12: around 128x128.
    """
    found = []
    for final in FINAL_GRIDS:
        height, width = ScaleSchedule.from_final(final, num_scales).image_size(DOWNSAMPLE)
        own = ScaleSchedule.nearest(height, width, num_scales).image_size(DOWNSAMPLE) == (height, width)
        if own and 0.5 <= height / width <= 2 and (height, width) not in found:
            found.append((height, width))
    return tuple(sorted(found, key=lambda size: (abs(math.log(size[0] / size[1])), size)))


def size_word(item: Item, base: int) -> Size:
    """The size class of an item: "small", "large", or the empty string in between."""
    share = item.size / base
    return "small" if share <= 0.31 else "large" if share >= 0.62 else ""


def thirds(box: Box, size: tuple[int, int]) -> tuple[int, int]:
    """(row, column) of 0, 1, 2: where a box lies in thirds of the way that it can move; 1 where it cannot move far."""
    base, out = base_of(size), []
    for low, high, whole in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
        free = whole - (high - low)
        out.append(1 if free < base / 6 else min(2, int(3 * low / (free + 1))))
    return out[0], out[1]


def place_words(box: Box, size: tuple[int, int]) -> str:
    """Where a box lies: "above left", "left", "middle", ..."""
    row, column = thirds(box, size)
    words = (("above", "", "below")[row], ("left", "", "right")[column])
    return " ".join(word for word in words if word) or "middle"


PLACES: tuple[str, ...] = (
    "above left", "above", "above right", "left", "middle", "right", "below left", "below", "below right",
)  # fmt: skip


def apart(a: Box, b: Box) -> bool:
    """Whether two boxes share no pixel."""
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def fits(canvas: Canvas) -> bool:
    """Whether every item and the word lie on the canvas, apart from each other."""
    boxes = [item.box for item in canvas.items] + ([canvas.word.box] if canvas.word else [])
    inside = all(b[0] >= 0 and b[1] >= 0 and b[2] <= canvas.height and b[3] <= canvas.width for b in boxes)
    return inside and all(apart(a, b) for k, a in enumerate(boxes) for b in boxes[k + 1 :])


def stands(relation: str, a: Item, b: Item) -> bool:
    """Whether ``a`` stands in ``relation`` to ``b``: one axis separates them and dominates the other (as in scenes.py)."""
    dx, dy = b.centre[0] - a.centre[0], b.centre[1] - a.centre[1]
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[
        relation
    ]
    return along > 0 and along >= 0.4 * (a.size + b.size) and abs(across) <= 0.75 * along


def two_ways(canvas: Canvas) -> bool:
    """Whether the words for the places of two related things say two relations at once: one "above left" and one "below
    right" are left of each other as much as above.
    """
    if canvas.relation is None:
        return False
    (row, column), (other_row, other_column) = (thirds(item.box, canvas.size) for item in canvas.items[:2])
    return row != other_row and column != other_column


def combinations(canvas: Canvas) -> frozenset[tuple[str, str]]:
    """What the splits are about: (object, colour) where the colour is not the object's own, (object, object), and
    ("word", the written word).
    """
    names = sorted({item.name for item in canvas.items})
    pairs = {(a, b) for k, a in enumerate(names) for b in names[k + 1 :]}
    pairs |= {(i.name, i.colour) for i in canvas.items if i.colour and i.colour != NATIVE.get(i.name)}
    return frozenset(pairs | ({("word", canvas.word.text)} if canvas.word else set()))


def held_out(pairs: frozenset[tuple[str, str]]) -> int:
    """How many of the combinations belong to the test split."""
    return sum(is_held_out(a, b) for a, b in pairs)
