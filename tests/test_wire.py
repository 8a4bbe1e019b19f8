"""Values between processes."""

from __future__ import annotations

import pickle

import pytest
import torch

from nextflow_ar.wire import packed


@pytest.mark.parametrize(
    "one",
    [
        torch.arange(6).view(2, 3),
        torch.arange(6).view(2, 3).T,
        torch.randn(3),
        torch.randn(4).bfloat16(),
        torch.empty(0, dtype=torch.long),
        torch.ones(2, requires_grad=True),
    ],
)
def test_tensors_come_out_as_they_were(one: torch.Tensor) -> None:
    name, found = pickle.loads(packed(("x", one)))
    assert name == "x" and found.dtype == one.dtype and found.shape == one.shape and torch.equal(found, one)
