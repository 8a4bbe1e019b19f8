"""Weights in fewer bits, where torchao is installed; without it one clear line."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from nextflow_ar.generation.engine import Engine, ImageRequest
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.model.lowbit import quantise
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.storage import StorageError
from nextflow_ar.types import Document, ImageReady, Text
from tests.conftest import TINY_MODEL, tiny_bundle, tiny_model


def test_torchao_missing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(StorageError, match=r"int8 weights need torchao: pip install 'nextflow-ar\[lowbit\]'"):
        quantise(tiny_model(), "int8")
    with pytest.raises(ValueError, match="int8, int4, fp8, got 'int7'"):
        quantise(tiny_model(), "int7")  # pyright: ignore[reportArgumentType]


def test_eight_bits_keep_what_is_computed() -> None:
    pytest.importorskip("torchao")
    bundle = tiny_bundle(replace(TINY_MODEL, layers=1))
    x, mask = torch.randn(1, 6, 48, generator=torch.Generator().manual_seed(0)), None
    places = torch.arange(6.0).expand(3, 1, 6)
    before = bundle.model.backbone.run(x, places, mask)
    assert quantise(bundle.model, "int8") == 7
    after = bundle.model.backbone.run(x, places, mask)
    away = float((after - before).norm() / before.norm())
    assert 1e-5 < away < 0.02
    request = ImageRequest(Document((Text("a"),)), ScaleSchedule.square(3), 0, SamplingSettings(guidance=2.0))
    events = list(Engine(bundle).images([request]))
    assert any(isinstance(e, ImageReady) and e.codes.target.numel() == 14 for e in events)
