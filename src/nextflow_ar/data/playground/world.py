"""The wide world: seventy-five sprites and five shapes with what is known of each, styles, moods, lights and words to
write.

It stands beside :mod:`words`, whose order older levels' seeds depend on; its first 56 nouns are those.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from nextflow_ar.data.playground.words import COLOURS, NOUNS, SHAPES, Noun

MORE_NOUNS: tuple[Noun, ...] = (
    Noun("bird", "🐦", ("blue",)),
    Noun("fish", "🐟", ("blue",), "fish"),
    Noun("heart", "❤", ("red",)),
    Noun("star", "⭐", ("yellow", "orange")),
    Noun("bed", "🛏", ("blue", "brown")),
    Noun("diamond", "💎", ("blue",)),
    Noun("grapes", "🍇", ("purple",), "grapes"),
    Noun("corn", "🌽", ("yellow", "green"), "corn"),
    Noun("scissors", "✂", ("red",), "scissors"),
    Noun("cow", "🐮", ("white",)),
    Noun("duck", "🦆", ("green", "brown")),
    Noun("elephant", "🐘", ("white",)),
    Noun("rabbit", "🐰", ("white",)),
    Noun("snail", "🐌", ("brown", "orange")),
    Noun("whale", "🐳", ("blue",), "whales"),
    Noun("moon", "🌙", ("yellow", "orange")),
    Noun("sun", "🌞", ("yellow", "orange")),
    Noun("train", "🚂", ("black",)),
    Noun("hat", "🎩", ("black",)),
)
SPRITES: tuple[Noun, ...] = NOUNS + MORE_NOUNS
NAMES: tuple[str, ...] = (*(noun.name for noun in SPRITES), *SHAPES)
COLOUR_NAMES: tuple[str, ...] = tuple(COLOURS)
POPULAR: tuple[str, ...] = tuple(noun.name for noun in NOUNS[:20])
"""Drawn twice as often as the others, so that questions have a most frequent answer to be wary of (POPE's "popular")."""

NATIVE: dict[str, str] = {
    "apple": "red", "balloon": "red", "bell": "yellow", "bird": "blue", "book": "red", "car": "red", "chair": "brown",
    "dress": "blue", "door": "brown", "fish": "blue", "heart": "red", "key": "yellow", "backpack": "red",
    "star": "yellow", "mushroom": "red", "umbrella": "purple", "bed": "blue", "cat": "yellow", "tent": "orange",
    "donut": "brown", "diamond": "blue", "crown": "yellow", "gift": "red", "boat": "red",
}  # fmt: skip
"""Sprites that come in every colour, and the colour of their own look. They always have a colour: said or native."""

_LIKE: dict[str, tuple[str, ...]] = {
    "umbrella": ("purple", "blue"), "cat": ("yellow", "orange"), "tent": ("orange", "brown"), "car": ("red",),
    "gift": ("red", "yellow"), "boat": ("red", "orange", "brown"), "donut": ("brown",), "chair": ("brown", "orange"),
    "door": ("brown", "orange"), "apple": ("red",), "balloon": ("red",), "crown": ("yellow", "orange"),
}  # fmt: skip
LIKE: dict[str, tuple[str, ...]] = {noun.name: noun.like for noun in SPRITES} | _LIKE
"""Palette colours near a thing's own look: no background of a scene that shows it, no second colour to give it."""

UNCOUNTED: tuple[str, ...] = ("grapes", "corn", "scissors")
"""Said with "some", never counted."""

GROUPS: dict[str, tuple[str, ...]] = {
    "animal": (
        "dog", "cat", "frog", "pig", "penguin", "turtle", "octopus", "butterfly", "owl", "bee", "ladybug", "bird",
        "fish", "cow", "duck", "elephant", "rabbit", "snail", "whale",
    ),
    "food": (
        "banana", "pineapple", "strawberry", "pizza", "burger", "apple", "mushroom", "donut", "carrot", "cake",
        "watermelon", "grapes", "corn",
    ),
    "plant": ("tree", "cactus", "sunflower", "rose"),
    "vehicle": ("car", "rocket", "boat", "airplane", "bicycle", "bus", "helicopter", "train"),
    "thing": (
        "house", "basketball", "balloon", "bell", "book", "chair", "dress", "door", "key", "backpack", "umbrella",
        "tent", "crown", "gift", "snowman", "guitar", "drum", "camera", "clock", "hammer", "trophy", "anchor", "heart",
        "bed", "diamond", "scissors", "hat",
    ),
    "sky": ("rainbow", "star", "moon", "sun"),
    "shape": SHAPES,
}  # fmt: skip
GROUP_OF: dict[str, str] = {name: group for group, names in GROUPS.items() for name in names}

ALIKE_TURNED: tuple[str, ...] = ("circle", "square", "cross", "ring", "basketball", "sun", "donut", "door")
"""Things whose quarter or half turn could be overlooked: never the object of a turn."""

ALIKE_FLAT: tuple[str, ...] = (
    "basketball", "circle", "sun", "donut", "clock", "frog", "pig", "ladybug", "book", "square", "door", "gift", "burger",
    "apple", "watermelon", "drum", "dog", "rainbow", "strawberry", "house", "camera", "bus", "pizza", "triangle",
    "tent", "ring",
)  # fmt: skip
"""Things that a silhouette does not tell apart: no picture to be read shows them flat."""

MANY: dict[str, str] = {noun.name: noun.many for noun in SPRITES} | {
    shape: "crosses" if shape == "cross" else shape + "s" for shape in SHAPES
}
ONE_OF: dict[str, str] = {many: name for name, many in MANY.items()} | {name: name for name in NAMES}
"""Singular or plural -> name."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "dog": ("puppy", "doggy"), "cat": ("kitty", "kitten"), "pig": ("piglet",), "turtle": ("tortoise",),
    "car": ("auto",), "airplane": ("plane", "aeroplane"), "bicycle": ("bike",), "burger": ("hamburger",),
    "gift": ("present",), "rabbit": ("bunny",), "boat": ("sailboat",), "house": ("home",), "donut": ("doughnut",),
    "ladybug": ("ladybird",), "rocket": ("spaceship",), "clock": ("alarm clock",), "basketball": ("ball",),
    "tree": ("fir tree",), "diamond": ("gem",), "backpack": ("rucksack",), "helicopter": ("chopper",),
    "cross": ("plus sign",), "circle": ("disc",), "ring": ("hoop",), "umbrella": ("parasol",), "trophy": ("golden cup",),
}  # fmt: skip
"""Other names that people use in requests; answers keep to the one name."""

COLOUR_SYNONYMS: dict[str, tuple[str, ...]] = {"purple": ("violet",), "red": ("scarlet",), "pink": ("rosy",)}
SIZE_SYNONYMS: dict[str, tuple[str, ...]] = {
    "small": ("little", "tiny"), "large": ("big", "huge", "giant"),
}  # fmt: skip

Size = Literal["small", "", "large"]
Style = Literal["full", "silhouette", "line"]
STYLES: tuple[Style, ...] = ("full", "silhouette", "line")
STYLE_WORDS: dict[str, str] = {
    "full": "full colour", "silhouette": "flat silhouette", "line": "line drawing",
}  # fmt: skip
Mood = Literal["warm", "cold", "dark", "bright", "gray"]
MOODS: tuple[Mood, ...] = ("warm", "cold", "dark", "bright", "gray")
MOOD_WORDS: dict[str, str] = {
    "warm": "warm colours", "cold": "cold colours", "dark": "dark", "bright": "pale and bright",
    "gray": "black and white",
}  # fmt: skip
Light = Literal["left", "right", "above", "below", "middle"]
LIGHTS: tuple[Light, ...] = ("left", "right", "above", "below", "middle")
LIGHT_WORDS: dict[str, str] = {
    "left": "light from the left", "right": "light from the right", "above": "light from above",
    "below": "light from below", "middle": "a spotlight in the middle",
}  # fmt: skip

WRITTEN: tuple[str, ...] = (
    "HI", "HELLO", "YES", "NO", "STOP", "GO", "OPEN", "LOVE", "FUN", "WOW", "HELP", "EXIT", "SALE", "HOME", "PLAY", "NEW",
    "HOT", "COOL", "ZOO", "TEA", "MILK", "CAFE", "BOOM", "ZAP", "JUMP", "LUCK", "MAGIC", "NICE", "OK", "QUIZ", "RUN",
    "SHOP", "TAXI", "UP", "VOTE", "WIN", "BYE", "DAY", "EAT", "FREE", "GAME", "JOY", "KIND", "LEFT", "MAP", "NEXT",
    "PARK", "REST",
)  # fmt: skip
"""Words to be written into pictures; one in eight is never written in training."""


def colours_of(name: str) -> tuple[str, ...]:
    """Colours that a thing can have: every one for a shape, its native one and those unlike it for a sprite that
    comes in colours, none for the others.
    """
    if name in SHAPES:
        return COLOUR_NAMES
    if name not in NATIVE:
        return ()
    near = LIKE[name]
    return tuple(colour for colour in COLOUR_NAMES if colour == NATIVE[name] or colour not in near)


_NEIGHBOURS = {"blue": "purple", "purple": "blue", "black": "brown", "brown": "black"}


@lru_cache(maxsize=4096)
def near_colours(name: str, colour: str | None) -> frozenset[str]:
    """Backgrounds that would hide the thing."""
    own = LIKE.get(name, ()) if colour is None or colour == NATIVE.get(name) else ()
    return frozenset(own) | ({colour, _NEIGHBOURS.get(colour, colour)} if colour else frozenset())
