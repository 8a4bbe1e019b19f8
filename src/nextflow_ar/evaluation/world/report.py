"""The figures of a run: shares right with 95 % intervals, ceilings and floors beside them, goals, and a plain table."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from nextflow_ar.evaluation.world.lines import LINES, SPLIT_NAMES, Line
from nextflow_ar.evaluation.world.run import CEILINGS, PROBE, WorldRun
from nextflow_ar.evaluation.world.scoring import Observed, score

Rows = Sequence[Mapping[str, Any]]
_RESAMPLES = 2000
_SHIFTS = (1, 7, 13)
"""How many items on the answers are shifted for the floor."""


@dataclass(frozen=True)
class Share:
    """A share of ``n`` with its 95 % interval."""

    n: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class LineScore:
    """One line in one split. ``tags``: by kind of item. ``extra``: measured beside, as shares. ``renders``, ``tokenizer``:
    ceilings; ``floor``: answers scored against other items; None where there is none. ``faults``: what came first, how
    often.
    """

    right: Share
    grade: float
    tags: dict[str, Share]
    extra: dict[str, Share]
    renders: Share | None
    tokenizer: Share | None
    floor: float | None
    faults: dict[str, int]


@dataclass(frozen=True)
class Figure:
    """A figure over several lines or of another kind, in one split. ``goal``: from the project's plan, None without."""

    name: str
    split: str
    value: Share
    goal: float | None
    note: str = ""


@dataclass(frozen=True)
class WorldReport:
    """Everything that a run found. ``lines``: name -> split -> score; ``probe``: split -> perplexity."""

    settings: dict[str, Any]
    lines: dict[str, dict[str, LineScore]]
    figures: list[Figure]
    probe: dict[str, dict[str, float]]

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(asdict(self), indent=1)


def wilson(hits: float, n: int, z: float = 1.96) -> Share:
    """A share with Wilson's interval. Raises ValueError for none."""
    if n < 1:
        raise ValueError("no items to score")
    p = hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n))
    return Share(n, p, max(0.0, low), min(1.0, high))


def mean_of_groups(groups: Sequence[np.ndarray], seed: int = 0) -> Share:
    """Mean of the groups' means with a bootstrap interval; every group is resampled on its own."""
    rng = np.random.default_rng(seed)
    means = np.zeros(_RESAMPLES)
    for values in groups:
        means += values[rng.integers(0, len(values), (_RESAMPLES, len(values)))].mean(1) / len(groups)
    low, high = np.quantile(means, [0.025, 0.975])
    value = float(np.mean([values.mean() for values in groups]))
    return Share(sum(len(values) for values in groups), value, float(low), float(high))


def f1_yes(rows: Rows, seed: int = 0) -> Share:
    """POPE's F1 of "yes" with a bootstrap interval; what is neither yes nor no counts as no."""
    truth = np.array([row["extra"]["truth"] == "yes" for row in rows])
    said = np.array([row["extra"]["said"].startswith("yes") for row in rows])
    rng = np.random.default_rng(seed)
    picks = [np.arange(len(rows)), *(rng.integers(0, len(rows), len(rows)) for _ in range(_RESAMPLES // 2))]
    found = []
    for pick in picks:
        hit, wrong = (truth & said)[pick].sum(), (truth ^ said)[pick].sum()
        found.append(2 * hit / max(1, 2 * hit + wrong))
    low, high = np.quantile(found[1:], [0.025, 0.975])
    return Share(len(rows), float(found[0]), float(low), float(high))


def relative_gain(thought: Rows, without: Rows, seed: int = 0) -> Share:
    """How much thinking adds, relative to the score without it; bootstrap over the items that both answered."""
    other = {row["index"]: row["right"] for row in without}
    pairs = np.array([(row["right"], other[row["index"]]) for row in thought if row["index"] in other], float)
    if not len(pairs) or not pairs[:, 1].any():
        raise ValueError("nothing is right without thinking")
    rng = np.random.default_rng(seed)
    means = pairs[rng.integers(0, len(pairs), (_RESAMPLES, len(pairs)))].mean(1)
    means = means[means[:, 1] > 0]
    low, high = np.quantile(means[:, 0] / means[:, 1] - 1, [0.025, 0.975])
    a, b = pairs.mean(0)
    return Share(len(pairs), float(a / b - 1), float(low), float(high))


def _right(rows: Rows) -> Share | None:
    return wilson(sum(row["right"] for row in rows), len(rows)) if rows else None


def _extra(rows: Rows) -> dict[str, Share]:
    """Shares of what is true or false beside the score."""
    found: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        for key, value in row["extra"].items():
            if isinstance(value, bool):
                found[key].append(value)
    return {key: wilson(sum(values), len(values)) for key, values in found.items()}


def floor_of(run: WorldRun, line: Line, rows: Rows) -> float:
    """Share right when every answer is scored against the items some numbers on (preservation left aside)."""
    hits = 0
    came = [replace(Observed.from_json(dict(row["observed"])), behind=None) for row in rows]
    for shift in _SHIFTS:
        for k, row in enumerate(rows):
            other = rows[(k + shift) % len(rows)]
            split = str(row["part"]).rpartition(" ")[2]
            hits += score(run.item_of((line.name, split, other["index"])), came[k]).right
    return hits / (len(_SHIFTS) * len(rows))


def line_score(run: WorldRun, line: Line, split: str) -> LineScore | None:
    """The figures of one line in one split; None where nothing was answered."""
    rows = run.journal.part(f"{line.name} {split}")
    ceilings = {name: run.journal.part(f"{name} {line.name} {split}") for name in CEILINGS}
    right = _right(rows)
    if right is None:
        return None
    tags: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        tags[row["tag"]].append(row)
    faults = Counter(row["fault"].split(":")[0].split(" ")[0] for row in rows if not row["right"])
    return LineScore(
        right,
        float(np.mean([row["grade"] for row in rows])),
        {tag: wilson(sum(r["right"] for r in mine), len(mine)) for tag, mine in sorted(tags.items())},
        _extra(rows),
        _right(ceilings["renders"]),
        _right(ceilings["tokenizer"]),
        None if line.group == "chat" else floor_of(run, line, rows),
        dict(faults.most_common(8)),
    )


_MEANS: tuple[tuple[str, tuple[str, ...], dict[str, float]], ...] = (
    ("captions", ("caption_short", "caption_full"), {"train": 0.90}),
    ("VQA", ("ask_yes_no", "ask_count", "ask_colour", "ask_place", "ask_choice"), {"train": 0.95}),
    ("edits", ("edit",), {"train": 0.70}),
    ("stories and recipes", ("story_script", "recipe"), {"train": 0.60}),
    ("video", ("video_draw", "video_next"), {"train": 0.80}),
    ("in-context edits", ("in_context",), {"train": 0.50}),
)


def figures_of(run: WorldRun, split: str) -> list[Figure]:
    """The figures that have goals, as far as the run has their lines."""
    rows = {name: run.journal.part(f"{name} {split}") for name in LINES}
    out: list[Figure] = []
    if rows["draw_scene"]:
        goal = 0.84 if split == "train" else 0.55
        for name, key in (
            ("text-to-image, mean of six types", "right"),
            ("the same by GenEval's rule", "geneval"),
        ):
            values: dict[str, list[float]] = defaultdict(list)
            for row in rows["draw_scene"]:
                values[row["tag"]].append(
                    float(row["right"] if key == "right" else row["extra"].get("geneval", False))
                )
            share = mean_of_groups([np.array(one) for one in values.values()])
            out.append(Figure(name, split, share, goal if key == "right" else None))
    for name, lines, goals in _MEANS:
        if all(rows[line] for line in lines):
            share = mean_of_groups([np.array([float(r["right"]) for r in rows[line]]) for line in lines])
            out.append(Figure(name, split, share, goals.get(split), f"mean of {', '.join(lines)}"))
    if rows["ask_yes_no"]:
        out.append(Figure("POPE's F1", split, f1_yes(rows["ask_yes_no"]), 0.95 if split == "train" else None))
    if rows["think"] and rows["think_without"]:
        try:
            gain = relative_gain(rows["think"], rows["think_without"])
            out.append(Figure("relative gain of thinking", split, gain, 0.167, "the paper's 0.60 to 0.70"))
        except ValueError:
            pass  # no gain is relative to nothing
    for line, name, goal in (("turn_drawn", "turns that ask for a picture and get one", 0.95),):
        if rows[line]:
            out.append(
                Figure(name, split, wilson(sum(r["right"] for r in rows[line]), len(rows[line])), goal)
            )
    if rows["turn_worded"]:
        wrong = sum(not row["right"] for row in rows["turn_worded"])
        share = wilson(wrong, len(rows["turn_worded"]))
        out.append(Figure("turns that do not ask and get one", split, share, 0.02, "at most"))
    return out


def probe_of(rows: Rows) -> dict[str, float]:
    """Perplexity per token with a bootstrap interval, and nats per letter (comparable between vocabularies)."""
    nats, tokens = (np.array([row[key] for row in rows], float) for key in ("nats", "tokens"))
    pick = np.random.default_rng(0).integers(0, len(rows), (_RESAMPLES, len(rows)))
    low, high = np.quantile(np.exp(nats[pick].sum(1) / tokens[pick].sum(1)), [0.025, 0.975])
    letters = sum(row["letters"] for row in rows)
    return {
        "n": len(rows),
        "perplexity": float(np.exp(nats.sum() / tokens.sum())),
        "low": float(low),
        "high": float(high),
        "nats_per_letter": float(nats.sum() / letters),
    }


def summed(run: WorldRun) -> WorldReport:
    """The report of a run, or of what there is of it."""
    lines: dict[str, dict[str, LineScore]] = {}
    figures: list[Figure] = []
    for split in run.settings.splits:
        for line in run.settings.chosen:
            found = line_score(run, line, split)
            if found is not None:
                lines.setdefault(line.name, {})[split] = found
        figures += figures_of(run, split)
    texts = {split: run.journal.part(f"{PROBE} {split}") for split in run.settings.splits}
    probe = {split: probe_of(rows) for split, rows in texts.items() if rows}
    return WorldReport(run.record, lines, figures, probe)


def table(report: WorldReport) -> str:
    """The report as plain text."""
    about = ", ".join(f"{key} {value}" for key, value in report.settings["about"].items())
    head = f"PlaygroundBench, the wide world, level {report.settings['level']}, judge {report.settings['judge'][:12]}"
    rows = [f"{head}, {about}" if about else head, ""]
    rows.append(
        f"{'line':<16}{'split':<17}{'items':>6}{'right':>7}{'95 %':>16}{'renders':>9}{'tokenizer':>11}{'floor':>7}"
    )
    for name, splits in report.lines.items():
        for split, found in splits.items():
            s = found.right
            ceilings = [f"{c.value:.3f}" if c else "-" for c in (found.renders, found.tokenizer)]
            low = f"{found.floor:.3f}" if found.floor is not None else "-"
            rows.append(
                f"{name:<16}{SPLIT_NAMES[split]:<17}{s.n:>6}{s.value:>7.3f}{f'[{s.low:.3f}, {s.high:.3f}]':>16}"
                f"{ceilings[0]:>9}{ceilings[1]:>11}{low:>7}"
            )
    rows.append("")
    for figure in report.figures:
        s = figure.value
        goal = f"   goal {figure.goal:.2f}" if figure.goal is not None else ""
        rows.append(
            f"{figure.name}, {SPLIT_NAMES[figure.split]}: {s.value:.3f} [{s.low:.3f}, {s.high:.3f}]{goal}"
        )
    for split, found in report.probe.items():
        rows.append(
            f"words alone, {SPLIT_NAMES[split]}: perplexity {found['perplexity']:.3f} [{found['low']:.3f}, "
            f"{found['high']:.3f}], {found['nats_per_letter']:.4f} nats per letter"
        )
    return "\n".join(rows)
