"""How well the judge reads: the share of pictures read fully right, and what it mistakes for what."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nextflow_ar.data.playground.canvases import Canvas
from nextflow_ar.data.playground.curriculum import episode
from nextflow_ar.data.playground.looks import render
from nextflow_ar.data.playground.scenes import Split
from nextflow_ar.evaluation.world.examples import ACCURACY_SEED, TASKS, any_size
from nextflow_ar.evaluation.world.judge import WorldJudge
from nextflow_ar.evaluation.world.verdict import Verdict
from nextflow_ar.evaluation.world.wanted import check, matched, of_item, turn_of, wanted_of

Through = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


def canvases(
    count: int, split: Split, level: str, size: tuple[int, int] | None = None, tasks: Sequence[str] = TASKS
) -> list[Canvas]:
    """Fresh canvases of the playground's tasks, never trained on; ``size``: of all of them, None for any."""
    found: list[Canvas] = []
    number = 0
    while len(found) < count:
        rng = random.Random(f"accuracy {split} {level} {number}")
        task = rng.choice(tasks)
        try:
            one = episode(task, number, ACCURACY_SEED, split, size or any_size(rng), level)
            found.append(rng.choice(one.pictures).canvas)
        except RuntimeError:
            pass  # nothing of this task fits so narrow a canvas
        number += 1
    return found


def reading_checks(canvas: Canvas, verdict: Verdict) -> dict[str, bool]:
    """What of a canvas is read right, by name: things (names, colours, how many), places, turns, background, ..."""
    things = [of_item(t, canvas, near=t.centre, turn=turn_of(t, canvas)) for t in canvas.items]
    wanted = wanted_of(canvas, things, word_colour=True, word_place=True)
    return check(wanted, verdict)


def accuracy(
    judge: WorldJudge, truth: Sequence[Canvas], through: Through | None = None, batch: int = 128
) -> dict[str, Any]:
    """Share of canvases read fully right ("exact") and each check's share; ``mistaken``: the commonest mistakes."""
    tally: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    mistaken: Counter[str] = Counter()
    exact = 0
    for start in range(0, len(truth), batch):
        part = truth[start : start + batch]
        pictures = [render(canvas) for canvas in part]
        for canvas, verdict in zip(part, judge(through(pictures) if through else pictures), strict=True):
            checks = reading_checks(canvas, verdict)
            exact += all(checks.values())
            asked.update(checks.keys())
            tally.update(name for name, right in checks.items() if right)
            mistaken.update(_mistakes(canvas, verdict, checks))
    return {
        "pictures": len(truth),
        "exact": exact / len(truth),
        **{name: tally[name] / count for name, count in asked.items()},
        "mistaken": dict(mistaken.most_common(20)),
    }


def _mistakes(canvas: Canvas, verdict: Verdict, checks: dict[str, bool]) -> list[str]:
    """What was taken for what: "moon: sun", "red: orange", "HELP: HELD"."""
    out: list[str] = []
    if not checks["things"]:
        wanted = wanted_of(canvas, [of_item(t, canvas, near=t.centre) for t in canvas.items])
        found = matched(wanted, verdict)
        rest = [thing for thing in verdict.things if thing not in found]
        for item, seen in zip(canvas.items, found, strict=True):
            if seen is not None:
                continue
            near = min(
                rest, key=lambda t: abs(t.x - item.centre[0]) + abs(t.y - item.centre[1]), default=None
            )
            if (
                near is None
                or abs(near.x - item.centre[0]) + abs(near.y - item.centre[1]) > 0.2 * canvas.base
            ):
                out.append(f"{item.name}: nothing")
                continue
            rest.remove(near)
            same = near.name == item.name
            out.append(f"{item.colour}: {near.colour}" if same else f"{item.name}: {near.name}")
        out += [f"nothing: {thing.name}" for thing in rest]
    if not checks["word"]:
        out.append(
            f"{canvas.word.text if canvas.word else 'no word'}: {verdict.word.text if verdict.word else 'no word'}"
        )
    for name, want, seen in (
        ("background", canvas.background, verdict.background),
        ("style", canvas.style, verdict.style),
        ("mood", canvas.mood, verdict.mood),
        ("light", canvas.light, verdict.light),
    ):
        if not checks.get(name, True):
            out.append(f"{name} {want}: {seen}")
    return out
