"""The judge: its bundled weights read true renders, altered weights are refused, and its training parts add
up.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from nextflow_ar.data.playground.scenes import LEVELS, Scene, Split, Thing, render
from nextflow_ar.evaluation.judge import (
    BUNDLED,
    CONFIG,
    UNKNOWN,
    WEIGHTS,
    Found,
    Judge,
    JudgeConfig,
    JudgeError,
    JudgeNetwork,
    Verdict,
    decode,
    to_input,
)
from nextflow_ar.evaluation.judge_scenes import (
    Example,
    ExampleStream,
    distort,
    from_scene,
    mixture,
    moved,
    targets,
)
from nextflow_ar.evaluation.judge_training import (
    DEFAULTS,
    JudgeSettings,
    accuracy,
    judge_config,
    judge_loss,
    scene_right,
    train_judge,
)

STILL = np.array([1.0, 0.0, 0.0, 0.0])


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


@pytest.mark.parametrize("split", ["train", "test"])
def test_bundled_judge_reads_fresh_scenes(judge: Judge, split: Split) -> None:
    assert accuracy(judge, split, 200, seed=9_600_000)[0] >= 0.97


def test_bundled_judge_reads_a_picture_by_hand(judge: Judge) -> None:
    things = (Thing("dog", None, 0, 0, 32), Thing("ring", "red", 32, 32, 32), Thing("dog", None, 32, 0, 32))
    scene = Scene("counting", "blue", things)
    verdict = judge(render(scene)[None])[0]
    assert scene_right(scene, verdict, tolerance=2.0)
    assert verdict.words() == "2 dog, red ring on blue"
    assert all(abs(found.size - 32) < 4 and found.score > 0.35 for found in verdict.things)
    empty = judge(np.full((2, 64, 64, 3), (50, 160, 70), np.uint8))
    assert [v.words() for v in empty] == ["nothing on green"] * 2


def test_batches_do_not_change_verdicts(judge: Judge) -> None:
    stream = ExampleStream(9_700_000, (1.0, 0.0, 0.0), 0.0)
    pictures = np.stack([stream.example(k).picture for k in range(12)])
    together, apart = judge(pictures), judge(pictures, batch=5)
    assert [v.words() for v in together] == [v.words() for v in apart]


def test_things_outside_its_words_are_mostly_unknown(judge: Judge) -> None:
    strange = ("bicycle", "guitar", "crown", "umbrella", "snowman", "bus", "clock", "door", "chair", "tent")
    pictures = np.stack(
        [render(Scene("single_object", "blue", (Thing(n, None, 16, 16, 32),))) for n in strange]
    )
    names = [[found.name for found in verdict.things] for verdict in judge(pictures)]
    assert sum(seen == [UNKNOWN] for seen in names) >= 8


def test_weights_are_small_and_known() -> None:
    assert (BUNDLED / WEIGHTS).stat().st_size < 1_500_000
    record = json.loads((BUNDLED / CONFIG).read_text())
    assert min(record["training"]["accuracy"][split] for split in ("train", "test", "any")) >= 0.97
    config = Judge.load().config
    assert config.names == (*LEVELS["easy"].nouns, *LEVELS["easy"].shapes)
    assert config.colours == LEVELS["easy"].colours


def flip(folder: Path) -> None:
    blob = bytearray((folder / WEIGHTS).read_bytes())
    blob[len(blob) // 2] ^= 1
    (folder / WEIGHTS).write_bytes(blob)


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


def lose(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def garble(folder: Path) -> None:
    (folder / CONFIG).write_text('{"sha256": "')


def widen(folder: Path) -> None:
    record = json.loads((folder / CONFIG).read_text())
    record["architecture"]["widths"] = [8, 8, 8]
    (folder / CONFIG).write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (flip, "was altered: SHA-256"),
        (cut, "was altered: SHA-256"),
        (lose, "cannot read .*judge.safetensors: No such file"),
        (garble, "is not a judge's config"),
        (widen, "do not fit the architecture"),
    ],
)
def test_a_harmed_folder_is_refused_in_one_line(
    tmp_path: Path, harm: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(BUNDLED, tmp_path / "judge")
    harm(tmp_path / "judge")
    with pytest.raises(JudgeError, match=message) as caught:
        Judge.load(tmp_path / "judge")
    assert "\n" not in str(caught.value)


def test_pictures_of_another_kind_are_refused(judge: Judge) -> None:
    for picture in (np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 64, 64, 3), np.float32)):
        with pytest.raises(ValueError, match="the judge reads uint8 pictures"):
            judge(picture)
    assert judge(np.zeros((0, 64, 64, 3), np.uint8)) == []


def maps_of(config: JudgeConfig, peaks: list[tuple[int, int, float, int]]) -> dict[str, torch.Tensor]:
    """Hand-made maps: peaks of (row, column, logit, name)."""
    maps = {
        "heat": torch.full((1, 1, 16, 16), -9.0),
        "name": torch.zeros(1, len(config.names) + 1, 16, 16),
        "colour": torch.zeros(1, len(config.colours), 16, 16),
        "offset": torch.zeros(1, 2, 16, 16),
        "size": torch.zeros(1, 1, 16, 16),
        "background": torch.zeros(1, len(config.colours)),
    }
    maps["background"][0, 4] = 1.0
    for i, j, logit, name in peaks:
        maps["heat"][0, 0, i, j] = logit
        maps["name"][0, name, i, j] = 5.0
        maps["colour"][0, 2, i, j] = 5.0
        maps["offset"][0, 0, i, j] = 0.25
    return maps


def test_decoding_by_hand() -> None:
    config = judge_config(DEFAULTS)
    circle, last = config.names.index("circle"), len(config.names)
    peaks = [(4, 4, 2.0, 0), (4, 6, 1.0, 1), (12, 8, 3.0, circle), (8, 14, -2.0, 3), (0, 0, 1.5, last)]
    verdict = decode(maps_of(config, peaks), config)[0]
    # the second lies 8 px beside the first (12 is the least), the fourth is below the threshold
    assert [found.key for found in verdict.things] == [("circle", "yellow"), ("dog", None), (UNKNOWN, None)]
    assert verdict.things[0].centre == (33.0, 48.0) and verdict.things[0].size == pytest.approx(32.0)
    assert verdict.things[0].score == pytest.approx(0.9526, abs=1e-4)
    assert verdict.background == "blue"
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict


def test_scene_right_needs_everything() -> None:
    scene = Scene("two_object", "blue", (Thing("dog", None, 0, 0, 32), Thing("ring", "red", 32, 32, 32)))
    dog, ring = Found("dog", None, 16, 16, 32, 1), Found("ring", "red", 48, 48, 32, 1)
    assert scene_right(scene, Verdict((ring, dog), "blue"))
    assert not scene_right(scene, Verdict((ring, dog), "red"))
    assert not scene_right(scene, Verdict((dog,), "blue"))
    assert not scene_right(scene, Verdict((dog, dog, ring), "blue"))
    assert not scene_right(scene, Verdict((replace(ring, colour="green"), dog), "blue"))
    assert not scene_right(scene, Verdict((replace(ring, x=40.0), dog), "blue"))


def test_targets_by_hand() -> None:
    config = judge_config(DEFAULTS)
    scene = Scene("two_object", "green", (Thing("cat", None, 0, 0, 32), Thing("ring", "red", 30, 32, 32)))
    want = targets([from_scene(scene)], STILL[None], config)
    assert (want.heat[0] == 1).nonzero().tolist() == [[4, 4], [12, 12]]
    assert want.heat[0, 4, 5] == pytest.approx(np.exp(-0.5))
    assert int(want.name[0, 4, 4]) == config.names.index("cat") and int(want.colour[0, 4, 4]) == -1
    assert int(want.name[0, 12, 12]) == config.names.index("ring") and int(want.colour[0, 12, 12]) == 0
    assert want.offset[0, :, 12, 12].tolist() == [-0.5, 0.0]  # 46 px is half a cell left of column 12
    assert int((want.weight[0] > 0).sum()) == 18 and int(want.background[0]) == config.colours.index("green")


def test_loss_is_small_only_for_the_right_maps() -> None:
    config = judge_config(DEFAULTS)
    scene = Scene("single_object", "blue", (Thing("dog", None, 16, 16, 32),))
    want = targets([from_scene(scene)], STILL[None], config)
    maps = maps_of(config, [(8, 8, 9.0, 0)])
    maps["name"][0, 0] = 12.0
    maps["offset"][:] = want.offset
    maps["background"] *= 12
    good = float(judge_loss(maps, want))
    assert good < 0.01
    for key, index in (("heat", (0, 0, 8, 8)), ("name", (0, 0)), ("background", (0, 4))):
        worse = {name: value.clone() for name, value in maps.items()}
        worse[key][index] = -9.0
        assert float(judge_loss(worse, want)) > good + 0.4, key


def test_distortion_moves_pictures_and_points_alike() -> None:
    dot = np.zeros((64, 64, 3), np.uint8)
    dot[38:43, 18:23] = 255  # centre (20.5, 40.5)
    rng = np.random.default_rng(9_700_001)
    pictures, moves = distort([Example(dot, (), "black")] * 64, rng)
    weight = (pictures.mean(1) + 1.0).clamp(min=0) - 0.9
    weight = weight.clamp(min=0).numpy()
    rows, columns = np.mgrid[0:64, 0:64] + 0.5
    for k in range(64):
        if weight[k].sum() < 0.5:
            continue
        x, y = (float((grid * weight[k]).sum() / weight[k].sum()) for grid in (columns, rows))
        px, py = moved(20.5, 40.5, moves.numpy()[k], 64)
        assert abs(x - px) < 3.5 and abs(y - py) < 3.5  # the wobble is not part of the affine map


def test_training_examples_come_from_their_own_seeds() -> None:
    with pytest.raises(ValueError, match="seeds start at 9000000"):
        ExampleStream(8_999_999, (1, 1, 1), 0.1)
    stream = ExampleStream(9_700_002, (0.4, 0.25, 0.35), 0.2)
    once, again = [stream.example(k) for k in range(30)], [stream.example(k) for k in range(30)]
    assert all(np.array_equal(a.picture, b.picture) for a, b in zip(once, again, strict=True))
    mixtures = [mixture(np.random.default_rng(k), 0.3) for k in range(60)]
    assert {len(m.labels) for m in mixtures} >= {1, 2, 3, 4}
    unknown = sum(label[0] == UNKNOWN for m in mixtures for label in m.labels)
    assert 0.15 <= unknown / sum(len(m.labels) for m in mixtures) <= 0.45


def test_the_recipe_holds_the_settings_of_the_bundled_judge() -> None:
    recipe = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "nano_judge.yaml").read_text())
    assert recipe.pop("kind") == "judge" and recipe.pop("out") == "runs/nano_judge"
    assert JudgeSettings(**recipe) == DEFAULTS
    stored = json.loads((BUNDLED / CONFIG).read_text())["training"]["settings"]
    assert JudgeSettings(**stored) == DEFAULTS
    with pytest.raises(ValidationError, match="minuets"):
        JudgeSettings(**(recipe | {"minuets": 3.0}))


def test_training_runs_saves_and_reports(tmp_path: Path) -> None:
    lines: list[str] = []
    settings = replace(DEFAULTS, minutes=0.02, batch=8, widths=(8, 16, 16), accuracy_scenes=20)
    report = train_judge(settings, tmp_path, lines.append)
    assert set(report) == {"train", "test", "any", "medium"} and "read fully right" in lines[-1]
    small = Judge.load(tmp_path)
    assert small.config.widths == (8, 16, 16) and small.config.names[0] == "dog"
    network = JudgeNetwork(small.config).eval()
    maps = network(to_input(np.zeros((2, 64, 64, 3), np.uint8)))
    assert {name: tuple(value.shape) for name, value in maps.items()} == {
        "heat": (2, 1, 16, 16),
        "name": (2, 26, 16, 16),
        "colour": (2, 8, 16, 16),
        "offset": (2, 2, 16, 16),
        "size": (2, 1, 16, 16),
        "background": (2, 8),
    }
