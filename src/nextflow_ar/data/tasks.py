"""Playground scenes and episodes as documents: what each task puts in front of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from nextflow_ar.data.playground.captions import caption, plan, prompt
from nextflow_ar.data.playground.episodes import Episode, Said
from nextflow_ar.data.playground.mixture import SceneMixture
from nextflow_ar.data.playground.scenes import Scene, is_held_out
from nextflow_ar.data.playground.words import COLOURS, NOUNS, SHAPES, plural
from nextflow_ar.sequence.dialogue import turns, whole
from nextflow_ar.sequence.vocab import BOI
from nextflow_ar.types import Codes, Document, Image, Mark, Text

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


def to_document(
    episode: Episode, codes: Sequence[Codes], *, dialogue: bool = True, scales: int | None = None
) -> Document:
    """The document of an episode of the wide world, whose pictures' codes are given in order.

    ``dialogue``: with chat marks around every turn, as :func:`turns` lays them out. ``scales``: of a picture that ends the
    document, lay out the first so many scales only (nothing follows it then, not even the mark that ends the turn); 0: the
    episode ends with what stands before such a picture, and the mark that begins it.
    Raises ValueError when there are not as many codes as pictures.
    """
    if len(codes) != len(episode.pictures):
        raise ValueError(
            f"this episode of {episode.task} has {len(episode.pictures)} pictures, got {len(codes)} codes"
        )
    left = iter(codes)
    parts: list[tuple[str, Text | Image]] = []
    for number, part in enumerate(episode.parts, start=1):
        if isinstance(part, Said):
            parts.append((part.role, Text(part.text, part.supervised)))
        else:
            laid = scales if number == len(episode.parts) else None
            said = parts[-1] if parts else None
            # Behind words of the assistant's, it is the assistant that begins a picture, be it only seen.
            begun = (
                part.role == "assistant" and said is not None and said[0] == part.role and said[1].supervised
            )
            parts.append((part.role, Image(next(left), part.supervised, laid, begun)))
    parts = whole(parts)
    segments = turns(parts) if dialogue else tuple(segment for _, segment in parts)
    unfinished = scales == 0 or (scales is not None and isinstance(parts[-1][1], Image))
    left_open = segments[:-1] if dialogue and unfinished else segments
    return Document((*left_open, Mark(BOI, supervised=True)) if scales == 0 else left_open)
