"""All tasks of the wide world by name, and the one way to get an episode of one: a pure function of its arguments."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from nextflow_ar.data.playground import asking, drawing, editing, talking, telling, thinking
from nextflow_ar.data.playground.canvases import canvas_sizes, combinations, fits, held_out
from nextflow_ar.data.playground.edits import EDITS
from nextflow_ar.data.playground.episodes import Draft, Episode
from nextflow_ar.data.playground.maker import Maker, Reject, world_level
from nextflow_ar.data.playground.scenes import Split

Builder = Callable[[Draft], Episode]

GROUPED: dict[str, dict[str, Builder]] = {
    "draw": {
        "draw_scene": drawing.draw_scene,
        "draw_sizes": drawing.draw_sizes,
        "draw_places": drawing.draw_places,
        "draw_word": drawing.draw_word,
        "draw_style": drawing.draw_style,
        "draw_mood": drawing.draw_mood,
    },
    "practice": {"crowd": drawing.crowd, "relation": drawing.relation},
    "caption": {"caption_short": asking.caption_short, "caption_full": asking.caption_full},
    "ask": {
        "ask_yes_no": asking.ask_yes_no,
        "ask_count": asking.ask_count,
        "ask_colour": asking.ask_colour,
        "ask_place": asking.ask_place,
        "ask_choice": asking.ask_choice,
    },
    "examine": {"examine": asking.examine},
    "exercise": {"exercise": asking.exercise},
    "edit": {f"edit_{kind}": editing.edit_task(kind) for kind in EDITS},
    "subject": {
        "subject_extract": editing.subject_extract,
        "subject_place": editing.subject_place,
        "subject_three": editing.subject_three,
    },
    "interleaved": {"story": telling.story, "recipe": telling.recipe},
    "video": {
        "video_draw": telling.video_draw,
        "video_next": telling.video_next,
        "video_caption": telling.video_caption,
    },
    "think": {
        "riddle": thinking.riddle,
        "clue": thinking.clue,
        "wish": thinking.wish,
        "sum_drawn": thinking.sum_drawn,
        "odd_one": thinking.odd_one,
        "planned": thinking.planned,
    },
    "in_context": {"in_context": editing.in_context},
    "chat": {"chat": talking.chat, "plain": talking.plain},
}
"""Capability -> its tasks."""

BUILDERS: dict[str, Builder] = {name: build for tasks in GROUPED.values() for name, build in tasks.items()}
TASK_NAMES: tuple[str, ...] = tuple(BUILDERS)

READ_ALONE: tuple[str, ...] = (*GROUPED["caption"], *GROUPED["ask"], *GROUPED["examine"])
"""Tasks of captions and questions about one picture."""

PLANNED: tuple[str, ...] = tuple(
    task for group in ("draw", "practice", "edit", "subject", "in_context") for task in GROUPED[group]
)
"""Tasks that end in a drawn picture without a plan, which :func:`~nextflow_ar.data.playground.planning.with_plan` adds."""

THOUGHT: tuple[str, ...] = tuple(GROUPED["think"])
"""Tasks that end in a drawn picture behind a plan of their own."""

UNSPLIT: tuple[str, ...] = ("wish", "clue", "plain")
"""Tasks in which a test episode cannot always show a held-out combination."""

_TRIES = 4000
_TEST_TRIES = 120  # of one pair in eight, so that none is found once in ten million


def episode(
    task: str,
    index: int,
    seed: int,
    split: Split = "train",
    canvas: tuple[int, int] = (64, 64),
    level: str = "world",
) -> Episode:
    """Episode ``index`` of a task: the same arguments give the same episode, whatever was asked before.

    ``split``: "train" never shows a held-out combination in any picture nor joins held-out clues; "test" does at
    least once where the task can; "any" ignores it. ``canvas``: (height, width) in pixels. ``level``: "world", "blocks",
    "hues", "shades" or "wide". Raises ValueError for an unknown task or level, RuntimeError when nothing fits the canvas.
    """
    if task not in BUILDERS:
        raise ValueError(f"unknown playground task {task!r}: one of {', '.join(TASK_NAMES)}")
    if level in ("hues", "shades") and task not in READ_ALONE:
        raise ValueError(
            f"the level {level} is for captions and questions, not for {task!r}: its shades have no words"
        )
    rng = random.Random(f"nextflow-ar {task} {seed} {index} {split} {canvas[0]}x{canvas[1]} {level}")
    draft = Draft(rng, Maker(rng, world_level(level), canvas), index, split)
    spare: Episode | None = None
    proposed = 0
    for _ in range(_TRIES):
        try:
            found = BUILDERS[task](draft).named(task)
        except Reject:
            continue
        if not all(fits(part.canvas) for part in found.pictures):
            continue
        pairs = held_out_of(found)
        if split == "any" or (pairs == 0) == (split == "train"):
            return found
        spare = spare or (found if split == "test" else None)
        proposed += 1
        if spare is not None and proposed >= _TEST_TRIES:
            return spare
    if spare is not None:
        return spare
    raise RuntimeError(f"no episode of {task} fits a canvas of {canvas[1]}x{canvas[0]}")


def held_out_of(found: Episode) -> int:
    """How many held-out combinations an episode has, in its pictures and between its clues."""
    pairs = frozenset(found.truth.combinations).union(*(combinations(p.canvas) for p in found.pictures))
    return held_out(pairs)


def by_task(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights of tasks from weights of tasks and groups: a group's is spread evenly over its tasks, what a task gets
    twice is added, and tasks without any are left out. Raises ValueError for an unknown name or where nothing has weight.
    """
    unknown = [name for name in weights if name not in BUILDERS and name not in GROUPED]
    if unknown:
        raise ValueError(
            f"unknown playground task {unknown[0]!r}: a group ({', '.join(GROUPED)}) or one of {', '.join(TASK_NAMES)}"
        )
    if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise ValueError("tasks needs at least one task with a weight above 0")
    found = dict.fromkeys(TASK_NAMES, 0.0)
    for name, weight in weights.items():
        several = tuple(GROUPED.get(name, (name,)))
        for task in several:
            found[task] += weight / len(several)
    return {task: weight for task, weight in found.items() if weight > 0}


@dataclass(frozen=True)
class Mix:
    """A stream of episodes: tasks by weight, canvases by level of scales. ``square``: share of square canvases."""

    tasks: dict[str, float]
    seed: int
    split: Split = "train"
    scales: int = 8
    square: float = 0.5
    level: str = "world"

    def __post_init__(self) -> None:
        unknown = [name for name in self.tasks if name not in BUILDERS]
        if unknown:
            raise ValueError(f"unknown playground task {unknown[0]!r}: one of {', '.join(TASK_NAMES)}")
        if not self.tasks or min(self.tasks.values()) < 0 or sum(self.tasks.values()) <= 0:
            raise ValueError("tasks needs at least one task with a weight above 0")
        world_level(self.level)

    def episode(self, index: int) -> Episode:
        """Episode ``index`` of the stream."""
        rng = random.Random(f"nextflow-ar mix {self.seed} {index}")
        task = rng.choices(tuple(self.tasks), tuple(self.tasks.values()))[0]
        sizes = canvas_sizes(self.scales)
        canvas = sizes[0] if rng.random() < self.square else rng.choice(sizes)
        return episode(task, index, self.seed, self.split, canvas, self.level)


def corpus(tasks: Sequence[str], count: int, seed: int, level: str = "world") -> Iterator[str]:
    """Texts of ``count`` training episodes of each task, to train a text tokenizer on."""
    for task in tasks:
        for index in range(count):
            for part in episode(task, index, seed, "train", level=level).texts:
                yield part.text
