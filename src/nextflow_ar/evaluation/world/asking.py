"""How a model is asked and how it answers: the benchmark knows no more of a model than this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Part = tuple[str, str | np.ndarray]
"""A role ("user" or "assistant") with a text or a picture (H, W, 3) uint8."""
Want = Literal["picture", "text", "pictures", "turn"]


@dataclass(frozen=True, eq=False)
class Ask:
    """What was said and shown so far, and what is to come.

    ``want``: "picture", one; "pictures", exactly so many; "text", words alone; "turn", whatever the model will, at most so
    many pictures. ``size``: (height, width) of pictures. ``think``: words before a picture (None: as the model does by
    itself). ``next_frame``: the picture continues a film. ``words``: most text tokens. ``number``: of the item, which seeds
    the answer; ``key`` names it for an oracle.
    """

    parts: tuple[Part, ...]
    want: Want
    size: tuple[int, int]
    number: int
    key: tuple[str, str, int]
    pictures: int = 1
    think: bool | None = None
    words: int = 64
    next_frame: bool = False


Reply = tuple[str | np.ndarray, ...]
"""Texts and pictures (H, W, 3) uint8 in the order in which they came; texts of nothing are left out."""


class Answers(Protocol):
    """A model, as the benchmark sees it."""

    def __call__(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answer every ask; its randomness follows from the ask alone."""
        ...


class Reads(Protocol):
    """What measures a model's language: exchanges of (role, text), the assistant's words to be predicted."""

    def __call__(self, exchanges: Sequence[Sequence[tuple[str, str]]]) -> list[tuple[float, int]]:
        """(nats, tokens) of the assistant's words of every exchange."""
        ...


def texts_of(reply: Reply) -> tuple[str, ...]:
    """Its texts."""
    return tuple(part for part in reply if isinstance(part, str))


def pictures_of(reply: Reply) -> tuple[np.ndarray, ...]:
    """Its pictures."""
    return tuple(part for part in reply if not isinstance(part, str))
