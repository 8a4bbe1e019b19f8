"""Tasks of several pictures that belong together: stories, step-by-step recipes, and moving pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nextflow_ar.data.playground.canvases import Canvas, Item, Kind, apart, place_words
from nextflow_ar.data.playground.editing import edited
from nextflow_ar.data.playground.edits import Edit
from nextflow_ar.data.playground.episodes import Answer, Draft, Episode, Part, Truth, draws, shows, tells
from nextflow_ar.data.playground.maker import Reject
from nextflow_ar.data.playground.saying import WHERE, phrase, the
from nextflow_ar.data.playground.words import NUMBERS, article
from nextflow_ar.data.playground.world import ALIKE_TURNED, NATIVE, near_colours

# --- stories ---------------------------------------------------------------------------------------------------------

_EVENTS: tuple[str, ...] = (
    "add", "add", "move", "move", "move", "remove", "size", "rotate", "colour", "background", "mood", "replace",
)  # fmt: skip
_TURNED = {
    "upside down": "{} stands on its head",
    "left": "{} falls over to the left",
    "right": "{} falls over to the right",
}


def sentence(edit: Edit, before: Canvas) -> str:
    """What happens between two pictures of a story, in words that say all that changes."""
    old = the(edit.target, before) if edit.target else ""
    if edit.target and sum(item.kind == edit.target for item in before.items) > 1:
        raise Reject
    if edit.kind == "add" and isinstance(edit.new, Item):
        return f"{phrase(edit.new.kind)} appears {WHERE[edit.how]}"
    if edit.kind == "replace" and isinstance(edit.new, tuple):
        return f"{old} turns into {phrase(edit.new)}"
    if edit.kind == "rotate":
        return _TURNED[edit.how].format(old)
    return {
        "move": f"{old} is now {WHERE.get(edit.how, '')}",
        "remove": f"{old} goes away",
        "size": f"{old} gets {edit.how}",
        "colour": f"{old} becomes {edit.new}",
        "background": f"everything behind turns {edit.new}",
        "mood": {"dark": "night falls and it gets dark", "gray": "all the colours fade"}.get(
            str(edit.new), ""
        ),
    }[edit.kind]


def _event(draft: Draft, canvas: Canvas, last: str) -> tuple[str, str, Canvas]:
    """The kind of what happens next (never the ``last`` again), its sentence, and the picture after it."""
    for _ in range(12):
        kind = draft.pick(_EVENTS)
        if kind == last:
            continue
        try:
            edit, after = edited(draft.maker, kind, canvas)
            text = sentence(edit, canvas)
        except Reject:
            continue
        if text and len(after.items) <= 4 and not (edit.kind == "mood" and edit.new == "none"):
            return kind, text, after
    raise Reject


def _plot(draft: Draft, count: int) -> list[tuple[str, Canvas]]:
    """``count`` pictures, each with the sentence that leads to it."""
    maker = draft.maker
    kinds = [maker.kind("animal"), *maker.distinct(draft.rng.randint(0, 1))]
    if len({name for name, _ in kinds}) < len(kinds):
        raise Reject
    canvas = maker.canvas(maker.items(kinds), plain=True)
    there = " and ".join(
        f"{phrase(item.kind)} {WHERE[place_words(item.box, canvas.size)]}" for item in canvas.items
    )
    told = [(f"there is {there}, before {article(canvas.background)} background", canvas)]
    kind = ""
    while len(told) < count:
        kind, text, canvas = _event(draft, canvas, kind)
        told.append((text, canvas))
    return told


_STORY = (
    "tell me a story about {hero} in {n} pictures", "a story with {hero}, {n} pictures please",
    "make a picture story of {hero}, {n} pictures",
    "i want a story about {hero}. {n} pictures",
)  # fmt: skip
_SCRIPT = (
    "draw this story, one picture per sentence: {plot}", "illustrate every sentence: {plot}",
    "a picture for each: {plot}",
)  # fmt: skip


def story(draft: Draft) -> Episode:
    """Two to five pictures with sentences between them; the assistant makes the story up, or illustrates one that is
    given.
    """
    count = 2 + draft.index % 4
    told = _plot(draft, count)
    hero = phrase(told[0][1].items[0].kind)
    if draft.index // 4 % 2:
        request = draft.pick(_SCRIPT).format(plot=". ".join(text for text, _ in told))
    else:
        request = draft.pick(_STORY).format(hero=hero, n=NUMBERS[count])
    parts: list[Part] = [draft.person(request)]
    for text, canvas in told:
        parts += [tells(text + "."), draws(canvas)]
    return Episode("", tuple(parts), Truth("script" if draft.index // 4 % 2 else "story"))


_RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "pizza": ("bake a pizza", ("mushroom", "corn", "pineapple", "carrot")),
    "cake": ("make a cake", ("strawberry", "apple", "banana", "carrot", "grapes", "pineapple")),
    "burger": ("make a burger", ("mushroom", "corn", "pineapple", "fish")),
    "snowman": ("build a snowman", ("carrot", "hat", "umbrella", "ring")),
    "tree": ("make a christmas tree", ("star", "bell", "heart", "gift")),
    "backpack": ("pack a backpack", ("book", "apple", "camera", "umbrella", "key", "banana")),
    "house": ("build a house", ("hammer", "door", "key", "bed", "chair")),
    "gift": ("make a gift", ("book", "scissors", "bell", "heart", "star")),
    "boat": ("get a boat ready", ("anchor", "hammer", "bell", "fish")),
    "tent": ("pitch a tent", ("hammer", "backpack", "key")),
    "crown": ("make a crown", ("diamond", "hammer", "star", "heart")),
    "train": ("build a train", ("hammer", "bell", "clock")),
}
_HOW_TO = (
    "how do i {title} with {parts}? show every step", "{title} with {parts}, step by step please",
    "show me how to {title} with {parts}",
    "steps to {title} with {parts}, in pictures",
)  # fmt: skip


def recipe(draft: Draft) -> Episode:
    """A thing made of others, step by step: each step adds one to what is there, the last shows the outcome alone."""
    maker, rng = draft.maker, draft.rng
    result = rng.choice(tuple(_RECIPES))
    title, pool = _RECIPES[result]
    count = min(len(pool), 1 + draft.index % 4)
    kinds: list[Kind] = []
    for name in rng.sample(pool, count):
        colour = "yellow" if name == "ring" else NATIVE.get(name)
        kinds.append((name, colour))
    shown = maker.canvas(maker.items(kinds), plain=True)
    side = min(44 * maker.base // 64, *shown.size)
    height, width = shown.size
    last = Item(result, NATIVE.get(result), (width - side) // 2, (height - side) // 2, side)
    if shown.background in near_colours(*last.kind):
        raise Reject
    said = [phrase((name, None)) for name, _ in kinds]
    request = draft.pick(_HOW_TO).format(title=title, parts=_and(said))
    parts: list[Part] = [draft.person(request)]
    for k, what in enumerate(said):
        verb = "take" if k == 0 else "add"
        step = replace(shown, items=shown.items[: k + 1])
        parts += [tells(f"step {k + 1}: {verb} {what}."), draws(step)]
    ready = f"step {count + 1}: put everything together. the {result} is ready."
    parts += [tells(ready), draws(replace(shown, items=(last,)))]
    return Episode("", tuple(parts), Truth("recipe"))


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


# --- moving pictures ---------------------------------------------------------------------------------------------------

MOTIONS: dict[str, str] = {
    "right": "moves right", "left": "moves left", "up": "moves up", "down": "moves down", "grow": "grows",
    "shrink": "shrinks", "turn": "turns",
}  # fmt: skip
_STEPS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
_MOVING = re.compile(
    r"^(?:an?|some) (?:(?P<colour>\w+) )?(?P<name>\w+) (?P<motion>moves \w+|grows|shrinks|turns)$"
)


@dataclass(frozen=True)
class Moving:
    """A thing and what it does in every step: ``pixels`` on, or larger, or a quarter turn."""

    item: Item
    motion: str
    pixels: int

    def at(self, frame: int) -> Item:
        """The thing in a frame."""
        if self.motion in _STEPS:
            dx, dy = _STEPS[self.motion]
            return replace(
                self.item,
                x=self.item.x + dx * self.pixels * frame,
                y=self.item.y + dy * self.pixels * frame,
            )
        if self.motion == "turn":
            return replace(self.item, turn=(self.item.turn + frame) % 4)
        more = self.pixels * frame * (1 if self.motion == "grow" else -1)
        return replace(
            self.item,
            x=self.item.x - more // 2,
            y=self.item.y - more // 2,
            size=self.item.size + more,
        )


def _moving(draft: Draft, kind: Kind, frames: int, motion: str) -> Moving:
    maker, rng = draft.maker, draft.rng
    base = maker.base
    side = maker.length(crowd=3) if motion != "shrink" else min(44 * base // 64, *maker.size)
    if motion in _STEPS:
        step = maker.level.lattice or rng.randint(5 * base // 64, 12 * base // 64)
    else:
        step = {"grow": 3, "shrink": 3, "turn": 0}[motion] * base // 64 * 2
    if motion == "grow":
        side = 20 * base // 64
    x, y = maker.spot((side, side), [])
    moving = Moving(Item(*kind, x, y, side), motion, step)
    ends = (moving.at(0), moving.at(frames - 1))
    height, width = maker.size
    if any(i.x < 0 or i.y < 0 or i.x + i.size > width or i.y + i.size > height for i in ends):
        raise Reject
    return moving


def _film(draft: Draft, frames: int) -> tuple[list[Moving], list[Canvas]]:
    """What moves, and the frames; nothing meets anything else on its way."""
    maker, rng = draft.maker, draft.rng
    kinds = maker.distinct(1 if rng.random() < 0.6 else 2, "countable")
    movers: list[Moving] = []
    for kind in kinds:
        motion = rng.choice(tuple(MOTIONS))
        if motion == "turn" and kind[0] in ALIKE_TURNED:
            raise Reject
        for _ in range(20):
            try:
                movers.append(_moving(draft, kind, frames, motion))
                break
            except Reject:
                continue
        else:
            raise Reject
    still = []
    if len(movers) == 1 and rng.random() < 0.4:
        still = [maker.item(maker.kind("countable", [kinds[0][0]]), maker.length(crowd=3))]
    shots = [[*(mover.at(k) for mover in movers), *still] for k in range(frames)]
    swept = [_union([mover.at(k) for k in range(frames)]) for mover in movers] + [item.box for item in still]
    if any(not apart(a, b) for k, a in enumerate(swept) for b in swept[k + 1 :]):
        raise Reject
    ground = maker.canvas(shots[0], plain=True)
    return movers, [replace(ground, items=tuple(shot)) for shot in shots]


def _union(items: Sequence[Item]) -> tuple[int, int, int, int]:
    return (
        min(i.y for i in items),
        min(i.x for i in items),
        max(i.y + i.size for i in items),
        max(i.x + i.size for i in items),
    )


def motion_words(movers: Sequence[Moving]) -> str:
    """What moves, in words: "a dog moves right and a red car turns"."""
    ordered = sorted(movers, key=lambda mover: mover.item.name)
    return " and ".join(f"{phrase(mover.item.kind)} {MOTIONS[mover.motion]}" for mover in ordered)


def read_motion(text: str) -> tuple[tuple[str, str | None, str], ...] | None:
    """(name, colour, what it does) of every thing that moves, sorted; None when it cannot be read."""
    found = []
    for part in text.strip().rstrip(".").split(" and "):
        match = _MOVING.match(part)
        if match is None or match["motion"] not in MOTIONS.values():
            return None
        found.append((match["name"], match["colour"], match["motion"]))
    return tuple(sorted(found, key=lambda entry: (entry[0], entry[1] or "")))


_VIDEO = (
    "a video in which {what}, {n} frames", "make a short film: {what}. {n} frames", "{n} frames in which {what}",
    "animate this in {n} frames: {what}",
)  # fmt: skip
_NEXT = (
    "what comes next?",
    "draw the next frame",
    "continue the video",
    "the next picture, please",
    "how does it go on?",
)
_HAPPENS = (
    "what happens in this video?",
    "what moves, and how?",
    "describe the motion",
    "what is going on here?",
)


def video_draw(draft: Draft) -> Episode:
    """Three to five frames of things that move, from words."""
    frames = 3 + draft.index % 3
    movers, shots = _film(draft, frames)
    what = motion_words(movers)
    for item in shots[0].items[len(movers) :]:
        what += f" beside {phrase(item.kind)}"
    if draft.rng.random() < 0.75:
        what += f" before {article(shots[0].background)} background"
    request = draft.pick(_VIDEO).format(what=what, n=NUMBERS[frames])
    return Episode("", (draft.person(request), *(draws(shot) for shot in shots)), Truth("video"))


def video_next(draft: Draft) -> Episode:
    """Two to four frames are shown; the next one is drawn."""
    frames = 3 + draft.index % 3
    _, shots = _film(draft, frames)
    asked = draft.person(draft.pick(_NEXT))
    parts = (*(shows(shot) for shot in shots[:-1]), asked, draws(shots[-1]))
    return Episode("", parts, Truth("next_frame"))


def video_caption(draft: Draft) -> Episode:
    """Frames are shown; what moves is told."""
    frames = 2 + draft.index % 3
    movers, shots = _film(draft, frames)
    words = motion_words(movers)
    asked = draft.person(draft.pick(_HAPPENS))
    truth = Truth("motion", (Answer(words, "motion"),))
    return Episode("", (*(shows(shot) for shot in shots), asked, tells(words)), truth)
