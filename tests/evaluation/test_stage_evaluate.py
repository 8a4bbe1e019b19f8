"""The benchmark through the command: the bundled model is scored, ceilings included, and a stopped run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nextflow_ar.app.cli import run
from nextflow_ar.data.playground.sprites import find_font

pytestmark = pytest.mark.skipif(find_font() is None, reason="needs the package fonts-noto-color-emoji")


def test_evaluate_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "evaluate",
        "playground",
        "-o",
        str(tmp_path / "e"),
        "--prompts",
        "2",
        "--captions",
        "12",
        "--json",
    ]
    assert run(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["about"]["model"] == "nano"
    assert report["renders"]["test"]["exact"] == 1.0
    assert set(report["sets"]["test"]["types"]) == {
        "single_object", "two_object", "counting", "colors", "position", "color_attr"
    }  # fmt: skip
    assert report["reconstructed"]["test"]["exact"] >= 0.75
    assert report["captions"]["all"]["n"] == 12
    assert (tmp_path / "e" / "sheet.png").is_file()
    assert run([*arguments[:-1]]) == 0  # everything is in the journal
    assert "mean of types" in capsys.readouterr().out


def test_a_model_of_other_pictures_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = Path(__file__).parent.parent / "golden" / "bundle"
    arguments = ["evaluate", "playground", "-o", str(tmp_path / "e"), "--prompts", "1", "--captions", "0"]
    assert run([*arguments, "-m", str(golden)]) == 1
    line = capsys.readouterr().err
    assert (
        "bundle draws pictures of 40x40 pixels: the benchmark needs 64x64" in line and line.count("\n") == 1
    )
    assert not (tmp_path / "e").exists()


def test_photographs_that_are_not_there_are_refused_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object, **__: object) -> None:
        pytest.fail("the tokenizer was loaded")

    monkeypatch.setattr("nextflow_ar.tokenizer.image_tokenizer.ImageTokenizer.from_pretrained", loaded)
    photos = ["--photos", str(tmp_path / "nope")]
    assert run(["evaluate", "tokenizer", "-o", str(tmp_path / "e"), *photos]) == 1
    line = capsys.readouterr().err
    assert "nope: no such file or folder" in line and line.count("\n") == 1
    assert not (tmp_path / "e").exists()
