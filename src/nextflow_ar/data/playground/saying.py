"""Words for canvases: the one canonical caption (short or full), and the many ways in which people put the same
thing.

Answers are canonical, so that they can be read back exactly (:mod:`reading`). Requests are not: synonyms, free order,
politeness, any case, slips of the pen. What stands in double quotes is never touched, since it is to be written as it
is.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from functools import lru_cache

from nextflow_ar.data.playground.canvases import Canvas, Item, Kind, place_words, size_word
from nextflow_ar.data.playground.words import NUMBERS, article
from nextflow_ar.data.playground.world import (
    COLOUR_NAMES,
    COLOUR_SYNONYMS,
    LIGHT_WORDS,
    MANY,
    MOOD_WORDS,
    NAMES,
    SIZE_SYNONYMS,
    SYNONYMS,
    UNCOUNTED,
)


def phrase(kind: Kind, count: int = 1, size: str = "", *, colour: bool = True) -> str:
    """A kind in words: "a small red car", "three dogs", "some corn"."""
    name, own = kind
    words = " ".join(w for w in (size, own if colour else None) if w)
    words = words + " " if words else ""
    if name in UNCOUNTED:
        return f"some {words}{name}"
    return article(words + name) if count == 1 else f"{NUMBERS[count]} {words}{MANY[name]}"


def the(item: Item | Kind, canvas: Canvas | None = None) -> str:
    """An item with its article: "the cat", with its colour where the canvas shows another of its name."""
    name, colour = item.kind if isinstance(item, Item) else item
    mixed = canvas is not None and any(i.name == name and i.colour != colour for i in canvas.items)
    return f"the {colour} {name}" if mixed and colour else f"the {name}"


def groups(canvas: Canvas) -> list[tuple[Kind, int, str]]:
    """(kind, count, size word) of the canvas, in canonical order."""
    sizes = {item.kind: size_word(item, canvas.base) for item in canvas.items}
    return [(kind, count, sizes[kind]) for kind, count in canvas.counts]


def _ground(canvas: Canvas) -> str:
    ground = canvas.background if canvas.second is None else f"{canvas.background} to {canvas.second}"
    return f"{ground} background"


def looks_words(canvas: Canvas) -> list[str]:
    """Mood and light in words, where there are any."""
    mood = [MOOD_WORDS[canvas.mood]] if canvas.mood else []
    return mood + ([LIGHT_WORDS[canvas.light]] if canvas.light else [])


def short_caption(canvas: Canvas) -> str:
    """Kinds in alphabetical order, counted, coloured where colours show, the word, the background, mood and light.

    'a large red car and two dogs and the word "HI" on a blue background, dark'; 'a line drawing of a dog and a ring'.
    """
    colours = canvas.shows_colours
    parts = [phrase(kind, count, size, colour=colours) for kind, count, size in groups(canvas)]
    merged = _merged(canvas) if not colours else parts
    if canvas.word is not None:
        merged = [*merged, f'the word "{canvas.word.text}"']
    text = " and ".join(merged)
    if canvas.style == "line":
        return f"a line drawing of {text}"
    before = "a silhouette of " if canvas.style == "silhouette" else ""
    if canvas.mood == "gray":
        return ", ".join([before + text, *looks_words(canvas)])
    return ", ".join([f"{before}{text} on {article(_ground(canvas))}", *looks_words(canvas)])


def _merged(canvas: Canvas) -> list[str]:
    """Phrases where colours do not show: kinds of one name and size are one."""
    tally: dict[tuple[str, str], int] = {}
    for (name, _), count, size in groups(canvas):
        tally[name, size] = tally.get((name, size), 0) + count
    return [phrase((name, None), count, size) for (name, size), count in tally.items()]


TURNED: dict[int, str] = {1: "turned left", 2: "upside down", 3: "turned right"}
"""Quarter turns counterclockwise -> words of a plan."""


def turned_words(item: Item) -> str:
    """How a thing is turned, behind a space; nothing where it is upright."""
    return f" {TURNED[item.turn]}" if item.turn else ""


def full_caption(canvas: Canvas, *, plan: bool = False) -> str:
    """Every single thing with its place, in reading order, then what :func:`short_caption` adds. ``plan``: and how it is
    turned; two things whose relation is the point come in the order in which they were named, so that their places follow
    from the relation alone.

    'a dog above left, a large red car right, the word "HI" below, blue background'.
    """
    colours = canvas.shows_colours
    ordered = sorted(canvas.items, key=lambda item: (item.y, item.x, item.name))
    if plan and canvas.relation is not None:
        ordered = list(canvas.items)
    parts = [
        f"{phrase(i.kind, 1, size_word(i, canvas.base), colour=colours)} {place_words(i.box, canvas.size)}"
        + (turned_words(i) if plan else "")
        for i in ordered
    ]
    if canvas.word is not None:
        parts.append(f'the word "{canvas.word.text}" {place_words(canvas.word.box, canvas.size)}')
    if canvas.style == "line":
        parts.append("line drawing")
    elif canvas.mood != "gray":
        parts.append(_ground(canvas))
    if canvas.style == "silhouette":
        parts.append("silhouette")
    return ", ".join(parts + looks_words(canvas))


# --- people's ways -------------------------------------------------------------------------------------------------

_BEFORE = (
    "draw {}", "draw me {}", "show me {}", "paint {}", "a picture of {}", "make a picture of {}", "give me {}",
    "i want {}", "i would like {}", "i'd like to see {}", "can you draw {}", "could you draw {}", "please draw {}",
    "let me see {}", "generate {}", "create an image of {}", "an image showing {}", "{} please", "{}", "{}", "{}",
)  # fmt: skip
_POLITE_ENDS = ("", "", "", "", "", ", please", " please", ", thanks", ", thank you", " for me")
_GROUNDS = (
    "{things} on {a} background", "{things} on {a} background", "{things}, {ground} background",
    "{a} background with {things}", "on {a} background, {things}", "{things} in front of {a} background",
    "{ground} background: {things}", "{things}. make the background {ground}",
)  # fmt: skip
_RELATIONS = {
    "left of": ("left of", "to the left of", "on the left side of"),
    "right of": ("right of", "to the right of", "on the right side of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath"),
}
_MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_QUOTED = re.compile(r'("[^"]*"|\n[A-D]\. [^\n]*)')
_SIDE_WORDS = {
    "above left": ("in the top left corner", "at the top left", "in the upper left"),
    "above": ("at the top", "in the upper part", "up in the middle"),
    "above right": ("in the top right corner", "at the top right", "in the upper right"),
    "left": ("on the left", "at the left", "on the left side"),
    "middle": ("in the middle", "in the centre", "in the center"),
    "right": ("on the right", "at the right", "on the right side"),
    "below left": ("in the bottom left corner", "at the bottom left", "in the lower left"),
    "below": ("at the bottom", "in the lower part", "down in the middle"),
    "below right": ("in the bottom right corner", "at the bottom right", "in the lower right"),
}
_TO_SIDE = {
    "above left": ("to the top left corner", "to the upper left"),
    "above": ("to the top", "up to the middle of the top"),
    "above right": ("to the top right corner", "to the upper right"),
    "left": ("to the left side", "to the left"),
    "middle": ("to the middle", "to the centre", "to the center"),
    "right": ("to the right side", "to the right"),
    "below left": ("to the bottom left corner", "to the lower left"),
    "below": ("to the bottom", "down to the middle of the bottom"),
    "below right": ("to the bottom right corner", "to the lower right"),
}
WHERE: dict[str, str] = {place: ways[0] for place, ways in _SIDE_WORDS.items()}
"""A place as an adverb: "above left" -> "in the top left corner"."""


def somewhere(rng: random.Random, place: str) -> str:
    """One of the ways to name a place."""
    return rng.choice(_SIDE_WORDS[place])


def towards(rng: random.Random, place: str) -> str:
    """One of the ways to name where a thing goes."""
    return rng.choice(_TO_SIDE[place])


def loosely(rng: random.Random, kind: Kind, count: int = 1, size: str = "", *, colour: bool = True) -> str:
    """:func:`phrase` with synonyms and other ways of counting, now and then."""
    name, own = kind
    many = MANY[name]
    if name in SYNONYMS and rng.random() < 0.2:
        name = rng.choice(SYNONYMS[name])
        many = "puppies" if name == "puppy" else "kitties" if name == "kitty" else name + "s"
        many = many.replace("doggys", "doggies").replace("bunnys", "bunnies")
    if size and rng.random() < 0.4:
        size = rng.choice(SIZE_SYNONYMS[size])
    if own in COLOUR_SYNONYMS and rng.random() < 0.15:
        own = rng.choice(COLOUR_SYNONYMS[own])
    words = " ".join(w for w in (size, own if colour else None) if w)
    words = words + " " if words else ""
    if kind[0] in UNCOUNTED:
        return f"some {words}{kind[0]}"
    if count == 1:
        return article(words + name) if rng.random() < 0.93 else f"one {words}{name}"
    number = NUMBERS[count]
    if rng.random() < 0.25:
        number = str(count) if count != 2 or rng.random() < 0.5 else rng.choice(("a pair of", "a couple of"))
    return f"{number} {words}{many}"


def listed(rng: random.Random, parts: list[str]) -> str:
    """Joined as people join: "a, b and c"."""
    if len(parts) > 2 and rng.random() < 0.7:
        return ", ".join(parts[:-1]) + " and " + parts[-1]
    return rng.choice((" and ", " and ", " with ", " next to ") if len(parts) == 2 else (" and ",)).join(
        parts
    )


def things_asked(rng: random.Random, canvas: Canvas, *, bare: bool = False) -> tuple[str, Canvas]:
    """What people would ask to see on this canvas: its things, or the relation between two of them. And the canvas, two
    related things in the order in which they are named.
    """
    if canvas.relation is not None:
        first, second = (loosely(rng, item.kind) for item in canvas.items[:2])
        relation = canvas.relation
        if rng.random() < 0.25:
            first, second, relation = second, first, _MIRRORED[relation]
            a, b, *others = canvas.items
            canvas = replace(canvas, items=(b, a, *others), relation=relation)
        return f"{first} {rng.choice(_RELATIONS[relation])} {second}", canvas
    found = groups(canvas)
    rng.shuffle(found)
    parts = [loosely(rng, kind, count, size, colour=not bare) for kind, count, size in found]
    return listed(rng, parts), canvas


def grounded(rng: random.Random, canvas: Canvas, things: str) -> str:
    """``things`` with the background named."""
    ground = canvas.background if canvas.second is None else f"{canvas.background} to {canvas.second}"
    return rng.choice(_GROUNDS).format(things=things, ground=ground, a=article(ground))


def asked_to_draw(rng: random.Random, what: str) -> str:
    """A request to draw ``what``; what begins with the background is a request already."""
    if what.startswith("on ") or re.match(r"[a-z ]+ background: ", what):
        return rng.choice(("{}", "{}", "{} please", "please: {}")).format(what)
    return rng.choice(_BEFORE).format(what)


_VERBS = frozenset(
    [
        "add",
        "put",
        "insert",
        "place",
        "remove",
        "take",
        "delete",
        "erase",
        "get",
        "replace",
        "swap",
        "turn",
        "make",
        "change",
        "colour",
        "paint",
        "enlarge",
        "scale",
        "shrink",
        "move",
        "bring",
        "shift",
        "rotate",
        "write",
        "zoom",
        "go",
        "show",
        "step",
        "redraw",
        "give",
        "light",
        "wash",
        "switch",
        "extract",
        "cut",
        "isolate",
        "draw",
    ]
)


def polite(rng: random.Random, text: str) -> str:
    """A command, maybe with a please around it; what is no command stays alone."""
    if text.split(" ", 1)[0] not in _VERBS:
        return text + rng.choice(("", "", "", ", please"))
    start = rng.choice(("", "", "", "", "please ", "could you ", "can you ", "now "))
    return start + text + ("" if start == "please " else rng.choice(_POLITE_ENDS))


@lru_cache(maxsize=1)
def _known() -> frozenset[str]:
    many = {MANY[name] for name in NAMES}
    said = {word for words in SYNONYMS.values() for word in words}
    return frozenset({*NAMES, *many, *said, *COLOUR_NAMES, *NUMBERS})


def _slip(rng: random.Random, word: str) -> str:
    """One letter dropped, doubled or swapped with the next; never into another word of the world."""
    at = rng.randint(1, len(word) - 2)
    how = rng.random()
    if how < 0.35:
        out = word[:at] + word[at + 1 :]
    elif how < 0.65:
        out = word[:at] + word[at] + word[at:]
    else:
        out = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word if out in _known() else out


def as_people_write(rng: random.Random, text: str, slips: float = 0.08) -> str:
    """A request in somebody's case, with or without a full stop, in ``slips`` of the cases with a slip of the pen.

    What stands in double quotes, and the lines of a multiple choice, stay as they are.
    """
    case = rng.random()
    slipping = rng.random() < slips
    if case < 0.5 and not slipping:
        return text
    pieces = _QUOTED.split(text)
    if slipping:
        places = [
            (k, match) for k, piece in enumerate(pieces[::2]) for match in re.finditer(r"[a-z]{5,}", piece)
        ]
        if places:
            k, match = rng.choice(places)
            piece = pieces[2 * k]
            pieces[2 * k] = piece[: match.start()] + _slip(rng, match.group()) + piece[match.end() :]
    if case > 0.97:
        pieces[::2] = [piece.upper() for piece in pieces[::2]]
    elif case > 0.5:
        pieces[0] = pieces[0][:1].upper() + pieces[0][1:]
        if len(pieces) == 1 and text[-1].isalnum():
            pieces[-1] += "."
    return "".join(pieces)
