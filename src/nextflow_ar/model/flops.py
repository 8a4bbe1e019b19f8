"""What a sample costs: FLOPs of the transformer, exact for the block mask (paper section 3.3, packing by compute)."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from nextflow_ar.config import ModelConfig
from nextflow_ar.sequence.layout import IGNORED, Sample


def visible_pairs(blocks: Int[Tensor, " l"]) -> int:
    """How many (query, key) pairs the mask of one document lets through, from its block numbers.

    A place sees everything up to the end of its own block: a text token itself and what came before, a grid all of itself.
    """
    _, sizes = torch.unique_consecutive(blocks, return_counts=True)
    ends = sizes.cumsum(0)
    return int((sizes * ends).sum())


def token_flops(config: ModelConfig) -> int:
    """Forward FLOPs of one place through all layers, attention's products between places left out."""
    head = config.hidden // config.heads
    queries, keys = config.heads * head, 2 * config.kv_heads * head
    attention = config.hidden * (2 * queries + keys)
    return 2 * config.layers * (attention + 3 * config.hidden * config.intermediate)


def pair_flops(config: ModelConfig) -> int:
    """Forward FLOPs of one visible (query, key) pair through all layers: the score and the weighted value."""
    return 2 * config.layers * 2 * config.hidden


def sample_flops(sample: Sample, config: ModelConfig, *, training: bool = True) -> int:
    """FLOPs of one sample (a multiply-add counts two): projections, block-masked attention, the head where it predicts.

    ``training``: forward and backward, three times the forward.
    """
    pairs = sum(
        visible_pairs(sample.blocks[sample.documents == number])
        for number in sample.documents.unique().tolist()
        if number >= 0
    )
    predicted = int((sample.targets != IGNORED).sum())
    once = (
        len(sample) * token_flops(config)
        + pairs * pair_flops(config)
        + predicted * 2 * config.hidden * config.vocab
    )
    return once * (3 if training else 1)
