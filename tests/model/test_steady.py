"""Products that do not depend on the batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nextflow_ar.model import steady
from nextflow_ar.model.steady import BySequence, keep_steady, steady_scores, varies


def test_products_that_vary_are_found_and_computed_by_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    def shaky(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """A library with another kernel for 40 rows and more, as some have for (., 24) matrices."""
        out = x @ weight.T if bias is None else x @ weight.T + bias
        return out + 0.25 if weight.shape[1] == 24 and x.flatten(0, -2).shape[0] >= 40 else out

    varies.cache_clear()
    monkeypatch.setattr(steady.F, "linear", shaky)
    assert varies(24, 8, torch.float32) and not varies(16, 8, torch.float32)
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": nn.Linear(24, 8), "two": nn.Linear(16, 8, bias=False)})
    assert keep_steady(model) == 1 and keep_steady(model) == 0
    assert type(model["one"]) is BySequence and type(model["two"]) is nn.Linear
    x = torch.randn(5, 20, 24)
    together = model["one"](x)
    assert all(torch.equal(model["one"](x[i : i + 1])[0], together[i]) for i in range(5))
    weight = torch.randn(8, 24)
    scores = steady_scores(x, weight)
    assert all(torch.equal(steady_scores(x[i : i + 1], weight)[0], scores[i]) for i in range(5))
    monkeypatch.undo()
    varies.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_layers_of_real_shapes_are_steady(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({str(i): nn.Linear(*s) for i, s in enumerate([(704, 256), (256, 704), (100, 30)])})
    model.to(dtype)
    plain = [(m.weight, m.bias) for m in model.values()]
    keep_steady(model)
    for (weight, bias), layer in zip(plain, model.values(), strict=True):
        x = torch.randn(6, 25, weight.shape[1]).to(dtype)
        torch.testing.assert_close(layer(x), F.linear(x, weight, bias), atol=2e-2, rtol=2e-2)
        for rows in (1, 2, 3):
            assert torch.equal(layer(x[:rows]), layer(x)[:rows])
        assert torch.equal(steady_scores(x[:1], weight), steady_scores(x, weight)[:1])
