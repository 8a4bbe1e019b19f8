"""The judge of the wide world: what its maps mean, what it learns from, how it is kept, how well the bundled one reads."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nextflow_ar.config import from_dict, load_yaml
from nextflow_ar.data.playground.canvases import Canvas, Item, Word, canvas_sizes
from nextflow_ar.data.playground.looks import render, word_box, word_mask
from nextflow_ar.evaluation.judge import JudgeError
from nextflow_ar.evaluation.playground_tasks import BENCH_SEED
from nextflow_ar.evaluation.world.accuracy import accuracy, canvases, reading_checks
from nextflow_ar.evaluation.world.detector import Detector, DetectorConfig, read_maps, to_base, to_input
from nextflow_ar.evaluation.world.examples import ACCURACY_SEED, FIRST_SEED, ExampleStream, labels_of
from nextflow_ar.evaluation.world.judge import CONFIG, WEIGHTS, WorldJudge, detector_config, save_judge
from nextflow_ar.evaluation.world.lettering import box_of_letters, letter_centres
from nextflow_ar.evaluation.world.targets import distort, targets
from nextflow_ar.evaluation.world.training import WorldJudgeSettings, WorldJudgeTraining, judge_loss
from nextflow_ar.evaluation.world.verdict import UNKNOWN, Verdict, perfect
from tests.conftest import tiny_image_tokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "world_judge.yaml"
STILL = np.array([[1.0, 0.0, 0.0]])


@pytest.fixture(scope="module")
def config() -> DetectorConfig:
    return detector_config((8, 12, 16, 24), 1, 0.35, 0.35, 9.0, 3.5)


def maps_of(canvas: Canvas, config: DetectorConfig) -> dict[str, torch.Tensor]:
    """What a network would say that has learnt everything."""
    x = to_base(to_input(render(canvas)[None]))
    want = targets([labels_of(canvas)], STILL, (x.shape[-2], x.shape[-1]), config)

    def sure(index: torch.Tensor, count: int) -> torch.Tensor:
        told = (
            F.one_hot(index.clamp_min(0), count).float() * (index >= 0)[..., None]
        )  # even where nothing is told
        return told.movedim(-1, 1) * 20

    heat = torch.logit(want.heat.clamp(1e-4, 1 - 1e-4))[:, None]
    letters = torch.logit(want.letter_heat.clamp(1e-4, 1 - 1e-4))[:, None]
    counts = {
        "background": len(config.colours), "second": len(config.colours) + 1, "style": len(config.styles),
        "mood": len(config.moods) + 1, "light": len(config.lights) + 1,
    }  # fmt: skip
    return {
        "heat": heat, "name": sure(want.name, len(config.names) + 1), "colour": sure(want.colour, len(config.colours)),
        "offset": want.offset, "size": want.size[:, None], "turn": sure(want.turn, 4), "letter_heat": letters,
        "letter": sure(want.letter, 26), **{key: sure(want.whole[key], n) for key, n in counts.items()},
    }  # fmt: skip


def test_targets_read_back_are_the_canvas(config: DetectorConfig) -> None:
    found = canvases(60, "any", "wide") + canvases(40, "any", "world", (64, 64))
    for canvas in found:
        verdict = read_maps(maps_of(canvas, config), canvas.size, config)[0]
        assert all(reading_checks(canvas, verdict).values()), (canvas, verdict)
        for item, seen in zip(
            sorted(canvas.items, key=lambda i: i.centre),
            sorted(verdict.things, key=lambda s: s.centre),
            strict=True,
        ):
            assert seen.centre == pytest.approx(item.centre, abs=1e-3)
            assert seen.size == pytest.approx(item.size, rel=1e-3)


def test_letters_stand_where_their_ink_is() -> None:
    for text, size in (("HELLO", 19), ("WIN", 16), ("QUIZ", 23)):
        mask = word_mask(text, size)
        for k, (x, y) in enumerate(letter_centres(text, size)):
            left = letter_centres(text, size)[k - 1][0] if k else 0.0
            assert mask[:, int(left) : int(x) + 3].sum() > 3 and 0 < y < mask.shape[0]
        centres = [(x + 5, y + 7) for x, y in letter_centres(text, size)]
        width, height = word_box(text, size)
        assert box_of_letters(text, centres, 64) == (7, 5, 7 + height, 5 + width)


def test_canvases_of_every_size_come_to_one_scale() -> None:
    for scales in (8, 10, 12):
        for height, width in canvas_sizes(scales):
            x = to_base(torch.zeros(1, 3, height, width))
            assert (
                x.shape[-1] % 8 == x.shape[-2] % 8 == 0
                and min(x.shape[-2:]) >= 40
                and max(x.shape[-2:]) <= 96
            )


def test_labels_leave_out_what_does_not_show() -> None:
    items = (
        Item("apple", "green", 4, 4, 24),
        Item("circle", "red", 34, 34, 24, 1),
        Item(f"{UNKNOWN}-3", None, 36, 2, 20),
    )
    word = Word("HI", "red", 2, 40, *word_box("HI", 16), 16)
    full = labels_of(Canvas(64, 64, "blue", items, word=word, mood="dark"))
    assert full.things[0] == ("apple", "green", 16.0, 16.0, 24.0, 0)
    assert full.things[1][5] is None and full.things[2][0] == UNKNOWN  # a circle's turn shows nowhere
    assert (
        [sign for sign, _, _ in full.letters] == ["H", "I"]
        and full.word_colour == "red"
        and full.mood == "dark"
    )
    line = labels_of(Canvas(64, 64, "blue", items, word=word, style="line"))
    assert line.things[0][1] is None and line.background is None and line.word_colour is None
    flat = labels_of(Canvas(64, 64, "blue", items[:1], style="silhouette"))
    assert flat.things[0][0] is None and flat.background == "blue"


def test_distortion_moves_labels_with_the_picture(config: DetectorConfig) -> None:
    canvas = Canvas(64, 64, "white", (Item("square", "black", 20, 24, 20),))
    x = to_base(to_input(np.stack([render(canvas)] * 24)))
    moved, moves = distort(x, (64, 64), np.random.default_rng(0))
    want = targets([labels_of(canvas)] * 24, moves, (64, 64), config)
    assert 6 < (moves != STILL).any(1).sum() < 18
    for k in range(24):
        i, j = (want.heat[k] == 1).nonzero()[0].tolist()
        x_at, y_at = 4 * (j + float(want.offset[k, 0, i, j])), 4 * (i + float(want.offset[k, 1, i, j]))
        dark = (moved[k].mean(0) < 0).nonzero().float() + 0.5
        assert dark.mean(0).tolist() == pytest.approx([y_at, x_at], abs=1.3)


def test_examples_are_pure_and_have_seeds_of_their_own() -> None:
    assert BENCH_SEED + 1_000_000 <= FIRST_SEED < ACCURACY_SEED
    with pytest.raises(ValueError, match="start at"):
        ExampleStream(BENCH_SEED, 0.5, 0.1)
    stream = ExampleStream(FIRST_SEED, 0.5, 0.3)
    pictures, labels = stream.batch(3, 12)
    again, same = ExampleStream(FIRST_SEED, 0.5, 0.3).batch(3, 12)
    assert np.array_equal(pictures, again) and labels == same
    assert pictures.shape[1:3] == stream.size(3) == labels[0].size
    names = [name for k in range(6) for one in stream.batch(k, 12)[1] for name, *_ in one.things]
    assert UNKNOWN in names and len(set(names)) > 30
    rng = random.Random(0)
    texts = {c.word.text for c in (stream.mixtures.canvas(rng, (64, 64)) for _ in range(80)) if c.word}
    assert len(texts) > 10  # many are no words


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorldJudgeTraining:
    tokenizer = tmp_path / "tokenizer"
    tiny_image_tokenizer().save_pretrained(tokenizer)
    values = {k: v for k, v in load_yaml(RECIPE).items() if k not in ("kind", "out")}
    values |= {"tokenizer": str(tokenizer), "batch": 6, "passed": 2, "widths": [8, 12, 16, 24], "blocks": 1}
    return WorldJudgeTraining(from_dict(WorldJudgeSettings, values, "recipe"), tmp_path / "judge")


def test_training_learns_and_goes_on_where_it_was(training: WorldJudgeTraining) -> None:
    first = [float(sum(training.advance(0.0).values()).detach()) for _ in range(2)]
    training.save()
    third = {key: float(value.detach()) for key, value in training.advance(0.5).items()}
    other = WorldJudgeTraining(training.settings, training.out)
    assert other.resume() and other.step == 2
    other.pool = training.pool if training.stream.size(2) in canvas_sizes(8) else other.pool
    assert all(np.isfinite(list(third.values()))) and all(np.isfinite(first))
    network, x = training.network, torch.rand(4, 3, 64, 64) * 2 - 1
    want = targets(
        [labels_of(Canvas(64, 64, "red", ()))] * 4, np.repeat(STILL, 4, 0), (64, 64), training.config
    )
    losses = []
    for _ in range(8):
        loss = torch.stack(list(judge_loss(network(x), want).values())).sum()
        training.optimizer.zero_grad()
        loss.backward()
        training.optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_altered_weights_are_refused(config: DetectorConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Detector(config)
    digest = save_judge(network, config, tmp_path / "a", {"pictures": 0})
    judge = WorldJudge.load(tmp_path / "a")
    assert judge.sha256 == digest and judge.config == config
    verdicts = judge(
        [np.zeros((64, 64, 3), np.uint8), np.zeros((128, 88, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)]
    )
    assert [v.size for v in verdicts] == [(64, 64), (128, 88), (64, 64)] and verdicts[0] == verdicts[2]
    with pytest.raises(ValueError, match="uint8"):
        judge([np.zeros((64, 64, 3))])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    blob = bytearray((tmp_path / "b" / WEIGHTS).read_bytes())
    blob[-1] ^= 1
    (tmp_path / "b" / WEIGHTS).write_bytes(blob)
    with pytest.raises(JudgeError, match="was altered"):
        WorldJudge.load(tmp_path / "b")
    (tmp_path / "b" / CONFIG).write_text("{}")
    with pytest.raises(JudgeError, match="not the config"):
        WorldJudge.load(tmp_path / "b")
    with pytest.raises(JudgeError, match="cannot read"):
        WorldJudge.load(tmp_path / "c")


def test_verdicts_survive_json() -> None:
    word = Word("HI", "red", 2, 40, *word_box("HI", 16), 16)
    verdict = perfect(Canvas(64, 64, "blue", (Item("apple", "green", 4, 4, 24),), word=word, light="left"))
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict
    assert verdict.words() == 'green apple, "HI" on blue, light left'


def test_the_bundled_judge_reads_true_renders() -> None:
    judge = WorldJudge.load()
    found = accuracy(judge, canvases(100, "test", "world", (64, 64)))
    assert found["exact"] >= 0.84 and found["background"] >= 0.97
    record = json.loads(
        (Path(__file__).parents[2] / "src/nextflow_ar/checkpoints/world_judge" / CONFIG).read_text()
    )
    measured = record["training"]["accuracy"]
    assert record["sha256"] == judge.sha256
    assert measured["renders, 64 px, level world"]["exact"] >= 0.9
    odd = replace(perfect(canvases(1, "any", "world")[0]), things=())
    assert odd.words().startswith("nothing on")
