"""Settings of a mixture of the wide world's tasks, as a source of training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict

from nextflow_ar.config import within
from nextflow_ar.data.loader import Packing
from nextflow_ar.data.playground.curriculum import PLANNED, READ_ALONE, THOUGHT, by_task, corpus
from nextflow_ar.data.playground.planning import TALKS, TOLD
from nextflow_ar.data.playground.scenes import Split

READING: tuple[str, ...] = (*READ_ALONE, "video_caption")
"""Tasks whose responses are words that no picture follows."""


@dataclass(frozen=True)
class EpisodeSource:
    """Part of every step: ``rows`` rows, over all processes, of the wide world's tasks (docs/playground.md).

    ``tasks``: name of a task or of a group -> weight; a group's is spread over its tasks. ``canvases``: WIDTHxHEIGHT ->
    weight. ``packing``: how episodes share rows. ``dialogue``: chat marks around every turn. ``scales``: of a picture that
    ends an episode, lay out the first so many scales only; 0: nothing of it, so that only the plan before it is taught
    (``planned`` is 1 then, for tasks that have no plan of their own). ``condition_dropout``: probability that what stands
    before the first drawn picture is left out, for guidance. ``picture_dropout``: the same of the given pictures before an
    answer in words (tasks of reading only): what is likely to be said of any picture, for the guidance of answers.
    ``swap``: share of the colours and names in a response that are fed as another one, targets unchanged (tasks of reading
    only). ``planned``: share of the episodes of drawing, editing, telling and conversation in which the assistant lays
    every picture out in words before it draws. ``drawn``: share of the pictures of a planned story or film that are laid
    out in full, one of them at least; the others are only seen.

    There is no inversion: people's requests are worded loosely, and the captioning tasks have the canonical words.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: Literal["episodes"]
    tasks: dict[str, float]
    rows: int
    packing: Packing
    canvases: dict[str, float]
    seed: int
    level: Literal["world", "blocks", "hues", "shades", "wide"] = "world"
    split: Split = "train"
    dialogue: bool = False
    scales: int | None = None
    condition_dropout: float = 0.0
    picture_dropout: float = 0.0
    swap: float = 0.0
    planned: float = 0.0
    drawn: float = 1.0

    def __post_init__(self) -> None:
        answers = by_task(self.tasks)
        within("at least 0", seed=self.seed)
        if self.rows < 1:
            raise ValueError("a source of episodes has at least one row")
        for name in self.canvases:
            canvas_size(name)
        if not self.canvases or min(self.canvases.values()) < 0 or sum(self.canvases.values()) <= 0:
            raise ValueError("canvases needs at least one canvas with a weight above 0")
        for name in ("condition_dropout", "picture_dropout", "swap", "planned", "drawn"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share from 0 to 1, got {getattr(self, name)}")
        others = [task for task in answers if task not in READING]
        laid_out = [task for task in answers if task in PLANNED or task in TOLD]
        if self.planned and not laid_out:
            raise ValueError(
                f"planned is for tasks that draw or edit, not for {others[0] if others else READING[0]}"
            )
        if self.drawn < 1 and not any(task in TOLD and task not in TALKS for task in answers):
            raise ValueError(f"drawn is for stories and films, not for {next(iter(answers))}")
        self._only_plans(laid_out, answers)
        if self.swap and others:
            raise ValueError(f"swap is for tasks that answer in words about a picture, not for {others[0]}")
        if self.picture_dropout and others:
            raise ValueError(
                f"picture_dropout is for tasks that answer in words about a picture, not for {others[0]}"
            )
        if self.scales is not None and self.scales < 0:
            raise ValueError(f"scales is at least 0, got {self.scales}")

    def _only_plans(self, laid_out: list[str], answers: dict[str, float]) -> None:
        """Raises ValueError where no scales are laid out and a task would have nothing to learn."""
        if self.scales != 0:
            return
        without = [task for task in answers if task not in (*PLANNED, *THOUGHT, "video_next")]
        if without:
            raise ValueError(f"scales: 0 leaves only plans, which {without[0]} has not")
        if laid_out and self.planned < 1:
            raise ValueError(f"scales: 0 leaves only plans: planned has to be 1, got {self.planned}")


def canvas_size(name: str) -> tuple[int, int]:
    """(height, width) of WIDTHxHEIGHT. Raises ValueError."""
    width, _, height = name.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ValueError(f"a canvas is its width and height in pixels such as 96x64, got {name!r}")
    return int(height), int(width)


def episode_texts(source: EpisodeSource, number: int) -> Iterator[str]:
    """Texts of about ``number`` episodes with the words that open their turns, to train a text tokenizer on."""
    tasks = tuple(by_task(source.tasks))
    each = -(-number // len(tasks))
    yield from corpus(tasks, each, source.seed, source.level)
    for role in ("user", "assistant"):
        yield from [f"{role}\n"] * each
