"""Ten pictures through the command, as a user would: folder, extract, train; their captions by heart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextflow_ar.app.cli import run
from nextflow_ar.config import load_yaml
from nextflow_ar.data.textures import dead_leaves
from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.tokenizer.image_tokenizer import tokenizer_config
from tests.conftest import tiny_image_tokenizer

RECIPE = Path(__file__).parent.parent.parent / "recipes" / "overfit.yaml"
SMALL = {
    "steps": 260, "text_entries": 300, "model.text_vocab": 300, "model.codes": 24, "model.code_dim": 10, "model.hidden": 64,
    "model.layers": 2, "model.heads": 4, "model.kv_heads": 4, "model.intermediate": 128, "model.rope_sections": "[2,3,3]",
    "sources.0.rows": 2, "sources.0.packing.budget": 260,
}  # fmt: skip
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


@pytest.mark.slow
def test_ten_captions_by_heart_and_drawing_well_on_its_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "ten"
    pictures.mkdir()
    tiny_image_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for i, word in enumerate(WORDS):
        Image.fromarray(dead_leaves((i,), 40, 40)).save(pictures / f"{word}.png")
        (pictures / f"{word}.txt").write_text(f"picture {word} of leaves")
    shards, out = tmp_path / "shards", tmp_path / "model"
    tokenizer = ["--image-tokenizer", str(tmp_path / "tokenizer")]
    assert run(["extract", str(pictures), "-o", str(shards), *tokenizer, "--correct-tokens", "0"]) == 0
    places = {"out": out, "image_tokenizer": tmp_path / "tokenizer", "sources.0.folders.0.folder": shards}
    changes = [f"--set={key}={value}" for key, value in (SMALL | places).items()]
    assert run(["train", str(RECIPE), *changes]) == 0
    capsys.readouterr()
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["read_right"] > 0.99
    assert last["draw_right"] > 0.4  # of 24 codes; so few steps of so small a model do not end it
    pipeline = NextFlowPipeline.from_pretrained(out / "final")
    images = [np.asarray(Image.open(pictures / f"{word}.png")) for word in WORDS]
    assert pipeline.describe(images) == [f"picture {word} of leaves" for word in WORDS]


def test_the_recipe_fits_the_bundled_tokenizer() -> None:
    """What stands in its header is all that it takes."""
    model = load_yaml(RECIPE)["model"]
    quantizer = tokenizer_config("nano").quantizer
    assert (model["codes"], model["code_dim"]) == (quantizer.codebook_size, quantizer.dim)
