"""Sampling of canvases: what stands where, how large, before what, at a chosen difficulty and on a canvas of any
size.

``world`` is the easier level: corners on the 8-pixel lattice of the codes, three sizes, plain backgrounds in palette
colours. ``blocks``: as coarse as the small world's easy level, every second point of the lattice and one size however
many things there are, every other one a shape; ``hues``: the same with shapes in all shades, ``shades``: sprites too.
``wide``: any pixel, a range of sizes, gradients, backgrounds off the palette.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nextflow_ar.data.playground.canvases import Box, Canvas, Item, Kind, Word, base_of, place_words, stands
from nextflow_ar.data.playground.looks import shades, stands_out, word_box
from nextflow_ar.data.playground.scenes import RELATIONS, RGB, TASKS, Task
from nextflow_ar.data.playground.words import COLOURS
from nextflow_ar.data.playground.world import (
    ALIKE_FLAT,
    COLOUR_NAMES,
    GROUP_OF,
    GROUPS,
    NAMES,
    NATIVE,
    SHAPES,
    UNCOUNTED,
    WRITTEN,
    Size,
    Style,
    colours_of,
    near_colours,
)


class Reject(Exception):
    """What was drawn does not fit together; the caller draws again."""


@dataclass(frozen=True)
class WorldLevel:
    """One setting of the dial. ``lattice``: pixels between possible corners, 0 is any pixel.

    ``small``, ``normal``, ``large``: ranges of sizes in 64ths of the base. ``crowded``: the normal range from three
    things on. ``gradient``: share of gradients. ``tint``: how far a background may be off the palette. ``shapes``: share of
    shapes among things, 0: about one in eight. ``hues``: how often a shape or a background has any shade that goes by its
    colour's name instead of the palette's; ``sprites``: sprites that come in colours too, and
    most do. ``gray``: share of pictures
    to be described that are black and white.
    """

    name: str
    lattice: int
    small: tuple[int, int]
    normal: tuple[int, int]
    large: tuple[int, int]
    crowded: tuple[int, int]
    max_count: int
    gradient: float
    tint: int
    shapes: float = 0.0
    hues: float = 0.0
    sprites: bool = False
    gray: float = 0.0


WORLD_LEVELS: dict[str, WorldLevel] = {
    "world": WorldLevel("world", 8, (18, 18), (32, 32), (40, 40), (24, 24), 4, 0.0, 0),
    "blocks": WorldLevel("blocks", 16, (18, 18), (32, 32), (40, 40), (32, 32), 4, 0.0, 0, shapes=0.4),
    "hues": WorldLevel("hues", 16, (18, 18), (32, 32), (40, 40), (32, 32), 4, 0.0, 0, shapes=0.5, hues=0.6),
    "shades": WorldLevel(
        "shades",
        16,
        (18, 18),
        (32, 32),
        (40, 40),
        (32, 32),
        4,
        0.0,
        0,
        shapes=0.5,
        hues=0.6,
        sprites=True,
        gray=0.15,
    ),
    "wide": WorldLevel("wide", 0, (17, 19), (27, 36), (42, 48), (22, 27), 5, 0.35, 12),
}
_APART = 70  # between the colours of a shape and its background, in RGB
_FIVE = (20, 20)  # five things fit only when they are as small as can be without being called small
_WEIGHTED = (*NAMES[:20], *NAMES)
_SPRITES = tuple(name for name in _WEIGHTED if name not in SHAPES)
_COUNTABLE = tuple(name for name in _WEIGHTED if name not in UNCOUNTED)
_COLOURED = tuple(name for name in _WEIGHTED if name in NATIVE) + SHAPES * 3


def world_level(name: str) -> WorldLevel:
    """A level by name. Raises ValueError for an unknown one."""
    if name not in WORLD_LEVELS:
        raise ValueError(f"unknown world level {name!r}: one of {', '.join(WORLD_LEVELS)}")
    return WORLD_LEVELS[name]


class Maker:
    """Draws canvases of one size at one level from one generator. Every method may raise :class:`Reject`."""

    def __init__(self, rng: random.Random, level: WorldLevel, size: tuple[int, int]) -> None:
        self.rng, self.level, self.size, self.base = rng, level, size, base_of(size)

    def kind(self, pool: str = "any", avoid: Sequence[str] = ()) -> Kind:
        """A thing and its colour. ``pool``: "any", "sprite", "coloured" (comes in colours), "countable", or a group's
        name.
        """
        rng = self.rng
        if self.level.shapes and pool in ("any", "coloured") and rng.random() < self.level.shapes:
            pool = "shape"
        if pool == "any":
            pool = "coloured" if rng.random() < (0.7 if self.level.sprites else 0.3) else "sprite"
        names: Sequence[str] = {
            "sprite": _SPRITES,
            "coloured": _COLOURED,
            "countable": _COUNTABLE,
        }.get(pool) or GROUPS[pool]
        for _ in range(50):
            name = rng.choice(names)
            if name not in avoid:
                return name, self.colour(name)
        raise Reject

    def colour(self, name: str, avoid: Sequence[str | None] = ()) -> str | None:
        """A colour that the thing can have (its own look half of the time), None for one that has but its own look."""
        if name in NATIVE and NATIVE[name] not in avoid and self.rng.random() < 0.5:
            return NATIVE[name]
        free = [colour for colour in colours_of(name) if colour not in avoid]
        return self.rng.choice(free) if free else None

    def length(self, size: Size = "", crowd: int = 1) -> int:
        """Side of a thing of this size class in pixels; ``crowd``: how many things share the canvas."""
        lv = self.level
        low, high = lv.small if size == "small" else lv.large if size == "large" else lv.normal
        if not size and crowd > 2:
            low, high = lv.crowded if crowd <= 4 else _FIVE
        most = min(self.size)
        if crowd > 2:  # two rows have to fit
            most = most // 2 // (lv.lattice or 1) * (lv.lattice or 1)
        return min(self.rng.randint(low, high) * self.base // 64, most)

    def spot(self, side: tuple[int, int], taken: Sequence[Box], place: str | None = None) -> tuple[int, int]:
        """A free corner (x, y) for a box of (height, width); ``place``: one of the nine places to be in."""
        height, width = side
        if height > self.size[0] or width > self.size[1]:
            raise Reject
        step = self.level.lattice or 1
        rows, columns = (self.size[0] - height) // step + 1, (self.size[1] - width) // step + 1
        draw = self.rng.random
        for _ in range(24 if place is None else 100):
            y, x = int(draw() * rows) * step, int(draw() * columns) * step
            low, right = y + height, x + width
            if any(y < b[2] and b[0] < low and x < b[3] and b[1] < right for b in taken):
                continue
            if place is None or place == place_words((y, x, low, right), self.size):
                return x, y
        raise Reject

    def item(
        self,
        kind: Kind,
        side: int,
        around: Sequence[Item] = (),
        place: str | None = None,
        word: Word | None = None,
    ) -> Item:
        """A thing of this side, apart from those around it and from the word."""
        taken = [other.box for other in around] + ([word.box] if word else [])
        x, y = self.spot((side, side), taken, place)
        return Item(*kind, x, y, side)

    def background(self, items: Sequence[Item], avoid: Sequence[str | None] = ()) -> str:
        """A palette colour before which every item can be seen."""
        hidden = set(avoid).union(*(near_colours(*item.kind) for item in items))
        free = [colour for colour in COLOUR_NAMES if colour not in hidden]
        if not free:
            raise Reject
        return self.rng.choice(free)

    def canvas(self, items: Sequence[Item], relation: str | None = None, *, plain: bool = False) -> Canvas:
        """The items before a background of this level. ``plain``: no gradient."""
        background = self.background(items)
        second = None
        if not plain and self.rng.random() < self.level.gradient:
            second = self.background(items, (background,))
        if self.level.hues:
            return self._shaded(Canvas(*self.size, background, tuple(items), relation=relation))
        span = self.level.tint
        tint = (0, 0, 0)
        if span:
            tint = (
                self.rng.randint(-span, span),
                self.rng.randint(-span, span),
                self.rng.randint(-span, span),
            )
        return Canvas(*self.size, background, tuple(items), second, tint, relation=relation)

    def _shaded(self, canvas: Canvas) -> Canvas:
        """The canvas with its shapes and its background in other shades of their colours, now and then."""
        rgb: dict[Kind, RGB] = {}
        for item in canvas.items:
            sprite = self.level.sprites and item.colour is not None and item.colour != NATIVE.get(item.name)
            if (item.name in SHAPES or sprite) and item.kind not in rgb:
                rgb[item.kind] = self._shade(str(item.colour))
        ground = self._shade(canvas.background)
        if any(
            sum((a - b) ** 2 for a, b in zip(one, ground, strict=True)) < _APART**2 for one in rgb.values()
        ):
            raise Reject
        plain = COLOURS[canvas.background]
        tint = (ground[0] - plain[0], ground[1] - plain[1], ground[2] - plain[2])
        items = tuple(replace(item, rgb=rgb.get(item.kind)) for item in canvas.items)
        return replace(canvas, items=items, tint=tint)

    def _shade(self, colour: str) -> RGB:
        return self.rng.choice(shades(colour)) if self.rng.random() < self.level.hues else COLOURS[colour]

    def items(self, kinds: Sequence[Kind], sizes: Sequence[Size] = ()) -> list[Item]:
        """The kinds as items in free places; equal kinds are equally large."""
        side: dict[Kind, int] = {}
        for k, kind in enumerate(kinds):
            side.setdefault(kind, self.length(sizes[k] if k < len(sizes) else "", len(kinds)))
        for _ in range(8):
            placed: list[Item] = []
            try:
                for kind in kinds:
                    placed.append(self.item(kind, side[kind], placed))
            except Reject:
                continue
            return placed
        raise Reject

    def distinct(self, count: int, pool: str = "any") -> list[Kind]:
        """Kinds of different names; every other one is likely to be of the group of the one before it."""
        kinds: list[Kind] = []
        for _ in range(count):
            near = bool(kinds) and pool == "any" and self.rng.random() < 0.3
            kinds.append(self.kind(GROUP_OF[kinds[-1][0]] if near else pool, [name for name, _ in kinds]))
        return kinds

    def scene(self, task: Task | None = None, *, plain: bool = False) -> tuple[Task, Canvas]:
        """A picture of one of GenEval's six types."""
        rng = self.rng
        task = task or rng.choice(TASKS)
        if task == "single_object":
            kinds = [self.kind("sprite" if rng.random() < 0.9 else "any")]
            kinds = [(name, NATIVE.get(name, colour)) for name, colour in kinds]  # unsaid means its own
        elif task == "colors":
            kinds = [self.kind("coloured")]
        elif task == "counting":
            kinds = [self.kind("countable")] * rng.randint(2, self.level.max_count)
        else:
            kinds = self.distinct(2, "coloured" if task == "color_attr" else "any")
            if task == "color_attr" and kinds[0][1] == kinds[1][1]:
                raise Reject
        if task != "position":
            return task, self.canvas(self.items(kinds), plain=plain)
        for _ in range(20):
            relation, items = rng.choice(RELATIONS), self.items(kinds)
            if stands(relation, *items):
                return task, self.canvas(items, relation, plain=plain)
        raise Reject

    def party(self, least: int = 1, most: int = 3, *, doubles: float = 0.3, plain: bool = True) -> Canvas:
        """A picture to talk about: ``least`` to ``most`` kinds, now and then a kind more than once."""
        kinds = self.distinct(self.rng.randint(least, most))
        if self.rng.random() < doubles and kinds[0][0] not in UNCOUNTED:
            kinds += [kinds[0]] * self.rng.randint(1, max(1, self.level.max_count - len(kinds)))
        return self.canvas(self.items(kinds), plain=plain)

    def crowd(self, least: int, most: int) -> list[Item]:
        """As many different things as find room, up to ``most``, small, normal and maybe one large; the largest first."""
        rng = self.rng
        often: tuple[Size, ...] = ("", "", "small")
        sizes: list[Size] = []
        if rng.random() < 0.4:
            sizes.append("large")
        while len(sizes) < most:
            sizes.append(rng.choice(often))
        placed: list[Item] = []
        for size in sorted(sizes, key=("large", "", "small").index):
            kind = self.kind(avoid=[item.name for item in placed])
            try:
                placed.append(self.item(kind, self.length(size, 1 if size == "large" else 3), placed))
            except Reject:
                continue
        if len(placed) < least:
            raise Reject
        return placed

    def word(self, canvas: Canvas, text: str | None = None, place: str | None = None) -> Canvas:
        """The canvas with a word written on a free place, as large as fits."""
        text = text or self.rng.choice(WRITTEN)
        colours = [c for c in COLOUR_NAMES if stands_out(c, canvas.background)]
        colours = [c for c in colours if canvas.second is None or stands_out(c, canvas.second)]
        if not colours:
            raise Reject
        colour = self.rng.choice(colours)
        for share in (0.36, 0.3, 0.25):
            font = round(self.base * share)
            width, height = word_box(text, font)
            try:
                x, y = self.spot((height, width), [item.box for item in canvas.items], place)
            except Reject:
                continue
            return replace(canvas, word=Word(text, colour, x, y, width, height, font))
        raise Reject

    def style(self, canvas: Canvas, style: Style) -> Canvas:
        """The canvas in a style, told apart in it: no gradient, ink that stands out, nothing whose outline is like
        another's.
        """
        if style == "full":
            return canvas
        if style == "silhouette" and any(item.name in ALIKE_FLAT for item in canvas.items):
            raise Reject
        return replace(canvas, style=style, second=None)
