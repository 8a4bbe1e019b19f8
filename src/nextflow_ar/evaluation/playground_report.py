"""PlaygroundBench's report: scores with confidence intervals, a plain table, and a sheet of pictures with
verdicts.
"""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nextflow_ar.data.playground.scenes import TASKS
from nextflow_ar.evaluation.judge import Verdict

_RESAMPLES = 2000
SET_NAMES = {"test": "held-out", "train": "in-distribution"}


@dataclass(frozen=True)
class TypeScore:
    """One task type: number of prompts, shares right under either rule."""

    n: int
    exact: float
    geneval: float


@dataclass(frozen=True)
class SetScore:
    """One set of prompts. ``exact`` and ``geneval``: mean over the task types; ``_ci``: bootstrap 95 %
    interval.

    ``faults``: how often each kind of fault came first under the exact rule.
    """

    types: dict[str, TypeScore]
    exact: float
    exact_ci: tuple[float, float]
    geneval: float
    geneval_ci: tuple[float, float]
    faults: dict[str, int]


@dataclass(frozen=True)
class CaptionScore:
    """Captions: number, share right in objects, counts and colours, share with the right background."""

    n: int
    right: float
    right_ci: tuple[float, float]
    background: float


@dataclass(frozen=True)
class Report:
    """Everything that a run of the benchmark found.

    ``settings``: what was run, with the judge's hash. ``sets``, ``renders`` (true renders of the prompts'
    scenes) and ``reconstructed`` (the same through the tokenizer): by split. ``floor``: held-out pictures
    against shuffled prompts, exact. ``captions``: by split, and "all".
    """

    settings: dict[str, Any]
    sets: dict[str, SetScore]
    renders: dict[str, SetScore]
    reconstructed: dict[str, SetScore]
    floor: float | None
    captions: dict[str, CaptionScore]

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(asdict(self), indent=2)

    def table(self) -> str:
        """The report as plain text, at most 100 columns."""
        return "\n".join([_headline(self.settings), "", *_type_rows(self), "", *_other_rows(self)])


def _interval(groups: Sequence[np.ndarray], seed: int = 0) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean of the groups' means; every group is resampled on its own."""
    rng = np.random.default_rng(seed)
    means = np.zeros(_RESAMPLES)
    for values in groups:
        means += values[rng.integers(0, len(values), (_RESAMPLES, len(values)))].mean(1) / len(groups)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def set_score(rows: Sequence[Mapping[str, Any]]) -> SetScore:
    """Score of one set from its rows (keys ``tag``, ``exact``, ``geneval``, ``reason``). Raises ValueError
    on none.
    """
    if not rows:
        raise ValueError("no results to score")
    types: dict[str, TypeScore] = {}
    exact: list[np.ndarray] = []
    loose: list[np.ndarray] = []
    for task in TASKS:
        mine = [row for row in rows if row["tag"] == task]
        if not mine:
            continue
        exact.append(np.array([row["exact"] for row in mine], float))
        loose.append(np.array([row["geneval"] for row in mine], float))
        types[task] = TypeScore(len(mine), float(exact[-1].mean()), float(loose[-1].mean()))
    faults = Counter(row["reason"].split(":")[0] for row in rows if row["reason"])
    return SetScore(
        types=types,
        exact=float(np.mean([values.mean() for values in exact])),
        exact_ci=_interval(exact),
        geneval=float(np.mean([values.mean() for values in loose])),
        geneval_ci=_interval(loose),
        faults=dict(faults.most_common()),
    )


def caption_score(rows: Sequence[Mapping[str, Any]]) -> CaptionScore:
    """Score of captions from their rows (keys ``right``, ``background``). Raises ValueError on none."""
    if not rows:
        raise ValueError("no captions to score")
    right = np.array([row["right"] for row in rows], float)
    background = np.array([row["background"] for row in rows], float)
    return CaptionScore(len(rows), float(right.mean()), _interval([right]), float(background.mean()))


def _headline(settings: Mapping[str, Any]) -> str:
    about = ", ".join(f"{key} {value}" for key, value in settings.get("about", {}).items())
    line = f"PlaygroundBench, level {settings['level']}, judge {settings['judge'][:12]}"
    return f"{line}, {about}" if about else line


def _type_rows(report: Report) -> list[str]:
    columns = [(f"{SET_NAMES[split]}", scores) for split, scores in report.sets.items()]
    columns += [(f"renders {split}", scores) for split, scores in report.renders.items() if split == "test"]
    columns += [(f"tokenizer {split}", s) for split, s in report.reconstructed.items() if split == "test"]
    if not columns:
        return []
    rows = [" " * 14 + "".join(f"{name:>20}" for name, _ in columns)]
    rows.append(f"{'type':<14}" + f"{'exact':>11}{'geneval':>9}" * len(columns))
    for task in TASKS:
        cells = [scores.types.get(task) for _, scores in columns]
        text = "".join(f"{c.exact:>11.3f}{c.geneval:>9.3f}" if c else f"{'-':>11}{'-':>9}" for c in cells)
        rows.append(f"{task:<14}{text}")
    rows.append(f"{'mean of types':<14}" + "".join(f"{s.exact:>11.3f}{s.geneval:>9.3f}" for _, s in columns))
    intervals = "".join(f"{f'[{s.exact_ci[0]:.3f}, {s.exact_ci[1]:.3f}]':>20}" for _, s in columns)
    rows.append(f"{'95 % (exact)':<14}{intervals}")
    return rows


def _other_rows(report: Report) -> list[str]:
    rows = []
    for split, scores in report.sets.items():
        faults = ", ".join(f"{kind} {count}" for kind, count in scores.faults.items())
        rows.append(f"first faults, {SET_NAMES[split]}: {faults or 'none'}")
    for name, by_split in (("true renders", report.renders), ("through the tokenizer", report.reconstructed)):
        cells = ", ".join(f"{SET_NAMES[split]} {scores.exact:.3f}" for split, scores in by_split.items())
        rows += [f"ceiling, {name}: {cells}"] if cells else []
    if report.floor is not None:
        rows.append(f"floor, held-out pictures against shuffled prompts: {report.floor:.3f}")
    for split, scores in report.captions.items():
        low, high = scores.right_ci
        rows.append(
            f"captions, {SET_NAMES.get(split, split)} ({scores.n}): fully right {scores.right:.3f} "
            f"[{low:.3f}, {high:.3f}], background {scores.background:.3f}"
        )
    return rows


_SIDE, _TEXT, _GAP = 128, 84, 8


def sheet(rows: Sequence[Mapping[str, Any]], pictures: Path, per_type: int) -> Image.Image:
    """The first ``per_type`` pictures of every type, not chosen by score: prompt, picture, verdict.

    ``rows``: as the runner stores them. A green frame passes the exact rule, a red one does not and says why.
    """
    width = per_type * (_SIDE + _GAP) + _GAP
    height = len(TASKS) * (_SIDE + _TEXT + _GAP) + _GAP
    page = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(page)
    font = ImageFont.load_default(size=9)
    for line, task in enumerate(TASKS):
        mine = [row for row in rows if row["tag"] == task][:per_type]
        for column, row in enumerate(mine):
            x, y = _GAP + column * (_SIDE + _GAP), _GAP + line * (_SIDE + _TEXT + _GAP)
            with Image.open(pictures / row["picture"]) as file:
                large = file.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
            page.paste(large, (x, y))
            colour = (20, 140, 40) if row["exact"] else (200, 30, 30)
            draw.rectangle((x - 2, y - 2, x + _SIDE + 1, y + _SIDE + 1), outline=colour, width=2)
            faults = "pass" if row["exact"] else f"fail, {row['reason']}"
            saw = "" if row["exact"] else f"saw {Verdict.from_json(row['verdict']).words()}"
            written = [(text, (0, 0, 0)) for text in textwrap.wrap(row["prompt"], 26)[:3]]
            written += [(text, colour) for text in textwrap.wrap(faults, 26)[:2]]
            written += [(text, (110, 110, 110)) for text in textwrap.wrap(saw, 26)[:2]]
            for k, (text, ink) in enumerate(written):
                draw.text((x, y + _SIDE + 3 + 11 * k), text, fill=ink, font=font)
    return page
