"""Tasks that change a picture: EditCanvas's taxonomy, subjects taken out and placed anew, and changes learnt from
examples.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from nextflow_ar.data.playground.canvases import Canvas, Item, Kind, Word, place_words, size_word, stands
from nextflow_ar.data.playground.edits import (
    EDITS,
    Edit,
    apply,
    propose,
    region,
    singles,
    visible,
)
from nextflow_ar.data.playground.episodes import Draft, Episode, Part, Said, Truth, draws, shows
from nextflow_ar.data.playground.maker import Maker, Reject
from nextflow_ar.data.playground.saying import (
    loosely,
    phrase,
    polite,
    somewhere,
    the,
    towards,
)
from nextflow_ar.data.playground.scenes import RELATIONS
from nextflow_ar.data.playground.words import NUMBERS
from nextflow_ar.data.playground.world import ALIKE_FLAT, LIGHTS, MOODS, NATIVE, UNCOUNTED

_SAY: dict[str, tuple[str, ...]] = {
    "add": ("add {new} {place}", "put {new} {place}", "insert {new} {place}", "place {new} {place}", "{place}, add {new}"),
    "remove": ("remove {old}", "take away {old}", "delete {old}", "erase {old}", "get rid of {old}", "{old} should go"),
    "replace": (
        "replace {old} with {new}", "swap {old} for {new}", "turn {old} into {new}", "make {old} into {new}",
        "instead of {old}, i want {new}", "change {old} into {new}",
    ),
    "colour": ("make {old} {new}", "colour {old} {new}", "change the colour of {old} to {new}", "paint {old} {new}"),
    "larger": ("make {old} larger", "enlarge {old}", "make {old} bigger", "{old} should be bigger", "scale up {old}"),
    "smaller": ("make {old} smaller", "shrink {old}", "{old} should be smaller", "scale down {old}"),
    "move": ("move {old} {place}", "{old} should go {place}", "bring {old} {place}", "shift {old} {place}"),
    "rotate": ("turn {old} {how}", "rotate {old} {how}", "{old} should be turned {how}"),
    "background": (
        "make the background {new}", "change the background to {new}", "{new} background instead",
        "replace the background with {new}", "i want {a} background", "put everything on {a} background",
    ),
    "light_none": ("remove the light", "switch off the lamp", "even lighting again"),
    "mood_none": ("back to normal colours", "remove the mood", "normal colours again"),
    "word_add": (
        'write "{new}" {place}', 'add the word "{new}" {place}', 'put the text "{new}" {place}', '{place}, write "{new}"',
    ),
    "word_replace": (
        'change the word "{old}" to "{new}"', 'replace "{old}" with "{new}"', 'it should say "{new}"',
        'write "{new}" instead',
    ),
    "word_remove": ("remove the word", "take away the text", 'erase "{old}"', "delete the writing", "no text"),
    "zoom_in": ("zoom in on {old}", "a close-up of {old}", "show me {old} from nearer", "go closer to {old}"),
    "zoom_out": ("zoom out", "show it from further away", "step back", "a wider view"),
    "view_rotate": ("rotate the whole picture {how}", "turn the image {how}", "turn the whole picture {how}"),
}  # fmt: skip
_HOW = {
    "left": ("a quarter turn to the left", "90 degrees counterclockwise", "by 90 degrees to the left"),
    "right": ("a quarter turn to the right", "90 degrees clockwise", "by 90 degrees to the right"),
    "upside down": ("upside down", "by 180 degrees", "a half turn"),
}
_STYLES = {
    "line": ("make it a line drawing", "turn this into a line drawing", "only the outlines", "redraw it as a line drawing"),
    "silhouette": ("make it a silhouette", "only flat silhouettes", "turn everything into silhouettes", "as shadow shapes"),
    "full": ("make it full colour", "colour it in", "give it natural colours", "turn this into a full colour picture"),
}  # fmt: skip
_MOODS = {
    "warm": ("make the colours warm", "warm tones", "give it a warm mood"),
    "cold": ("make the colours cold", "cold tones", "give it a cold mood"),
    "dark": ("make it dark", "much darker", "make it look like night"),
    "bright": ("make it pale and bright", "much brighter", "wash it out with light"),
    "gray": ("make it black and white", "take out all colour", "shades of gray only"),
}
_LIGHTS = {
    "left": ("add light from the left", "light it from the left"),
    "right": ("add light from the right", "light it from the right"),
    "above": ("add light from above", "light it from above"),
    "below": ("add light from below", "light it from below"),
    "middle": ("put a spotlight in the middle", "add a spotlight in the middle"),
}


def instruction(rng: random.Random, edit: Edit, before: Canvas) -> str:
    """The edit as people would ask for it, politeness aside."""
    kind = edit.kind
    if kind == "style":
        return rng.choice(_STYLES[str(edit.new)])
    if kind == "mood" and edit.new != "none":
        return rng.choice(_MOODS[str(edit.new)])
    if kind == "light" and edit.new != "none":
        return rng.choice(_LIGHTS[str(edit.new)])
    key = f"{kind}_none" if edit.new == "none" else edit.how if kind == "size" else kind
    words = {"old": "", "new": str(edit.new), "place": "", "how": "", "a": ""}
    if edit.target is not None:
        words["old"] = _old(rng, edit, before)
    if kind in ("word_replace", "word_remove"):
        words["old"] = before.word.text if before.word else ""
    if kind == "word_add" and isinstance(edit.new, Word):
        words["new"] = edit.new.text
    if kind == "background":
        words["a"] = phrase(("background", str(edit.new))).removesuffix(" background")
    if kind in ("add", "move", "word_add"):
        words["place"] = (towards if kind == "move" else somewhere)(rng, edit.how)
    if kind == "add" and isinstance(edit.new, Item):
        words["new"] = loosely(rng, edit.new.kind, size=size_word(edit.new, before.base))
    if kind == "replace" and isinstance(edit.new, tuple):
        words["new"] = loosely(rng, edit.new)
    if kind in ("rotate", "view_rotate"):
        words["how"] = rng.choice(_HOW[edit.how])
    return rng.choice(_SAY[key]).format(**words)


def _old(rng: random.Random, edit: Edit, before: Canvas) -> str:
    assert edit.target is not None
    name, colour = edit.target
    several = sum(item.kind == edit.target for item in before.items)
    if several > 1:
        mixed = before.count(name) > several
        words = phrase(edit.target, several, colour=mixed and bool(colour)).split(" ", 1)[1]
        return f"{rng.choice(('the', 'all the'))} {words}" if not mixed else f"the {words}"
    if colour and rng.random() < 0.3:
        return f"the {colour} {name}"
    return the(edit.target, before)


def edited(maker: Maker, kind: str, before: Canvas) -> tuple[Edit, Canvas]:
    """An edit of a kind and its outcome. Raises Reject where the kind does not fit the canvas."""
    edit = propose(kind, before, maker)
    return edit, apply(edit, before, maker)


def source(draft: Draft, kind: str) -> Canvas:
    """A picture to which this kind of edit can happen."""
    maker, rng = draft.maker, draft.rng
    crowd = {"remove": (2, 3), "zoom_in": (1, 2), "zoom_out": (1, 2), "style": (1, 2), "rotate": (1, 2)}
    least, most = crowd.get(kind, (1, 3))
    lone = ("zoom_in", "zoom_out", "rotate", "size", "word_add")
    canvas = maker.party(least, most, doubles=0.0 if kind in lone else 0.2)
    if kind in ("word_replace", "word_remove"):
        canvas = maker.word(canvas)
    elif kind == "style":
        canvas = _styled(draft, canvas)
    elif kind in ("mood", "light") and rng.random() < 0.2:
        canvas = apply(propose(kind, canvas, maker), canvas, maker)
    return canvas


def _styled(draft: Draft, canvas: Canvas) -> Canvas:
    """Two in three start in full colour; a line drawing has the natural colours to go back to, so nothing else is
    shown in it.
    """
    if draft.rng.random() < 0.67:
        return canvas
    if any(item.colour and NATIVE.get(item.name) != item.colour for item in canvas.items):
        raise Reject
    if canvas.background != "white":
        canvas = replace(canvas, background="white", tint=(0, 0, 0))
    canvas = replace(canvas, style="line")
    if not visible(replace(canvas, style="full")):
        raise Reject
    return canvas


def edit_task(kind: str) -> Callable[[Draft], Episode]:
    """The task that makes edits of one kind."""
    assert kind in EDITS

    def build(draft: Draft) -> Episode:
        before = source(draft, kind)
        edit, after = edited(draft.maker, kind, before)
        words = polite(draft.rng, instruction(draft.rng, edit, before))
        truth = Truth(kind, region=region(edit, before, after))
        return Episode("", (shows(before), draft.person(words), draws(after)), truth)

    build.__doc__ = f"Source, instruction, target: an edit of the kind {kind!r}."
    return build


# --- subjects ------------------------------------------------------------------------------------------------------


def _centred(canvas: Canvas, item: Item, side: int) -> Item:
    return replace(item, x=(canvas.width - side) // 2, y=(canvas.height - side) // 2, size=side, turn=0)


def _subject(draft: Draft, least: int) -> tuple[Canvas, Item]:
    before = draft.maker.party(least, 3, doubles=0.0)
    found = [item for item in singles(before) if item.name not in UNCOUNTED]
    if not found:
        raise Reject
    return before, draft.rng.choice(found)


_EXTRACT = (
    "extract {} on a white background", "cut out {} onto white", "only {} on white",
    "isolate {} on a white background",
)  # fmt: skip
_PLACE = (
    "put {} {} on {} background", "place {} {}, {} background", "show {} {} before {} background",
)  # fmt: skip
_THREE = (
    "make it three",
    "show three of them",
    "three of these",
    "draw {} three times",
    "i want three of {}",
)


def subject_extract(draft: Draft) -> Episode:
    """One thing of a picture alone, large, in the middle, on white."""
    before, item = _subject(draft, 2)
    side = min(44 * draft.maker.base // 64, *before.size)
    after = Canvas(*before.size, "white", (_centred(before, item, side),))
    if not visible(after):
        raise Reject
    words = polite(draft.rng, draft.pick(_EXTRACT).format(the(item, before)))
    return Episode("", (shows(before), draft.person(words), draws(after)), Truth("extract"))


def subject_place(draft: Draft) -> Episode:
    """The thing of a picture in a scene of its own: where, beside what, before which background. Its colour is not said."""
    maker, rng = draft.maker, draft.rng
    first, item = _subject(draft, 1)
    items, beside = [maker.item(item.kind, maker.length())], ""
    if rng.random() < 0.6:
        other = maker.kind(avoid=[item.name])
        items, relation = _related(maker, [item.kind, other])
        beside = f"{relation} {loosely(rng, other)}"
    new = items[0]
    after = maker.canvas(items, plain=True)
    a = phrase(("background", after.background)).removesuffix(" background")
    where = beside or somewhere(rng, place_words(new.box, after.size))
    words = polite(rng, rng.choice(_PLACE).format(f"this {item.name}", where, a))
    return Episode("", (shows(first), draft.person(words), draws(after)), Truth("place"))


def _related(maker: Maker, kinds: list[Kind]) -> tuple[list[Item], str]:
    """Two items, and how the first stands to the second."""
    for _ in range(20):
        items = maker.items(kinds)
        for relation in RELATIONS:
            if stands(relation, *items):
                return items, relation
    raise Reject


def subject_three(draft: Draft) -> Episode:
    """A picture of one thing; three of the same before the same background."""
    maker = draft.maker
    kind = maker.kind("countable")
    before = maker.canvas(maker.items([kind]), plain=True)
    number = draft.rng.choice((3, 3, 3, 2, 4))
    after = replace(before, items=tuple(maker.items([kind] * number)))
    words = draft.pick(_THREE).format("it", "it").replace("three", NUMBERS[number])
    return Episode(
        "", (shows(before), draft.person(polite(draft.rng, words)), draws(after)), Truth("quantity")
    )


# --- changes learnt from examples ------------------------------------------------------------------------------------

_RULES = (
    "background",
    "mood",
    "light",
    "style",
    "view_rotate",
    "zoom_out",
    "add",
    "replace",
    "colour",
    "remove",
)
_LIKE_THIS = (
    "now this one",
    "do the same here",
    "and this?",
    "same change for this picture",
    "continue",
    "your turn",
)


def in_context(draft: Draft) -> Episode:
    """One or two example pairs that nobody explains, then a picture to change in the same way."""
    maker, rng = draft.maker, draft.rng
    kind = _RULES[draft.index % len(_RULES)]
    pairs = rng.choice((2, 3))
    edit: Edit | None = None
    parts: list[Part] = []
    before = after = None
    for number in range(pairs):
        before = _for_rule(draft, kind, edit)
        edit = edit or _rule(maker, kind, before)
        after = apply(edit, before, maker)
        last = number == pairs - 1
        parts.append(shows(before))
        if last:
            parts.append(draft.person(rng.choice(_LIKE_THIS)))
            parts.append(draws(after))
        else:
            parts += [Said("->", "user", False), shows(after)]
    assert edit is not None and before is not None and after is not None
    return Episode("", tuple(parts), Truth(kind, region=region(edit, before, after)))


def _rule(maker: Maker, kind: str, canvas: Canvas) -> Edit:
    edit = propose(kind, canvas, maker)
    if kind in ("mood", "light") and edit.new not in (*MOODS, *LIGHTS):
        raise Reject
    if kind == "style" and edit.new == "full":
        raise Reject
    return edit


def _for_rule(draft: Draft, kind: str, edit: Edit | None) -> Canvas:
    """A picture that the rule can be applied to: it holds the rule's thing where there is one."""
    maker = draft.maker
    if edit is None or edit.target is None:
        canvas = maker.party(2 if kind == "remove" else 1, 2, doubles=0.0)
        flat = edit is not None and edit.new == "silhouette"
        if flat and all(item.name in ALIKE_FLAT for item in canvas.items):
            raise Reject
        return canvas
    others = maker.distinct(1 if kind == "remove" or draft.rng.random() < 0.5 else 0)
    if any(name == edit.target[0] for name, _ in others):
        raise Reject
    canvas = maker.canvas(maker.items([edit.target, *others]), plain=True)
    return canvas
