"""Reading answers back, for exact scoring: one function per kind of answer; None is what cannot be read."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from nextflow_ar.data.playground.canvases import PLACES, Canvas, place_words, size_word
from nextflow_ar.data.playground.saying import TURNED, looks_words
from nextflow_ar.data.playground.words import NUMBERS
from nextflow_ar.data.playground.world import (
    COLOUR_NAMES,
    LIGHT_WORDS,
    MOOD_WORDS,
    ONE_OF,
    UNCOUNTED,
)

Seen = tuple[str, str | None, str]
"""Name, colour if said, size word or the empty string."""


@dataclass(frozen=True)
class Caption:
    """What a caption says: how many of each, sorted; ``ground``: the background's words; ``looks``: mood and light."""

    counts: tuple[tuple[Seen, int], ...]
    ground: str | None = None
    word: str | None = None
    style: str = "full"
    looks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Placed:
    """What a full caption says: every thing with its place, sorted; and as in :class:`Caption`."""

    things: tuple[tuple[Seen, str], ...]
    ground: str | None = None
    word: tuple[str, str] | None = None
    style: str = "full"
    looks: tuple[str, ...] = ()


_THING = re.compile(r"^(?P<count>\w+) (?:(?P<size>small|large) )?(?:(?P<colour>\w+) )?(?P<name>\w+)$")
_WORD = re.compile(r'^the word "(?P<word>[^"]+)"(?: (?P<place>[a-z ]+))?$')
_COLOUR = "|".join(COLOUR_NAMES)
_GROUND = re.compile(rf"^(?P<ground>(?:{_COLOUR})(?: to (?:{_COLOUR}))?) background$")
_SHORT = re.compile(r"^(?P<things>.*) on an? (?P<ground>[a-z ]+ background)$")
_TURNS = re.compile(rf" (?:{'|'.join(TURNED.values())})(?=,|$)")
_LOOKS = (*MOOD_WORDS.values(), *LIGHT_WORDS.values())


def read_number(text: str) -> int | None:
    """A number in words or digits: "three", "3", "two hundred" is none."""
    said = text.strip().lower().rstrip(".")
    words = {word: k for k, word in enumerate((*NUMBERS, *_TEENS))} | _TENS
    if re.fullmatch(r"\d{1,6}", said):
        return int(said)
    if said in words:
        return words[said]
    tens, _, ones = said.partition("-")
    return words[tens] + words[ones] if tens in _TENS and 1 <= words.get(ones, 0) <= 9 else None


_TEENS = (
    "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen",
    "eighteen", "nineteen",
)  # fmt: skip
_TENS = {
    "twenty": 20,
    "thirty": 30,
    "forty": 40,
    "fifty": 50,
    "sixty": 60,
    "seventy": 70,
    "eighty": 80,
    "ninety": 90,
}


def number_words(number: int) -> str:
    """0..99 in words: 34 is "thirty-four"."""
    small = (*NUMBERS, *_TEENS)
    if number < len(small):
        return small[number]
    tens = next(word for word, value in _TENS.items() if value == number // 10 * 10)
    return tens if number % 10 == 0 else f"{tens}-{small[number % 10]}"


def read_yes_no(text: str) -> bool | None:
    """A leading "yes" or "no", whatever follows it."""
    found = re.match(r"\s*(yes|no)\b", text.lower())
    return None if found is None else found[1] == "yes"


def read_choice(text: str) -> str | None:
    """The letter of a multiple choice: "B", "b.", "B. dog"."""
    found = re.match(r"\s*([A-Da-d])(?:\b|$)", text)
    return None if found is None else found[1].upper()


def read_colour(text: str) -> str | None:
    """The one colour named, None when there is none or more than one."""
    found = set(re.findall(rf"\b({_COLOUR})\b", text.lower()))
    return found.pop() if len(found) == 1 else None


def read_place(text: str) -> str | None:
    """One of the nine places."""
    said = text.strip().lower().rstrip(".")
    return said if said in PLACES else None


def read_name(text: str) -> str | None:
    """The one thing named, singular, None when there is none or more than one."""
    found = {ONE_OF[word] for word in re.findall(r"\w+", text.lower()) if word in ONE_OF}
    return found.pop() if len(found) == 1 else None


def _seen(text: str) -> tuple[Seen, int] | None:
    found = _THING.match(text)
    if found is None or found["name"] not in ONE_OF:
        return None
    colour, count = found["colour"], found["count"]
    if colour is not None and colour not in COLOUR_NAMES:
        return None
    name = ONE_OF[found["name"]]
    if count in ("a", "an"):
        number = 1
    elif count == "some":
        number = 1 if name in UNCOUNTED else 0
    else:
        number = read_number(count) or 0
    return ((name, colour, found["size"] or ""), number) if number else None


def read_short(text: str) -> Caption | None:
    """A caption in the form of ``short_caption``, its things in any order."""
    body, looks = _without_looks(text.strip().rstrip("."))
    style = "full"
    for words, name in (("a line drawing of ", "line"), ("a silhouette of ", "silhouette")):
        if body.startswith(words):
            body, style = body[len(words) :], name
    ground = _SHORT.match(body)
    things = ground["things"] if ground else body
    named = _GROUND.match(ground["ground"]) if ground else None
    if ground and named is None:
        return None
    tally: Counter[Seen] = Counter()
    word = None
    for part in things.split(" and "):
        written = _WORD.match(part)
        if written is not None:
            word = written["word"]
            continue
        seen = _seen(part)
        if seen is None:
            return None
        tally[seen[0]] += seen[1]
    counts = tuple(sorted(tally.items(), key=lambda entry: _key(entry[0])))
    return Caption(counts, named["ground"] if named else None, word, style, looks)


def _without_looks(text: str) -> tuple[str, tuple[str, ...]]:
    parts = text.split(", ")
    looks = []
    while len(parts) > 1 and parts[-1] in _LOOKS:
        looks.insert(0, parts.pop())
    return ", ".join(parts), tuple(looks)


def _key(seen: Seen) -> tuple[str, str, str]:
    return seen[0], seen[1] or "", seen[2]


def read_full(text: str) -> Placed | None:
    """A caption (or a plan) in the form of ``full_caption``, its things in any order."""
    body, looks = _without_looks(text.strip().rstrip("."))
    things: list[tuple[Seen, str]] = []
    ground, word, style = None, None, "full"
    for part in body.split(", "):
        named, written = _GROUND.match(part), _WORD.match(part)
        if named is not None:
            ground = named["ground"]
        elif written is not None and written["place"] in PLACES:
            word = (written["word"], written["place"])
        elif part in ("line drawing", "silhouette"):
            style = part.split()[0]
        else:
            place = next((p for p in sorted(PLACES, key=len, reverse=True) if part.endswith(" " + p)), None)
            seen = _seen(part[: -len(place) - 1]) if place else None
            if place is None or seen is None or seen[1] != 1:
                return None
            things.append((seen[0], place))
    things.sort(key=lambda entry: (*_key(entry[0]), entry[1]))
    return Placed(tuple(things), ground, word, style, looks)


def read_plan(text: str) -> Placed | None:
    """The plan that ends a thought: what follows the last "plan: ", however its things are turned."""
    _, found, plan = text.rpartition("plan: ")
    return read_full(_TURNS.sub("", plan)) if found else None


def _ground_of(canvas: Canvas) -> str | None:
    if canvas.style == "line" or canvas.mood == "gray":
        return None
    return canvas.background if canvas.second is None else f"{canvas.background} to {canvas.second}"


def truth_short(canvas: Canvas) -> Caption:
    """What a short caption of the canvas has to say."""
    shown = canvas.shows_colours
    tally: Counter[Seen] = Counter(
        (i.name, i.colour if shown else None, size_word(i, canvas.base)) for i in canvas.items
    )
    counts = tuple(sorted(tally.items(), key=lambda entry: _key(entry[0])))
    looks = () if canvas.style == "line" else tuple(looks_words(canvas))
    word = canvas.word.text if canvas.word else None
    return Caption(counts, _ground_of(canvas), word, canvas.style, looks)


def truth_full(canvas: Canvas) -> Placed:
    """What a full caption of the canvas has to say."""
    shown = canvas.shows_colours
    things = [
        (
            (i.name, i.colour if shown else None, size_word(i, canvas.base)),
            place_words(i.box, canvas.size),
        )
        for i in canvas.items
    ]
    things.sort(key=lambda entry: (*_key(entry[0]), entry[1]))
    word = (canvas.word.text, place_words(canvas.word.box, canvas.size)) if canvas.word else None
    return Placed(tuple(things), _ground_of(canvas), word, canvas.style, tuple(looks_words(canvas)))
