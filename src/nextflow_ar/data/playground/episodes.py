"""An episode: one example of one task as a person and an assistant would live it, with exact ground truth and without
codes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from nextflow_ar.data.playground.canvases import Box, Canvas
from nextflow_ar.data.playground.looks import render
from nextflow_ar.data.playground.maker import Maker
from nextflow_ar.data.playground.saying import as_people_write

Role = Literal["system", "user", "assistant"]
AnswerKind = Literal[
    "yes_no", "number", "colour", "place", "choice", "name", "short_caption", "full_caption", "motion", "plan", "free"
]  # fmt: skip


@dataclass(frozen=True)
class Said:
    """A run of text. ``supervised``: it is a response to learn."""

    text: str
    role: Role
    supervised: bool


@dataclass(frozen=True)
class Shown:
    """A picture. ``supervised``: it is drawn, and to be learnt."""

    canvas: Canvas
    role: Role
    supervised: bool

    def render(self, sprite_folder: Path | None = None) -> np.ndarray:
        """Its pixels, (height, width, 3) uint8."""
        return render(self.canvas, sprite_folder)


Part = Said | Shown


@dataclass(frozen=True)
class Answer:
    """A right answer: its text and how it is read."""

    text: str
    kind: AnswerKind


@dataclass(frozen=True)
class Truth:
    """What is right.

    ``kind``: of the instruction or question, such as "colour" or "counting". ``answers``: the supervised texts that
    can be scored, in order. ``region``: of the last drawn picture, what may differ from the last shown one; None
    where no picture is edited. ``combinations``: pairs beside those in the pictures that the splits hold out, such as
    two clues of a riddle.
    """

    kind: str
    answers: tuple[Answer, ...] = ()
    region: Box | None = None
    combinations: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Episode:
    """One example: its parts in order, and what is right about them."""

    task: str
    parts: tuple[Part, ...]
    truth: Truth

    @property
    def pictures(self) -> tuple[Shown, ...]:
        """Its pictures, in order."""
        return tuple(part for part in self.parts if isinstance(part, Shown))

    @property
    def texts(self) -> tuple[Said, ...]:
        """Its texts, in order."""
        return tuple(part for part in self.parts if isinstance(part, Said))

    @property
    def expected(self) -> tuple[Canvas, ...]:
        """The pictures to be drawn."""
        return tuple(part.canvas for part in self.pictures if part.supervised)

    def named(self, task: str) -> Episode:
        """The same under a task's name."""
        return replace(self, task=task)


@dataclass(frozen=True)
class Draft:
    """What a task is built from: a generator, a maker of canvases on the episode's canvas, and the episode's number,
    which balances answers.
    """

    rng: random.Random
    maker: Maker
    index: int
    split: str

    def pick(self, options: Sequence[str]) -> str:
        """One of them."""
        return self.rng.choice(options)

    def person(self, text: str, slips: float = 0.08) -> Said:
        """What a person writes, in their own way."""
        return Said(as_people_write(self.rng, text, slips), "user", False)


def tells(text: str) -> Said:
    """What the assistant says."""
    return Said(text, "assistant", True)


def draws(canvas: Canvas) -> Shown:
    """What the assistant draws."""
    return Shown(canvas, "assistant", True)


def shows(canvas: Canvas) -> Shown:
    """What a person shows."""
    return Shown(canvas, "user", False)
