"""PlaygroundBench: its prompts, both scoring rules on hand-written verdicts, ceilings, floor, and continued
runs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nextflow_ar.data.playground.captions import caption
from nextflow_ar.data.playground.scenes import TASKS, Scene, Thing, held_out_pairs, render
from nextflow_ar.evaluation.judge import Found, Judge, Verdict
from nextflow_ar.evaluation.playground import (
    BenchError,
    BenchSettings,
    evaluate,
    prompts,
    score,
    score_caption,
    shuffled_floor,
)
from nextflow_ar.evaluation.playground_report import set_score
from nextflow_ar.evaluation.playground_tasks import caption_questions, geneval_relations, questions

SMALL = BenchSettings(n_per_type=4, in_distribution=2, captions=12, batch=5, per_type=2)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


def saw(
    *things: tuple[str, str | None, float, float], background: str = "blue", size: float = 32.0
) -> Verdict:
    return Verdict(tuple(Found(n, c, x, y, size, 0.9) for n, c, x, y in things), background)


DOG, CAT = ("dog", None, 16.0, 32.0), ("cat", None, 48.0, 32.0)
RED, BLUE = ("circle", "red", 16.0, 16.0), ("circle", "blue", 48.0, 48.0)
TWO = {"tag": "two_object", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}]}
COUNT = {"tag": "counting", "include": [{"class": "dog", "count": 2}]}
COLOUR = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}
BARE = {"tag": "single_object", "include": [{"class": "circle", "count": 1}]}
PAIR = {
    "tag": "color_attr",
    "include": [
        {"class": "circle", "count": 1, "color": "red"},
        {"class": "circle", "count": 1, "color": "blue"},
    ],
}
LEFT = {
    "tag": "position",
    "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
}


def asked(what: dict, background: str | None = None, exclude: list | None = None) -> dict:
    return what | {"exclude": exclude or [], "prompt": "", "background": background}


@pytest.mark.parametrize(
    ("metadata", "verdict", "exact", "geneval", "reason"),
    [
        (asked(TWO), saw(DOG, CAT), True, True, ""),
        (asked(TWO), saw(DOG), False, False, "missing: cat"),
        (asked(TWO), saw(), False, False, "missing: cat"),
        (asked(TWO), saw(DOG, CAT, RED), False, True, "extra: red circle"),
        (asked(TWO), saw(DOG, CAT, ("unknown", None, 48, 8)), False, True, "extra: unknown"),
        (asked(TWO, "blue"), saw(DOG, CAT), True, True, ""),
        (asked(TWO, "red"), saw(DOG, CAT), False, True, "background: wanted red, saw blue"),
        (asked(COUNT, exclude=[{"class": "dog", "count": 3}]), saw(DOG), False, False, "missing: dog"),
        (asked(COUNT, exclude=[{"class": "dog", "count": 3}]), saw(DOG, DOG), True, True, ""),
        (
            asked(COUNT, exclude=[{"class": "dog", "count": 3}]),
            saw(DOG, DOG, DOG),
            False,
            False,
            "extra: dog",
        ),
        (asked(COLOUR), saw(RED), True, True, ""),
        (asked(COLOUR), saw(BLUE), False, False, "colour: wanted red circle, saw blue circle"),
        (asked(BARE), saw(BLUE), True, True, ""),
        (asked(BARE), saw(RED, BLUE), False, True, "extra: blue circle"),
        (asked(PAIR), saw(BLUE, RED), True, True, ""),
        (asked(PAIR), saw(RED, RED), False, False, "colour: wanted blue circle, saw red circle"),
        (asked(PAIR), saw(RED), False, False, "missing: blue circle"),
        (asked(LEFT), saw(CAT, DOG), True, True, ""),
        (asked(LEFT), saw(("cat", None, 16, 32), ("dog", None, 48, 32)), False, False, "relation"),
        (asked(LEFT), saw(("cat", None, 48, 48), ("dog", None, 16, 16)), False, True, "relation"),
        (asked(LEFT), saw(("cat", None, 30, 32), ("dog", None, 24, 32)), False, False, "relation"),
        (asked(LEFT), saw(DOG), False, False, "missing: cat"),
    ],
)
def test_each_fault(metadata: dict, verdict: Verdict, exact: bool, geneval: bool, reason: str) -> None:
    result = score(metadata, verdict)
    assert (result.exact, result.geneval) == (exact, geneval)
    assert result.reason.startswith(reason) and bool(result.reason) is bool(reason)


def test_geneval_relations_by_hand() -> None:
    def relations(ax: float, ay: float) -> set[str]:
        return geneval_relations(Found("dog", None, ax, ay, 20, 1), Found("cat", None, 32, 32, 20, 1))

    assert relations(10, 32) == {"left of"}
    assert relations(60, 36) == {"right of"}
    assert relations(32, 8) == {"above"}
    assert relations(12, 56) == {"left of", "below"}
    assert relations(30, 34) == set()  # within a tenth of the sizes
    assert relations(32, 32) == set()


def test_prompts_are_480_distinct_fixed_and_of_their_split() -> None:
    held = questions(80, "test")
    assert [q.index for q in held] == list(range(480))
    assert Counter(q.metadata["tag"] for q in held) == dict.fromkeys(TASKS, 80)
    assert len({q.metadata["prompt"] for q in held}) == 480
    assert all(held_out_pairs(q.scene) > 0 for q in held if q.scene.task not in ("single_object", "counting"))
    usual = questions(80, "train")
    assert max(held_out_pairs(q.scene) for q in usual) == 0
    assert prompts(80, "test") == [q.metadata for q in held]
    assert prompts(80, "test", seed=8_000_100) != prompts(80, "test")
    named = sum(q.metadata["background"] is not None for q in held)
    assert 0.65 <= named / 480 <= 0.9


def test_metadata_says_what_the_prompt_says() -> None:
    for question in questions(20, "test"):
        meta = question.metadata
        assert set(meta) == {"tag", "include", "exclude", "prompt", "background"}
        assert sum(want["count"] for want in meta["include"]) == len(question.scene.things)
        for want in meta["include"]:
            assert want.get("color", "") in meta["prompt"]
            assert ("color" in want) is (
                want["class"] in ("circle", "square", "triangle", "cross", "ring")
            ) or (meta["tag"] == "single_object")
            assert want.get("position", [""])[0] in meta["prompt"]
        assert (meta["background"] is not None) is ("background" in meta["prompt"])
        truth = tuple(Found(t.name, t.colour, *t.centre, t.size, 1.0) for t in question.scene.things)
        assert score(meta, Verdict(truth, question.scene.background)).exact
        assert score(meta, Verdict(truth, question.scene.background)).geneval


def test_captions_by_hand() -> None:
    scene = Scene("two_object", "blue", (Thing("dog", None, 0, 0, 32), Thing("ring", "red", 32, 0, 32)))
    cases = {
        "a dog and a red ring on a blue background": (True, True, True),
        "a red ring and a dog on a blue background": (True, True, True),
        "a dog and a red ring on a green background": (True, False, True),
        "a dog and a red ring": (True, False, True),
        "a dog and a green ring on a blue background": (False, True, True),
        "two dogs and a red ring on a blue background": (False, True, True),
        "a dog on a blue background": (False, True, True),
        "a dog and a gryphon on a blue background": (False, False, False),
        "": (False, False, False),
    }
    for text, expected in cases.items():
        result = score_caption(scene, text)
        assert (result.right, result.background, result.readable) == expected, text


def test_caption_scenes_are_half_held_out() -> None:
    items = caption_questions(400)
    assert Counter(item.split for item in items) == {"test": 200, "train": 200}
    assert max(held_out_pairs(item.scene) for item in items if item.split == "train") == 0
    assert min(Counter(item.scene.task for item in items).values()) >= 66


def test_interval_and_means_by_hand() -> None:
    rows = [
        {"tag": "colors", "exact": k < 8, "geneval": True, "reason": "" if k < 8 else "extra: x"}
        for k in range(10)
    ]
    rows += [{"tag": "counting", "exact": False, "geneval": k < 5, "reason": "missing: x"} for k in range(10)]
    result = set_score(rows)
    assert result.exact == pytest.approx(0.4) and result.geneval == pytest.approx(0.75)
    assert result.faults == {"missing": 10, "extra": 2}
    assert result.exact_ci == pytest.approx((0.25, 0.5), abs=0.03)  # sd of one mean of ten: 0.126, halved
    with pytest.raises(ValueError, match="no results"):
        set_score([])


def drawer(calls: list[list[str]]) -> Callable[[list[str]], np.ndarray]:
    """A perfect draughtsman: the true render of every prompt."""
    held, usual = questions(SMALL.n_per_type, "test"), questions(SMALL.in_distribution, "train")
    scenes = {question.metadata["prompt"]: question.scene for question in (*held, *usual)}

    def draw(texts: list[str]) -> np.ndarray:
        calls.append(texts)
        return np.stack([render(scenes[text]) for text in texts])

    return draw


def describer(pictures: np.ndarray) -> list[str]:
    """A perfect narrator: it knows the benchmark's scenes by their pictures."""
    known = {render(item.scene).tobytes(): caption(item.scene) for item in caption_questions(SMALL.captions)}
    return [known[picture.tobytes()] for picture in pictures]


def test_true_renders_pass_and_shuffled_prompts_do_not(judge: Judge) -> None:
    held = questions(80, "test")
    verdicts = judge(np.stack([render(question.scene) for question in held]))
    results = [score(q.metadata, v) for q, v in zip(held, verdicts, strict=True)]
    assert np.mean([result.exact for result in results]) >= 0.97
    assert np.mean([result.geneval for result in results]) >= 0.97
    assert shuffled_floor([q.metadata for q in held], verdicts) <= 0.02


def test_a_whole_run_and_its_files(judge: Judge, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = evaluate(
        drawer([]),
        describer,
        lambda pictures: np.zeros_like(pictures),
        out=tmp_path,
        settings=SMALL,
        judge=judge,
        about={"model": "perfect"},
        progress=lambda part, done, total: seen.append((part, done, total)),
    )
    assert report.sets["test"].exact >= 0.95 and report.sets["train"].exact >= 0.9
    assert report.renders["test"].exact == report.sets["test"].exact
    assert report.reconstructed["test"].exact == 0.0  # a black picture shows nothing
    assert report.captions["all"].right == 1.0 and report.captions["all"].background == 1.0
    assert report.captions["test"].n == report.captions["train"].n == 6
    assert report.floor is not None and report.floor <= 0.2
    assert ("prompts test", 24, 24) in seen and ("captions", 12, 12) in seen
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["settings"]["judge"] == judge.sha256 and stored["settings"]["about"] == {"model": "perfect"}
    table = (tmp_path / "report.txt").read_text()
    assert table.strip() == report.table().strip() and max(map(len, table.split("\n"))) <= 100
    for word in (*TASKS, "mean of types", "ceiling", "floor", "captions"):
        assert word in table
    assert (tmp_path / "sheet.png").stat().st_size > 5000
    assert len(list((tmp_path / "pictures").iterdir())) == 24 + 12


def test_a_killed_run_continues_and_ends_the_same(judge: Judge, tmp_path: Path) -> None:
    whole: list[list[str]] = []
    first = evaluate(drawer(whole), describer, out=tmp_path / "whole", settings=SMALL, judge=judge)
    before: list[list[str]] = []
    draw = drawer(before)

    def dies(texts: list[str]) -> np.ndarray:
        if len(before) == 3:
            raise KeyboardInterrupt
        return draw(texts)

    with pytest.raises(KeyboardInterrupt):
        evaluate(dies, describer, out=tmp_path / "killed", settings=SMALL, judge=judge)
    journal = tmp_path / "killed" / "results.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(
        b"".join(lines[:-1]) + lines[-1][:40]
    )  # killed while it wrote the third batch's last line
    after: list[list[str]] = []
    second = evaluate(drawer(after), describer, out=tmp_path / "killed", settings=SMALL, judge=judge)
    assert after == whole[2:]  # the same batches, from the torn one on
    assert second == first
    again: list[list[str]] = []
    assert evaluate(drawer(again), describer, out=tmp_path / "killed", settings=SMALL, judge=judge) == first
    assert again == []


def test_a_journal_of_another_run_is_refused(judge: Judge, tmp_path: Path) -> None:
    few = replace(SMALL, n_per_type=1, in_distribution=0, captions=0)
    evaluate(None, out=tmp_path, settings=few, judge=judge, about={"model": "one"})
    with pytest.raises(BenchError, match="holds a run with another model: choose another folder"):
        evaluate(None, out=tmp_path, settings=few, judge=judge, about={"model": "two"})
    more = replace(few, captions=12)
    with pytest.raises(BenchError, match="holds a run with another captions, model, seed: choose"):
        evaluate(None, out=tmp_path, settings=more, judge=judge, about={"model": "two", "seed": 5})
    (tmp_path / "results.jsonl").write_text("not a journal\n")
    with pytest.raises(BenchError, match="is not a journal of this benchmark"):
        evaluate(None, out=tmp_path, settings=few, judge=judge, about={"model": "one"})


def test_pictures_of_the_wrong_shape_are_refused(judge: Judge, tmp_path: Path) -> None:
    few = replace(SMALL, n_per_type=1, in_distribution=0, captions=0)
    with pytest.raises(
        BenchError, match=r"expected uint8 pictures \(5, 64, 64, 3\), got uint8 \(5, 32, 32, 3\)"
    ):
        evaluate(lambda t: np.zeros((len(t), 32, 32, 3), np.uint8), out=tmp_path, settings=few, judge=judge)
    with pytest.raises(BenchError, match="expected 5 captions, got 0"):
        evaluate(None, lambda p: [], out=tmp_path / "b", settings=replace(few, captions=12), judge=judge)
