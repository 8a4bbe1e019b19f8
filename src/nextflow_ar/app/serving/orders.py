"""Orders: what the worker is given for one picture or one text, and what it says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nextflow_ar.generation.engine import Request, TextRequest
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.types import Event


@dataclass(frozen=True, eq=False)
class Order:
    """One row of the engine's work.

    ``request``: what is to be drawn or written. ``thought``: a text to be written first; ``then`` makes of it what is
    drawn. ``previews``: scales (0-based) that are told when they are ready.
    """

    request: Request
    thought: TextRequest | None = None
    then: Callable[[str], Request] | None = None
    previews: frozenset[int] = frozenset()

    @property
    def seed(self) -> int:
        """Of the request."""
        return self.request.seed

    @property
    def schedule(self) -> ScaleSchedule | None:
        """Of the pictures, where there may be any."""
        return None if isinstance(self.request, TextRequest) else self.request.schedule


@dataclass(frozen=True)
class Thought:
    """The plan in words is written; the picture begins."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Finished:
    """An order is done. ``reason``: "stop" or "length"; ``text_tokens``: written, a thought's left out."""

    reason: str
    text_tokens: int


@dataclass(frozen=True)
class Failed:
    """An order will not be done."""

    error: BaseException


News = Event | Thought | Finished | Failed


def preview_scales(schedule: ScaleSchedule, pictures: int) -> frozenset[int]:
    """Scales (0-based) after which a partial picture is shown: evenly spread, the last left out."""
    scales = len(schedule)
    pictures = min(pictures, scales - 1)
    return frozenset(-(-(i + 1) * scales // (pictures + 1)) - 1 for i in range(pictures))
