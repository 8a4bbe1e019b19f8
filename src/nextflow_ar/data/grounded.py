"""Pictures with a text each and what covers every patch: what the semantic teacher learns from."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from pydantic import ConfigDict

from nextflow_ar.data.playground.canvases import Canvas
from nextflow_ar.data.playground.captions import caption, plan, prompt
from nextflow_ar.data.playground.curriculum import by_task, episode
from nextflow_ar.data.playground.looks import render
from nextflow_ar.data.playground.maker import WORLD_LEVELS
from nextflow_ar.data.playground.mixture import SceneMixture
from nextflow_ar.data.playground.saying import full_caption, short_caption
from nextflow_ar.data.playground.scenes import Scene
from nextflow_ar.data.playground.world import COLOUR_NAMES, NAMES

WORD = "word"
CLASSES: tuple[str, ...] = (*NAMES, WORD)
"""What can cover a patch; class 0 is the background, ``CLASSES[i]`` class i + 1."""

_CLASS = {name: i + 1 for i, name in enumerate(CLASSES)}
_COLOUR = {name: i + 1 for i, name in enumerate(COLOUR_NAMES)}


@dataclass(frozen=True, eq=False)
class Pairs:
    """A batch. ``pictures``: (B, H, W, 3) uint8. ``texts``: one each. ``names``, ``colours``: (B, h, w) int64, the class of
    what covers each patch's centre (0: background) and the number of its colour (0: none that a word tells); of a patch of
    background, the background's.
    """

    pictures: np.ndarray
    texts: tuple[str, ...]
    names: np.ndarray
    colours: np.ndarray


class PairSource(Protocol):
    """Numbered pairs: the same number is always the same pair."""

    def pairs(self, first: int, count: int) -> Pairs:
        """Pairs ``first`` to ``first + count``."""
        ...

    def corpus(self, count: int) -> Iterable[str]:
        """Texts to train the text tower's tokenizer on."""
        ...


@dataclass(frozen=True)
class WorldPairs:
    """Pictures of the wide world, 64 px. ``tasks``: as in a mixture of episodes; ``levels``: weights of world levels."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    tasks: dict[str, float]
    levels: dict[str, float]
    seed: int

    def __post_init__(self) -> None:
        if "plain" in by_task(self.tasks):
            raise ValueError("the task plain has no pictures")
        unknown = [name for name in self.levels if name not in WORLD_LEVELS]
        if unknown or not self.levels or min(self.levels.values()) < 0 or sum(self.levels.values()) <= 0:
            raise ValueError(
                f"levels needs weights of some of {', '.join(WORLD_LEVELS)}, at least one above 0"
            )


class SmallWorld:
    """Scenes of the small world. Texts: a caption, a request, or a plan, which tells places."""

    def __init__(self, mixture: SceneMixture, patch: int) -> None:
        self.mixture, self.patch = mixture, patch

    def _texts(self, number: int) -> tuple[str, str, str]:
        scene = self.mixture.scene(number)
        asked = prompt(scene, self.mixture.sampler(number).rng(number, 1), 1.0)
        return caption(scene), asked, plan(scene)

    def pairs(self, first: int, count: int) -> Pairs:
        """See :class:`PairSource`."""
        scenes, pictures = self.mixture.pictures(first, count)
        names, colours = patch_labels(scenes, self.patch)
        texts = tuple(self._texts(first + row)[(first + row) % 3] for row in range(count))
        return Pairs(pictures, texts, names, colours)

    def corpus(self, count: int) -> Iterable[str]:
        """See :class:`PairSource`."""
        for number in range(count):
            yield from self._texts(number)


class WideWorld:
    """Pictures of the wide world. Texts: the short caption, or the full one, which tells places."""

    def __init__(self, config: WorldPairs, patch: int) -> None:
        self.config, self.patch = config, patch
        self._tasks = by_task(config.tasks)

    def canvas(self, number: int) -> Canvas:
        """Canvas of pair ``number``: one of an episode's."""
        seed = self.config.seed
        rng = random.Random(f"nextflow-ar pairs {seed} {number}")
        task = rng.choices(tuple(self._tasks), tuple(self._tasks.values()))[0]
        level = rng.choices(tuple(self.config.levels), tuple(self.config.levels.values()))[0]
        return rng.choice(episode(task, number, seed, "train", (64, 64), level).pictures).canvas

    def pairs(self, first: int, count: int) -> Pairs:
        """See :class:`PairSource`."""
        canvases = [self.canvas(number) for number in range(first, first + count)]
        labels = [canvas_labels(canvas, self.patch) for canvas in canvases]
        texts = tuple((short_caption, full_caption)[(first + i) % 2](c) for i, c in enumerate(canvases))
        pictures = np.stack([render(canvas) for canvas in canvases])
        return Pairs(
            pictures, texts, np.stack([names for names, _ in labels]), np.stack([c for _, c in labels])
        )

    def corpus(self, count: int) -> Iterable[str]:
        """See :class:`PairSource`."""
        for number in range(count):
            canvas = self.canvas(number)
            yield from (short_caption(canvas), full_caption(canvas))


def patch_labels(scenes: list[Scene], patch: int) -> tuple[np.ndarray, np.ndarray]:
    """``names`` and ``colours`` of :class:`Pairs` for scenes of one size."""
    n = scenes[0].canvas // patch
    names, colours = np.zeros((2, len(scenes), n, n), np.int64)
    for b, scene in enumerate(scenes):
        colours[b] = _COLOUR[scene.background]
        for thing in scene.things:
            inside = _covered((thing.y, thing.x, thing.y + thing.size, thing.x + thing.size), n, n, patch)
            names[b][inside], colours[b][inside] = _CLASS[thing.name], _COLOUR.get(thing.colour or "", 0)
    return names, colours


def canvas_labels(canvas: Canvas, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """(h, w) names and (h, w) colours of one canvas's patches; colours are 0 where none can be seen."""
    h, w = canvas.height // patch, canvas.width // patch
    names, colours = np.zeros((2, h, w), np.int64)
    if canvas.style != "line" and not (canvas.mood or canvas.light or canvas.second):
        colours[:] = _COLOUR[canvas.background]
    for item in canvas.items:
        inside = _covered(item.box, h, w, patch)
        names[inside] = _CLASS[item.name]
        colours[inside] = _COLOUR.get(item.colour or "", 0) if canvas.shows_colours else 0
    if canvas.word is not None:
        inside = _covered(canvas.word.box, h, w, patch)
        names[inside] = _CLASS[WORD]
        colours[inside] = _COLOUR[canvas.word.colour] if canvas.shows_colours else 0
    return names, colours


def _covered(box: tuple[int, int, int, int], h: int, w: int, patch: int) -> tuple[np.ndarray, ...]:
    rows, columns = (np.arange(h) + 0.5) * patch, (np.arange(w) + 0.5) * patch
    inside = (rows > box[0]) & (rows < box[2]), (columns > box[1]) & (columns < box[3])
    return np.ix_(*inside)
