"""What a model and its documents cost, by closed forms: parameters, and tokens, visible pairs and predictions of a document
whose parts are known by size only. Equal to :mod:`nextflow_ar.model.flops` on samples that the layout made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nextflow_ar.config import ModelConfig
from nextflow_ar.model.embeddings import learned_places
from nextflow_ar.model.flops import pair_flops, token_flops
from nextflow_ar.scales import ScaleSchedule


@dataclass(frozen=True)
class TextShape:
    """``tokens`` of text."""

    tokens: int
    supervised: bool = False


@dataclass(frozen=True)
class ImageShape:
    """An image on all grids of ``schedule``; it is closed when anything follows it."""

    schedule: ScaleSchedule
    supervised: bool = False


Shape = TextShape | ImageShape


@dataclass(frozen=True)
class Counts:
    """``tokens``: places. ``pairs``: visible (query, key) pairs. ``predicted``: places that predict something. Of one
    document on average, or of many.
    """

    tokens: float
    pairs: float
    predicted: float

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tokens + other.tokens, self.pairs + other.pairs, self.predicted + other.predicted)

    def times(self, n: float) -> Counts:
        """Of ``n`` such documents."""
        return Counts(n * self.tokens, n * self.pairs, n * self.predicted)


def count(shapes: Sequence[Shape], context_images: str = "scales") -> Counts:
    """Counts of one document in the layout's order, without marks of dialogue. ``context_images``: as in LayoutOptions."""
    tokens = pairs = predicted = 0
    free = False  # whether the last place predicts nothing yet
    for number, shape in enumerate(shapes):
        if isinstance(shape, TextShape):
            n = shape.tokens
            pairs += n * tokens + n * (n + 1) // 2
            tokens += n
            if shape.supervised:
                predicted += n - 1 + free + 1  # every token by the place before it, and the end
            free = not shape.supervised
            continue
        if shape.supervised:
            predicted += free + shape.schedule.num_tokens  # <boi> by the place before it, and every cell
        closed = number < len(shapes) - 1
        alone = closed and not shape.supervised and context_images == "closing"
        for size in (1,) if alone else shape.schedule.sizes:
            tokens += size
            pairs += size * tokens
        if closed:
            for size in (shape.schedule.sizes[-1], 1):  # the closing block and <eoi>
                tokens += size
                pairs += size * tokens
            free = True
    return Counts(tokens, pairs, predicted)


def forward_flops(counts: Counts, config: ModelConfig) -> tuple[float, float]:
    """(FLOPs of the layers, FLOPs of the head), forward; a multiply-add counts two."""
    layers = counts.tokens * token_flops(config) + counts.pairs * pair_flops(config)
    return layers, counts.predicted * 2 * config.hidden * config.vocab


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by part; ``layer`` is one layer's."""

    layer: int
    layers: int
    embeddings: int
    head: int
    inputs: int

    @property
    def total(self) -> int:
        """All, with the last norm counted to the layers."""
        return self.layers + self.embeddings + self.head + self.inputs


def parameters(config: ModelConfig) -> Parameters:
    """Parameters of a model of this shape: what ``NextFlowModel(config)`` holds."""
    hidden = config.hidden
    keys = 2 * config.kv_heads * (hidden // config.heads)
    layer = (hidden + 1) * (hidden + keys) + hidden * hidden + 3 * hidden * config.intermediate + 2 * hidden
    inputs = config.codes * config.code_dim + (config.code_dim + 1) * hidden + (hidden + 1) * hidden
    inputs += (config.max_scales + 1) * hidden + hidden * hidden
    if config.copies:
        inputs += config.code_dim * hidden + hidden + 1
    inputs += learned_places(config) * hidden
    return Parameters(
        layer=layer,
        layers=config.layers * layer + hidden,
        embeddings=config.text_vocab * hidden,
        head=config.vocab * hidden,
        inputs=inputs,
    )


def saved_bytes(config: ModelConfig) -> int:
    """Bytes that one layer keeps of one place for its backward, in bf16 with a fused attention.

    Both norms' inputs in fp32 and outputs, queries, keys, values and the attention's result, and of the feed-forward part
    gate, up, silu(gate) and their product.
    """
    keys = 2 * config.kv_heads * (config.hidden // config.heads)
    norms = 2 * (4 + 2) * config.hidden
    return norms + 2 * (2 * config.hidden + keys) + 2 * 4 * config.intermediate
