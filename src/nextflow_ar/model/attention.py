"""Attention as the backbone runs it: torch's fused kernel, and on a CPU in training two products with a softmax between."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "nextflow_ar"
"""Under which transformers' registry knows :func:`attend`."""
LONGEST = 640
"""Keys up to which whole matrices of scores are faster; beyond it the fused kernel catches up and needs less memory."""


def attend(
    module: torch.nn.Module,
    query: Float[Tensor, "b h l d"],
    key: Float[Tensor, "b g k d"],
    value: Float[Tensor, "b g k d"],
    attention_mask: Bool[Tensor, "b 1 l k"] | None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b l h d"], None]:
    """Attention behind transformers' interface. ``attention_mask``: True where a query sees a key, None where it sees all.

    In bf16 on a CPU the backward pass of torch's fused kernel is the slowest part of a training step. There, for rows of
    up to 640 places, scores are held in full, which takes two thirds of the time (benchmarks/attention.py). Everything
    else, generation first of all, goes through the fused kernel.
    """
    trained = torch.is_grad_enabled() and query.requires_grad
    short = key.shape[2] <= LONGEST and key.shape[1] == query.shape[1]
    if attention_mask is None or not (trained and short) or _dtype(query) != torch.bfloat16:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key, value = (t.to(torch.bfloat16) for t in (query * kwargs["scaling"], key, value))
    return _in_full(query, key, value, attention_mask).transpose(1, 2), None


def _dtype(query: Tensor) -> torch.dtype | None:
    """What the products of attention would be computed in; None away from a CPU.

    Rotated queries are fp32 under autocast.
    """
    if query.device.type != "cpu":
        return None
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype


def _in_full(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    unseen = torch.zeros(mask.shape, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    with torch.autocast("cpu", enabled=False):  # which would hold the scores in fp32
        chance = torch.softmax(query @ key.transpose(-1, -2) + unseen, dim=-1)
        return chance @ value


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
