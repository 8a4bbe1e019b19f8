"""Attention as the backbone runs it: torch's fused kernel, and on a CPU in training two products with a softmax between.
Behind prefixes of several lengths the fused kernel runs without a mask (:class:`PrefixMask`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nextflow_ar.model.document_attention import (
    LONGEST,
    DocumentMask,
    attend_by_document,
    document_spans,
)

NAME = "nextflow_ar"
"""Under which transformers' registry knows :func:`attend`."""
APART = {torch.float32: 257, torch.bfloat16: 512}
"""Places from which a row's documents are computed apart. Shorter rows of bf16 were not measured."""


@dataclass(frozen=True, eq=False)
class PrefixMask:
    """What new places see of a cache whose first columns hold a prefix of another length in every row: of those columns
    what ``prefix`` says, of the keys behind them all. No row's prefix is empty.
    """

    prefix: Bool[Tensor, "b 1 1 p"]


@dataclass(frozen=True, eq=False)
class RowGroups:
    """What new places see where the rows of a batch are held in groups, each with keys of its own: a mask for every group,
    in the order of the rows. Rows behind the last group belong to nobody.
    """

    masks: tuple[Bool[Tensor, "r 1 l k"], ...]


def attend(
    module: torch.nn.Module,
    query: Float[Tensor, "b h l d"],
    key: Float[Tensor, "b g k d"] | tuple[Tensor, ...],
    value: Float[Tensor, "b g k d"] | tuple[Tensor, ...],
    attention_mask: Bool[Tensor, "b 1 l k"]
    | Float[Tensor, "b 1 l k"]
    | PrefixMask
    | RowGroups
    | DocumentMask
    | BlockMask
    | None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b l h d"], None]:
    """Attention behind transformers' interface. ``attention_mask``: True where a query sees a key, None where it sees all;
    or what :func:`mask_of_rows` or :func:`sparse_mask` made of that. With :class:`RowGroups`, keys and values are tuples.

    On a CPU the backward pass of torch's fused kernel is the slowest part of a training step in bf16, and a slow one in
    fp32. There, for rows of up to 640 places, scores are held in full, which takes two thirds of the time, and packed rows
    are computed document by document (benchmarks/attention.py). Everything else, generation first of all, goes through the
    fused kernel.
    """
    if isinstance(attention_mask, RowGroups):
        assert isinstance(key, tuple) and isinstance(value, tuple)
        return _by_group(module, query, key, value, attention_mask.masks, **kwargs), None
    assert isinstance(key, Tensor) and isinstance(value, Tensor)
    if isinstance(attention_mask, PrefixMask):
        return _behind_prefix(query, key, value, attention_mask.prefix, kwargs["scaling"]), None
    if isinstance(attention_mask, DocumentMask):
        return attend_by_document(query, key, value, attention_mask, kwargs["scaling"]), None
    if isinstance(attention_mask, BlockMask):
        return _sparse(query, key, value, attention_mask, kwargs["scaling"]), None
    if attention_mask is not None and attention_mask.dtype == torch.bool and key.shape[1] == query.shape[1]:
        attention_mask = mask_of_rows(attention_mask, query)
        assert isinstance(attention_mask, Tensor)
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    q, k, v = (t.to(attention_mask.dtype) for t in (query * kwargs["scaling"], key, value))
    return _in_full(q, k, v, attention_mask).transpose(1, 2), None


def mask_of_rows(
    mask: Bool[Tensor, "b 1 l k"],
    hidden: Tensor,
    documents: Int[Tensor, "b l"] | None = None,
    *,
    trains: bool | None = None,
) -> Bool[Tensor, "b 1 l k"] | Float[Tensor, "b 1 l k"] | DocumentMask:
    """The mask as numbers to add to scores (0, or the lowest there is, in what products are computed in) where those are to
    be held in full; as it is where the fused kernel runs. ``hidden``: what attention is computed from, the queries or the
    rows themselves. ``documents``: of which document every place is (-1: padding), where rows hold several. ``trains``:
    there will be a backward pass through attention (None: where ``hidden`` has a gradient).

    Called once for all layers, outside of what is compiled: within, every layer made the numbers anew while it computed its
    softmax, which then took four times as long.
    """
    trains = hidden.requires_grad if trains is None else trains
    dtype = _dtype(hidden)
    if not trains or not torch.is_grad_enabled() or dtype not in APART:
        return mask
    length = mask.shape[-1]
    spans = document_spans(documents) if documents is not None and length >= APART[dtype] else None
    if length > LONGEST and spans is None:
        return mask
    unseen = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return unseen if spans is None else DocumentMask(unseen, spans)


def sparse_mask(blocks: Int[Tensor, "b l"], documents: Int[Tensor, "b l"]) -> BlockMask:
    """The mask rule for FlexAttention: squares of 128 x 128 places in which nothing is visible are never computed.

    For compiled training on a GPU; not compiled, FlexAttention is slower than anything else.
    """

    def visible(b: Tensor, _: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (documents[b, q] == documents[b, k]) & (blocks[b, q] >= blocks[b, k])

    rows, length = blocks.shape
    return create_block_mask(visible, rows, None, length, length, device=str(blocks.device))


def _by_group(
    module: torch.nn.Module,
    query: Float[Tensor, "b h l d"],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    masks: Sequence[Tensor],
    **kwargs: Any,
) -> Float[Tensor, "b l h d"]:
    found, start = [], 0
    for key, value, mask in zip(keys, values, masks, strict=True):
        end = start + len(mask)
        found.append(sdpa_attention_forward(module, query[start:end], key, value, mask, **kwargs)[0])
        start = end
    if start < len(query):
        found.append(found[0].new_zeros(len(query) - start, *found[0].shape[1:]))
    return torch.cat(found) if len(found) > 1 else found[0]


def _sparse(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scaling: float
) -> Float[Tensor, "b l h d"]:
    """Rotated queries and keys are fp32 under autocast, which FlexAttention does not know."""
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        query, key, value = (t.to(torch.get_autocast_dtype(kind)) for t in (query, key, value))
    shared = key.shape[1] != query.shape[1]
    found = flex_attention(query, key, value, block_mask=mask, scale=scaling, enable_gqa=shared)
    assert isinstance(found, Tensor)
    return found.transpose(1, 2).contiguous()


def _dtype(query: Tensor) -> torch.dtype | None:
    """What the products of attention would be computed in; None away from a CPU.

    Rotated queries are fp32 under autocast.
    """
    if query.device.type != "cpu":
        return None
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype


def _behind_prefix(
    query: Float[Tensor, "b h l d"],
    key: Float[Tensor, "b g k d"],
    value: Float[Tensor, "b g k d"],
    seen: Bool[Tensor, "b 1 1 p"],
    scaling: float,
) -> Float[Tensor, "b l h d"]:
    """Attention over the masked prefix and over the keys behind it, joined by their sums of exponentials.

    The prefix is short and its scores are held in full; the rest, nearly all of an image, goes through the fused kernel,
    which is fastest without a mask. For inference: no gradient.
    """
    groups, columns = key.shape[1], seen.shape[-1]
    grouped = query.unflatten(1, (groups, -1)).flatten(
        2, 3
    )  # queries of heads that share keys, one behind the other
    scores = (grouped @ key[:, :, :columns].transpose(-1, -2)).float() * scaling
    scores = scores.masked_fill(~seen, float("-inf"))
    before = torch.logsumexp(scores, dim=-1, keepdim=True)
    near = ((scores - before).exp().to(value.dtype) @ value[:, :, :columns]).view(query.shape)
    far, behind = _fused(query, key[:, :, columns:], value[:, :, columns:], scaling)
    share = torch.sigmoid(behind[..., None] - before.view(*query.shape[:3], 1))
    return torch.lerp(near.float(), far.float(), share).to(query.dtype).transpose(1, 2).contiguous()


def _fused(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """(B, H, L, D) and the logarithm (B, H, L) of each query's sum of exponentials, without a mask.

    torch has no public function that returns both for every device and version.
    """
    if query.device.type == "cuda":
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scaling)[:2]
    more = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(more, dim=1) if more > 1 else x for x in (key, value))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scaling)


def _in_full(query: Tensor, key: Tensor, value: Tensor, unseen: Tensor) -> Tensor:
    """Compiled, the values are summed before they are divided by the sum of the exponentials: Inductor writes the scores
    of a softmax to memory in fp32 in between, here their exponentials once, in bf16.
    """
    with torch.autocast("cpu", enabled=False):  # which would hold the scores in fp32
        scores = query @ key.transpose(-1, -2) + unseen
        if not torch.compiler.is_compiling():
            return torch.softmax(scores, dim=-1) @ value
        top = scores.detach().amax(-1, keepdim=True)
        powers = (scores - top).exp()
        total = powers.sum(-1, keepdim=True, dtype=torch.float32)
        return ((powers @ value) / total).to(value.dtype)


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
