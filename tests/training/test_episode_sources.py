"""The wide world's tasks in training: every task's losses, exact resume, what is corrected, prefetch, recipes, errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nextflow_ar.config import ConfigError, from_dict, to_dict
from nextflow_ar.data.episodes import EpisodeSource
from nextflow_ar.data.playground.curriculum import GROUPED, TASK_NAMES, by_task
from nextflow_ar.sequence.layout import IGNORED, TEXT_SCALE
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.quantizer import SelfCorrection
from nextflow_ar.training.episode_sources import EpisodeBatches
from nextflow_ar.training.model_stage import ModelRecipe, ModelTrainer
from nextflow_ar.training.prefetch import Ahead
from tests.conftest import TINY_MODEL, TINY_SEMANTIC, TINY_TOKENIZER, tiny_image_tokenizer

EIGHT = replace(TINY_TOKENIZER, num_scales=8, semantic=replace(TINY_SEMANTIC, position_grid=8))
MODEL = replace(
    TINY_MODEL, text_vocab=400, max_positions=2048, closing_input="accumulated", context_images="closing"
)
OPTIMIZER = {
    "lr": 5e-3, "muon_lr": 1e-2, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.98, "warmup": 3,
    "schedule": "constant", "decay": 0.3, "final": 0.1, "clip": 1.0,
}  # fmt: skip
CORRECTED = {"share": 0.5, "top_k": 4, "temperature": 1.0, "start": 0, "ramp": 1}
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tokenizer") / "final"
    state, larger = tiny_image_tokenizer().state_dict(), ImageTokenizer(EIGHT)
    fresh = larger.state_dict()
    larger.load_state_dict(
        {k: state[k] if k in state and state[k].shape == v.shape else v for k, v in fresh.items()}
    )
    larger.save_pretrained(found)
    return found


def source(**changes: Any) -> dict[str, Any]:
    values = {
        "kind": "episodes", "rows": 3, "seed": 4, "tasks": {"caption": 1.0, "edit_move": 1.0, "chat": 1.0},
        "canvases": {"64x64": 1.0, "80x48": 1.0}, "packing": {"mode": "length", "budget": 900, "open_rows": 2},
    }  # fmt: skip
    return values | changes


def trainer(out: Path, folder: Path, sources: list[dict[str, Any]], **changes: Any) -> ModelTrainer:
    values = {
        "kind": "model", "out": str(out), "seed": 1, "image_tokenizer": str(folder), "text_entries": 400,
        "start": None, "steps": 40, "alpha": 0.9, "text_weight": 4.0, "ema": 0.9, "compile": False,
        "sheet_seconds": 1e9, "save_seconds": 1e9, "optimizer": OPTIMIZER, "correction": CORRECTED,
        "sources": sources, "model": to_dict(MODEL),
    }  # fmt: skip
    recipe = from_dict(ModelRecipe, values | changes)
    return ModelTrainer(recipe, to_dict(recipe))


def same_batches(one: ModelTrainer, two: ModelTrainer) -> None:
    a, b = one.batch(0), two.batch(0)
    for name in ("tokens", "targets", "weights", "positions", "blocks", "scales", "documents"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for x, y in zip(a.images, b.images, strict=True):
        assert torch.equal(x.codes, y.codes) and torch.equal(x.starts, y.starts)


def test_a_step_over_several_tasks_tells_the_loss_of_each(folder: Path, tmp_path: Path) -> None:
    tasks = {"draw_scene": 1.0, "caption_full": 1.0, "edit_colour": 1.0, "riddle": 1.0, "plain": 1.0}
    training = trainer(tmp_path / "run", folder, [source(tasks=tasks, rows=5)])
    told = [training.advance() for _ in range(6)]
    assert {f"{t}_loss" for t in tasks} | {f"{t}_right" for t in tasks} <= set().union(*told)
    assert told[-1]["text"] < told[0]["text"]
    assert {"scale_1", "scale_8", "text"} <= set(told[0])
    assert training.documents > 6 * 5  # rows are shared
    corpus = (tmp_path / "run" / "text_tokenizer" / "tokenizer.json").read_text()
    assert "backgr" in corpus and "assistant" in corpus


def test_a_resumed_run_meets_the_same_batches_and_ends_the_same(folder: Path, tmp_path: Path) -> None:
    sources = [source(dialogue=True), source(tasks={"ask": 1}, swap=0.5, seed=9)]
    whole = trainer(tmp_path / "a", folder, sources)
    told = [whole.advance() for _ in range(19)]  # beyond the steps that are packed together
    first = trainer(tmp_path / "b", folder, sources, prefetch=True)
    assert [first.advance() for _ in range(17)] == told[:17]  # made ahead or in place is the same
    first.save()
    first.advance()  # lost
    second = trainer(tmp_path / "b", folder, sources)
    assert second.step == 17 and [second.advance() for _ in range(2)] == told[17:]
    same_batches(whole, second)
    for (name, a), b in zip(
        whole.model.state_dict().items(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    first.episodes.close()


def batches(folder: Path, tmp_path: Path, **changes: Any) -> EpisodeBatches:
    return trainer(tmp_path / "one", folder, [source(**changes)]).episodes.sources[0]


def test_words_alone_have_no_image(folder: Path, tmp_path: Path) -> None:
    made = batches(folder, tmp_path, tasks={"plain": 1.0}, packing={"mode": "pad", "budget": 400}, rows=12)
    rows = made.rows(0, None)
    silent = [row for row in rows if not row.sample.images]
    assert 5 <= len(silent) < 12  # every third asks for a picture
    for row in silent:
        assert row.tasks == ("plain",) and bool((row.sample.scales == TEXT_SCALE).all())
        assert bool((row.sample.targets != IGNORED).any())
    batch = made.batch(silent, 0)
    assert batch.images == () and batch.shape[1] % 64 == 0


def test_given_pictures_are_neither_learnt_nor_corrected(folder: Path, tmp_path: Path) -> None:
    made = batches(folder, tmp_path, tasks={"edit": 1.0}, packing={"mode": "pad", "budget": 400}, rows=8)
    strong = SelfCorrection(1.0, 4, 1.0)
    rows, plain = made.rows(3, strong), made.rows(3, None)
    for row, other in zip(rows, plain, strict=True):
        given, drawn = row.sample.images
        assert (given.scales, drawn.scales) == (0, 8)  # a given one is its closing block alone
        assert torch.equal(given.codes.input, given.codes.target)
        assert torch.equal(given.codes.target, other.sample.images[0].codes.target)
        assert not torch.equal(drawn.codes.input, drawn.codes.target)
        start, end = given.boi, given.inputs[1] + 1
        assert bool((row.sample.targets[start:end] == IGNORED).all())
        assert float(row.sample.weights[start:end].sum()) == 0
        assert int((row.sample.scales[row.sample.targets != IGNORED] >= 0).sum()) == len(drawn.codes.target)
    assert all(r.tasks[0].startswith("edit_") for r in rows)


def test_canvases_prefixes_and_dropped_conditions(folder: Path, tmp_path: Path) -> None:
    made = batches(
        folder, tmp_path, tasks={"draw": 1.0}, rows=40, scales=5, condition_dropout=0.5,
        packing={"mode": "pad", "budget": 200},
    )  # fmt: skip
    samples = [row.sample for row in made.rows(0, None)]
    finals = [s.images[0].codes.schedule.final for s in samples]
    assert {(8, 8), (6, 10)} == set(finals) and 10 <= finals.count((8, 8)) <= 30
    assert all(s.images[0].scales == 5 and not s.images[0].closed for s in samples)
    alone = [s for s in samples if s.images[0].boi == 0]
    assert 10 <= len(alone) <= 30 and all(len(s) == s.images[0].codes.schedule.offsets[5] for s in alone)


def test_processes_share_the_rows(folder: Path, tmp_path: Path) -> None:
    made = batches(folder, tmp_path, rows=4)
    whole = made.rows(5, None)
    halves = [made.rows(5, None, process, 2) for process in range(2)]
    for i, row in enumerate(whole):
        assert torch.equal(row.sample.targets, halves[i % 2][i // 2].sample.targets)


def test_packing_by_compute_and_what_fits_no_row(folder: Path, tmp_path: Path) -> None:
    made = batches(
        folder, tmp_path, tasks={"video_draw": 1.0, "caption": 1.0}, rows=2,
        packing={"mode": "compute", "budget": 0.001, "longest": 700, "open_rows": 2},
    )  # fmt: skip
    rows = made.rows(0, None)
    assert made.skipped > 0 and max(len(row.sample) for row in rows) <= 700
    short = batches(folder, tmp_path / "short", tasks={"video": 1.0}, packing={"mode": "pad", "budget": 60})
    with pytest.raises(ConfigError, match=r"2000 episodes one after the other \(video_draw, .*fit no row"):
        short.rows(0, None)


def test_mistakes_are_one_clear_line(folder: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"tasks": {"paint": 1.0}}, "unknown playground task 'paint': a group (draw, caption, "),
        ({"tasks": {"draw": 0.0}}, "at least one task with a weight above 0"),
        ({"canvases": {"64": 1.0}}, "a canvas is its width and height in pixels such as 96x64"),
        ({"canvases": {}}, "at least one canvas"),
        ({"swap": 0.5}, "swap is for tasks that answer in words about a picture, not for edit_move"),
        ({"condition_dropout": 1.5}, "condition_dropout is a share from 0 to 1"),
        ({"level": "hard"}, "level"),
        ({"colour": 1}, "colour"),
    ):
        with pytest.raises(ConfigError) as caught:
            trainer(tmp_path / "run", folder, [source(**changes)])
        assert message in str(caught.value) and "\n" not in str(caught.value)
    for changes, message in (
        ({"canvases": {"60x64": 1.0}}, "canvas 60x64: no scale schedule covers"),
        ({"scales": 9}, "has 8 scales, not 9"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer(tmp_path / "run", folder, [source(**changes)])


def test_groups_spread_their_weight() -> None:
    found = by_task({"caption": 1.0, "caption_full": 0.25, "in_context": 2.0, "plain": 0.0})
    assert found == {"caption_short": 0.5, "caption_full": 0.75, "in_context": 2.0}
    assert set(by_task(dict.fromkeys(GROUPED, 1.0))) == set(TASK_NAMES)


def test_ahead_gives_every_step_once_and_tells_errors() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        if step == 3:
            raise ConfigError("step 3 cannot be made")
        return step * step

    ahead = Ahead(make, 6)
    assert [ahead.get(0), ahead.get(0), ahead.get(1), ahead.get(2)] == [0, 0, 1, 4]
    with pytest.raises(ConfigError, match="step 3"):
        ahead.get(3)
    assert ahead.get(5) == 25  # another step than the one that was waiting
    ahead.close()
    assert made[:4] == [0, 1, 2, 3] and max(made) == 5


STAGES = [
    p for p in sorted(RECIPES.glob("world_*.yaml")) if yaml.safe_load(p.read_text()).get("kind") == "model"
]


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_recipes_are_whole(path: Path) -> None:
    recipe = from_dict(ModelRecipe, yaml.safe_load(path.read_text()), path.name)
    recipe.check()
    assert recipe.start is None or (RECIPES / f"{recipe.start.parent.name}.yaml").exists()
    assert all(isinstance(source, EpisodeSource) for source in recipe.sources)
    assert len({source.seed for source in recipe.sources}) == len(recipe.sources)  # type: ignore[union-attr]
    assert any(isinstance(source, EpisodeSource) and source.scales is None for source in recipe.sources)
