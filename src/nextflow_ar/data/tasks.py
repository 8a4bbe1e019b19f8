"""Playground scenes as documents: what each task puts in front of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from nextflow_ar.data.playground.captions import caption, plan, prompt
from nextflow_ar.data.playground.mixture import SceneMixture
from nextflow_ar.data.playground.scenes import Scene, is_held_out
from nextflow_ar.data.playground.words import COLOURS, NOUNS, SHAPES, plural
from nextflow_ar.types import Codes, Document

TaskName = Literal["text_to_image", "think_to_image", "image_to_text", "image_and_text", "plan"]
"""Drawing from words; the same with a plan written first; describing a picture; both at once: an image without
words before it, supervised (this is what guidance contrasts with), and its caption after it; and the plan alone, without
a picture, of scenes whose sprites may be coloured too."""

_COLOURED = 0.5

WORD_CLASSES: tuple[tuple[str, ...], ...] = (
    tuple(COLOURS),
    (*(noun.name for noun in NOUNS), *SHAPES),
    (*(noun.many for noun in NOUNS), *(plural(shape) for shape in SHAPES)),
)
"""Words that can stand in each other's place: colours, things, several things."""


def document(
    task: TaskName, scene: Scene, codes: Codes, mixture: SceneMixture, index: int, scales: int | None = None
) -> Document:
    """The document of scene ``index``, whose codes are given. The wording follows from the mixture's seed and index.

    ``scales``: of a drawing, lay out the first so many scales only.
    """
    if task in ("text_to_image", "think_to_image"):
        asked = prompt(scene, mixture.sampler(index).rng(index, 1))
        thought = plan(scene) if task == "think_to_image" else None
        return Document.text_to_image(asked, codes, thought=thought, scales=scales)
    return Document.image_to_text(codes, caption(scene), image_supervised=task == "image_and_text")


def plan_document(mixture: SceneMixture, index: int) -> Document:
    """A request for scene ``index`` and its plan, in words only.

    Half of the sprites get a colour, which no picture could show: "a purple dog" is planned word by word. So a colour
    meets many more names than the five shapes, and following the request beats knowing which pairs are common. The
    held-out pairs stay out.
    """
    rng = mixture.sampler(index).rng(index, 2)
    scene = _coloured(mixture.scene(index), rng, mixture.sampler(index).level.colours)
    return Document.text_to_text(prompt(scene, mixture.sampler(index).rng(index, 1)), plan(scene))


def _coloured(scene: Scene, rng: np.random.Generator, colours: tuple[str, ...]) -> Scene:
    given: dict[str, str | None] = {}
    for name in sorted({thing.name for thing in scene.things if thing.colour is None}):
        free = [c for c in colours if c != scene.background and not is_held_out(name, c)]
        given[name] = str(rng.choice(free)) if rng.random() < _COLOURED else None
    things = tuple(replace(t, colour=given[t.name]) if t.colour is None else t for t in scene.things)
    # A single object's request leaves colours out, which the plan could not guess.
    task = "colors" if scene.task == "single_object" and any(given.values()) else scene.task
    return replace(scene, things=things, task=task)


def caption_corpus(mixture: SceneMixture, count: int) -> list[str]:
    """Prompts, captions and plans of ``count`` scenes, to train the text tokenizer on."""
    out = []
    for index in range(count):
        scene = mixture.scene(index)
        out += [prompt(scene, mixture.sampler(index).rng(index, 1)), caption(scene), plan(scene)]
    return out
