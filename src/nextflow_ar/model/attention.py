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
    attention_mask: Bool[Tensor, "b 1 l k"] | Float[Tensor, "b 1 l k"] | None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b l h d"], None]:
    """Attention behind transformers' interface. ``attention_mask``: True where a query sees a key, None where it sees all;
    or what :func:`mask_of_rows` made of that.

    In bf16 on a CPU the backward pass of torch's fused kernel is the slowest part of a training step. There, for rows of
    up to 640 places, scores are held in full, which takes two thirds of the time (benchmarks/attention.py). Everything
    else, generation first of all, goes through the fused kernel.
    """
    if attention_mask is not None and attention_mask.dtype == torch.bool and key.shape[1] == query.shape[1]:
        attention_mask = mask_of_rows(attention_mask, query)
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key, value = (t.to(torch.bfloat16) for t in (query * kwargs["scaling"], key, value))
    return _in_full(query, key, value, attention_mask).transpose(1, 2), None


def mask_of_rows(
    mask: Bool[Tensor, "b 1 l k"], hidden: Tensor
) -> Bool[Tensor, "b 1 l k"] | Float[Tensor, "b 1 l k"]:
    """The mask as numbers to add to scores (bf16: 0, or the lowest there is) where those are to be held in full; as it is
    where the fused kernel runs. ``hidden``: what attention is computed from, the queries or the rows themselves.

    Called once for all layers, outside of what is compiled: within, every layer made the numbers anew while it computed its
    softmax, which then took four times as long.
    """
    trained = torch.is_grad_enabled() and hidden.requires_grad
    if not trained or mask.shape[-1] > LONGEST or _dtype(hidden) != torch.bfloat16:
        return mask
    return torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, torch.finfo(torch.bfloat16).min)


def _dtype(query: Tensor) -> torch.dtype | None:
    """What the products of attention would be computed in; None away from a CPU.

    Rotated queries are fp32 under autocast.
    """
    if query.device.type != "cpu":
        return None
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype


def _in_full(query: Tensor, key: Tensor, value: Tensor, unseen: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):  # which would hold the scores in fp32
        chance = torch.softmax(query @ key.transpose(-1, -2) + unseen, dim=-1)
        return chance @ value


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
