"""A committed tiny checkpoint gives the committed numbers: pixels to codes to pixels, logits, loss and a drawing."""

from __future__ import annotations

import json

import pytest

from tests.golden.make import HERE, measure


def test_golden_checkpoint() -> None:
    expected, found = json.loads((HERE / "expected.json").read_text()), measure()
    assert found["codes"] == expected["codes"]
    assert len(set(found["codes"])) > 10
    assert found["pixels"] == pytest.approx(expected["pixels"], abs=1e-4)
    assert found["logits"] == pytest.approx(expected["logits"], abs=1e-3)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert found["drawn"] == pytest.approx(expected["drawn"], abs=1.01)
