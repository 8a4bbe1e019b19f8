"""Products that do not depend on the batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nextflow_ar.model import steady
from nextflow_ar.model.steady import BySequence, by_sequence, keep_steady, steady_scores, varies


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


def test_sequences_multiplied_together_come_out_as_one_by_one() -> None:
    """A model's layer with 704 columns, every scale's length and some texts' and prefixes', every number of rows."""
    generator = torch.Generator().manual_seed(5)
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(256, 704, generator=generator).to(dtype)
        for length in (1, 4, 9, 16, 25, 36, 49, 64, 272):
            for rows in (2, 3, 7, 16, 32):
                x = torch.randn(rows, length, 704, generator=generator).to(dtype)
                alone = torch.stack([F.linear(one, weight) for one in x])
                assert torch.equal(by_sequence(x, weight), alone), (dtype, length, rows)


def test_a_kernel_that_rounds_differently_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    true = F.linear

    def shaky(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if 33 <= x.numel() // x.shape[-1] < 100:  # another kernel, which sums in halves
            half = x.shape[-1] // 2
            return true(x[..., :half], weight[:, :half]) + true(x[..., half:], weight[:, half:])
        return true(x, weight, bias)

    monkeypatch.setattr(steady.F, "linear", shaky)
    steady.together.cache_clear()
    sizes = steady.together(48, 20, torch.float32, 16, 1)
    assert {1, 2, 7, 8} <= set(sizes) and not set(sizes) & {3, 4, 5, 6}
    assert steady.grouped(4, sizes) == (2, 2) and steady.grouped(5, sizes) == (7,)
    steady.together.cache_clear()


def test_groups_are_few() -> None:
    assert steady.grouped(32, (1,)) == (1,) * 32
    assert steady.grouped(32, (1, 2, 3)) == (3,) * 10 + (2,)
    assert steady.grouped(12, (1, 2, 16)) == (16,)  # filled up with nothing
    assert steady.grouped(3, (1, 2, 16)) == (2, 1)
