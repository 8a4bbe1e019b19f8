"""PlaygroundBench in the wide world: scoring, runs, the report. The judge here knows what it looks at."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from nextflow_ar.config import from_dict, load_yaml, to_dict
from nextflow_ar.data.playground.canvases import Canvas, Item
from nextflow_ar.data.playground.episodes import Said
from nextflow_ar.data.playground.looks import render
from nextflow_ar.evaluation.playground import BenchError
from nextflow_ar.evaluation.world.asking import Ask, Reply
from nextflow_ar.evaluation.world.evaluate import evaluate_world
from nextflow_ar.evaluation.world.lines import LINES, SPLITS, item
from nextflow_ar.evaluation.world.motion import film_checks, frame_checks, motion_of
from nextflow_ar.evaluation.world.oracle import Oracle
from nextflow_ar.evaluation.world.preservation import behind, outside, psnr
from nextflow_ar.evaluation.world.report import f1_yes, mean_of_groups, relative_gain, wilson
from nextflow_ar.evaluation.world.run import WorldBenchSettings, WorldRun
from nextflow_ar.evaluation.world.scoring import Observed, score
from nextflow_ar.evaluation.world.tales import shows
from nextflow_ar.evaluation.world.verdict import SeenWord, Verdict, perfect
from nextflow_ar.evaluation.world.wanted import names_colour, names_ground, names_place

RECIPE = Path(__file__).parents[2] / "recipes" / "world_bench.yaml"
ITEMS = 12


def canvas(*items: Item, background: str = "blue", **more) -> Canvas:
    return Canvas(64, 64, background, items, **more)


class Knowing:
    """A judge that recognises the very pictures of a run's answers."""

    sha256 = "0" * 64

    def __init__(self) -> None:
        self.known: dict[bytes, Verdict] = {}

    def learn(self, run_settings: WorldBenchSettings) -> None:
        for line in run_settings.chosen:
            for split in SPLITS:
                for number in range(run_settings.items):
                    for shown in run_settings.item(line, split, number).expected:
                        self.known[render(shown).tobytes()] = perfect(shown)

    def __call__(self, pictures) -> list[Verdict]:
        return [self.known[picture.tobytes()] for picture in pictures]


@pytest.fixture(scope="module")
def settings() -> WorldBenchSettings:
    return WorldBenchSettings(items=ITEMS, ceiling=4, batch=5, kept=3)


@pytest.fixture(scope="module")
def knowing(settings: WorldBenchSettings) -> Knowing:
    judge = Knowing()
    judge.learn(settings)
    return judge


def read(exchanges) -> list[tuple[float, int]]:
    return [(0.5 * len(one), len(one)) for one in exchanges]


def oracle_of(run_settings: WorldBenchSettings, astray: int = 0) -> Oracle:
    return Oracle(
        lambda key: run_settings.item(LINES[key[0]], "train" if key[1] == "train" else "test", key[2]), astray
    )


def told(found) -> Observed:
    return Observed(
        tuple(perfect(one) for one in found.expected),
        tuple(part.text for part in found.answer if isinstance(part, Said)),
        tuple("text" if isinstance(part, Said) else "picture" for part in found.answer),
        0.0 if found.line.kind == "edit" else None,
    )


@pytest.mark.parametrize("name", LINES)
def test_the_truth_is_right_and_another_items_truth_is_not(name: str) -> None:
    items = [item(LINES[name], split, k, (64, 64), "world") for split in SPLITS for k in range(14)]
    scores = [score(one, told(one)) for one in items]
    assert [one.fault for one in scores] == [""] * len(items)
    assert all(one.right and one.grade == 1 for one in scores)
    if "right" in scores[0].extra:
        assert all(one.extra["right"] for one in scores)
    if LINES[name].group != "chat":
        astray = [score(a, told(b)).right for a, b in zip(items, items[1:] + items[:1], strict=True)]
        assert np.mean(astray) <= (
            0.65 if name == "ask_yes_no" else 0.45 if LINES[name].group == "ask" else 0.12
        )


def test_settings_in_the_recipe_are_the_defaults() -> None:
    assert to_dict(from_dict(WorldBenchSettings, load_yaml(RECIPE))) == to_dict(WorldBenchSettings())


def test_an_oracle_reaches_the_ceiling_and_the_page_is_well_formed(settings, knowing, tmp_path: Path) -> None:
    report = evaluate_world(
        oracle_of(settings), settings, tmp_path, judge=knowing, read=read, about={"model": "truth"}
    )
    assert set(report.lines) == set(LINES)
    for name, splits in report.lines.items():
        for found in splits.values():
            assert found.right.value == 1 and found.right.n == ITEMS, name
            assert found.renders is None or found.renders.value == 1
            assert found.floor is None or found.floor < (0.75 if LINES[name].group == "ask" else 0.2), name
    figures = {(f.name, f.split): f.value.value for f in report.figures}
    assert figures["text-to-image, mean of six types", "train"] == 1
    assert figures["the same by GenEval's rule", "test"] == 1
    assert figures["POPE's F1", "train"] == 1
    assert figures["relative gain of thinking", "train"] == 0
    assert figures["turns that do not ask and get one", "test"] == 0
    assert report.probe["train"]["perplexity"] == pytest.approx(np.exp(0.5))
    for name in ("report.json", "report.txt", "report.html", "geneval-test.jsonl"):
        assert (tmp_path / name).stat().st_size > 500
    parser = Balanced()
    parser.feed((tmp_path / "report.html").read_text())
    assert parser.open == [] and parser.images >= 2 * 10 and "Figures and goals" in parser.text


def test_wrong_answers_stay_near_the_floor(settings, knowing, tmp_path: Path) -> None:
    few = replace(settings, lines=("draw_scene", "caption_short", "edit", "video_draw"), ceiling=0)
    report = evaluate_world(oracle_of(few, astray=5), few, tmp_path, judge=knowing)
    for splits in report.lines.values():
        assert all(found.right.value <= 0.1 for found in splits.values())
    html = (tmp_path / "report.html").read_text()
    assert html.count("<h4>worst</h4>") == 8


class Balanced(HTMLParser):
    """Collects open tags, pictures and text; every end tag has to close the last one opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images, self.text = 0, ""

    def handle_starttag(self, tag: str, attrs) -> None:
        if tag == "img":
            self.images += 1
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


class Dying:
    """An oracle that is killed after some batches."""

    def __init__(self, oracle: Oracle, batches: int) -> None:
        self.oracle, self.left, self.asked = oracle, batches, 0

    def __call__(self, asks: list[Ask]) -> list[Reply]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked += len(asks)
        return self.oracle(asks)


def test_a_killed_run_goes_on(settings, knowing, tmp_path: Path) -> None:
    few = replace(settings, lines=("draw_scene", "edit"), ceiling=0)
    whole = evaluate_world(oracle_of(few), few, tmp_path / "whole", judge=knowing)
    dying = Dying(oracle_of(few), 4)
    with pytest.raises(KeyboardInterrupt):
        evaluate_world(dying, few, tmp_path / "part", judge=knowing)
    with (tmp_path / "part" / "results.jsonl").open("a") as file:
        file.write('{"part": "draw_sc')  # half a line
    rest = Dying(oracle_of(few), 99)
    again = evaluate_world(rest, few, tmp_path / "part", judge=knowing)
    assert dying.asked + rest.asked == 2 * 2 * ITEMS
    assert again.to_json() == whole.to_json()
    with pytest.raises(BenchError, match="another items"):
        WorldRun(replace(few, items=13), knowing, tmp_path / "part")


def test_runs_of_several_lines_are_joined(settings, knowing, tmp_path: Path) -> None:
    both = replace(settings, lines=("draw_scene", "edit"), ceiling=2)
    whole = evaluate_world(oracle_of(both), both, tmp_path / "whole", judge=knowing)
    parts = [tmp_path / name for name in both.lines]
    for part in parts:
        few = replace(both, lines=(part.name,))
        evaluate_world(oracle_of(few), few, part, judge=knowing)
    nobody = Dying(oracle_of(both), 0)
    joined = evaluate_world(nobody, both, tmp_path / "joined", judge=knowing, join=parts)
    assert joined.to_json() == whole.to_json() and nobody.asked == 0
    kept = {path.name for path in (tmp_path / "whole" / "pictures").iterdir()}
    assert kept and kept == {path.name for path in (tmp_path / "joined" / "pictures").iterdir()}
    for other, why in ((replace(both, seed=1), "another seed"), (replace(both, items=13), "another items")):
        with pytest.raises(BenchError, match=why):
            evaluate_world(nobody, other, tmp_path / why, judge=knowing, join=parts)
    with pytest.raises(BenchError, match="No such file"):
        evaluate_world(nobody, both, tmp_path / "c", judge=knowing, join=[tmp_path / "nowhere"])
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "results.jsonl").write_text("[]\n")
    with pytest.raises(BenchError, match="is not a journal"):
        evaluate_world(nobody, both, tmp_path / "c", judge=knowing, join=[tmp_path / "d"])


def test_a_run_of_another_model_is_refused(settings, knowing, tmp_path: Path) -> None:
    WorldRun(settings, knowing, tmp_path, about={"model": "a"})
    with pytest.raises(BenchError, match="another model"):
        WorldRun(settings, knowing, tmp_path, about={"model": "b"})


def test_answers_of_the_wrong_kind_are_an_error(settings, knowing, tmp_path: Path) -> None:
    few = replace(settings, lines=("draw_scene",), ceiling=0)
    with pytest.raises(BenchError, match="uint8"):
        evaluate_world(lambda asks: [(np.zeros((4, 4)),) for _ in asks], few, tmp_path / "a", judge=knowing)
    with pytest.raises(BenchError, match="answered 1 times"):
        evaluate_world(lambda asks: [()], few, tmp_path / "b", judge=knowing)


def test_a_request_counts_for_what_it_says() -> None:
    assert names_ground("a dog on a red background") and names_ground("two cats. make the backgrund white")
    assert not names_ground("a backpack and a red car")
    assert names_colour('the word "HI" in red on a blue background', "red")
    assert not names_colour('the word "HI" on a red background', "red")
    assert names_place('the word "HI" in the top left corner') and not names_place('"HI" in red letters')


def test_scenes_are_checked_part_by_part() -> None:
    found = item(LINES["draw_scene"], "train", 3, (64, 64), "world")
    right = perfect(found.expected[0])
    thing = right.things[0]
    cases = {
        "things": replace(right, things=right.things[1:]),
        "word": replace(right, word=SeenWord("HI", "red", (0, 0, 9, 9))),
        "mood": replace(right, mood="dark"),
        "style": replace(right, style="line"),
    }
    for name, verdict in cases.items():
        got = score(found, Observed((verdict,), (), ("picture",)))
        assert not got.right and not got.checks[name]
    assert score(found, Observed((), (), ())).fault == "no picture came"
    twice = replace(right, things=(*right.things, replace(thing, x=thing.x + 1)))
    assert "too much" in score(found, Observed((twice,), (), ("picture",))).fault


def test_an_edit_needs_both_the_change_and_the_rest() -> None:
    found = next(
        one
        for one in (item(LINES["edit"], "train", k, (64, 64), "world") for k in range(60))
        if one.episode.truth.kind == "move"
    )
    right, before = perfect(found.expected[0]), found.before
    assert before is not None
    assert score(found, Observed((right,), (), ("picture",), 1.9)).right
    lost = score(found, Observed((right,), (), ("picture",), 2.1))
    assert not lost.right and lost.extra["instruction"] and not lost.extra["preserved"]
    assert not score(found, Observed((perfect(before),), (), ("picture",), 0.0)).right


def test_outside_of_an_edit_is_compared_with_the_round_trip() -> None:
    source = np.full((64, 64, 3), 100, np.uint8)
    trip, drawn = source + 4, source + 5
    box = (16, 16, 40, 40)
    assert outside((64, 64), box).sum() == 64 * 64 - 32 * 32
    assert behind(source, trip, drawn, box) == pytest.approx(20 * np.log10(5 / 4), abs=0.01)
    drawn[20:30, 20:30] = 0  # inside: nobody's matter
    assert behind(source, trip, drawn, box) == pytest.approx(20 * np.log10(5 / 4), abs=0.01)
    assert behind(source, source, source, box) == 0
    assert behind(source, trip, source, box) == pytest.approx(
        psnr(source, trip, outside((64, 64), box)) - 99, abs=0.01
    )
    assert behind(source, trip, drawn, (0, 0, 64, 64)) is None
    assert behind(source, trip, drawn[:32], box) == 99


def test_motion_is_told_from_its_frames() -> None:
    def film(*items: Item) -> list[Canvas]:
        return [canvas(one) for one in items]

    right = film(*(Item("dog", None, 8 * k, 20, 24) for k in range(4)))
    back = list(reversed(right))
    assert motion_of([one.items[0] for one in right]) == "right"
    assert motion_of([one.items[0] for one in back]) == "left"
    seen = [perfect(one) for one in right]
    assert all(film_checks(right, seen, ground=True).values())
    assert not film_checks(back, seen, ground=True)["motion"]
    assert not film_checks(right, seen[:3], ground=True)["frames"]
    still = [seen[0]] * 4
    assert film_checks(right, still, ground=True) | {"motion": False} == film_checks(
        right, still, ground=True
    )
    turns = film(*(Item("dog", None, 8, 20, 24, k) for k in range(5)))
    assert motion_of([one.items[0] for one in turns]) == "turn"
    assert all(film_checks(turns, [perfect(one) for one in turns], ground=False).values())
    assert all(frame_checks(right[2], right[3], seen[3]).values())
    assert not frame_checks(right[2], right[3], seen[2])["motion"]


def test_made_up_stories_are_held_to_their_own_words() -> None:
    first = perfect(canvas(Item("dog", None, 20, 20, 24)))
    moved = perfect(canvas(Item("dog", None, 0, 0, 24)))
    assert shows("there is a dog in the middle, before a blue background.", None, first)
    assert not shows("there is a dog in the middle, before a red background.", None, first)
    assert not shows("there is a cat in the middle, before a blue background.", None, first)
    assert shows("the dog is now in the top left corner.", first, moved)
    assert not shows("the dog is now in the top left corner.", first, first)
    assert not shows("the dog sings.", first, moved)
    assert shows("the dog goes away.", first, perfect(canvas()))


def test_intervals() -> None:
    share = wilson(90, 100)
    assert (share.low, share.high) == (pytest.approx(0.8256, abs=1e-3), pytest.approx(0.9448, abs=1e-3))
    assert mean_of_groups([np.ones(10), np.zeros(1000)]).value == 0.5
    rows = [
        {"extra": {"truth": t, "said": s}}
        for t, s in (("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"))
    ]
    assert f1_yes(rows).value == 0.5
    thought = [{"index": k, "right": k < 7} for k in range(10)]
    plain = [{"index": k, "right": k < 6} for k in range(10)]
    assert relative_gain(thought, plain).value == pytest.approx(1 / 6)
    with pytest.raises(ValueError, match="nothing"):
        relative_gain(thought, [{"index": k, "right": False} for k in range(10)])
    with pytest.raises(ValueError, match="no items"):
        wilson(0, 0)
