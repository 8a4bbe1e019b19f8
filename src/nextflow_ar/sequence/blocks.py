"""The one mask rule: a query sees a key when both are in the same document and block(query) >= block(key)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int


def block_mask(
    blocks: Int[torch.Tensor, "b q"],
    documents: Int[torch.Tensor, "b q"],
    key_blocks: Int[torch.Tensor, "b k"] | None = None,
    key_documents: Int[torch.Tensor, "b k"] | None = None,
) -> Bool[torch.Tensor, "b 1 q k"]:
    """Which keys every query may see; True is visible.

    ``blocks``: every text token and every grid has its own number, rising along the sequence. ``documents``: -1 is
    padding. A padding query sees itself's document only, so no row is ever empty. Keys default to the queries.
    """
    key_blocks = blocks if key_blocks is None else key_blocks
    key_documents = documents if key_documents is None else key_documents
    same = documents[:, :, None] == key_documents[:, None, :]
    earlier = blocks[:, :, None] >= key_blocks[:, None, :]
    return (same & earlier)[:, None]
