"""Words for scenes: the canonical caption, the ways people ask for a scene, and reading a caption back."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from nextflow_ar.data.playground.scenes import Scene, Thing
from nextflow_ar.data.playground.words import COLOURS, NOUNS, NUMBERS, SHAPES, article, plural

Kind = tuple[str, str | None]
Counts = tuple[tuple[Kind, int], ...]


@dataclass(frozen=True)
class Reading:
    """What a caption says: how many of each (name, colour), and the background's colour if it names one."""

    counts: Counts
    background: str | None


def counts_of(scene: Scene) -> Counts:
    """How many of each (name, colour) a scene shows, sorted by name, then colour."""
    tally = Counter(thing.key for thing in scene.things)
    return tuple(sorted(tally.items(), key=lambda item: (item[0][0], item[0][1] or "")))


def _phrase(kind: Kind, count: int, *, with_colour: bool = True) -> str:
    name, colour = kind
    colour_word = f"{colour} " if colour and with_colour else ""
    if count == 1:
        return article(colour_word + name)
    return f"{NUMBERS[count]} {colour_word}{plural(name)}"


def caption(scene: Scene) -> str:
    """The one canonical description: things in alphabetical order, counted, coloured, then the background."""
    things = " and ".join(_phrase(kind, count) for kind, count in counts_of(scene))
    return f"{things} on {article(scene.background)} background"


_WITH_BACKGROUND = (
    "{things} on {a_bg} background",
    "{things} on {a_bg} background",
    "{things} on {a_bg} background",
    "{things}, {bg} background",
    "{a_bg} background with {things}",
    "a picture of {things} on {a_bg} background",
)
_PLAIN = ("{things}", "{things}", "a picture of {things}", "draw {things}")


def prompt(scene: Scene, rng: np.random.Generator, background: float = 0.75) -> str:
    """A request for the scene, as its task type would put it; names the background with probability ``background``."""
    if scene.relation is not None:
        first, second = scene.things[0].key, scene.things[1].key
        things = f"{_phrase(first, 1)} {scene.relation} {_phrase(second, 1)}"
    else:
        kinds = list(counts_of(scene))
        if len(kinds) > 1 and rng.random() < 0.5:
            kinds.reverse()
        bare = scene.task == "single_object"
        things = " and ".join(_phrase(kind, count, with_colour=not bare) for kind, count in kinds)
    forms = _WITH_BACKGROUND if rng.random() < background else _PLAIN
    form = forms[int(rng.integers(len(forms)))]
    return form.format(things=things, bg=scene.background, a_bg=article(scene.background))


def place_words(thing: Thing, canvas: int) -> str:
    """Where a thing's centre lies on the canvas, in thirds of the way that a thing of its size can move."""
    free = max(1, canvas - thing.size)
    row, column = (min(2, int(3 * corner / (free + 1))) for corner in (thing.y, thing.x))
    words = (("above", "", "below")[row], ("left", "", "right")[column])
    return " ".join(word for word in words if word) or "middle"


def plan(scene: Scene) -> str:
    """The scene thought through before it is drawn: every single thing with its place, in reading order, and the
    background. "a dog above left, a red circle right, blue background".
    """
    ordered = sorted(scene.things, key=lambda thing: (thing.y, thing.x))
    things = [f"{_phrase(thing.key, 1)} {place_words(thing, scene.canvas)}" for thing in ordered]
    return ", ".join([*things, f"{scene.background} background"])


_NAMES = {noun.name: noun.name for noun in NOUNS} | {noun.many: noun.name for noun in NOUNS}
_NAMES |= {shape: shape for shape in SHAPES} | {plural(shape): shape for shape in SHAPES}
_BACKGROUND = re.compile(r"^(?P<things>.*?) on an? (?P<bg>\w+) background\.?$")
_THING = re.compile(r"^(?P<count>an?|\w+) (?:(?P<colour>\w+) )?(?P<name>\w+)$")


def read_caption(text: str) -> Reading | None:
    """Parse a caption in the canonical form (any order of things); None when it is not of that form."""
    match = _BACKGROUND.match(text.strip().lower())
    things, background = (match["things"], match["bg"]) if match else (text.strip().lower().rstrip("."), None)
    tally: Counter[Kind] = Counter()
    for part in things.split(" and "):
        found = _THING.match(part.strip())
        if found is None or found["name"] not in _NAMES:
            return None
        count = (
            1
            if found["count"] in ("a", "an")
            else NUMBERS.index(found["count"])
            if found["count"] in NUMBERS
            else 0
        )
        colour = found["colour"]
        if count == 0 or (colour is not None and colour not in COLOURS):
            return None
        tally[_NAMES[found["name"]], colour] += count
    ordered = tuple(sorted(tally.items(), key=lambda item: (item[0][0], item[0][1] or "")))
    return Reading(ordered, background)
