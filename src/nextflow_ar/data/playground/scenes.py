"""Scenes with exact ground truth: what stands where, sampled from a seed at a chosen difficulty, and rendered.

Difficulty is a dial (:data:`LEVELS`). ``easy``: twenty sprites and five shapes in eight colours, one size, positions on
every second point of the 8-pixel lattice, plain palette backgrounds. ``shapes``: easy without sprites, so that no font is
needed. ``hues``: easy in any colour, named after the nearest of the palette.
``medium``: any pixel position, sizes from 20 to 40, colours jittered around the palette. ``hard``: every sprite,
more sizes, gradients and, if a folder is given, photographs behind them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from nextflow_ar.data.playground.sprites import sprite
from nextflow_ar.data.playground.words import COLOURS, NOUNS, SHAPES

Task = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
TASKS: tuple[Task, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
Split = Literal["train", "test", "any"]

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Thing:
    """One object: its name, the colour of a shape (None: a sprite in its own look), its box in pixels."""

    name: str
    colour: str | None
    x: int
    y: int
    size: int
    rgb: RGB | None = None

    @property
    def key(self) -> tuple[str, str | None]:
        """What it is, without where it is."""
        return self.name, self.colour

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the box's centre in pixels."""
        return self.x + self.size / 2, self.y + self.size / 2


@dataclass(frozen=True)
class Scene:
    """Ground truth of one picture. ``rgb``: the background's corner colours (one: plain, two: a vertical gradient)."""

    task: Task
    background: str
    things: tuple[Thing, ...]
    relation: str | None = None
    canvas: int = 64
    rgb: tuple[RGB, ...] = ()
    photo: Path | None = None


@dataclass(frozen=True)
class Level:
    """One setting of the difficulty dial. Lengths in pixels of the canvas."""

    name: str
    canvas: int
    nouns: tuple[str, ...]
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    sizes: tuple[int, ...]
    lattice: int
    max_count: int
    colour_jitter: int
    gradient: float
    sprite_folder: Path | None = None
    photo_folder: Path | None = None
    hues: bool = False


_EASY_COLOURS = tuple(COLOURS)[:8]
_EASY_NOUNS = tuple(noun.name for noun in NOUNS[:20])
LEVELS: dict[str, Level] = {
    "shapes": Level("shapes", 64, (), SHAPES, _EASY_COLOURS, (32,), 16, 4, 0, 0.0),
    "easy": Level("easy", 64, _EASY_NOUNS, SHAPES, _EASY_COLOURS, (32,), 16, 4, 0, 0.0),
    "hues": Level("hues", 64, _EASY_NOUNS, SHAPES, _EASY_COLOURS, (32,), 16, 4, 0, 0.0, hues=True),
    "medium": Level("medium", 64, _EASY_NOUNS, SHAPES, _EASY_COLOURS, tuple(range(20, 41, 2)), 1, 4, 25, 0.0),
    "hard": Level(
        "hard",
        64,
        tuple(n.name for n in NOUNS),
        SHAPES,
        tuple(COLOURS),
        tuple(range(14, 49, 2)),
        1,
        5,
        25,
        0.5,
    ),
}


def level(name: str, **changes: object) -> Level:
    """A named level, with fields changed. Raises ValueError for an unknown name."""
    if name not in LEVELS:
        raise ValueError(f"unknown playground level {name!r}: one of {', '.join(LEVELS)}")
    return replace(LEVELS[name], **changes)  # type: ignore[arg-type]


@lru_cache(maxsize=65536)
def is_held_out(a: str, b: str) -> bool:
    """Whether the pair (object, colour) or (object, object) belongs to the test split: one pair in eight, by hash."""
    first, second = sorted((a, b))
    digest = hashlib.sha256(f"nextflow-ar playground {first}|{second}".encode()).digest()
    return digest[0] < 32


def held_out_pairs(scene: Scene) -> int:
    """How many held-out combinations a scene shows: (object, colour) of shapes, (object, object) of different names."""
    names = sorted({thing.name for thing in scene.things})
    coloured = {thing.key for thing in scene.things if thing.colour is not None}
    pairs = sum(is_held_out(name, colour or "") for name, colour in coloured)
    return pairs + sum(is_held_out(a, b) for i, a in enumerate(names) for b in names[i + 1 :])


def _overlap(a: Thing, b: Thing) -> bool:
    return (
        abs(a.centre[0] - b.centre[0]) < (a.size + b.size) / 2
        and abs(a.centre[1] - b.centre[1]) < (a.size + b.size) / 2
    )


def relation_holds(relation: str, a: Thing, b: Thing) -> bool:
    """Whether ``a`` stands in ``relation`` to ``b``: the named axis separates them and dominates the other."""
    dx, dy = b.centre[0] - a.centre[0], b.centre[1] - a.centre[1]
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[
        relation
    ]
    return along > 0 and along >= 0.4 * (a.size + b.size) and abs(across) <= 0.75 * along


class SceneSampler:
    """Endless scenes of one level and split; scene ``index`` of seed ``seed`` is always the same.

    ``split``: "train" never shows a held-out combination; "test" shows one wherever the task can; "any" ignores it.
    """

    def __init__(self, level: Level, split: Split, seed: int) -> None:
        self.level, self.split, self.seed = level, split, seed

    def rng(self, index: int, stream: int = 0) -> np.random.Generator:
        """The generator that decides everything about scene ``index`` (``stream`` 0: content, others: captions)."""
        return np.random.default_rng([self.seed, index, stream])

    def scene(self, index: int, task: Task | None = None) -> Scene:
        """Scene ``index``; ``task`` fixes its type, otherwise the six types come equally often."""
        rng = self.rng(index)
        chosen = TASKS[int(rng.integers(len(TASKS)))]
        for _ in range(10_000):
            scene = self._propose(rng, task or chosen)
            if scene is not None and self._accept(scene):
                return scene
        raise RuntimeError(
            f"no scene of type {task or chosen} fits the level {self.level.name!r} and its split"
        )

    def _accept(self, scene: Scene) -> bool:
        if self.split == "any":
            return True
        pairs = held_out_pairs(scene)
        if self.split == "train":
            return pairs == 0
        free = scene.task in ("single_object", "counting")
        return pairs > 0 or free

    def _pick(self, rng: np.random.Generator, kind: str) -> tuple[str, str | None]:
        lv = self.level
        shape = kind == "shape" or (kind == "any" and rng.random() < 0.3) or not lv.nouns
        if shape:
            return str(rng.choice(lv.shapes)), str(rng.choice(lv.colours))
        return str(rng.choice(lv.nouns)), None

    def _kinds(self, rng: np.random.Generator, task: Task) -> list[tuple[str, str | None]] | None:
        if task == "single_object":
            return [self._pick(rng, "sprite" if rng.random() < 0.9 else "shape")]
        if task == "colors":
            return [self._pick(rng, "shape")]
        if task == "counting":
            return [self._pick(rng, "any")] * int(rng.integers(2, self.level.max_count + 1))
        kind = "shape" if task == "color_attr" else "any"
        pair = [self._pick(rng, kind), self._pick(rng, kind)]
        if task == "color_attr":
            return pair if pair[0][1] != pair[1][1] else None
        return pair if pair[0][0] != pair[1][0] else None

    def _propose(self, rng: np.random.Generator, task: Task) -> Scene | None:
        lv = self.level
        kinds = self._kinds(rng, task)
        if kinds is None:
            return None
        largest = 64 * 32 // (32 * (1 if len(kinds) == 1 else 2))
        fitting = [s for s in lv.sizes if s <= largest * lv.canvas // 64] or [min(lv.sizes)]
        size = int(rng.choice(fitting))
        things: list[Thing] = []
        for name, colour in kinds:
            placed = self._place(rng, name, colour, size, things)
            if placed is None:
                return None
            things.append(placed)
        relation = str(rng.choice(RELATIONS)) if task == "position" else None
        if relation is not None and not relation_holds(relation, things[0], things[1]):
            return None
        background = self._background(rng, things)
        if background is None:
            return None
        rgb = [self._shade(rng, background)]
        if self.level.hues and any(t.rgb and _alike(t.rgb, rgb[0]) for t in things):
            return None
        if rng.random() < lv.gradient:
            rgb.append(self._jitter(rng, rgb[0]))
        return Scene(task, background, tuple(things), relation, lv.canvas, tuple(rgb), self._photo(rng))

    def _place(
        self, rng: np.random.Generator, name: str, colour: str | None, size: int, placed: list[Thing]
    ) -> Thing | None:
        lv = self.level
        steps = (lv.canvas - size) // lv.lattice
        rgb = placed[0].rgb if placed and placed[0].key == (name, colour) else None
        if colour is not None and rgb is None:
            rgb = self._shade(rng, colour)
        for _ in range(12):
            x, y = (int(v) * lv.lattice for v in rng.integers(0, steps + 1, 2))
            thing = Thing(name, colour, x, y, size, rgb)
            if not any(_overlap(thing, other) for other in placed):
                return thing
        return None

    def _background(self, rng: np.random.Generator, things: list[Thing]) -> str | None:
        hidden = {thing.colour for thing in things}
        like = {noun.name: noun.like for noun in NOUNS}
        for thing in things:
            hidden.update(like.get(thing.name, ()) if thing.colour is None else ())
        free = [colour for colour in self.level.colours if colour not in hidden]
        return str(rng.choice(free)) if free else None

    def _shade(self, rng: np.random.Generator, colour: str) -> RGB:
        """A colour that goes by this name: the palette's, jittered, or any whose nearest palette colour it is."""
        if not self.level.hues:
            return self._jitter(rng, COLOURS[colour])
        names = self.level.colours
        palette = np.array([COLOURS[name] for name in names])
        while True:
            tries = rng.integers(0, 256, (64, 3))
            nearest = ((tries[:, None] - palette) ** 2).sum(-1).argmin(1)
            hits = np.flatnonzero(nearest == names.index(colour))
            if len(hits):
                red, green, blue = tries[hits[0]]
                return int(red), int(green), int(blue)

    def _jitter(self, rng: np.random.Generator, rgb: RGB) -> RGB:
        span = self.level.colour_jitter
        if span == 0:
            return rgb
        moved = np.clip(np.array(rgb) + rng.integers(-span, span + 1, 3), 0, 255)
        return int(moved[0]), int(moved[1]), int(moved[2])

    def _photo(self, rng: np.random.Generator) -> Path | None:
        folder = self.level.photo_folder
        if folder is None or rng.random() < 0.5:
            return None
        files = _photos(folder)
        return files[int(rng.integers(len(files)))] if files else None


def _alike(a: RGB, b: RGB) -> bool:
    """Too near each other for a thing to stand out from its background."""
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) < 70**2


@lru_cache(maxsize=8)
def _photos(folder: Path) -> tuple[Path, ...]:
    return tuple(
        sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".png", ".jpg", ".jpeg", ".webp"})
    )


@lru_cache(maxsize=256)
def _photo(path: Path, canvas: int) -> np.ndarray:
    with Image.open(path) as file:
        picture = file.convert("RGB")
    side = min(picture.size)
    return np.asarray(
        picture.resize((canvas, canvas), Image.Resampling.LANCZOS, (0, 0, side, side)), np.float32
    )


def render(scene: Scene, sprite_folder: Path | None = None) -> np.ndarray:
    """Picture of a scene, (canvas, canvas, 3) uint8 sRGB. Raises SpritesMissing when it shows a sprite without font."""
    n = scene.canvas
    colours = scene.rgb or (COLOURS[scene.background],)
    if scene.photo is not None:
        picture = _photo(scene.photo, n).copy()
    elif len(colours) == 1:
        picture = np.empty((n, n, 3), np.float32)
        picture[:] = colours[0]
    else:
        ramp = np.linspace(0.0, 1.0, n, dtype=np.float32)[:, None, None]
        picture = np.broadcast_to(np.array(colours[0]) * (1 - ramp) + np.array(colours[1]) * ramp, (n, n, 3))
        picture = np.array(picture, np.float32)
    for thing in scene.things:
        rgb = thing.rgb or (COLOURS[thing.colour] if thing.colour else None)
        patch = sprite(thing.name, thing.size, rgb, sprite_folder)
        window = picture[thing.y : thing.y + thing.size, thing.x : thing.x + thing.size]
        window *= 1.0 - patch[..., 3:]
        window += patch[..., :3]
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)
