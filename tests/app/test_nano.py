"""The bundled checkpoint answers on real input."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from nextflow_ar import NextFlowPipeline
from nextflow_ar.app.cli import run
from nextflow_ar.generation.pipeline import resolve_model


@pytest.fixture(scope="module")
def nano() -> NextFlowPipeline:
    return NextFlowPipeline.from_pretrained("nano")


def test_what_it_draws_is_what_it_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(tmp_path / "a.png")
    assert run(["generate", "a red circle on a blue background", "-o", picture, "--seed", "1"]) == 0
    capsys.readouterr()
    assert run(["describe", picture]) == 0
    assert capsys.readouterr().out == "a red circle on a blue background\n"


def hand_drawn() -> list[tuple[Image.Image, str]]:
    """Pictures in the playground's style that no line of the playground has drawn."""
    circle = Image.new("RGB", (64, 64), "#2d5fd2")
    ImageDraw.Draw(circle).ellipse((17, 17, 46, 46), fill="#dc2828")
    two = Image.new("RGB", (64, 64), "#fad732")
    ImageDraw.Draw(two).rectangle((3, 19, 28, 44), fill="#8741af")
    ImageDraw.Draw(two).polygon([(48, 17), (62, 46), (33, 46)], fill="#dc2828")
    three = Image.new("RGB", (128, 128), "#f5f5f5")  # a larger picture is scaled down
    for x, y in ((2, 2), (66, 2), (2, 66)):
        ImageDraw.Draw(three).ellipse((x, y, x + 58, y + 58), fill="#32a046")
    return [
        (circle, "a red circle on a blue background"),
        (two, "a purple square and a red triangle on a yellow background"),
        (three, "three green circles on a white background"),
    ]


@pytest.mark.parametrize("number", range(3))
def test_pictures_drawn_by_hand_are_described(nano: NextFlowPipeline, number: int) -> None:
    picture, words = hand_drawn()[number]
    assert nano.describe(picture) == [words]


def test_reconstruction_keeps_the_picture(nano: NextFlowPipeline) -> None:
    for picture, _ in hand_drawn():
        before = nano.fit(picture).astype(float)
        error = ((before - np.asarray(nano.reconstruct(picture), float)) ** 2).mean()
        assert 10 * np.log10(255**2 / error) > 25


def test_a_batch_and_its_rows_are_the_same_pictures(nano: NextFlowPipeline) -> None:
    prompts = [
        "a green square on a white background",
        "two yellow crosses on a red background",
        "a blue ring",
    ]
    together = nano.generate(prompts, n=2, seed=9)
    for i, prompt in enumerate(prompts):
        assert np.array_equal(nano.generate(prompt, seed=9)[0], together[2 * i])


def test_the_folder_is_small_and_tells_what_it_is() -> None:
    folder = resolve_model("nano")
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) <= 40e6
    card = (folder / "README.md").read_text()
    for word in ("Data", "minutes", "Scores", "dB", "captions"):
        assert re.search(word, card, re.IGNORECASE), word


def test_it_runs_in_both_dtypes() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = NextFlowPipeline.from_pretrained("nano", dtype=dtype)
        assert pipeline.describe(hand_drawn()[0][0]) == ["a red circle on a blue background"]
