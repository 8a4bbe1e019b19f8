"""The notebook runs from top to bottom, and is committed without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

NOTEBOOK = Path(__file__).parent.parent / "examples" / "nextflow.ipynb"
pytestmark = pytest.mark.skipif(not NOTEBOOK.is_file(), reason="needs the checkout")


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def test_it_is_stripped() -> None:
    for cell in cells():
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    assert len({cell["id"] for cell in cells()}) == len(cells())


def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[Image.Image] = []
    names: dict[str, Any] = {"display": shown.append}
    for cell in cells():
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    printed = capsys.readouterr().out
    assert "plan: " in printed and " cat" in printed and "a red circle on a blue background" in printed
    assert "the same picture: True" in printed
    assert [picture.height for picture in shown] == [160, 120, 160, 160, 160]
    assert all(np.asarray(picture).std() > 10 for picture in shown)
    before, after = np.asarray(names["picture"], int), np.asarray(names["redrawn"], int)
    assert np.abs(before - after)[:, :32].mean() > 3 * np.abs(before - after)[:, 32:].mean()
