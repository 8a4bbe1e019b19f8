"""What is wanted of a picture, and what is wrong with the one that came.

A want says no more than was asked: places only where places were named, a background only where one was. Every check is a
name with yes or no, so that a picture can be a little wrong as well as right.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

from nextflow_ar.data.playground.canvases import Canvas, Item, place_words, size_word
from nextflow_ar.data.playground.looks import INK, ink_on
from nextflow_ar.data.playground.world import ALIKE_FLAT, ALIKE_TURNED, COLOUR_NAMES, COLOUR_SYNONYMS, SHAPES
from nextflow_ar.evaluation.world.verdict import UNKNOWN, SeenThing, Verdict

_SLACK = 0.05
"""Of the base: how far a box may lie beside a place that is named (3 px at 64)."""
_NEAR = 0.11
"""Of the base: how far a thing may have strayed from where it belongs (7 px at 64)."""
_SMALL, _LARGE = 0.33, 0.56
"""Sizes, as shares of the base, below and above which a thing counts as small or large."""
_RESIZED = 0.25
"""How far a thing's size may be off where its size is told exactly, as a share of it."""


@dataclass(frozen=True)
class ThingWanted:
    """One thing. None: not asked. ``near``: a centre (x, y) in pixels where it belongs; ``side``: its size in pixels."""

    name: str | None
    colour: str | None = None
    size: str | None = None
    place: str | None = None
    near: tuple[float, float] | None = None
    side: float | None = None
    turn: int | None = None


@dataclass(frozen=True)
class PictureWanted:
    """A picture of (height, width) at ``base``. None: not asked. ``mood`` and ``light``: "" for none.
    ``word``: "" for none; ``relation``: how things 0 and 1 stand to each other.
    """

    size: tuple[int, int]
    base: int
    things: tuple[ThingWanted, ...]
    background: str | None = None
    style: str | None = "full"
    mood: str | None = ""
    light: str | None = ""
    word: str | None = ""
    word_colour: str | None = None
    word_place: str | None = None
    relation: str | None = None


Checks = dict[str, bool]


def names_ground(text: str) -> bool:
    """Whether a request names its background, slips of the pen included."""
    return any(
        SequenceMatcher(None, word, "background").ratio() > 0.85 for word in re.findall(r"\w+", text.lower())
    )


def names_colour(text: str, colour: str) -> bool:
    """Whether a request names a colour behind its quoted word: 'the word "HI" in red', '"HI" in red letters'."""
    behind = text.lower().rpartition('"')[2]
    said = re.match(r"\s+in (\w+)", behind)
    if said is None:
        return False
    near = {name: SequenceMatcher(None, said[1], name).ratio() for name in COLOUR_NAMES}
    best = max(near, key=lambda name: near[name])
    return (best == colour and near[best] > 0.7) or said[1] in COLOUR_SYNONYMS.get(colour, ())


_SIDES = re.compile(
    r"^\s+(?:in|at|on|up in|down in) the (?:top|upper|bottom|lower|left|right|middle|centre|center)\b"
)


def names_place(text: str) -> bool:
    """Whether a request says where its quoted word is to stand."""
    return bool(_SIDES.match(text.lower().rpartition('"')[2]))


def of_item(item: Item, canvas: Canvas, **asked: object) -> ThingWanted:
    """A thing as a canvas has it: name and colour where they show, and what else is ``asked``."""
    flat = canvas.style == "silhouette" and item.name in ALIKE_FLAT
    wanted = ThingWanted(None if flat else item.name, item.colour if canvas.shows_colours else None)
    return replace(wanted, **asked)  # type: ignore[arg-type]


def turn_of(item: Item, canvas: Canvas) -> int | None:
    """Its turn, where one would see it."""
    hidden = item.name in ALIKE_TURNED or (canvas.style == "silhouette" and item.name in ALIKE_FLAT)
    return None if hidden else item.turn % 4


def flat_anyway(canvas: Canvas) -> bool:
    """Whether a picture is the same to the pixel in full colour and as a silhouette: shapes in the ink of its background,
    or nothing at all.
    """
    ink = "black" if ink_on(canvas.background) == INK else "white"
    shapes = all(item.name in SHAPES for item in canvas.items)
    inked = canvas.style == "silhouette" or all(item.colour == ink for item in canvas.items)
    return canvas.style != "line" and canvas.second is None and shapes and inked


def wanted_of(
    canvas: Canvas,
    things: Sequence[ThingWanted],
    *,
    ground: bool = True,
    relation: bool = False,
    word_colour: bool = False,
    word_place: bool = False,
) -> PictureWanted:
    """A picture with the looks of a canvas and these things."""
    word = canvas.word
    shown = canvas.style != "line" and canvas.mood != "gray"
    return PictureWanted(
        canvas.size,
        canvas.base,
        tuple(things),
        background=canvas.background if ground and shown else None,
        style=None if flat_anyway(canvas) else canvas.style,
        mood=canvas.mood or "",
        light=canvas.light or "",
        word=word.text if word else "",
        word_colour=word.colour if word and word_colour and shown else None,
        word_place=place_words(word.box, canvas.size) if word and word_place else None,
        relation=canvas.relation if relation else None,
    )


def _is_size(side: float, base: int, size: str) -> bool:
    share = side / base
    return (
        share < _SMALL
        if size == "small"
        else share > _LARGE
        if size == "large"
        else _SMALL * 0.9 < share < _LARGE * 1.1
    )


def in_place(box: tuple[int, int, int, int], place: str, size: tuple[int, int], base: int) -> bool:
    """Whether a box lies at a named place, give or take a little."""
    slack = round(base * _SLACK)
    moves = (-slack, 0, slack)
    return any(
        place_words((box[0] + dy, box[1] + dx, box[2] + dy, box[3] + dx), size) == place
        for dy in moves
        for dx in moves
    )


def _fits(want: ThingWanted, seen: SeenThing) -> bool:
    named = want.name == seen.name if want.name is not None else seen.name != UNKNOWN
    return named and (want.colour is None or want.colour == seen.colour)


def _where(want: ThingWanted, seen: SeenThing, wanted: PictureWanted, scale: tuple[float, float]) -> float:
    """How far off a seen thing is from where it is wanted; 0 where nothing is asked."""
    if want.near is not None:
        dx, dy = seen.x - want.near[0] * scale[0], seen.y - want.near[1] * scale[1]
        return (dx**2 + dy**2) ** 0.5 / wanted.base
    if want.place is not None:
        return 0.0 if in_place(seen.box, want.place, wanted.size, wanted.base) else 1.0
    return 0.0


def matched(wanted: PictureWanted, verdict: Verdict) -> list[SeenThing | None]:
    """The seen thing for every wanted one: by name and colour first, then the nearest to where it should be."""
    scale = (verdict.width / wanted.size[1], verdict.height / wanted.size[0])
    rest = list(verdict.things)
    found: list[SeenThing | None] = [None] * len(wanted.things)
    told = sorted(
        range(len(found)), key=lambda k: (wanted.things[k].name is None, wanted.things[k].colour is None)
    )
    pairs = [
        (_where(wanted.things[k], seen, wanted, scale), rank, k, seen)
        for rank, k in enumerate(told)
        for seen in rest
        if _fits(wanted.things[k], seen)
    ]
    for _, _, k, seen in sorted(pairs, key=lambda pair: (pair[0], pair[1])):
        if found[k] is None and seen in rest:
            found[k] = seen
            rest.remove(seen)
    return found


def check(wanted: PictureWanted, verdict: Verdict) -> Checks:
    """What is right and what is not, by name; the picture is right when everything is."""
    found = matched(wanted, verdict)
    scale = (verdict.width / wanted.size[1], verdict.height / wanted.size[0])
    checks: Checks = {"things": all(found) and len(verdict.things) == len(found)}
    pairs = [(want, seen) for want, seen in zip(wanted.things, found, strict=True) if seen is not None]
    if any(want.size is not None or want.side is not None for want in wanted.things):
        checks["sizes"] = checks["things"] and all(
            (want.size is None or _is_size(seen.size, wanted.base, want.size))
            and (want.side is None or abs(seen.size / want.side - 1) <= _RESIZED)
            for want, seen in pairs
        )
    if any(want.place is not None or want.near is not None for want in wanted.things):
        checks["places"] = checks["things"] and all(
            _where(want, seen, wanted, scale) <= _NEAR for want, seen in pairs
        )
    if any(want.turn is not None for want in wanted.things):
        checks["turns"] = checks["things"] and all(want.turn in (None, seen.turn) for want, seen in pairs)
    if wanted.relation is not None:
        checks["relation"] = checks["things"] and _related(wanted.relation, found)
    return checks | _looks(wanted, verdict)


def _related(relation: str, found: Sequence[SeenThing | None]) -> bool:
    a, b = found[0], found[1]
    if a is None or b is None:
        return False
    dx, dy = b.x - a.x, b.y - a.y
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[
        relation
    ]
    return along > 0 and along >= 0.35 * (a.size + b.size) and abs(across) <= 0.85 * along


def _looks(wanted: PictureWanted, verdict: Verdict) -> Checks:
    checks: Checks = {}
    if wanted.background is not None:
        checks["background"] = verdict.background == wanted.background
    if wanted.style is not None:
        checks["style"] = verdict.style == wanted.style
    if wanted.mood is not None:
        checks["mood"] = (verdict.mood or "") == wanted.mood
    if wanted.light is not None:
        checks["light"] = (verdict.light or "") == wanted.light
    if wanted.word is not None:
        checks["word"] = (verdict.word.text if verdict.word else "") == wanted.word
    if verdict.word is not None and wanted.word:
        if wanted.word_colour is not None:
            checks["word colour"] = verdict.word.colour == wanted.word_colour
        if wanted.word_place is not None:
            checks["word place"] = in_place(verdict.word.box, wanted.word_place, wanted.size, wanted.base)
    return checks


def fault(wanted: PictureWanted, verdict: Verdict) -> str:
    """The first thing that is wrong, in words; empty where nothing is."""
    wrong = [name for name, right in check(wanted, verdict).items() if not right]
    if not wrong:
        return ""
    if wrong[0] == "things":
        want = Counter(" ".join(w for w in (t.colour, t.name or "anything") if w) for t in wanted.things)
        seen = Counter(" ".join(w for w in (t.colour, t.name) if w) for t in verdict.things)
        missing, more = want - seen, seen - want
        lost = ", ".join(missing) or "nothing"
        return f"things: {lost} missing" + (f", {', '.join(more)} too much" if more else "")
    return wrong[0]


def size_asked(item: Item, base: int) -> str | None:
    """The size class that is said of an item: none for those in between."""
    return size_word(item, base) or None
