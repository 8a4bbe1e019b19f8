"""Tasks that think before they draw: riddles, sums, implicit wishes and plain requests become reasoning and a plan, then a
picture.

A thought names what every clue means and ends with a plan (:func:`~nextflow_ar.data.playground.planning.plan_of`).
"""

from __future__ import annotations

from collections.abc import Sequence

from nextflow_ar.data.playground.canvases import Canvas, Kind, stands
from nextflow_ar.data.playground.drawing import scene_asked
from nextflow_ar.data.playground.episodes import Answer, Draft, Episode, Truth, draws, tells
from nextflow_ar.data.playground.knowledge import CLUES, COLOUR_CLUES, WISHES
from nextflow_ar.data.playground.maker import Reject
from nextflow_ar.data.playground.planning import plan_of
from nextflow_ar.data.playground.reading import number_words
from nextflow_ar.data.playground.saying import asked_to_draw, phrase
from nextflow_ar.data.playground.scenes import RELATIONS
from nextflow_ar.data.playground.words import NUMBERS
from nextflow_ar.data.playground.world import MANY, NATIVE, SHAPES, colours_of


def _is(clue: str, kind: Kind) -> str:
    name = kind[0]
    return f"{clue} is {f'the {name}' if name in ('sun', 'moon') else phrase((name, None))}"


def _thought(
    draft: Draft,
    request: str,
    steps: list[str],
    canvas: Canvas,
    kind: str,
    pairs: Sequence[tuple[str, str]] = (),
) -> Episode:
    thought = ". ".join([*steps, plan_of(canvas)])
    truth = Truth(kind, (Answer(thought, "plan"),), combinations=tuple(pairs))
    return Episode("", (draft.person(request), tells(thought), draws(canvas)), truth)


def _own(kind: Kind) -> Kind:
    """The thing in its own look: what is meant when no colour is said."""
    return kind[0], NATIVE.get(kind[0], kind[1])


_BESIDE = ("beside", "next to", "together with", "and")


def riddle(draft: Draft) -> Episode:
    """One thing by two clues, or two things by a clue each, maybe in a relation; some with a colour that is paraphrased."""
    maker, rng = draft.maker, draft.rng
    if draft.index % 3 == 0:
        kind = _own(maker.kind("sprite"))
        first, second = rng.sample(CLUES[kind[0]], 2)
        canvas = maker.canvas(maker.items([kind]), plain=True)
        request = asked_to_draw(rng, f"{first}, {second}")
        return _thought(draft, request, [_is(first, kind)], canvas, "riddle", [(first, second)])
    if draft.index % 3 == 1:
        return _coloured_riddle(draft)
    kinds = [_own(kind) for kind in maker.distinct(2, "sprite")]
    clues = [rng.choice(CLUES[name]) for name, _ in kinds]
    items = maker.items(kinds)
    link, relation = rng.choice(_BESIDE), None
    if rng.random() < 0.5:
        relation = link = rng.choice(RELATIONS)
        if not stands(relation, *items):
            raise Reject
    canvas = maker.canvas(items, relation, plain=True)
    steps = [_is(clue, kind) for clue, kind in zip(clues, kinds, strict=True)]
    request = asked_to_draw(rng, f"{clues[0]} {link} {clues[1]}")
    return _thought(draft, request, steps, canvas, "riddle", [(clues[0], clues[1])])


def clue(draft: Draft) -> Episode:
    """One thing by one clue, the shortest riddle: for training only, since no split can hold a clue by itself out."""
    maker, rng = draft.maker, draft.rng
    kind = _own(maker.kind("sprite"))
    said = rng.choice(CLUES[kind[0]])
    canvas = maker.canvas(maker.items([kind]), plain=True)
    return _thought(draft, asked_to_draw(rng, said), [_is(said, kind)], canvas, "riddle")


def _coloured_riddle(draft: Draft) -> Episode:
    """A shape or a thing in a colour, both paraphrased: "the shape without a corner in the colour of grass"."""
    maker, rng = draft.maker, draft.rng
    name = maker.kind("shape" if rng.random() < 0.5 else "coloured")[0]
    colour = rng.choice(colours_of(name))
    clue, tint = rng.choice(CLUES[name]), rng.choice(COLOUR_CLUES[colour])
    canvas = maker.canvas(maker.items([(name, colour)]), plain=True)
    steps = [_is(clue, (name, None)), f"{tint} is {colour}"]
    words = f"{clue}, in {tint}" if tint.startswith("the colour") else f"{clue}, its colour is {tint}"
    return _thought(draft, asked_to_draw(rng, words), steps, canvas, "riddle", [(clue, tint)])


_NEEDED = (
    "{}. draw what i need", "{}. what do i need? draw it", "{}. show me what would help",
    "{}. can you draw what helps?",
)  # fmt: skip


def wish(draft: Draft) -> Episode:
    """Somebody says what the matter is; the thing that helps is drawn."""
    rng, maker = draft.rng, draft.maker
    name = rng.choice(tuple(WISHES))
    said, clue = rng.choice(WISHES[name]), rng.choice(CLUES[name])
    kind = _own((name, None))
    canvas = maker.canvas(maker.items([kind]), plain=True)
    steps = [f"what helps is {phrase((name, None))}, {clue}"]
    return _thought(draft, rng.choice(_NEEDED).format(said), steps, canvas, "wish", [(said, clue)])


_SUMS = (
    ("as many {many} as {a} plus {b}", 1), ("{a} plus {b} {many}", 1), ("as many {many} as {c} minus {b}", -1),
    ("i had {c} {many} and gave {b} away: draw the rest", -1),
)  # fmt: skip


def sum_drawn(draft: Draft) -> Episode:
    """A number of things that has to be worked out first."""
    maker, rng = draft.maker, draft.rng
    kind = maker.kind("countable")
    number = rng.randint(2, maker.level.max_count)
    canvas = maker.canvas(maker.items([kind] * number), plain=True)
    form, sign = _SUMS[draft.index % len(_SUMS)]
    b = rng.randint(1, number - 1) if sign > 0 else rng.randint(1, 4)
    a, c = number - b, number + b
    many = f"{kind[1]} {MANY[kind[0]]}" if kind[1] else MANY[kind[0]]
    words = form.format(many=many, a=number_words(a), b=number_words(b), c=number_words(c))
    request = words if "draw" in words else asked_to_draw(rng, words)
    step = f"{number_words(a if sign > 0 else c)} {'plus' if sign > 0 else 'minus'} {number_words(b)} is {NUMBERS[number]}"
    return _thought(draft, request, [step], canvas, "sum")


def planned(draft: Draft) -> Episode:
    """One of GenEval's six types as anyone would ask for it, laid out in words before it is drawn."""
    words, canvas, task = scene_asked(draft)
    return _thought(draft, asked_to_draw(draft.rng, words), [], canvas, task)


def odd_one(draft: Draft) -> Episode:
    """The thing that does not belong to a list of three others, on the background that is paraphrased."""
    maker, rng = draft.maker, draft.rng
    groups = rng.sample(("animal", "food", "vehicle", "shape"), 2)
    kinds: list[Kind] = []
    for _ in range(3):
        kinds.append(maker.kind(groups[0], [name for name, _ in kinds]))
    odd = _own(maker.kind(groups[1]))
    if odd[0] in SHAPES:
        odd = (odd[0], rng.choice(colours_of(odd[0])))
    canvas = maker.canvas(maker.items([odd]), plain=True)
    tint = rng.choice(COLOUR_CLUES[canvas.background])
    names = [name for name, _ in kinds] + [odd[0]]
    rng.shuffle(names)
    colour = f", in {odd[1]}" if odd[0] in SHAPES else ""
    request = f"{', '.join(names)}: draw the one that does not belong{colour}, before a background in {tint}"
    if not tint.startswith("the colour"):
        raise Reject
    belongs = {"animal": "animals", "food": "food", "vehicle": "vehicles", "shape": "shapes"}[groups[0]]
    steps = [f"the others are {belongs}, the {odd[0]} is not", f"{tint} is {canvas.background}"]
    return _thought(draft, request, steps, canvas, "odd_one")
