"""The lines of PlaygroundBench in the wide world: which episodes each asks, and how an episode becomes an item.

An item is one episode (or one turn of one), pure in its line, split and number. Episodes have seeds of their own, which
nothing trains on.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nextflow_ar.data.playground.canvases import Canvas
from nextflow_ar.data.playground.curriculum import GROUPED, episode
from nextflow_ar.data.playground.edits import EDITS
from nextflow_ar.data.playground.episodes import Answer, Episode, Said, Shown
from nextflow_ar.evaluation.playground_tasks import BENCH_SEED
from nextflow_ar.evaluation.world.asking import Ask, Want

BenchSplit = Literal["train", "test"]
SPLITS: tuple[BenchSplit, BenchSplit] = ("train", "test")
SPLIT_NAMES = {"train": "in-distribution", "test": "compositional"}
_SUBJECTS = tuple(GROUPED["subject"])
_THINK = ("riddle", "wish", "sum_drawn", "odd_one")
_TRIES = 50


@dataclass(frozen=True)
class Line:
    """One line of the table. ``pick``: item number -> (task, number of its episode). ``kind``: how it is scored.
    ``think``: words before the picture (None: as the model does by itself).
    """

    name: str
    group: str
    pick: Callable[[int], tuple[str, int]]
    want: Want
    kind: str
    think: bool | None = None


def _of(task: str) -> Callable[[int], tuple[str, int]]:
    return lambda number: (task, number)


def _among(tasks: tuple[str, ...]) -> Callable[[int], tuple[str, int]]:
    return lambda number: (tasks[number % len(tasks)], number // len(tasks))


def _script(number: int) -> tuple[str, int]:
    return "story", number // 4 * 8 + 4 + number % 4  # illustrates sentences that are given


def _made_up(number: int) -> tuple[str, int]:
    return "story", number // 4 * 8 + number % 4


def _drawn_turn(number: int) -> tuple[str, int]:
    return ("chat", number // 2) if number % 2 else ("plain", number // 2 * 3)


def _worded_turn(number: int) -> tuple[str, int]:
    half = number // 2
    return (
        ("chat", half) if number % 2 else ("plain", half * 3 + 1 + half % 2)
    )  # every third asks for a picture


def _lines() -> tuple[Line, ...]:
    draw, ask = tuple(GROUPED["draw"]), tuple(GROUPED["ask"])
    return (
        *(Line(task, "draw", _of(task), "picture", "request") for task in draw),
        *(Line(task, "caption", _of(task), "text", "answer") for task in GROUPED["caption"]),
        *(Line(task, "ask", _of(task), "text", "answer") for task in ask),
        Line("edit", "edit", _among(tuple(f"edit_{kind}" for kind in EDITS)), "picture", "edit"),
        Line("subject", "edit", _among(_SUBJECTS), "picture", "subject"),
        Line("in_context", "edit", _of("in_context"), "picture", "edit"),
        Line("story_script", "tell", _script, "turn", "story"),
        Line("story_free", "tell", _made_up, "turn", "tale"),
        Line("recipe", "tell", _of("recipe"), "turn", "story"),
        Line("video_draw", "video", _of("video_draw"), "pictures", "video"),
        Line("video_next", "video", _of("video_next"), "picture", "frame"),
        Line("video_caption", "video", _of("video_caption"), "text", "answer"),
        Line("think", "think", _among(_THINK), "picture", "thought", think=True),
        Line("think_without", "think", _among(_THINK), "picture", "thought", think=False),
        Line("turn_drawn", "chat", _drawn_turn, "turn", "turn_drawn"),
        Line("turn_worded", "chat", _worded_turn, "turn", "turn_worded"),
    )


LINES: dict[str, Line] = {line.name: line for line in _lines()}


@dataclass(frozen=True, eq=False)
class Item:
    """One thing asked. ``context``: the episode's parts up to the answer, ``answer``: the parts that are right there;
    ``before``: the canvas last shown or drawn before the answer, if there is one.
    """

    line: Line
    split: BenchSplit
    number: int
    episode: Episode
    context: tuple[Said | Shown, ...]
    answer: tuple[Said | Shown, ...]
    truths: tuple[Answer, ...]

    @property
    def before(self) -> Canvas | None:
        """The last picture before the answer."""
        shown = [part.canvas for part in self.context if isinstance(part, Shown)]
        return shown[-1] if shown else None

    @property
    def expected(self) -> tuple[Canvas, ...]:
        """Canvases of the pictures to be drawn."""
        return tuple(part.canvas for part in self.answer if isinstance(part, Shown))

    @property
    def asked(self) -> str:
        """The last words before the answer."""
        return next((part.text for part in reversed(self.context) if isinstance(part, Said)), "")

    @property
    def tag(self) -> str:
        """Kind of item, for the rows below a line."""
        kind = self.episode.truth.kind
        return self.episode.task if self.line.name in ("subject", "think", "think_without") else kind

    def ask(self) -> Ask:
        """What the model gets: pictures rendered, nothing of the answer."""
        size = self.expected[0].size if self.expected else self.before.size if self.before else (64, 64)
        parts = tuple(
            (part.role, part.text if isinstance(part, Said) else part.render()) for part in self.context
        )
        count = max(1, len(self.expected))
        told = self.line.want == "turn"
        return Ask(
            parts,
            self.line.want,
            size,
            self.number,
            (self.line.name, self.split, self.number),
            pictures=5 if told and self.line.group == "tell" else count,
            think=self.line.think,
            words=48 * 5 if self.line.group == "tell" else 64,
            next_frame=self.line.kind == "frame",
        )


def item(
    line: Line, split: BenchSplit, number: int, canvas: tuple[int, int], level: str, seed: int = BENCH_SEED
) -> Item:
    """Item ``number`` of a line: the same arguments give the same one. Raises RuntimeError where none fits the canvas."""
    task, index = line.pick(number)
    for attempt in range(_TRIES):
        # An episode that has no turn of the kind asked for makes way for another.
        found = episode(task, index, seed + 1_000 * attempt, split, canvas, level)
        cut = _turn(found, number, line) if line.group == "chat" else _answer(found)
        if cut is not None:
            return Item(line, split, number, found, *cut)
    raise RuntimeError(f"no item {number} of {line.name} fits a canvas of {canvas[1]}x{canvas[0]}")


Cut = tuple[tuple[Said | Shown, ...], tuple[Said | Shown, ...], tuple[Answer, ...]]


def _answer(found: Episode) -> Cut:
    """Everything before the first response, and all from there."""
    first = next(k for k, part in enumerate(found.parts) if part.supervised)
    return found.parts[:first], found.parts[first:], found.truth.answers


def _turn(found: Episode, number: int, line: Line) -> Cut | None:
    """One answer in a conversation: a picture or words, as the line wants; what came before it is right."""
    drawn = line.kind == "turn_drawn"
    places = [
        k
        for k, part in enumerate(found.parts)
        if part.supervised and isinstance(part, Shown if drawn else Said)
    ]
    if not places:
        return None
    at = random.Random(f"turn {line.name} {number}").choice(places)
    answers = list(found.truth.answers)
    told = sum(part.supervised and isinstance(part, Said) for part in found.parts[:at])
    truths = () if drawn else (answers[told],)
    return found.parts[:at], found.parts[at : at + 1], truths
