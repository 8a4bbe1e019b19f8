"""Playground scenes as documents: what each task puts in front of the model."""

from __future__ import annotations

from typing import Literal

from nextflow_ar.data.playground.captions import caption, plan, prompt
from nextflow_ar.data.playground.mixture import SceneMixture
from nextflow_ar.data.playground.scenes import Scene
from nextflow_ar.types import Codes, Document

TaskName = Literal["text_to_image", "think_to_image", "image_to_text", "image_and_text"]
"""Drawing from words; the same with a plan written first; describing a picture; and both at once: an image without
words before it, supervised (this is what guidance contrasts with), and its caption after it."""


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


def caption_corpus(mixture: SceneMixture, count: int) -> list[str]:
    """Prompts, captions and plans of ``count`` scenes, to train the text tokenizer on."""
    out = []
    for index in range(count):
        scene = mixture.scene(index)
        out += [prompt(scene, mixture.sampler(index).rng(index, 1)), caption(scene), plan(scene)]
    return out
