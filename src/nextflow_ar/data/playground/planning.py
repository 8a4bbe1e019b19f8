"""Plans in words for episodes that have none: the assistant lays out every picture before it draws it.

A plan has the form of ``full_caption`` and says how things are turned; that of a film's frame says in numbers where its
things stand and how wide they are, since frames differ by less than a place has a word for.
"""

from __future__ import annotations

import random
from dataclasses import replace

from nextflow_ar.data.playground.canvases import Canvas, Item
from nextflow_ar.data.playground.episodes import Answer, Episode, Part, Said, Shown, tells
from nextflow_ar.data.playground.saying import full_caption, phrase, turned_words

FILMS: tuple[str, ...] = ("video_draw", "video_next")
"""Tasks whose plans are in numbers."""
TALKS: tuple[str, ...] = ("chat", "plain")
"""Tasks of several turns: what the assistant planned in an earlier turn is not shown to it again."""
TOLD: tuple[str, ...] = ("story", "recipe", *FILMS, *TALKS)
"""Tasks whose pictures :func:`planned_throughout` lays out."""

_GRID = 4  # pixels of a base of 64 to a number of a film's plan


def plan_of(canvas: Canvas) -> str:
    """The plan of a canvas: "plan: a dog above left, a red car right turned left, blue background"."""
    return f"plan: {full_caption(canvas, plan=True)}"


def frame_plan(canvas: Canvas) -> str:
    """The plan of a film's frame: "plan: a dog 4 8 size 28, a red car 12 4 size 24 turned left, blue background".

    Two numbers are the middle of a thing, across and down, in sixteenths of the base.
    """
    unit = _GRID * canvas.base / 64
    return "plan: " + ", ".join([*(_framed(item, unit, canvas) for item in canvas.items), _ground(canvas)])


def _framed(item: Item, unit: float, canvas: Canvas) -> str:
    across, down = (round(value / unit) for value in item.centre)
    size = round(item.size * 64 / canvas.base)
    return f"{phrase(item.kind)} {across} {down} size {size}{turned_words(item)}"


def _ground(canvas: Canvas) -> str:
    return f"{canvas.background} background"


def with_plan(found: Episode) -> Episode:
    """An episode whose last part is the one picture that is drawn, laid out in words first."""
    *before, drawn = found.parts
    assert isinstance(drawn, Shown)
    plan = plan_of(drawn.canvas)
    truth = replace(found.truth, answers=(*found.truth.answers, Answer(plan, "plan")))
    return replace(found, parts=(*before, tells(plan), drawn), truth=truth)


def planned_throughout(found: Episode, rng: random.Random, drawn: float = 1.0) -> Episode:
    """An episode of :data:`TOLD` with a plan before every picture that is drawn, behind what is said there.

    ``drawn``: share of these pictures that stay to be learnt, at least one of them; the others are only seen, which costs
    a closing block each. Of a conversation one picture stays, those before it were drawn without a plan (a plan is not
    part of what was said) and what comes behind the next one is left out. ``truth`` is that of the episode without plans.
    """
    places = [k for k, part in enumerate(found.parts) if isinstance(part, Shown) and part.supervised]
    if not places:
        return found
    if found.task in TALKS:
        return _talked(found, places, rng.choice(places))
    kept = {rng.choice(places), *(k for k in places if rng.random() < drawn)}
    parts: list[Part] = []
    for k, part in enumerate(found.parts):
        if isinstance(part, Shown) and part.supervised:
            _lay_out(parts, part, found.task in FILMS)
            part = replace(part, supervised=k in kept)
        parts.append(part)
    return replace(found, parts=tuple(parts))


def _talked(found: Episode, places: list[int], chosen: int) -> Episode:
    """One picture of a conversation is planned and drawn; those before it are there."""
    end = next((k for k in places if k > chosen), len(found.parts))
    if end < len(found.parts):
        while end > chosen + 1 and not found.parts[end - 1].supervised:  # the request for the next one
            end -= 1
    parts: list[Part] = []
    for k, part in enumerate(found.parts[:end]):
        if k == chosen:
            assert isinstance(part, Shown)
            _lay_out(parts, part, film=False)
        parts.append(replace(part, supervised=False) if k in places and k < chosen else part)
    return replace(found, parts=tuple(parts))


def _lay_out(parts: list[Part], drawn: Shown, film: bool) -> None:
    """Put the plan of a picture behind what was said just before it."""
    plan = frame_plan(drawn.canvas) if film else plan_of(drawn.canvas)
    said = parts[-1] if parts else None
    if isinstance(said, Said) and said.supervised:
        parts.pop()
        plan = f"{said.text} {plan}"
    parts.append(tells(plan))
