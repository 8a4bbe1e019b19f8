"""Tasks that draw from words: GenEval's six types, sizes, places, written words, styles, moods, lights."""

from __future__ import annotations

from dataclasses import replace

from nextflow_ar.data.playground.canvases import Canvas, place_words
from nextflow_ar.data.playground.episodes import Draft, Episode, Truth, draws
from nextflow_ar.data.playground.looks import stands_out
from nextflow_ar.data.playground.maker import Reject
from nextflow_ar.data.playground.saying import (
    asked_to_draw,
    grounded,
    listed,
    loosely,
    somewhere,
    things_asked,
)
from nextflow_ar.data.playground.scenes import TASKS, Task
from nextflow_ar.data.playground.world import LIGHTS, MOODS, Light, Mood, Size, Style


def _episode(draft: Draft, words: str, canvas: Canvas, kind: str) -> Episode:
    return Episode("", (draft.person(asked_to_draw(draft.rng, words)), draws(canvas)), Truth(kind))


def scene_asked(draft: Draft, task: Task | None = None) -> tuple[str, Canvas, str]:
    """(words, canvas, type) of one of GenEval's six types, in turn or ``task``; three in four name the background."""
    task, canvas = draft.maker.scene(task or TASKS[draft.index % len(TASKS)])
    words, canvas = things_asked(draft.rng, canvas, bare=task == "single_object")
    if draft.rng.random() < 0.75:
        words = grounded(draft.rng, canvas, words)
    return words, canvas, task


def draw_scene(draft: Draft) -> Episode:
    """One of GenEval's six types."""
    return _episode(draft, *scene_asked(draft))


def relation(draft: Draft) -> Episode:
    """Two things in a relation: one of GenEval's types, by itself for training only."""
    return _episode(draft, *scene_asked(draft, "position"))


def draw_sizes(draft: Draft) -> Episode:
    """One thing small or large, or two of different sizes."""
    maker, rng = draft.maker, draft.rng
    sizes: list[Size] = ["small", "large"]
    rng.shuffle(sizes)
    if rng.random() < 0.4:
        sizes = sizes[:1]
    canvas = maker.canvas(maker.items(maker.distinct(len(sizes)), sizes))
    words, _ = things_asked(rng, canvas)
    return _episode(draft, grounded(rng, canvas, words), canvas, "size")


def draw_places(draft: Draft) -> Episode:
    """One to three things, each at a place that is named."""
    maker, rng = draft.maker, draft.rng
    canvas = maker.party(1, 3, doubles=0.0, plain=False)
    words = [
        f"{loosely(rng, item.kind)} {somewhere(rng, place_words(item.box, canvas.size))}"
        for item in canvas.items
    ]
    text = listed(rng, words) if len(words) < 2 else ", ".join(words[:-1]) + " and " + words[-1]
    return _episode(draft, grounded(rng, canvas, text), canvas, "place")


def crowd(draft: Draft) -> Episode:
    """Three things or more of all sizes, now and then in a style, a mood or a light.

    For training only, no line of the benchmark: a picture costs as many tokens with four things in it as with one, and
    shows four times as much of what things look like.
    """
    maker, rng = draft.maker, draft.rng
    canvas = maker.canvas(maker.crowd(3, rng.randint(4, 7)))
    how, chance = "", rng.random()
    if chance < 0.3:
        style: Style = "line" if chance < 0.18 else "silhouette"
        canvas = maker.style(canvas, style)
    elif chance < 0.4:
        mood = rng.choice(MOODS)
        canvas, how = replace(canvas, mood=mood), ", " + rng.choice(MOOD_ASKED[mood])
    elif chance < 0.5:
        light = rng.choice(LIGHTS)
        canvas, how = replace(canvas, light=light), ", " + rng.choice(LIGHT_ASKED[light])
    if not mood_shows(canvas):
        raise Reject
    if canvas.style != "full":
        words = STYLE_ASKED[canvas.style][0].format(
            listed(rng, [loosely(rng, (name, None), n) for name, n in _names(canvas)])
        )
    else:
        words = listed(rng, [loosely(rng, kind, count) for kind, count in canvas.counts])
    if canvas.style != "line" and canvas.mood != "gray":
        words = grounded(rng, canvas, words)
    return _episode(draft, words + how, canvas, "crowd")


_WRITTEN = (
    'the word "{word}"', 'the word "{word}" in {colour}', 'the text "{word}"', 'a sign that says "{word}"',
    '"{word}" in {colour} letters', 'the word "{word}" {place}',
)  # fmt: skip


def draw_word(draft: Draft) -> Episode:
    """A written word, alone or beside a thing."""
    maker, rng = draft.maker, draft.rng
    items = [maker.item(maker.kind(), maker.length())] if rng.random() < 0.6 else []
    canvas = maker.word(maker.canvas(items))
    word = canvas.word
    assert word is not None
    place = somewhere(rng, place_words(word.box, canvas.size))
    said = rng.choice(_WRITTEN).format(word=word.text, colour=word.colour, place=place)
    if items:
        things, _ = things_asked(rng, canvas)
        said = f"{things} {rng.choice(('and', 'with', 'next to'))} {said}"
    return _episode(draft, grounded(rng, canvas, said), canvas, "word")


STYLE_ASKED: dict[Style, tuple[str, ...]] = {
    "line": ("a line drawing of {}", "an outline of {}", "a black and white line drawing of {}", "{} as a line drawing"),
    "silhouette": ("a silhouette of {}", "the flat silhouette of {}", "{} as a silhouette", "the shadow shape of {}"),
    "full": ("a full colour picture of {}", "{} in full colour"),
}  # fmt: skip
MOOD_ASKED: dict[Mood, tuple[str, ...]] = {
    "warm": ("in warm colours", "with a warm mood", "in warm tones", "as on a warm evening"),
    "cold": ("in cold colours", "with a cold mood", "in cold tones", "as on an icy morning"),
    "dark": ("very dark", "in the dark", "with hardly any light", "as if it were night"),
    "bright": ("pale and bright", "in pale bright colours", "overexposed", "as if washed out by light"),
    "gray": ("in black and white", "without any colour", "as a black and white photo", "in shades of gray"),
}  # fmt: skip
LIGHT_ASKED: dict[Light, tuple[str, ...]] = {
    "left": ("lit from the left", "with light from the left", "with a lamp on the left"),
    "right": ("lit from the right", "with light from the right", "with a lamp on the right"),
    "above": ("lit from above", "with light from above", "with a lamp at the top"),
    "below": ("lit from below", "with light from below", "with a lamp at the bottom"),
    "middle": ("with a spotlight in the middle", "lit only in the middle", "in a spotlight"),
}  # fmt: skip


def draw_style(draft: Draft) -> Episode:
    """Line drawings and silhouettes."""
    maker, rng = draft.maker, draft.rng
    style: Style = ("line", "silhouette")[draft.index % 2]
    canvas = maker.style(maker.party(1, 2, doubles=0.2), style)
    things = listed(rng, [loosely(rng, (name, None), n) for name, n in _names(canvas)])
    words = rng.choice(STYLE_ASKED[style]).format(things)
    if style == "silhouette":
        words = grounded(rng, canvas, words)
    return _episode(draft, words, canvas, style)


def _names(canvas: Canvas) -> list[tuple[str, int]]:
    return [(name, canvas.count(name)) for name in dict.fromkeys(item.name for item in canvas.items)]


def draw_mood(draft: Draft) -> Episode:
    """A picture in a mood or a light."""
    maker, rng = draft.maker, draft.rng
    _, canvas = maker.scene(rng.choice(TASKS), plain=True)
    if draft.index % 2:
        mood = rng.choice(MOODS)
        canvas, how, kind = replace(canvas, mood=mood), rng.choice(MOOD_ASKED[mood]), mood
    else:
        light = rng.choice(LIGHTS)
        canvas, how, kind = replace(canvas, light=light), rng.choice(LIGHT_ASKED[light]), light
    if not mood_shows(canvas):
        raise Reject
    words, canvas = things_asked(rng, canvas, bare=canvas.mood == "gray")
    words = words if canvas.mood == "gray" else grounded(rng, canvas, words)
    return _episode(draft, f"{words}, {how}", canvas, kind)


def mood_shows(canvas: Canvas) -> bool:
    """Whether the background lets the mood and the light be seen: darkness needs brightness to take away, and so on."""
    dull = {"black"} if canvas.light or canvas.mood == "dark" else set()
    dull |= {"orange"} if canvas.mood == "dark" else set()  # which would look brown
    dull |= {"white", "red"} if canvas.mood == "bright" else set()
    if canvas.mood == "gray":
        dull |= {"black", "white"}
        if any(i.colour and not stands_out(i.colour, canvas.background, 50) for i in canvas.items):
            return False
    if canvas.mood == "warm":
        dull |= {"orange", "brown", "red", "yellow", "blue"}
    if canvas.mood == "cold":
        dull |= {"blue", "purple", "yellow", "orange"}
    return canvas.background not in dull
