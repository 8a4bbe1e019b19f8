"""PlaygroundBench's questions: fixed prompts as GenEval-format metadata, fixed scenes to caption, and how
both are scored.

A prompt says less than its scene shows (no positions, often no background, no colour for a lone shape):
only what it says counts. Two rules are applied side by side. ``exact``: precisely the requested things and
nothing else, in the right colours, relation and named background. ``geneval``: the official, looser rule of
GenEval, which lets further things stand around and ignores the background.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from nextflow_ar.data.playground.captions import Kind, counts_of, prompt, read_caption
from nextflow_ar.data.playground.scenes import TASKS, Scene, SceneSampler, Task, Thing, level, relation_holds
from nextflow_ar.data.playground.world import NATIVE
from nextflow_ar.evaluation.judge import Found, Verdict

Metadata = dict[str, Any]
"""GenEval's keys ``tag``, ``include`` [{class, count, color?, position?}], ``exclude``, ``prompt``, and
``background``.
"""

BenchSplit = Literal["test", "train"]
BENCH_SEED = 8_000_000
"""Seeds from here to 8_999_999 belong to the benchmark: nothing trains on them. Offsets below keep its
parts apart.
"""
_OFFSET = {("prompt", "test"): 0, ("prompt", "train"): 1, ("caption", "test"): 2, ("caption", "train"): 3}
_GENEVAL_MARGIN = 0.1  # GenEval's POSITION_THRESHOLD: share of both sizes that an offset must exceed
_TRIES_PER_PROMPT = 40


@dataclass(frozen=True)
class Question:
    """A prompt with a scene that fulfils it (the ceiling's picture)."""

    index: int
    metadata: Metadata
    scene: Scene


@dataclass(frozen=True)
class CaptionQuestion:
    """A scene to describe, from ``split``."""

    index: int
    split: BenchSplit
    scene: Scene


@dataclass(frozen=True)
class Result:
    """Score of one picture. ``reason``: the first thing that breaks the exact rule, empty if none does."""

    exact: bool
    geneval: bool
    reason: str


@dataclass(frozen=True)
class CaptionResult:
    """Score of one caption. ``right``: objects, counts and colours; ``background`` apart; ``readable``: it
    parsed.
    """

    right: bool
    background: bool
    readable: bool


def metadata_of(scene: Scene, text: str) -> Metadata:
    """What the prompt ``text`` asks of a picture; ``scene`` is the scene that it was made from."""
    bare = scene.task == "single_object"
    include: list[dict[str, Any]] = []
    exclude: list[dict[str, Any]] = []
    if scene.relation is not None:
        first, second = scene.things[0], scene.things[1]
        include = [
            _wanted(second.key, 1, bare),
            _wanted(first.key, 1, bare) | {"position": [scene.relation, 0]},
        ]
    else:
        include = [_wanted(key, count, bare) for key, count in counts_of(scene)]
    if scene.task == "counting":
        exclude = [{"class": want["class"], "count": want["count"] + 1} for want in include]
    named = scene.background if f"{scene.background} background" in text else None
    return {"tag": scene.task, "include": include, "exclude": exclude, "prompt": text, "background": named}


def _wanted(key: tuple[str, str | None], count: int, bare: bool) -> dict[str, Any]:
    name, colour = key
    want: dict[str, Any] = {"class": name, "count": count}
    return want if bare or colour is None else want | {"color": colour}


def questions(
    n_per_type: int = 80, split: BenchSplit = "test", seed: int = BENCH_SEED, level_name: str = "easy"
) -> list[Question]:
    """``n_per_type`` prompts of each task type, in the order of TASKS; the same arguments give the same
    list.

    ``split`` "test": two_object, colors, position and color_attr each show a combination that training
    never shows. "train": the same kinds of prompts in distribution. Prompts differ from each other as long
    as their type allows.
    """
    found: list[Question] = []
    for task in TASKS:
        found.extend(_of_type(task, n_per_type, split, seed, level_name, len(found)))
    return found


def _of_type(task: Task, n: int, split: BenchSplit, seed: int, level_name: str, start: int) -> list[Question]:
    sampler = SceneSampler(level(level_name), split, seed + _OFFSET["prompt", split])
    seen: set[str] = set()
    chosen: list[Question] = []
    base = TASKS.index(task) * 1_000_000
    for index in range(base, base + n * _TRIES_PER_PROMPT):
        if len(chosen) == n:
            break
        scene = sampler.scene(index, task)
        text = prompt(scene, sampler.rng(index, stream=1))
        left = base + n * _TRIES_PER_PROMPT - index
        if text in seen and left > n - len(chosen):
            continue
        seen.add(text)
        chosen.append(Question(start + len(chosen), metadata_of(scene, text), scene))
    return chosen


def prompts(
    n_per_type: int = 80, split: BenchSplit = "test", seed: int = BENCH_SEED, level_name: str = "easy"
) -> list[Metadata]:
    """The metadata of :func:`questions`."""
    return [question.metadata for question in questions(n_per_type, split, seed, level_name)]


def caption_questions(
    n: int = 400, seed: int = BENCH_SEED, level_name: str = "easy"
) -> list[CaptionQuestion]:
    """``n`` scenes to describe, test and train split in turn, each split through the six task types in
    turn.
    """
    halves: tuple[BenchSplit, BenchSplit] = ("test", "train")
    samplers = {s: SceneSampler(level(level_name), s, seed + _OFFSET["caption", s]) for s in halves}
    chosen = []
    for index in range(n):
        split = halves[index % 2]
        chosen.append(
            CaptionQuestion(index, split, samplers[split].scene(index, TASKS[index // 2 % len(TASKS)]))
        )
    return chosen


def score(metadata: Metadata, verdict: Verdict) -> Result:
    """Score what the judge saw against what the prompt asked."""
    reason = _exact_fault(metadata, verdict)
    return Result(reason == "", geneval_rule(metadata, verdict.things), reason)


def _say(name: str, colour: str | None) -> str:
    return f"{colour} {name}" if colour else name


def _exact_fault(metadata: Metadata, verdict: Verdict) -> str:
    """The first fault under the exact rule, or the empty string."""
    rest = list(verdict.things)
    matched: list[list[Found]] = [[] for _ in metadata["include"]]
    order = sorted(range(len(matched)), key=lambda k: "color" not in metadata["include"][k])
    missing: list[tuple[str, str | None]] = []
    for k in order:  # those with a colour choose first
        want = metadata["include"][k]
        name, colour = want["class"], want.get("color")
        for _ in range(want["count"]):
            fit = next((f for f in rest if f.name == name and colour in (None, f.colour)), None)
            if fit is None:
                missing.append((name, colour))
            else:
                rest.remove(fit)
                matched[k].append(fit)
    for name, colour in missing:
        other = next((f for f in rest if f.name == name), None)
        if other is not None:
            return f"colour: wanted {_say(name, colour)}, saw {_say(*other.key)}"
    if missing:
        return f"missing: {_say(*missing[0])}"
    if rest:
        return f"extra: {_say(*rest[0].key)}"
    return _relation_fault(metadata, matched) or _background_fault(metadata, verdict)


def _relation_fault(metadata: Metadata, matched: Sequence[Sequence[Found]]) -> str:
    for k, want in enumerate(metadata["include"]):
        if "position" not in want:
            continue
        relation, target = want["position"]
        for a in matched[k]:
            for b in matched[target]:
                # relation_holds reads nothing but the centre and the size
                if not relation_holds(relation, cast(Thing, a), cast(Thing, b)):
                    return f"relation: {a.name} is not {relation} {b.name}"
    return ""


def _background_fault(metadata: Metadata, verdict: Verdict) -> str:
    named = metadata["background"]
    if named is None or named == verdict.background:
        return ""
    return f"background: wanted {named}, saw {verdict.background}"


def geneval_rule(metadata: Metadata, things: Sequence[Found]) -> bool:
    """GenEval's ``evaluate``: things of a class, best first, cut to the count; colours; relations; the
    exclusions.

    GenEval never asks twice for one class; where we do (a red circle and a blue circle), each request takes
    its things from those that earlier ones left, its own colour first.
    """
    correct = True
    free = list(things)
    groups: list[list[Found] | None] = []
    classes = [want["class"] for want in metadata["include"]]
    for want in metadata["include"]:
        colour = want.get("color")
        candidates = [f for f in free if f.name == want["class"]]
        if classes.count(want["class"]) > 1:
            candidates.sort(key=lambda f: f.colour != colour)
        group = candidates[: want["count"]]
        good = len(group) == want["count"] and (colour is None or all(f.colour == colour for f in group))
        if good and "position" in want:
            relation, target = want["position"]
            other = groups[target]
            good = other is not None and all(
                relation in geneval_relations(a, b) for a in group for b in other
            )
        free = [f for f in free if f not in group]
        groups.append(group if good else None)
        correct = correct and good
    for want in metadata["exclude"]:
        correct = correct and sum(f.name == want["class"] for f in things) < want["count"]
    return correct


def geneval_relations(a: Found, b: Found) -> set[str]:
    """GenEval's ``relative_position``: where ``a`` stands relative to ``b``; two answers are possible on a
    diagonal.
    """
    offset = (a.x - b.x, a.y - b.y)
    slack = _GENEVAL_MARGIN * (a.size + b.size)
    dx, dy = (math.copysign(max(abs(o) - slack, 0.0), o) for o in offset)
    length = math.hypot(*offset)
    if abs(dx) < 1e-3 and abs(dy) < 1e-3:
        return set()
    tests = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
    return {relation for relation, value in tests.items() if value / length > 0.5}


def score_caption(scene: Scene, text: str) -> CaptionResult:
    """Score a caption of ``scene``: one that :func:`read_caption` cannot read is wrong in all.

    A sprite's own colour may be said ("a red car"): that is what it looks like, and the wide world's captions say it.
    """
    reading = read_caption(text)
    if reading is None:
        return CaptionResult(False, False, False)
    said: Counter[Kind] = Counter()
    for (name, colour), count in reading.counts:
        said[name, None if NATIVE.get(name) == colour else colour] += count
    return CaptionResult(
        said == Counter(dict(counts_of(scene))), reading.background == scene.background, True
    )
