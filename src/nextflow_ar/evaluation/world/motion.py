"""Moving pictures: whether the right things move in the right way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from nextflow_ar.data.playground.canvases import Canvas, Item
from nextflow_ar.evaluation.world.verdict import SeenThing, Verdict
from nextflow_ar.evaluation.world.wanted import Checks

_SHARE = 0.5
"""Of the way, or of the growth, that has to be seen at least."""
_STRAY = 0.12
"""Of the base: how far a thing may leave its line, or a still thing its place."""
_SIZE = 1.25
"""How much larger or smaller a thing may be that does not change its size."""
_SAME = 0.11
"""Of the base: how far a thing of the next frame may be from where it belongs."""


def motion_of(frames: Sequence[Item]) -> str:
    """What an item does over its frames: "right", "left", "up", "down", "grow", "shrink", "turn" or "still"."""
    first, second, last = frames[0], frames[1], frames[-1]
    if first.turn != second.turn:
        return "turn"
    if first.size != last.size:
        return "grow" if last.size > first.size else "shrink"
    dx, dy = last.x - first.x, last.y - first.y
    if not dx and not dy:
        return "still"
    return ("right" if dx > 0 else "left") if dx else ("down" if dy > 0 else "up")


def _moves(motion: str, wanted: Sequence[Item], seen: Sequence[SeenThing], base: int) -> bool:
    xs, ys, sizes = [s.x for s in seen], [s.y for s in seen], [s.size for s in seen]
    grown = sizes[-1] / sizes[0]
    if motion == "turn":
        return all((b.turn - a.turn) % 4 == 1 for a, b in pairwise(seen))
    if motion in ("grow", "shrink"):
        ratio = wanted[-1].size / wanted[0].size
        return grown >= 1 + _SHARE * (ratio - 1) if motion == "grow" else grown <= 1 - _SHARE * (1 - ratio)
    if not 1 / _SIZE <= grown <= _SIZE:
        return False
    if motion == "still":
        return max(max(xs) - min(xs), max(ys) - min(ys)) <= _STRAY * base
    along, across = (xs, ys) if motion in ("left", "right") else (ys, xs)
    sign = 1 if motion in ("right", "down") else -1
    first, last = wanted[0].centre, wanted[-1].centre
    way = abs(last[0] - first[0]) + abs(last[1] - first[1])
    steps = [sign * (b - a) for a, b in pairwise(along)]
    return sum(steps) >= _SHARE * way and min(steps) > 0 and max(across) - min(across) <= _STRAY * base


def film_checks(expected: Sequence[Canvas], seen: Sequence[Verdict], *, ground: bool) -> Checks:
    """Frames from words: as many as asked, the same right things in all of them, each moving (or not) as it was told.

    Where things begin is nobody's request. ``ground``: the background was named; one for all frames there has to be anyway.
    """
    if len(seen) != len(expected):
        return {"frames": False, "identity": False, "motion": False, "background": False}
    kinds = Counter(item.kind for item in expected[0].items)
    identity = all(Counter(thing.key for thing in frame.things) == kinds for frame in seen)
    motion = identity
    for number, item in enumerate(expected[0].items if identity else ()):
        wanted = [canvas.items[number] for canvas in expected]
        track = [next(thing for thing in frame.things if thing.key == item.kind) for frame in seen]
        motion = motion and _moves(motion_of(wanted), wanted, track, expected[0].base)
    grounds = {frame.background for frame in seen}
    named = not ground or grounds == {expected[0].background}
    return {"frames": True, "identity": identity, "motion": motion, "background": len(grounds) == 1 and named}


def frame_checks(before: Canvas, target: Canvas, seen: Verdict) -> Checks:
    """The next frame: the same things, each nearer to where (how large, how turned) it has to be than to where it was."""
    kinds = Counter(item.kind for item in target.items)
    identity = Counter(thing.key for thing in seen.things) == kinds
    motion = identity
    for old, new in zip(before.items, target.items, strict=True) if identity else ():
        thing = next(t for t in seen.things if t.key == new.kind)
        off = _off(thing, new)
        near = off <= _SAME * target.base
        if old.centre != new.centre:
            near = near and off < _off(thing, old)
        if old.size != new.size:
            near = near and abs(thing.size - new.size) < abs(thing.size - old.size)
        if old.turn != new.turn:
            near = near and thing.turn == new.turn
        motion = motion and near
    return {"identity": identity, "motion": motion, "background": seen.background == target.background}


def _off(thing: SeenThing, item: Item) -> float:
    return ((thing.x - item.centre[0]) ** 2 + (thing.y - item.centre[1]) ** 2) ** 0.5
