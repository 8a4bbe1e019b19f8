"""Changes of a canvas, after EditCanvas's taxonomy (paper section 4): each is a value that can be applied to any
canvas that it fits, so that an example pair and a new picture can share it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from nextflow_ar.data.playground.canvases import Box, Canvas, Item, Kind, Word, fits, place_words
from nextflow_ar.data.playground.drawing import mood_shows
from nextflow_ar.data.playground.looks import stands_out, word_box
from nextflow_ar.data.playground.maker import Maker, Reject
from nextflow_ar.data.playground.world import (
    ALIKE_FLAT,
    ALIKE_TURNED,
    LIGHTS,
    MOODS,
    STYLES,
    WRITTEN,
    Light,
    Mood,
    Style,
    colours_of,
    near_colours,
)

LOCAL: tuple[str, ...] = ("add", "remove", "replace", "colour", "size", "move", "rotate")
GLOBAL: tuple[str, ...] = ("background", "mood", "light", "style")
WRITING: tuple[str, ...] = ("word_add", "word_replace", "word_remove")
VIEW: tuple[str, ...] = ("zoom_in", "zoom_out", "view_rotate")
EDITS: tuple[str, ...] = (*LOCAL, *GLOBAL, *WRITING, *VIEW)


@dataclass(frozen=True)
class Edit:
    """One change. ``target``: the thing that it is about, if there is one; ``new``: the thing, item, colour, word,
    ... that comes, by the kind of edit; ``how``: "left", "larger", "upside down", ...
    """

    kind: str
    target: Kind | None = None
    new: Item | Word | Kind | str | None = None
    how: str = ""


def apply(edit: Edit, canvas: Canvas, maker: Maker) -> Canvas:
    """The canvas after the edit. Raises Reject where the edit does not fit it: no such thing, out of the canvas, hidden."""
    after = _APPLY[edit.kind](edit, canvas, maker)
    if _upright(after) == _upright(canvas) or not fits(after) or not visible(after):
        raise Reject
    return after


def _upright(canvas: Canvas) -> Canvas:
    """The canvas without turns that nobody would see."""
    items = tuple(replace(i, turn=0) if i.name in ALIKE_TURNED else i for i in canvas.items)
    return replace(canvas, items=items, relation=None)


def visible(canvas: Canvas) -> bool:
    """Whether nothing disappears into the background."""
    grounds = {canvas.background, canvas.second}
    seen = canvas.style != "full" or not any(near_colours(*i.kind) & grounds for i in canvas.items)
    word = canvas.word
    written = word is None or canvas.style == "line" or all(stands_out(word.colour, g) for g in grounds if g)
    return seen and written and (not (canvas.mood or canvas.light) or mood_shows(canvas))


def propose(kind: str, canvas: Canvas, maker: Maker) -> Edit:
    """An edit of a kind that fits the canvas. Raises Reject."""
    return _PROPOSE[kind](canvas, maker)


def region(edit: Edit, before: Canvas, after: Canvas) -> Box:
    """What the edit may change: the boxes of what came, went or changed; everything for a change of the whole picture."""
    if edit.kind in GLOBAL or edit.kind in VIEW:
        return before.box
    old, new = set(before.items), set(after.items)
    boxes = [item.box for item in old ^ new]
    if before.word != after.word:
        boxes += [word.box for word in (before.word, after.word) if word]
    tops, lefts, bottoms, rights = zip(*boxes, strict=True)
    return min(tops), min(lefts), max(bottoms), max(rights)


def only(canvas: Canvas, kind: Kind | None) -> Item:
    """The one item of this kind. Raises Reject when there is none, or more than one."""
    found = [item for item in canvas.items if item.kind == kind]
    if len(found) != 1:
        raise Reject
    return found[0]


def singles(canvas: Canvas) -> list[Item]:
    """Items that "the cat" or "the red cat" names without doubt."""
    kinds = [item.kind for item in canvas.items]
    named = [item for item in canvas.items if kinds.count(item.kind) == 1]
    return [i for i in named if i.colour or canvas.count(i.name) == 1]


def _one(canvas: Canvas, maker: Maker) -> Item:
    found = singles(canvas)
    if not found:
        raise Reject
    return maker.rng.choice(found)


def swap(canvas: Canvas, old: Item, new: Item | None) -> Canvas:
    """The canvas with one item replaced or taken away."""
    items = tuple(new if item == old else item for item in canvas.items)
    return replace(canvas, items=tuple(item for item in items if item is not None), relation=None)


# --- what each kind does -------------------------------------------------------------------------------------------


def _add(edit: Edit, canvas: Canvas, maker: Maker) -> Canvas:
    assert isinstance(edit.new, Item)
    return replace(canvas, items=(*canvas.items, edit.new), relation=None)


def _remove(edit: Edit, canvas: Canvas, maker: Maker) -> Canvas:
    left = tuple(item for item in canvas.items if item.kind != edit.target)
    return replace(canvas, items=left, relation=None)


def _replace(edit: Edit, canvas: Canvas, maker: Maker) -> Canvas:
    old = only(canvas, edit.target)
    assert isinstance(edit.new, tuple)
    return swap(canvas, old, replace(old, name=edit.new[0], colour=edit.new[1], turn=0))


def _colour(edit: Edit, canvas: Canvas, maker: Maker) -> Canvas:
    colour = str(edit.new)
    items = tuple(replace(i, colour=colour) if i.kind == edit.target else i for i in canvas.items)
    return replace(canvas, items=items, relation=None)


def _size(edit: Edit, canvas: Canvas, maker: Maker) -> Canvas:
    old = only(canvas, edit.target)
    side = round(old.size * (1.5 if edit.how == "larger" else 0.6) / 2) * 2
    y, x = old.y + (old.size - side) // 2, old.x + (old.size - side) // 2
    y, x = max(0, min(y, canvas.height - side)), max(0, min(x, canvas.width - side))
    if not maker.base * 0.25 <= side <= maker.base * 0.76:
        raise Reject
    return swap(canvas, old, replace(old, x=x, y=y, size=side))


def _move(edit: Edit, canvas: Canvas, maker: Maker) -> Canvas:
    old = only(canvas, edit.target)
    assert isinstance(edit.new, Item)
    return swap(canvas, old, edit.new)


_TURNS = {"left": 1, "upside down": 2, "right": 3}


def _rotate(edit: Edit, canvas: Canvas, maker: Maker) -> Canvas:
    old = only(canvas, edit.target)
    if old.name in ALIKE_TURNED:
        raise Reject
    return swap(canvas, old, replace(old, turn=(old.turn + _TURNS[edit.how]) % 4))


def _background(edit: Edit, canvas: Canvas, maker: Maker) -> Canvas:
    return replace(canvas, background=str(edit.new), second=None, tint=(0, 0, 0))


def _mood(edit: Edit, canvas: Canvas, maker: Maker) -> Canvas:
    mood: Mood | None = next((m for m in MOODS if m == edit.new), None)
    return replace(canvas, mood=mood)


def _light(edit: Edit, canvas: Canvas, maker: Maker) -> Canvas:
    light: Light | None = next((m for m in LIGHTS if m == edit.new), None)
    return replace(canvas, light=light)


def _style(edit: Edit, canvas: Canvas, maker: Maker) -> Canvas:
    style: Style = next(m for m in STYLES if m == edit.new)
    return replace(canvas, style=style)


def _word_add(edit: Edit, canvas: Canvas, maker: Maker) -> Canvas:
    if canvas.word is not None or not isinstance(edit.new, Word):
        raise Reject
    return replace(canvas, word=edit.new)


def _word_replace(edit: Edit, canvas: Canvas, maker: Maker) -> Canvas:
    old = canvas.word
    if old is None:
        raise Reject
    width, height = word_box(str(edit.new), old.font)
    x = max(0, min(old.x + (old.width - width) // 2, canvas.width - width))
    y = max(0, min(old.y + (old.height - height) // 2, canvas.height - height))
    return replace(canvas, word=replace(old, text=str(edit.new), x=x, y=y, width=width, height=height))


def _word_remove(edit: Edit, canvas: Canvas, maker: Maker) -> Canvas:
    return replace(canvas, word=None)


def _zoomed(canvas: Canvas, factor: float, centre: tuple[float, float]) -> Canvas:
    """Everything larger by ``factor`` around the middle, ``centre`` (x, y) moved there; what falls off the canvas is
    gone.
    """
    items = []
    for item in canvas.items:
        side = round(item.size * factor / 2) * 2
        x = round(canvas.width / 2 + (item.centre[0] - centre[0]) * factor - side / 2)
        y = round(canvas.height / 2 + (item.centre[1] - centre[1]) * factor - side / 2)
        if x >= canvas.width or y >= canvas.height or x + side <= 0 or y + side <= 0:
            continue
        items.append(replace(item, x=x, y=y, size=side))
    if not items or min(i.size for i in items) < 0.22 * canvas.base:
        raise Reject
    return replace(canvas, items=tuple(items), relation=None)


def _zoom_in(edit: Edit, canvas: Canvas, maker: Maker) -> Canvas:
    if canvas.word or canvas.second or canvas.light:
        raise Reject
    item = only(canvas, edit.target)
    if item.size > 0.6 * maker.base:
        raise Reject
    return _zoomed(canvas, 1.5 if min(canvas.size) >= maker.base else 1.3, item.centre)


def _zoom_out(edit: Edit, canvas: Canvas, maker: Maker) -> Canvas:
    if canvas.word or canvas.second or canvas.light:
        raise Reject
    return _zoomed(canvas, 0.6, (canvas.width / 2, canvas.height / 2))


def _view_rotate(edit: Edit, canvas: Canvas, maker: Maker) -> Canvas:
    turns = _TURNS[edit.how]
    height, width = canvas.size
    if canvas.word or canvas.second or canvas.light or (turns != 2 and height != width):
        raise Reject
    items = canvas.items
    for _ in range(turns):  # quarter turns counterclockwise: what was on the right is above
        items = tuple(replace(i, x=i.y, y=width - i.x - i.size, turn=(i.turn + 1) % 4) for i in items)
        height, width = width, height
    return replace(canvas, items=items, relation=None)


_APPLY: dict[str, Callable[[Edit, Canvas, Maker], Canvas]] = {
    "add": _add, "remove": _remove, "replace": _replace, "colour": _colour, "size": _size, "move": _move,
    "rotate": _rotate, "background": _background, "mood": _mood, "light": _light, "style": _style,
    "word_add": _word_add, "word_replace": _word_replace, "word_remove": _word_remove, "zoom_in": _zoom_in,
    "zoom_out": _zoom_out, "view_rotate": _view_rotate,
}  # fmt: skip


# --- what can be asked of a canvas -----------------------------------------------------------------------------------


def _propose_add(canvas: Canvas, maker: Maker) -> Edit:
    kind = maker.kind(avoid=[item.name for item in canvas.items])
    if canvas.items and near_colours(*kind) & {canvas.background, canvas.second}:
        raise Reject
    side = maker.length(crowd=len(canvas.items) + 1)
    item = maker.item(kind, side, canvas.items, word=canvas.word)
    return Edit("add", new=item, how=place_words(item.box, canvas.size))


def _propose_remove(canvas: Canvas, maker: Maker) -> Edit:
    if len({item.kind for item in canvas.items}) < 2:
        raise Reject
    return Edit("remove", maker.rng.choice(canvas.items).kind)


def _propose_replace(canvas: Canvas, maker: Maker) -> Edit:
    old = _one(canvas, maker)
    return Edit("replace", old.kind, maker.kind(avoid=[item.name for item in canvas.items]))


def _propose_colour(canvas: Canvas, maker: Maker) -> Edit:
    coloured = [item for item in canvas.items if item.colour]
    if not coloured:
        raise Reject
    item = maker.rng.choice(coloured)
    taken = {canvas.background, canvas.second, *(i.colour for i in canvas.items if i.name == item.name)}
    free = [colour for colour in colours_of(item.name) if colour not in taken]
    return Edit("colour", item.kind, maker.rng.choice(free))


def _propose_size(canvas: Canvas, maker: Maker) -> Edit:
    return Edit("size", _one(canvas, maker).kind, how=maker.rng.choice(("larger", "smaller")))


def _propose_move(canvas: Canvas, maker: Maker) -> Edit:
    old = _one(canvas, maker)
    around = [item for item in canvas.items if item != old]
    x, y = maker.spot(
        (old.size, old.size), [i.box for i in around] + ([canvas.word.box] if canvas.word else [])
    )
    new = replace(old, x=x, y=y)
    place = place_words(new.box, canvas.size)
    far = max(abs(x - old.x), abs(y - old.y)) >= 0.18 * maker.base
    if place == place_words(old.box, canvas.size) or not far:
        raise Reject
    return Edit("move", old.kind, new, place)


def _propose_rotate(canvas: Canvas, maker: Maker) -> Edit:
    return Edit("rotate", _one(canvas, maker).kind, how=maker.rng.choice(tuple(_TURNS)))


def _propose_background(canvas: Canvas, maker: Maker) -> Edit:
    return Edit("background", new=maker.background(canvas.items, (canvas.background, canvas.second)))


def _propose_mood(canvas: Canvas, maker: Maker) -> Edit:
    if canvas.mood is not None:
        return Edit("mood", new="none")
    return Edit("mood", new=maker.rng.choice(MOODS))


def _propose_light(canvas: Canvas, maker: Maker) -> Edit:
    if canvas.light is not None and maker.rng.random() < 0.5:
        return Edit("light", new="none")
    return Edit("light", new=maker.rng.choice([light for light in LIGHTS if light != canvas.light]))


def _propose_style(canvas: Canvas, maker: Maker) -> Edit:
    if canvas.second or canvas.mood or canvas.light:
        raise Reject
    style = maker.rng.choice([style for style in STYLES if style != canvas.style])
    if style == "silhouette" and all(item.name in ALIKE_FLAT for item in canvas.items):
        raise Reject
    return Edit("style", new=style)


def _propose_word_add(canvas: Canvas, maker: Maker) -> Edit:
    word = maker.word(canvas).word
    assert word is not None
    return Edit("word_add", new=word, how=place_words(word.box, canvas.size))


def _propose_word_replace(canvas: Canvas, maker: Maker) -> Edit:
    return Edit("word_replace", new=maker.rng.choice(WRITTEN))


def _propose_word_remove(canvas: Canvas, maker: Maker) -> Edit:
    if canvas.word is None or not canvas.items:
        raise Reject
    return Edit("word_remove")


_PROPOSE: dict[str, Callable[[Canvas, Maker], Edit]] = {
    "add": _propose_add, "remove": _propose_remove, "replace": _propose_replace, "colour": _propose_colour,
    "size": _propose_size, "move": _propose_move, "rotate": _propose_rotate, "background": _propose_background,
    "mood": _propose_mood, "light": _propose_light, "style": _propose_style, "word_add": _propose_word_add,
    "word_replace": _propose_word_replace, "word_remove": _propose_word_remove,
    "zoom_in": lambda canvas, maker: Edit("zoom_in", _one(canvas, maker).kind),
    "zoom_out": lambda canvas, maker: Edit("zoom_out"),
    "view_rotate": lambda canvas, maker: Edit("view_rotate", how=maker.rng.choice(tuple(_TURNS))),
}  # fmt: skip
