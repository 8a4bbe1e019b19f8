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
