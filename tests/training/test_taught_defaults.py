"""What a run writes into generation.json of how its pictures are shown: canvases and fit, as its sources taught them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from nextflow_ar.app.cli import run
from nextflow_ar.config import from_dict
from nextflow_ar.data.loader import ShardLoader
from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.model.checkpoint import load_bundle, load_generation, save_bundle
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.training import material
from nextflow_ar.training.material import taught_defaults
from nextflow_ar.training.model_stage import ModelRecipe
from tests.conftest import TINY_TOKENIZER, tiny_bundle, tiny_image_tokenizer
from tests.shards import captions, make_shards, mixed
from tests.training.test_from_shards import Make, maker, recipe
from tests.training.test_sharded_stage import SHARDING

SEEN = ["32x32", "48x24"]
"""Canvases of four scales that the shards have: a third of the pictures is wide."""


def save_base(folder: Path, generation: dict[str, Any]) -> None:
    bundle = tiny_bundle()
    save_bundle(folder, bundle.model, bundle.image_tokenizer, bundle.vocab.tokenizer, generation, "# base\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder ``base`` with its tokenizer, and extractions ``a`` and ``b`` by that tokenizer."""
    folder = tmp_path_factory.mktemp("shards")
    save_base(folder / "base", {"guidance": 2.0})
    make_shards(folder / "a", mixed(12), tiny_image_tokenizer())
    make_shards(folder / "b", captions(6), tiny_image_tokenizer())
    return folder


@pytest.fixture
def make(place: Path, tmp_path: Path) -> Make:
    return maker(place, tmp_path)


def padded(place: Path, to: Path) -> dict[str, Any]:
    """The recipe's source of shards, all of its pictures padded."""
    (values,) = recipe(place, to)["sources"]
    for folder in values["folders"]:
        copied = Path(shutil.copytree(folder["folder"], to / Path(folder["folder"]).parent.name))
        manifest = json.loads((copied / "manifest.json").read_text())
        manifest["config"]["fit"] = "pad"
        (copied / "manifest.json").write_text(json.dumps(manifest))
        folder["folder"] = str(copied)
    return values


@pytest.mark.parametrize("sharding", [None, SHARDING])
def test_a_finished_model_reads_pictures_on_the_canvases_that_it_was_taught(
    make: Make, sharding: dict[str, Any] | None
) -> None:
    trainer = make(steps=4, sharding=sharding)
    assert "canvases" not in trainer.generation and "canvases" not in trainer._defaults()  # nothing seen yet
    final = trainer.fit()
    written = load_generation(final)
    assert written == trainer.generation | {"canvases": SEEN} and "fit" not in written
    found = NextFlowPipeline(load_bundle(final))
    assert found.canvas_for(24, 48).final == (3, 6) and found.canvas_for(32, 32).final == (4, 4)
    (final / "generation.json").unlink()
    again = make(steps=4, sharding=sharding)  # nothing left to train: exported once more
    assert again.step == 4 and load_generation(again.fit()) == written


def test_a_resumed_run_knows_what_it_was_taught_before(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(material, "_RARE", 0.0)
    whole, first = make("a"), make("b")
    for _ in range(4):
        whole.advance()
    for _ in range(2):
        first.advance()
    first.save()
    second = make("b")
    assert second.loaders[0].canvases == first.loaders[0].canvases != {}
    for _ in range(2):
        second.advance()
    assert second.loaders[0].canvases == whole.loaders[0].canvases
    assert second._defaults() == whole._defaults() and whole._defaults()["canvases"] == SEEN


def test_what_a_start_reads_stays_and_the_recipe_has_the_last_word(make: Make, tmp_path: Path) -> None:
    start = tmp_path / "start"
    save_base(start, {"canvases": ["48x40", "32x32"], "fit": "pad"})
    for changes, canvases in (
        ({}, ["48x40", "32x32", "48x24"]),
        ({"generation": {"canvases": ["64x24"]}}, ["64x24"]),
        ({"generation": {"canvases": []}}, []),
    ):
        trainer = make(f"run{len(canvases)}", start=str(start), **changes)
        trainer.advance()
        assert trainer.bundle().generation["canvases"] == canvases
        assert trainer.bundle().generation["fit"] == "crop"  # what its shards show from now on
    stays = make("stays", start=str(start), generation={"fit": "pad"})
    stays.advance()
    assert stays.bundle().generation["fit"] == "pad"


class _Seen:
    """Of a loader, what it tells."""

    def __init__(self, fit: str, **canvases: int) -> None:
        self.fits, self.canvases = {fit}, {name[1:]: count for name, count in canvases.items()}


def test_a_stray_is_no_canvas(make: Make) -> None:
    plain, config = make().recipe, TINY_TOKENIZER

    def told(*loaders: _Seen, **generation: Any) -> dict[str, Any]:
        several: list[ShardLoader] = list(loaders)  # type: ignore[arg-type]
        return taught_defaults(plain, generation, several, config)

    one = _Seen("crop", s40x40=700, s48x32=290, s32x48=5, s72x16=4, s96x96=1)
    assert told(one) == {"canvases": ["32x48", "48x32"]}  # not the default square, nor fewer than one in 200
    other = _Seen("pad", s72x16=60, s48x32=1)
    assert told(one, other, top_p=0.5) == {
        "top_p": 0.5,
        "canvases": ["72x16", "48x32"],
    }  # all sources' pictures
    sized = told(_Seen("crop", s40x40=6, s56x56=4), size="56x56")
    assert sized == {"size": "56x56", "canvases": ["40x40"]}  # the default is drawn anyway, the square is not
    assert told(_Seen("crop", s40x40=9)) == {}
    assert told(_Seen("pad", s40x40=9)) == {"fit": "pad"}


def test_padded_shards_make_a_model_that_pads(place: Path, make: Make, tmp_path: Path) -> None:
    trainer = make(steps=2, sources=[padded(place, tmp_path)])
    final = trainer.fit()
    assert load_generation(final)["fit"] == "pad"
    assert NextFlowPipeline(load_bundle(final)).fitting == "pad"


def test_playground_sources_name_their_canvases(make: Make) -> None:
    episodes = {
        "kind": "episodes", "rows": 2, "seed": 4, "tasks": {"caption": 1.0, "draw": 1.0},
        "canvases": {"64x64": 1.0, "80x48": 1.0, "48x80": 0.0, "40x40": 1.0},
        "packing": {"mode": "length", "budget": 900},
    }  # fmt: skip
    built = replace(make().recipe, sources=(from_dict(ModelRecipe, recipe_with(episodes)).sources[0],))
    assert taught_defaults(built, {}, [], TINY_TOKENIZER) == {"canvases": ["80x48", "64x64"]}
    plans = recipe_with(episodes | {"scales": 0, "planned": 1.0, "tasks": {"draw": 1.0}})
    built = replace(built, sources=(from_dict(ModelRecipe, plans).sources[0],))
    assert taught_defaults(built, {}, [], TINY_TOKENIZER) == {}  # nothing of a picture is laid out


def test_lists_for_scales_fit_the_size_that_is_inherited(
    tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the size or the list is the start's: at the first picture it would be too late."""
    sized = ScaleSchedule.square(TINY_TOKENIZER.num_scales + 1)
    height, width = sized.image_size(TINY_TOKENIZER.downsample)
    few, many = ([1.0] * n for n in (TINY_TOKENIZER.num_scales, len(sized)))
    for number, (start, own, status) in enumerate(
        (
            ({"size": f"{width}x{height}"}, {"guidance": many}, 0),
            ({"size": f"{width}x{height}"}, {"guidance": few}, 2),
            ({"guidance": few}, {"size": f"{width}x{height}"}, 2),
        )
    ):
        save_base(tmp_path / f"start{number}", start)
        out = tmp_path / f"run{number}"
        values = recipe(place, out, start=str(tmp_path / f"start{number}"), generation=own, steps=1)
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
        assert run(["train", str(tmp_path / "recipe.yaml")]) == status
        told = capsys.readouterr().err
        assert (f"one for each of the {len(many)} scales, got {len(few)}" in told) == bool(status), told


def recipe_with(source: dict[str, Any]) -> dict[str, Any]:
    return recipe(Path("unused"), Path("unused"), sources=[source])
