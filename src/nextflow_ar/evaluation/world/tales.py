"""Stories that a model makes up: whether its pictures show what its own sentences say."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from nextflow_ar.data.playground.canvases import Canvas, base_of
from nextflow_ar.data.playground.saying import WHERE
from nextflow_ar.data.playground.world import COLOUR_NAMES, NAMES
from nextflow_ar.evaluation.world.verdict import SeenThing, Verdict
from nextflow_ar.evaluation.world.wanted import Checks, in_place

_COLOUR = "|".join(COLOUR_NAMES)
_NAME = "|".join(sorted(NAMES, key=len, reverse=True))
_PLACES = {words: place for place, words in WHERE.items()}
_WHERE = "|".join(sorted(map(re.escape, _PLACES), key=len, reverse=True))
_THING = rf"(?:(?P<colour>{_COLOUR}) )?(?P<name>{_NAME})"
_A = re.compile(rf"(?:an?|some) {_THING} (?P<where>{_WHERE})")
_BACKGROUND = re.compile(rf"before an? (?P<ground>{_COLOUR}) background")
_TURNS = {"stands on its head": 2, "falls over to the left": 1, "falls over to the right": 3}


def _found(seen: Verdict, name: str, colour: str | None) -> list[SeenThing]:
    return [t for t in seen.things if t.name == name and colour in (None, t.colour)]


def _placed(seen: Verdict, name: str, colour: str | None, where: str) -> bool:
    base = base_of(seen.size)
    return any(in_place(t.box, _PLACES[where], seen.size, base) for t in _found(seen, name, colour))


def _begins(text: str, seen: Verdict) -> bool | None:
    """'there is a dog in the middle and a red car on the left side, before a blue background'."""
    if not text.startswith("there is "):
        return None
    things = list(_A.finditer(text))
    ground = _BACKGROUND.search(text)
    if not things or ground is None:
        return False
    right = all(_placed(seen, m["name"], m["colour"], m["where"]) for m in things)
    return right and len(seen.things) == len(things) and seen.background == ground["ground"]


Event = Callable[[re.Match[str], Verdict, Verdict], bool]


def _grew(match: re.Match[str], before: Verdict, seen: Verdict) -> bool:
    old, new = _found(before, match["name"], match["colour"]), _found(seen, match["name"], match["colour"])
    if not old or not new:
        return False
    ratio = new[0].size / old[0].size
    return ratio >= 1.15 if match["how"] == "larger" else ratio <= 0.87


def _turned(match: re.Match[str], before: Verdict, seen: Verdict) -> bool:
    old, new = _found(before, match["name"], match["colour"]), _found(seen, match["name"], match["colour"])
    return bool(old and new) and (new[0].turn - old[0].turn) % 4 == _TURNS[match["how"]]


_EVENTS: tuple[tuple[re.Pattern[str], Event], ...] = (
    (
        re.compile(rf"(?:an?|some) {_THING} appears (?P<where>{_WHERE})"),
        lambda m, before, seen: _placed(seen, m["name"], m["colour"], m["where"]),
    ),
    (
        re.compile(rf"the {_THING} is now (?P<where>{_WHERE})"),
        lambda m, before, seen: _placed(seen, m["name"], m["colour"], m["where"]),
    ),
    (
        re.compile(rf"the {_THING} goes away"),
        lambda m, before, seen: not _found(seen, m["name"], m["colour"]) and bool(before.things),
    ),
    (re.compile(rf"the {_THING} gets (?P<how>larger|smaller)"), _grew),
    (
        re.compile(rf"the {_THING} becomes (?P<new>{_COLOUR})"),
        lambda m, before, seen: bool(_found(seen, m["name"], m["new"])),
    ),
    (
        re.compile(rf"the {_THING} turns into (?:an?|some) (?:(?P<new_colour>{_COLOUR}) )?(?P<new>{_NAME})"),
        lambda m, before, seen: (
            bool(_found(seen, m["new"], m["new_colour"])) and not _found(seen, m["name"], m["colour"])
        ),
    ),
    (re.compile(rf"the {_THING} (?P<how>{'|'.join(_TURNS)})"), _turned),
    (
        re.compile(rf"everything behind turns (?P<ground>{_COLOUR})"),
        lambda m, before, seen: seen.background == m["ground"],
    ),
    (re.compile("night falls and it gets dark"), lambda m, before, seen: seen.mood == "dark"),
    (re.compile("all the colours fade"), lambda m, before, seen: seen.mood == "gray"),
)


def shows(text: str, before: Verdict | None, seen: Verdict) -> bool:
    """Whether a picture shows what the sentence before it says; a sentence that cannot be read is not shown."""
    said = text.strip().rstrip(".").lower()
    if before is None:
        return bool(_begins(said, seen))
    for pattern, event in _EVENTS:
        match = pattern.fullmatch(said)
        if match is not None:
            return event(match, before, seen)
    return False


def tale_checks(
    count: int, first: Canvas, said: Sequence[str], seen: Sequence[Verdict], order: Sequence[str]
) -> tuple[Checks, str]:
    """As many pictures as asked for, each behind a sentence, the hero in the first, every picture as its sentence says."""
    checks: Checks = {
        "count": len(seen) == count,
        "order": list(order) == ["text", "picture"] * count,
        "hero": bool(seen) and bool(_found(seen[0], first.items[0].name, None)),
    }
    for k in range(count):
        there = k < len(seen) and k < len(said)
        checks[f"picture {k + 1}"] = there and shows(said[k], seen[k - 1] if k else None, seen[k])
    wrong = next((name for name, right in checks.items() if not right), "")
    at = int(wrong.rpartition(" ")[2]) - 1 if wrong.startswith("picture ") else -1
    why = f"{wrong} does not show {said[at]!r}" if 0 <= at < len(said) else wrong
    return checks, why
