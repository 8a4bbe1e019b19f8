"""Attention in two products is the fused kernel's, forwards and backwards, and is used where it should be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nextflow_ar.model import attention
from nextflow_ar.sequence.blocks import block_mask


def _inputs(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    query, key, value = (torch.randn(2, 3, length, 64).to(dtype).requires_grad_() for _ in range(3))
    mask = torch.rand(2, 1, length, length) < 0.6
    return query, key, value, mask | torch.eye(length, dtype=torch.bool)


def _run(length: int, dtype: torch.dtype) -> Tensor:
    query, key, value, mask = _inputs(length, dtype)
    return attention.attend(torch.nn.Module(), query, key, value, mask, scaling=0.125)[0]


@pytest.mark.parametrize(("dtype", "closeness"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_as_the_fused_kernel_forwards_and_backwards(dtype: torch.dtype, closeness: float) -> None:
    query, key, value, mask = _inputs(40, dtype)
    exact = [t.detach().double().requires_grad_() for t in (query, key, value)]
    want = scaled_dot_product_attention(*exact, attn_mask=mask, scale=0.125).transpose(1, 2)
    found, _ = attention.attend(torch.nn.Module(), query, key, value, mask, scaling=0.125)
    goal = torch.randn(want.shape, dtype=torch.float64)
    wanted = torch.autograd.grad((want * goal).sum(), exact)
    got = torch.autograd.grad((found.double() * goal).sum(), (query, key, value))
    for a, b in zip((found, *got), (want, *wanted), strict=True):
        assert (a.double() - b).abs().max() < closeness * b.abs().max()


def test_flex_attention_sees_what_the_mask_rule_lets_through() -> None:
    torch.manual_seed(5)
    query, key, value = (torch.randn(2, heads, 240, 16) for heads in (4, 2, 2))
    blocks = torch.tensor([[0, 1, 2, 2, 2, 3, 0, 1, 1, 2, 0, 0], [0, 0, 1, 2, 3, 3, 3, 4, 5, 5, 6, 7]])
    documents = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, -1, -1], [0] * 12])
    blocks, documents = blocks.repeat_interleave(20, 1), documents.repeat_interleave(20, 1)
    sparse, _ = attention.attend(
        torch.nn.Module(), query, key, value, attention.sparse_mask(blocks, documents), scaling=0.25
    )
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    want = scaled_dot_product_attention(query, key, value, block_mask(blocks, documents), scale=0.25)
    torch.testing.assert_close(sparse, want.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_rows_in_groups_see_their_own_keys_as_if_they_were_alone() -> None:
    torch.manual_seed(6)
    query = torch.randn(5, 4, 3, 16)  # two rows, then one, and two that belong to nobody
    keys, values = (tuple(torch.randn(rows, 2, k, 16) for rows, k in ((2, 8), (1, 40))) for _ in range(2))
    masks = tuple(torch.rand(rows, 1, 3, k) < 0.7 for rows, k in ((2, 8), (1, 40)))
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # pyright: ignore[reportArgumentType]
    found, _ = attention.attend(module, query, keys, values, attention.RowGroups(masks), scaling=0.25)
    assert found.shape == (5, 3, 4, 16) and not found[3:].any()
    for rows, key, value, mask in zip((slice(0, 2), slice(2, 3)), keys, values, masks, strict=True):
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        want = scaled_dot_product_attention(query[rows], key, value, mask, scale=0.25)
        torch.testing.assert_close(found[rows], want.transpose(1, 2), atol=1e-6, rtol=1e-6)


def test_used_in_training_for_short_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    full = attention._in_full
    monkeypatch.setattr(attention, "_in_full", lambda *given: calls.append(1) or full(*given))
    _run(24, torch.bfloat16)
    assert len(calls) == 1
    _run(24, torch.float32)
    assert len(calls) == 2
    with torch.no_grad():
        _run(24, torch.bfloat16)
    monkeypatch.setattr(attention, "LONGEST", 23)
    _run(24, torch.bfloat16)
    _run(24, torch.float64)
    assert len(calls) == 2
    monkeypatch.setattr(attention, "LONGEST", 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert _run(24, torch.float32).dtype == torch.bfloat16
    assert len(calls) == 3
