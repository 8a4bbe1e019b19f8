"""What a sample costs: FLOPs of the transformer, exact for the block mask (paper section 3.3, packing by compute)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from nextflow_ar.config import ModelConfig
from nextflow_ar.sequence.batch import Batch
from nextflow_ar.sequence.layout import IGNORED, Sample


class Passes(NamedTuple):
    """How often a training does the products of the layers' and of the head's weights: forward, for the gradient of what
    comes in, and, where they train, for their own. ``adapters``: numbers of adapters beside the layers' weights, which
    train. Attention has no weights: both of what it multiplies have gradients, always.
    """

    layers: int = 3
    head: int = 3
    adapters: int = 0


ALL_TRAINS = Passes()


def visible_pairs(blocks: Int[Tensor, " l"]) -> int:
    """How many (query, key) pairs the mask of one document lets through, from its block numbers.

    A place sees everything up to the end of its own block: a text token itself and what came before, a grid all of itself.
    """
    _, sizes = torch.unique_consecutive(blocks, return_counts=True)
    ends = sizes.cumsum(0)
    return int((sizes * ends).sum())


def batch_pairs(batch: Batch) -> int:
    """Visible (query, key) pairs of all documents of a batch, padding left out."""
    real = batch.documents >= 0
    rows = torch.arange(len(real), device=real.device)[:, None].expand_as(real)
    columns = torch.stack([rows[real], batch.documents[real], batch.blocks[real]])
    count = columns.shape[1]
    if not count:
        return 0
    changed = torch.ones(3, count, dtype=torch.bool, device=real.device)
    changed[:, 1:] = columns[:, 1:] != columns[:, :-1]
    document, index = changed[0] | changed[1], torch.arange(count, device=real.device)
    begins = torch.where(document, index, 0).cummax(0).values  # of each place's document
    starts = (document | changed[2]).nonzero()[:, 0]
    ends = torch.cat([starts[1:], starts.new_tensor([count])])
    return int(((ends - starts) * (ends - begins[starts])).sum())


def batch_flops(batch: Batch, config: ModelConfig, passes: Passes = ALL_TRAINS) -> int:
    """FLOPs of training on a batch: what padding costs is not in it. Where all trains, what :func:`sample_flops` counts."""
    places, predicted = int((batch.documents >= 0).sum()), int((batch.targets != IGNORED).sum())
    return int(passed_flops(places, batch_pairs(batch), predicted, config, passes))


def passed_flops(
    places: float, pairs: float, predicted: float, config: ModelConfig, passes: Passes = ALL_TRAINS
) -> float:
    """FLOPs of training, forward and backward, on so many places, visible (query, key) pairs and predictions."""
    layers = places * (passes.layers * token_flops(config) + 3 * 2 * passes.adapters)
    return (
        layers + 3 * pairs * pair_flops(config) + passes.head * predicted * 2 * config.hidden * config.vocab
    )


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
