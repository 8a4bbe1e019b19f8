"""Shortcuts of the training step on a CPU: the same numbers as the plain way."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from nextflow_ar.model import attention
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.sequence.batch import collate
from nextflow_ar.sequence.layout import LayoutOptions, build
from nextflow_ar.tokenizer.highest import highest
from nextflow_ar.types import Document, Text
from tests.conftest import tiny_model


@pytest.mark.parametrize("entries", [4096, 192, 100, 7])
def test_highest_entries_equal_argmax(entries: int) -> None:
    """Of equal scores the first counts, as for argmax; bf16 scores are often equal."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(33, entries, generator=generator).bfloat16().float()
    scores[0] = 1.0
    scores[1, -1] = 9.0
    top, best = highest(scores)
    assert torch.equal(top[:, 0], scores.amax(1))
    assert torch.equal(best, scores.argmax(1))
    assert best[:2].tolist() == [0, entries - 1]


def _passes(run, given: tuple[Tensor, ...], slope: Tensor) -> list[Tensor]:
    given = tuple(x.detach().requires_grad_() for x in given)
    out = run(*given)
    return [out.detach(), *torch.autograd.grad(out, given, slope.to(out.dtype))]


def test_compiled_attention_and_its_gradients_are_as_close_as_bf16_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values divided after the product: next to fp32 no further off than a softmax in bf16 (0.3 to 0.4 %)."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, slope = (torch.randn(2, 3, 32, 16, generator=generator).bfloat16() for _ in range(4))
    seen = torch.ones(32, 32, dtype=torch.bool).tril().expand(2, 1, 32, 32).clone()
    seen[1, :, 24:] = False  # padding sees nothing
    unseen = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, torch.finfo(torch.bfloat16).min)

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(query @ key.mT + unseen.float(), dim=-1) @ value

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention._in_full(query, key, value, unseen)

    given = (query * 0.25, key, value)
    wanted = _passes(exact, tuple(x.float() for x in given), slope)
    plain = _passes(ours, given, slope)
    monkeypatch.setattr(
        torch.compiler, "is_compiling", lambda: True
    )  # the same operations, without a compiler
    found = _passes(ours, given, slope)
    for ours_, softmax, right in zip(found, plain, wanted, strict=True):
        assert ours_.dtype == torch.bfloat16 and bool(ours_.isfinite().all())
        assert (ours_.float() - right).norm() < 1.6 * (softmax.float() - right).norm() < 0.02 * right.norm()


@pytest.mark.parametrize("shapes", [2, 5])
def test_as_many_shapes_of_batches_are_compiled_as_was_asked(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, shapes: int
) -> None:
    """Torch itself goes on uncompiled after eight."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    model = tiny_model()
    sample = build(Document((Text("a red leaf", supervised=True),)), bundle.vocab, LayoutOptions(12.0))
    made = []
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        model.compile_backbone(shapes=shapes)
        for width in range(64, 64 + 5 * 16, 16):
            before = counter.frame_count
            model.losses(collate([sample], width))
            made.append(counter.frame_count - before)
    torch._dynamo.reset()
    assert made == [made[0]] * shapes + [0] * (5 - shapes) and made[0] > 0
