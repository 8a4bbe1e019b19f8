"""What a judge of the wide world says of one picture, as values in the picture's own pixels."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

from nextflow_ar.data.playground.canvases import Box, Canvas

UNKNOWN = "unknown"


@dataclass(frozen=True)
class SeenThing:
    """One thing: what, in which colour (None: it has but its own look), centre and side of its box in pixels, quarter turns
    counterclockwise, centre score 0..1.
    """

    name: str
    colour: str | None
    x: float
    y: float
    size: float
    turn: int
    score: float

    @property
    def key(self) -> tuple[str, str | None]:
        """What it is, without where it is."""
        return self.name, self.colour

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        return self.x, self.y

    @property
    def box(self) -> Box:
        """Its box, rounded to pixels."""
        half = self.size / 2
        return round(self.y - half), round(self.x - half), round(self.y + half), round(self.x + half)


@dataclass(frozen=True)
class SeenWord:
    """Letters read from left to right (lines from top to bottom, joined by a space), their colour and their box."""

    text: str
    colour: str
    box: Box


@dataclass(frozen=True)
class Verdict:
    """All that a judge sees in a picture of (height, width) pixels.

    ``things``: best centre score first. ``second``: lower colour of a gradient, None for a plain background. ``style``,
    ``mood``, ``light``: as in :class:`~nextflow_ar.data.playground.canvases.Canvas`.
    """

    height: int
    width: int
    things: tuple[SeenThing, ...]
    background: str
    second: str | None
    style: str
    mood: str | None
    light: str | None
    word: SeenWord | None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    def to_json(self) -> dict:
        """Plain data for JSON, numbers to two places; :meth:`from_json` reads it back."""
        things = [
            {
                key: round(value, 2) if isinstance(value, float) else value
                for key, value in asdict(thing).items()
            }
            for thing in self.things
        ]
        return asdict(self) | {"things": things}

    @classmethod
    def from_json(cls, data: dict) -> Verdict:
        """The verdict that :meth:`to_json` wrote."""
        word = data["word"]
        return cls(
            **{
                **data,
                "things": tuple(SeenThing(**thing) for thing in data["things"]),
                "word": SeenWord(word["text"], word["colour"], tuple(word["box"])) if word else None,
            }
        )

    def words(self) -> str:
        """A short line for people: '2 dog, red circle, "HI" on blue, dark'."""
        tally = Counter(f"{t.colour} {t.name}" if t.colour else t.name for t in self.things)
        listed = [what if n == 1 else f"{n} {what}" for what, n in sorted(tally.items())]
        listed += [f'"{self.word.text}"'] if self.word else []
        ground = f"{self.background} to {self.second}" if self.second else self.background
        looks = [self.style] if self.style != "full" else []
        looks += [self.mood] if self.mood else []
        looks += [f"light {self.light}"] if self.light else []
        return ", ".join([f"{', '.join(listed) or 'nothing'} on {ground}", *looks])


def perfect(canvas: Canvas) -> Verdict:
    """What a judge that never errs would say of a canvas; what does not show is said as the canvas has it."""
    things = tuple(
        SeenThing(i.name, i.colour, *i.centre, float(i.size), i.turn % 4, 1.0) for i in canvas.items
    )
    word = SeenWord(canvas.word.text, canvas.word.colour, canvas.word.box) if canvas.word else None
    looks = (canvas.background, canvas.second, canvas.style, canvas.mood, canvas.light)
    return Verdict(canvas.height, canvas.width, things, *looks, word)
