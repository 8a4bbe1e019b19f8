"""How every kind of item is scored: from what the judge saw and what was said to right or wrong, check by check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from nextflow_ar.data.playground.canvases import Canvas, place_words, stands
from nextflow_ar.data.playground.canvases import Item as Thing
from nextflow_ar.data.playground.episodes import Said
from nextflow_ar.data.playground.reading import read_plan
from nextflow_ar.data.playground.scenes import RELATIONS
from nextflow_ar.data.playground.scoring import is_right
from nextflow_ar.evaluation.world.geneval import geneval, geneval_metadata
from nextflow_ar.evaluation.world.lines import Item
from nextflow_ar.evaluation.world.motion import film_checks, frame_checks
from nextflow_ar.evaluation.world.tales import tale_checks
from nextflow_ar.evaluation.world.verdict import Verdict
from nextflow_ar.evaluation.world.wanted import (
    Checks,
    PictureWanted,
    ThingWanted,
    check,
    fault,
    names_colour,
    names_ground,
    names_place,
    of_item,
    size_asked,
    turn_of,
    wanted_of,
)

WITHIN_DB = 2.0
"""How far the area outside an edit may fall behind the tokenizer's round trip (PSNR)."""


@dataclass(frozen=True)
class Observed:
    """What came: verdicts of the pictures, the texts, their order ("picture" or "text"), and for edits by how many dB the
    area outside the change falls behind the tokenizer's round trip of the source (None: nothing is to be preserved).
    """

    seen: tuple[Verdict, ...]
    said: tuple[str, ...]
    order: tuple[str, ...]
    behind: float | None = None

    def to_json(self) -> dict:
        """Plain data; :meth:`from_json` reads it back."""
        return asdict(self) | {"seen": [verdict.to_json() for verdict in self.seen]}

    @classmethod
    def from_json(cls, data: dict) -> Observed:
        """What :meth:`to_json` wrote."""
        seen = tuple(Verdict.from_json(one) for one in data["seen"])
        return cls(seen, tuple(data["said"]), tuple(data["order"]), data["behind"])


@dataclass(frozen=True)
class Score:
    """``right``: all checks hold. ``grade``: the share of them that do. ``extra``: measured beside, not needed."""

    right: bool
    grade: float
    fault: str
    checks: Checks
    extra: dict[str, float | bool | str] = field(default_factory=dict)


def _scored(checks: Checks, why: str = "", **extra: float | bool | str) -> Score:
    wrong = [name for name, right in checks.items() if not right]
    grade = 1 - len(wrong) / len(checks)
    return Score(not wrong, grade, (why or wrong[0]) if wrong else "", checks, extra)


def _missing() -> Score:
    return _scored({"picture": False}, "no picture came")


def request_wanted(item: Item) -> PictureWanted:
    """What a request to draw asks for: no more than its words say."""
    canvas, task, asked = item.expected[0], item.episode.task, item.asked
    things = [
        of_item(
            thing,
            canvas,
            size=None
            if canvas.relation is not None or task == "draw_places"
            else size_asked(thing, canvas.base),
            place=place_words(thing.box, canvas.size) if task == "draw_places" else None,
        )
        for thing in canvas.items
    ]
    word = canvas.word
    return wanted_of(
        canvas,
        things,
        ground=names_ground(asked),
        relation=canvas.relation is not None,
        word_colour=word is not None and names_colour(asked, word.colour),
        word_place=word is not None and names_place(asked),
    )


def _request(item: Item, observed: Observed) -> Score:
    if not observed.seen:
        return _missing()
    wanted, verdict = request_wanted(item), observed.seen[-1]
    extra: dict[str, float | bool | str] = {}
    if item.episode.task == "draw_scene":
        extra["geneval"] = geneval(geneval_metadata(item), verdict)
    return _scored(check(wanted, verdict), fault(wanted, verdict), **extra)


def _answer(item: Item, observed: Observed) -> Score:
    """Words alone: the answer has to mean the same."""
    said = " ".join(observed.said).strip()
    right = is_right(item.truths[0], said)
    extra: dict[str, float | bool | str] = {}
    if item.episode.task == "ask_yes_no":
        extra = {"truth": item.truths[0].text, "said": said.split(" ")[0].lower() if said else ""}
    return Score(right, float(right), "" if right else f"said {said[:80]!r}", {"answer": right}, extra)


def edit_wanted(item: Item) -> PictureWanted:
    """What an edit has to show: what is new where it was asked for, all else where it was."""
    before, after = item.before, item.expected[0]
    assert before is not None
    kind = item.episode.truth.kind
    moving = kind in ("add", "move")
    resized = kind in ("zoom_in", "zoom_out", "size")
    kept = set(before.items)
    things = []
    for thing in after.items:
        if moving and thing not in kept:
            asked: dict[str, object] = {"place": place_words(thing.box, after.size)}
        else:
            asked = {"near": thing.centre}
        if resized and thing not in kept:
            asked["side"] = float(thing.size)
        things.append(of_item(thing, after, turn=turn_of(thing, after), **asked))
    return wanted_of(after, things, word_place=kind == "word_add")


def _edit(item: Item, observed: Observed) -> Score:
    if not observed.seen:
        return _missing()
    wanted = edit_wanted(item)
    checks = check(wanted, observed.seen[-1])
    instruction = all(checks.values())
    why = fault(wanted, observed.seen[-1])
    if observed.behind is not None:
        checks["preserved"] = observed.behind <= WITHIN_DB
    extra: dict[str, float | bool | str] = {"instruction": instruction}
    if observed.behind is not None:
        extra |= {"preserved": checks["preserved"], "behind": observed.behind}
    return _scored(checks, why, **extra)


def subject_wanted(item: Item) -> PictureWanted:
    """A subject taken out, placed anew, or multiplied."""
    canvas, task = item.expected[0], item.episode.task
    things = [of_item(thing, canvas) for thing in canvas.items]
    if task == "subject_extract":
        only = canvas.items[0]
        things = [of_item(only, canvas, near=only.centre, size="large")]
    relation = None
    if task == "subject_place":
        if len(canvas.items) == 2:
            relation = _relation(canvas.items[0], canvas.items[1])
        else:
            things = [of_item(canvas.items[0], canvas, place=place_words(canvas.items[0].box, canvas.size))]
    return replace(wanted_of(canvas, things), relation=relation)


def _relation(a: Thing, b: Thing) -> str | None:
    return next((relation for relation in RELATIONS if stands(relation, a, b)), None)


def _subject(item: Item, observed: Observed) -> Score:
    if not observed.seen:
        return _missing()
    wanted = subject_wanted(item)
    return _scored(check(wanted, observed.seen[-1]), fault(wanted, observed.seen[-1]))


def story_wanted(canvas: Canvas) -> PictureWanted:
    """A picture of a story whose words are given: what there is, where, before what. Sizes are told only by comparison."""
    return wanted_of(
        canvas, [of_item(t, canvas, place=place_words(t.box, canvas.size)) for t in canvas.items]
    )


def recipe_wanted(canvas: Canvas) -> PictureWanted:
    """A step of a recipe names things alone: neither places nor backgrounds."""
    return wanted_of(canvas, [of_item(t, canvas) for t in canvas.items], ground=False)


def _story(item: Item, observed: Observed) -> Score:
    """Right pictures in the right order, as many as there are sentences, each behind words of its own."""
    count = len(item.expected)
    checks: Checks = {"count": len(observed.seen) == count}
    wish = recipe_wanted if item.episode.task == "recipe" else story_wanted
    whys = []
    for k, canvas in enumerate(item.expected):
        wanted = wish(canvas)
        if k < len(observed.seen):
            why = fault(wanted, observed.seen[k])
            checks[f"picture {k + 1}"] = not why
            whys += [f"picture {k + 1}: {why}"] if why else []
        else:
            checks[f"picture {k + 1}"] = False
    wrong = "count" if not checks["count"] else whys[0] if whys else ""
    if wrong == "count":
        wrong = f"{len(observed.seen)} pictures, not {count}"
    said = [part.text for part in item.answer if isinstance(part, Said)]
    told = " ".join(observed.said).split() == " ".join(said).split()
    pictures = sum(checks[f"picture {k + 1}"] for k in range(count)) / count
    return _scored(checks, wrong, pictures=pictures, words=told)


def _tale(item: Item, observed: Observed) -> Score:
    checks, why = tale_checks(
        len(item.expected), item.expected[0], observed.said, observed.seen, observed.order
    )
    return _scored(checks, why)


def _video(item: Item, observed: Observed) -> Score:
    return _scored(film_checks(item.expected, observed.seen, ground=names_ground(item.asked)))


def _frame(item: Item, observed: Observed) -> Score:
    if not observed.seen:
        return _missing()
    assert item.before is not None
    return _scored(frame_checks(item.before, item.expected[0], observed.seen[-1]))


def thought_wanted(item: Item) -> PictureWanted:
    """What a riddle, a wish or a sum comes down to; only the odd one out is asked before a background."""
    canvas, task = item.expected[0], item.episode.task
    things = [of_item(thing, canvas) for thing in canvas.items]
    return wanted_of(canvas, things, ground=task == "odd_one", relation=canvas.relation is not None)


def _thought(item: Item, observed: Observed) -> Score:
    if not observed.seen:
        return _missing()
    wanted = thought_wanted(item)
    extra: dict[str, float | bool | str] = {}
    if item.line.think:
        plan, right = (
            read_plan(" ".join(observed.said)),
            read_plan(item.truths[0].text),
        )
        assert right is not None
        kinds = [
            sorted((seen[:2] for seen, _ in one.things), key=str) for one in (plan, right) if one is not None
        ]
        extra["plan"] = len(kinds) == 2 and kinds[0] == kinds[1]
    return _scored(check(wanted, observed.seen[-1]), fault(wanted, observed.seen[-1]), **extra)


def _turn_drawn(item: Item, observed: Observed) -> Score:
    """A picture came by itself; whether it is right is measured beside."""
    began = bool(observed.seen)
    extra: dict[str, float | bool | str] = {"right": False}
    if began:
        canvas = item.expected[0]
        before = item.before if item.episode.task == "chat" else None
        kept = set(before.items) if before is not None else set()
        things: list[ThingWanted] = [
            of_item(t, canvas, **({"near": t.centre} if t in kept and len(kept & set(canvas.items)) else {}))
            for t in canvas.items
        ]
        wanted = wanted_of(canvas, things, ground=names_ground(item.asked) or before is not None)
        extra["right"] = not fault(wanted, observed.seen[0])
    return Score(began, float(began), "" if began else "no picture came", {"began": began}, extra)


def _turn_worded(item: Item, observed: Observed) -> Score:
    """No picture came; whether the words are right is measured beside."""
    kept = not observed.seen
    right = kept and is_right(item.truths[0], " ".join(observed.said).strip())
    return Score(kept, float(kept), "" if kept else "a picture came", {"words alone": kept}, {"right": right})


SCORERS: dict[str, Callable[[Item, Observed], Score]] = {
    "request": _request,
    "answer": _answer,
    "edit": _edit,
    "subject": _subject,
    "story": _story,
    "tale": _tale,
    "video": _video,
    "frame": _frame,
    "thought": _thought,
    "turn_drawn": _turn_drawn,
    "turn_worded": _turn_worded,
}


def score(item: Item, observed: Observed) -> Score:
    """Score what came for an item."""
    return SCORERS[item.line.kind](item, observed)
