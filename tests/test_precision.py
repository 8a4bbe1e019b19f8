"""In what training and generation compute: bf16 where the processor is fast at it, else fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nextflow_ar import precision
from nextflow_ar.precision import best_dtype, chosen_dtype, mixed_precision, precision_name

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    best_dtype.cache_clear()
    yield
    best_dtype.cache_clear()


def _processor(monkeypatch: pytest.MonkeyPatch, *able: str) -> None:
    for name in precision._CPU_CHECKS:
        monkeypatch.setattr(torch.cpu, name, lambda found=name in able: found, raising=False)


def test_bf16_where_the_processor_has_products_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for able in precision._CPU_CHECKS:
        _processor(monkeypatch, able)
        best_dtype.cache_clear()
        assert best_dtype(CPU) == torch.bfloat16
        with mixed_precision(CPU):
            assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    assert best_dtype(GPU) == torch.bfloat16


def test_fp32_on_other_processors_and_where_torch_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    _processor(monkeypatch)
    assert best_dtype(CPU) == torch.float32
    with mixed_precision(CPU):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
    best_dtype.cache_clear()
    for name in precision._CPU_CHECKS:
        monkeypatch.delattr(torch.cpu, name)
    assert best_dtype(CPU) == torch.float32
    assert best_dtype(GPU) == torch.bfloat16


def test_a_recipe_may_ask_for_either(monkeypatch: pytest.MonkeyPatch) -> None:
    for able in ((), precision._CPU_CHECKS):
        _processor(monkeypatch, *able)
        best_dtype.cache_clear()
        assert chosen_dtype(CPU, "bfloat16") == torch.bfloat16
        assert chosen_dtype(CPU, "float32") == torch.float32
        assert chosen_dtype(CPU) == best_dtype(CPU)
        assert precision_name(CPU) == ("bf16" if able else "fp32")
        with mixed_precision(CPU, "bfloat16"):
            assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
        with mixed_precision(CPU, "bfloat16", on=False):
            assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
