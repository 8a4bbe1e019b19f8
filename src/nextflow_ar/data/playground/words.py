"""Words of the playground: nameable sprites, shapes, colours and backgrounds, with plurals and articles."""

from __future__ import annotations

from dataclasses import dataclass

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "ring")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (50, 160, 70),
    "blue": (45, 95, 210),
    "purple": (135, 65, 175),
    "black": (30, 30, 30),
    "white": (245, 245, 245),
    "pink": (245, 150, 190),
    "brown": (130, 85, 50),
}
"""Palette colour of every colour name (sRGB, 0..255)."""

NUMBERS: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Noun:
    """A nameable sprite: its emoji glyph, and the palette colours that its own look resembles.

    ``like``: backgrounds of these colours would hide the sprite, so scenes avoid them.
    """

    name: str
    glyph: str
    like: tuple[str, ...] = ()
    plural: str | None = None

    @property
    def many(self) -> str:
        """The plural form."""
        return self.plural or self.name + "s"


# The first twenty are the easy level's. Order is part of the seeds: append, never reorder.
NOUNS: tuple[Noun, ...] = (
    Noun("dog", "🐶", ("brown", "orange")),
    Noun("cat", "🐱", ("orange", "yellow")),
    Noun("frog", "🐸", ("green",)),
    Noun("pig", "🐷", ("pink",)),
    Noun("penguin", "🐧", ("black",)),
    Noun("turtle", "🐢", ("green",)),
    Noun("octopus", "🐙", ("red",), "octopuses"),
    Noun("butterfly", "🦋", ("orange",), "butterflies"),
    Noun("tree", "🌲", ("green",)),
    Noun("cactus", "🌵", ("green",), "cactuses"),
    Noun("sunflower", "🌻", ("yellow",)),
    Noun("banana", "🍌", ("yellow",)),
    Noun("pineapple", "🍍", ("orange", "yellow")),
    Noun("strawberry", "🍓", ("red",), "strawberries"),
    Noun("pizza", "🍕", ("orange", "yellow")),
    Noun("burger", "🍔", ("brown", "orange")),
    Noun("car", "🚗", ("red",)),
    Noun("house", "🏠", ()),
    Noun("rocket", "🚀", ()),
    Noun("basketball", "🏀", ("orange",)),
    Noun("apple", "🍎", ("red",)),
    Noun("balloon", "🎈", ("red",)),
    Noun("bell", "🔔", ("yellow", "orange")),
    Noun("book", "📕", ("red",)),
    Noun("chair", "🪑", ("brown",)),
    Noun("dress", "👗", ("blue",), "dresses"),
    Noun("door", "🚪", ("brown",)),
    Noun("key", "🔑", ("yellow", "orange")),
    Noun("backpack", "🎒", ("red",)),
    Noun("mushroom", "🍄", ("red",)),
    Noun("umbrella", "☂", ("purple",)),
    Noun("tent", "⛺", ("green",)),
    Noun("donut", "🍩", ("pink", "brown")),
    Noun("crown", "👑", ("yellow", "orange")),
    Noun("gift", "🎁", ("yellow",)),
    Noun("boat", "⛵", ()),
    Noun("carrot", "🥕", ("orange",)),
    Noun("cake", "🎂", ()),
    Noun("watermelon", "🍉", ("red", "green")),
    Noun("owl", "🦉", ("brown",)),
    Noun("bee", "🐝", ("yellow",)),
    Noun("ladybug", "🐞", ("red",)),
    Noun("rose", "🌹", ("red",)),
    Noun("snowman", "⛄", ("white",), "snowmen"),
    Noun("rainbow", "🌈", ()),
    Noun("guitar", "🎸", ("red",)),
    Noun("drum", "🥁", ("red",)),
    Noun("airplane", "✈", ("blue",)),
    Noun("bicycle", "🚲", ()),
    Noun("bus", "🚌", (), "buses"),
    Noun("helicopter", "🚁", ()),
    Noun("camera", "📷", ("black",)),
    Noun("clock", "⏰", ("red",)),
    Noun("hammer", "🔨", ()),
    Noun("trophy", "🏆", ("yellow", "orange"), "trophies"),
    Noun("anchor", "⚓", ("blue",)),
)

_PLURALS = {noun.name: noun.many for noun in NOUNS} | {
    "cross": "crosses",
    **{shape: shape + "s" for shape in SHAPES if shape != "cross"},
}


def plural(name: str) -> str:
    """Plural of a thing's name; names outside the word list get an s."""
    return _PLURALS.get(name, name + "s")


def article(words: str) -> str:
    """``words`` behind "a" or "an"."""
    return ("an " if words[0] in "aeiou" else "a ") + words
