"""Tasks that read a picture: captions, yes or no in POPE's balanced form, counting, colour, place, multiple choice."""

from __future__ import annotations

from dataclasses import replace

from nextflow_ar.data.playground.canvases import PLACES, Canvas, Kind, combinations, place_words, stands
from nextflow_ar.data.playground.drawing import mood_shows
from nextflow_ar.data.playground.edits import singles
from nextflow_ar.data.playground.episodes import (
    Answer,
    AnswerKind,
    Draft,
    Episode,
    Said,
    Shown,
    Truth,
    shows,
    tells,
)
from nextflow_ar.data.playground.maker import Reject
from nextflow_ar.data.playground.reading import number_words
from nextflow_ar.data.playground.saying import full_caption, phrase, short_caption, the
from nextflow_ar.data.playground.scenes import TASKS
from nextflow_ar.data.playground.world import (
    COLOUR_NAMES,
    GROUP_OF,
    GROUPS,
    MANY,
    MOOD_WORDS,
    MOODS,
    NAMES,
    POPULAR,
    STYLE_WORDS,
    STYLES,
    UNCOUNTED,
    colours_of,
)

NEGATIVES: tuple[str, ...] = ("random", "popular", "adversarial")
"""How POPE picks what is not there: anything, a frequent thing, a thing that goes with what is there."""


def _answered(
    draft: Draft, canvas: Canvas, question: str, answer: str, kind: AnswerKind, name: str
) -> Episode:
    truth = Truth(name, (Answer(answer, kind),))
    return Episode("", (shows(canvas), draft.person(question), tells(answer)), truth)


def _seen(draft: Draft) -> Canvas:
    """A picture to talk about: mostly talkative ones, some of GenEval's types, now and then a word in it."""
    maker, rng = draft.maker, draft.rng
    canvas = (
        maker.party(1, 3, plain=False)
        if rng.random() < 0.6
        else maker.scene(TASKS[draft.index % len(TASKS)])[1]
    )
    if rng.random() < 0.12:
        canvas = maker.word(canvas)
    return replace(canvas, relation=None)


_CAPTION_ASKED = (
    "describe this picture", "what is in the picture?", "what do you see?", "a caption for this, please",
    "caption this image",
    "what does this show?", "tell me what is here", "say in one sentence what this is",
)  # fmt: skip
_FULL_ASKED = (
    "describe this picture in detail", "what is where in this picture?", "list every thing with its place",
    "a detailed caption, please", "tell me exactly what you see and where", "describe everything",
)  # fmt: skip


def _captioned(draft: Draft, *, full: bool) -> Episode:
    maker, rng = draft.maker, draft.rng
    canvas = _seen(draft)
    if draft.index % 8 == 0:
        canvas = maker.style(replace(canvas, second=None), "line")
    elif draft.index % 8 == 1:
        canvas = replace(canvas, mood=rng.choice(("dark", "bright", "gray")), second=None, tint=(0, 0, 0))
        if not mood_shows(canvas):
            raise Reject
    elif maker.level.gray and rng.random() < maker.level.gray:
        plain = tuple(
            replace(item, rgb=None) for item in canvas.items
        )  # shades could be as bright as the background
        canvas = replace(canvas, mood="gray", second=None, tint=(0, 0, 0), items=plain)
        if not mood_shows(canvas):
            raise Reject
    if canvas.style == "line" and canvas.word is not None:
        canvas = replace(canvas, word=None)
    text, kind = (full_caption(canvas), "full_caption") if full else (short_caption(canvas), "short_caption")
    return _answered(
        draft, canvas, rng.choice(_FULL_ASKED if full else _CAPTION_ASKED), text, kind, "caption"
    )


def caption_short(draft: Draft) -> Episode:
    """One sentence: things counted and coloured, the background."""
    return _captioned(draft, full=False)


def caption_full(draft: Draft) -> Episode:
    """Every thing with its place."""
    return _captioned(draft, full=True)


_YES_NO = (
    "is there {a} in the picture?", "is there {a} in this image?", "do you see {a}?", "can you see {a} here?",
    "does the picture show {a}?", "is {a} in the image?", "{a}: is it there?", "is there {a} in the picture? yes or no",
)  # fmt: skip


def absent(draft: Draft, canvas: Canvas, how: str) -> Kind:
    """A thing that the picture does not show, chosen as POPE does. Its colour is said only where the name is there."""
    rng, shown = draft.rng, {item.name for item in canvas.items}
    if how == "adversarial":
        coloured = sorted({i.name for i in canvas.items if i.colour})
        if coloured and rng.random() < 0.4:
            name = rng.choice(coloured)
            there = {item.colour for item in canvas.items if item.name == name}
            return name, rng.choice([colour for colour in colours_of(name) if colour not in there])
        pool = [n for name in sorted(shown) for n in GROUPS[GROUP_OF[name]] if n not in shown]
    else:
        pool = [name for name in (POPULAR if how == "popular" else NAMES) if name not in shown]
    return rng.choice(pool), None


def ask_yes_no(draft: Draft) -> Episode:
    """Is it there? Every other answer is yes; what is not there is chosen in POPE's three ways in turn."""
    rng, canvas = draft.rng, _seen(draft)
    if draft.index % 2 == 0:
        item = rng.choice(canvas.items)
        said = item.colour if item.colour and rng.random() < 0.27 else None  # as often as a no names one
        kind, answer, how = (item.name, said), "yes", "yes"
    else:
        how = NEGATIVES[draft.index // 2 % 3]
        kind, answer = absent(draft, canvas, how), "no"
    return _answered(draft, canvas, draft.pick(_YES_NO).format(a=phrase(kind)), answer, "yes_no", how)


_COUNT = (
    "how many {many} are there?", "how many {many} do you see?", "count the {many}", "what is the number of {many}?",
    "how many {many} are in the picture?", "{many}: how many?",
)  # fmt: skip


def ask_count(draft: Draft) -> Episode:
    """How many? From zero to the level's most, each about equally often."""
    maker, rng = draft.maker, draft.rng
    number = draft.index % (maker.level.max_count + 1)
    kinds = maker.distinct(rng.randint(1, 2))  # what else is there
    kind = maker.kind("countable", [name for name, _ in kinds])
    canvas = maker.canvas(maker.items([kind] * number + kinds[: 2 if number < 2 else 1 if number < 4 else 0]))
    name, colour = kind
    mixed = colour and rng.random() < 0.3
    many = f"{colour} {MANY[name]}" if mixed else MANY[name]
    return _answered(
        draft, canvas, draft.pick(_COUNT).format(many=many), number_words(number), "number", "counting"
    )


_COLOUR = (
    "what colour is {the}?", "which colour does {the} have?", "what color is {the}?", "{the}: what colour?",
    "tell me the colour of {the}",
)  # fmt: skip


def ask_colour(draft: Draft) -> Episode:
    """The colour of a thing that comes in colours, or of the background."""
    maker, rng = draft.maker, draft.rng
    kinds = [maker.kind("coloured")]
    kinds += [maker.kind(avoid=[kinds[0][0]]) for _ in range(rng.randint(0, 2))]
    canvas = maker.canvas(maker.items(kinds), plain=True)
    the_thing, answer = f"the {kinds[0][0]}", str(kinds[0][1])
    if draft.index % 5 == 0:
        the_thing, answer = "the background", canvas.background
    return _answered(draft, canvas, draft.pick(_COLOUR).format(the=the_thing), answer, "colour", "colour")


_WHERE = (
    "where is {the}?",
    "where do you see {the}?",
    "in which part of the picture is {the}?",
    "{the}: where?",
)
_SIDES = {"left of": "left", "right of": "right", "above": "above", "below": "below"}


def side_asked(draft: Draft, a: str, b: str, side: str) -> str:
    """Asks on which of two sides of ``b`` the thing ``a`` is, one of them ``side``."""
    pair = ("left", "right") if side in ("left", "right") else ("above", "below")
    one, other = pair if draft.rng.random() < 0.5 else pair[::-1]
    question = f"is {a} {one} or {other} of {b}?" if "left" in pair else f"is {a} {one} {b} or {other} it?"
    return question if one in ("left", "above") else question.replace("is ", "tell me: is ", 1)


def ask_place(draft: Draft) -> Episode:
    """Where a thing is: one of nine places, or on which side of another."""
    maker, rng = draft.maker, draft.rng
    if draft.index % 2:
        _, canvas = maker.scene("position")
        assert canvas.relation is not None
        answer = _SIDES[canvas.relation]
        a, b = (the(item, canvas) for item in canvas.items)
        question = side_asked(draft, a, b, answer)
        return _answered(draft, replace(canvas, relation=None), question, answer, "place", "relation")
    canvas = maker.party(1, 3, plain=False)
    found = singles(canvas)
    if not found:
        raise Reject
    item = rng.choice(found)
    place = place_words(item.box, canvas.size)
    return _answered(draft, canvas, draft.pick(_WHERE).format(the=the(item, canvas)), place, "place", "place")


def ask_choice(draft: Draft) -> Episode:
    """Four options, one of them right; the right letters come equally often."""
    rng = draft.rng
    kinds = ("thing", "colour", "count", "place", "style", "mood", "absent")
    kind = kinds[draft.index // 4 % len(kinds)]
    canvas, question, right, wrong = _CHOICES[kind](draft)
    letter = draft.index % 4
    options = rng.sample(wrong, 3)
    options.insert(letter, right)
    lines = "".join(f"\n{name}. {option}" for name, option in zip("ABCD", options, strict=True))
    return _answered(draft, canvas, question + lines, "ABCD"[letter], "choice", kind)


Choice = tuple[Canvas, str, str, list[str]]


def _choose_thing(draft: Draft) -> Choice:
    canvas = draft.maker.party(1, 3)
    shown = {item.name for item in canvas.items}
    right = draft.rng.choice(sorted(shown))
    wrong = [absent(draft, canvas, how)[0] for how in ("popular", "random", "random", "random")]
    wrong = sorted({name for name in wrong if name not in shown})
    if len(wrong) < 3:
        raise Reject
    return canvas, "which of these is in the picture?", right, wrong


def _choose_absent(draft: Draft) -> Choice:
    canvas = draft.maker.party(3, 3, doubles=0.0)
    return (
        canvas,
        "which of these is not in the picture?",
        absent(draft, canvas, "random")[0],
        [i.name for i in canvas.items],
    )


def _choose_colour(draft: Draft) -> Choice:
    maker = draft.maker
    kind = maker.kind("coloured")
    canvas = maker.canvas(maker.items([kind, *maker.distinct(1, "sprite")]), plain=True)
    if canvas.count(kind[0]) > 1:
        raise Reject
    wrong = [colour for colour in COLOUR_NAMES if colour != kind[1]]
    return canvas, f"what colour is the {kind[0]}?", str(kind[1]), wrong


def _choose_count(draft: Draft) -> Choice:
    maker = draft.maker
    kind, number = maker.kind("countable"), draft.rng.randint(1, maker.level.max_count)
    canvas = maker.canvas(maker.items([kind] * number))
    wrong = [number_words(n) for n in range(1, 7) if n != number]
    return canvas, f"how many {MANY[kind[0]]} are there?", number_words(number), wrong


def _choose_place(draft: Draft) -> Choice:
    canvas = draft.maker.party(1, 3, doubles=0.0)
    item = draft.rng.choice(canvas.items)
    place = place_words(item.box, canvas.size)
    return canvas, f"where is {the(item, canvas)}?", place, [p for p in PLACES if p != place]


def _choose_style(draft: Draft) -> Choice:
    style = draft.rng.choice(STYLES)
    canvas = draft.maker.style(draft.maker.party(1, 2), style)
    wrong = [STYLE_WORDS[s] for s in STYLES if s != style]
    return canvas, "what kind of picture is this?", STYLE_WORDS[style], [*wrong, "a page of text", "a map"]


def _choose_mood(draft: Draft) -> Choice:
    mood = draft.rng.choice(MOODS)
    canvas = replace(draft.maker.party(1, 3), mood=mood, tint=(0, 0, 0))
    if not mood_shows(canvas) or (
        mood in ("warm", "cold") and canvas.background not in ("white", "green", "pink")
    ):
        raise Reject
    wrong = [words for name, words in MOOD_WORDS.items() if name != mood]
    return canvas, "what are the colours and the light like?", MOOD_WORDS[mood], wrong


_CHOICES = {
    "thing": _choose_thing, "absent": _choose_absent, "colour": _choose_colour, "count": _choose_count,
    "place": _choose_place, "style": _choose_style, "mood": _choose_mood,
}  # fmt: skip


def question_about(draft: Draft, canvas: Canvas) -> tuple[Said, Answer]:
    """A question about any picture in full colour, and its answer; for conversations."""
    rng = draft.rng
    choice = rng.choice(("yes", "no", "count", "colour", "place", "caption", "caption"))
    items = [item for item in canvas.items if item.name not in UNCOUNTED]
    item = rng.choice(items or list(canvas.items))
    if choice == "yes":
        return draft.person(draft.pick(_YES_NO).format(a=phrase((item.name, None)))), Answer("yes", "yes_no")
    if choice == "no":
        kind = absent(draft, canvas, rng.choice(NEGATIVES))
        return draft.person(draft.pick(_YES_NO).format(a=phrase(kind))), Answer("no", "yes_no")
    if choice == "count" and items:
        number = number_words(canvas.count(item.name))
        return draft.person(draft.pick(_COUNT).format(many=MANY[item.name])), Answer(number, "number")
    if choice == "colour":
        asked = draft.person(draft.pick(_COLOUR).format(the="the background"))
        return asked, Answer(canvas.background, "colour")
    if choice == "place" and item in singles(canvas):
        asked = draft.person(draft.pick(_WHERE).format(the=the(item, canvas)))
        return asked, Answer(place_words(item.box, canvas.size), "place")
    return draft.person(draft.pick(_CAPTION_ASKED)), Answer(short_caption(canvas), "short_caption")


# --- several questions about one picture ----------------------------------------------------------------------------


def _yes_no_about(draft: Draft, canvas: Canvas) -> tuple[str, Answer]:
    rng = draft.rng
    if rng.random() < 0.5:
        item = rng.choice(canvas.items)
        said = item.colour if item.colour and canvas.shows_colours and rng.random() < 0.27 else None
        return draft.pick(_YES_NO).format(a=phrase((item.name, said))), Answer("yes", "yes_no")
    kind = absent(draft, canvas, rng.choice(NEGATIVES))
    return draft.pick(_YES_NO).format(a=phrase(kind)), Answer("no", "yes_no")


def _count_about(draft: Draft, canvas: Canvas) -> tuple[str, Answer]:
    names = sorted({item.name for item in canvas.items if item.name not in UNCOUNTED})
    if not names or draft.rng.random() < 0.15:
        name = absent(draft, canvas, "random")[0]
        if name in UNCOUNTED:
            raise Reject
    else:
        name = draft.rng.choice(names)
    return draft.pick(_COUNT).format(many=MANY[name]), Answer(number_words(canvas.count(name)), "number")


def _colour_about(draft: Draft, canvas: Canvas) -> tuple[str, Answer]:
    if canvas.second is not None:
        raise Reject
    if draft.rng.random() < 0.25:
        return draft.pick(_COLOUR).format(the="the background"), Answer(canvas.background, "colour")
    found = [item for item in canvas.items if item.colour and item.rgb is None]
    found = [item for item in found if len({i.colour for i in canvas.items if i.name == item.name}) == 1]
    if not found:
        raise Reject
    item = draft.rng.choice(found)
    return draft.pick(_COLOUR).format(the=f"the {item.name}"), Answer(str(item.colour), "colour")


def _place_about(draft: Draft, canvas: Canvas) -> tuple[str, Answer]:
    found = singles(canvas)
    if not found:
        raise Reject
    item = draft.rng.choice(found)
    if len(found) > 1 and draft.rng.random() < 0.5:
        other = draft.rng.choice([i for i in found if i is not item])
        holding = [word for word, side in _SIDES.items() if stands(word, item, other)]
        if len(holding) != 1:
            raise Reject
        question = side_asked(draft, the(item, canvas), the(other, canvas), _SIDES[holding[0]])
        return question, Answer(_SIDES[holding[0]], "place")
    asked = draft.pick(_WHERE).format(the=the(item, canvas))
    return asked, Answer(place_words(item.box, canvas.size), "place")


def _choice_about(draft: Draft, canvas: Canvas) -> tuple[str, Answer]:
    rng = draft.rng
    item = rng.choice(canvas.items)
    which = rng.choice(("thing", "count", "place", "absent"))
    if which == "thing":
        shown = {i.name for i in canvas.items}
        question, right = "which of these is in the picture?", item.name
        wrong = sorted({absent(draft, canvas, "random")[0] for _ in range(6)} - shown)
    elif which == "absent":
        question, right = "which of these is not in the picture?", absent(draft, canvas, "random")[0]
        wrong = sorted({i.name for i in canvas.items})
    elif which == "count":
        if item.name in UNCOUNTED:
            raise Reject
        number = canvas.count(item.name)
        question, right = f"how many {MANY[item.name]} are there?", number_words(number)
        wrong = [number_words(n) for n in range(1, 7) if n != number]
    else:
        if item not in singles(canvas):
            raise Reject
        right = place_words(item.box, canvas.size)
        question, wrong = f"where is {the(item, canvas)}?", [p for p in PLACES if p != right]
    if len(wrong) < 3:
        raise Reject
    options = rng.sample(wrong, 3)
    letter = rng.randrange(4)
    options.insert(letter, right)
    lines = "".join(f"\n{name}. {option}" for name, option in zip("ABCD", options, strict=True))
    return question + lines, Answer("ABCD"[letter], "choice")


def _told_about(draft: Draft, canvas: Canvas) -> tuple[str, Answer]:
    if draft.rng.random() < 0.5:
        return draft.rng.choice(_FULL_ASKED), Answer(full_caption(canvas), "full_caption")
    return draft.rng.choice(_CAPTION_ASKED), Answer(short_caption(canvas), "short_caption")


_ABOUT = (_yes_no_about, _yes_no_about, _count_about, _colour_about, _place_about, _choice_about)
_ASKED_OF_ONE = 4


def examine(draft: Draft) -> Episode:
    """Four questions about one picture and a caption, each answered: twice as many answers a token as one by one. The
    caption comes last, since it would give the answers away.
    """
    canvas = _seen(draft)
    several = [*_questions(draft, canvas), _told_about(draft, canvas)]
    return _examined(draft, shows(canvas), several, "examine")


def exercise(draft: Draft) -> Episode:
    """The same four questions about a picture that is described in full, not shown: what a question means, and how a letter
    stands for an option, without having to see. For training only.
    """
    canvas = _seen(draft)
    told = Said(full_caption(canvas), "user", False)
    found = _examined(draft, told, _questions(draft, canvas), "exercise")
    return replace(found, truth=replace(found.truth, combinations=tuple(sorted(combinations(canvas)))))


def _questions(draft: Draft, canvas: Canvas) -> list[tuple[str, Answer]]:
    """Some questions about a picture with their answers, none of which gives another one away."""
    if canvas.second is not None:
        raise Reject
    found: dict[tuple[str, str], tuple[str, Answer]] = {}
    for _ in range(40):
        if len(found) == _ASKED_OF_ONE:
            break
        try:
            question, answer = draft.rng.choice(_ABOUT)(draft, canvas)
        except Reject:
            continue
        same = (
            question if answer.kind == "yes_no" else answer.text
        )  # what was answered before is not asked again
        found.setdefault((answer.kind, same), (question, answer))
    if len(found) < _ASKED_OF_ONE:
        raise Reject
    return list(found.values())


def _examined(draft: Draft, before: Said | Shown, several: list[tuple[str, Answer]], kind: str) -> Episode:
    parts = [part for question, answer in several for part in (draft.person(question), tells(answer.text))]
    return Episode("", (before, *parts), Truth(kind, tuple(answer for _, answer in several)))
