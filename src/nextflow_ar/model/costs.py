"""What a model and its documents cost, by closed forms: parameters, and tokens, visible pairs and predictions of a document
whose parts are known by size only. Equal to :mod:`nextflow_ar.model.flops` on samples that the layout made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from nextflow_ar.config import ModelConfig
from nextflow_ar.model.embeddings import learned_places
from nextflow_ar.model.flops import pair_flops, token_flops
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.types import Document, Image, Text


@dataclass(frozen=True)
class TextShape:
    """``tokens`` of text."""

    tokens: int
    supervised: bool = False


@dataclass(frozen=True)
class ImageShape:
    """An image on the grids of ``schedule``, closed when anything follows it. ``scales``, ``begun``: as in Image."""

    schedule: ScaleSchedule
    supervised: bool = False
    scales: int | None = None
    begun: bool = False


@dataclass(frozen=True)
class MarkShape:
    """A special token, such as those around a turn."""

    supervised: bool = False


Shape = TextShape | ImageShape | MarkShape


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


def shapes(document: Document, tokens: Callable[[str], int]) -> list[Shape]:
    """What a document's counts follow from; no code is looked at. ``tokens``: how many a text has."""
    found: list[Shape] = []
    for segment in document.segments:
        if isinstance(segment, Text):
            found.append(TextShape(tokens(segment.text), segment.supervised))
        elif isinstance(segment, Image):
            schedule = segment.codes.schedule
            found.append(ImageShape(schedule, segment.supervised, segment.scales, segment.begun))
        else:
            found.append(MarkShape(segment.supervised))
    return found


@lru_cache(maxsize=4096)
def _grids(schedule: ScaleSchedule, scales: int) -> tuple[int, int]:
    """Places of the first ``scales`` grids, and the visible pairs among them."""
    ends = schedule.offsets[1 : scales + 1]
    return ends[-1], sum(size * end for size, end in zip(schedule.sizes, ends, strict=False))


def count(shapes: Sequence[Shape], context_images: str = "scales") -> Counts:
    """Counts of one document in the layout's order. ``context_images``: as in LayoutOptions.

    Raises ValueError where something follows an image of which only the first scales are laid out.
    """
    tokens = pairs = predicted = 0
    free = False  # whether the last place predicts nothing yet
    for shape, after in zip(shapes, [*shapes, None][1:], strict=True):
        if not isinstance(shape, ImageShape):
            n = shape.tokens if isinstance(shape, TextShape) else 1
            if shape.supervised and n:
                predicted += free + n - 1  # every token by the place before it
            pairs += n * tokens + n * (n + 1) // 2
            tokens, free = tokens + n, free or n > 0
            if shape.supervised and isinstance(shape, TextShape) and not _goes_on(after):
                predicted, free = predicted + free, False  # the end of the response
            continue
        laid = shape.scales or len(shape.schedule)
        predicted += free and (shape.supervised or shape.begun)  # <boi> by the place before it
        free = False
        if after is not None and not shape.supervised and context_images == "closing":
            laid = 1
        elif after is not None and laid < len(shape.schedule):
            raise ValueError("nothing can follow an image of which only the first scales are laid out")
        places, among = _grids(shape.schedule, laid)
        predicted += places * shape.supervised
        pairs += places * tokens + among
        tokens += places
        if after is not None:
            for size in (shape.schedule.sizes[-1], 1):  # the closing block and <eoi>
                tokens += size
                pairs += size * tokens
            free = True
    return Counts(tokens, pairs, predicted)


def _goes_on(after: Shape | None) -> bool:
    """Whether a response learns what stands behind it instead of its own end."""
    if isinstance(after, ImageShape):
        return after.supervised or after.begun
    return after is not None and after.supervised


def forward_flops(counts: Counts, config: ModelConfig) -> tuple[float, float]:
    """(FLOPs of the layers, FLOPs of the head), forward; a multiply-add counts two."""
    layers = counts.tokens * token_flops(config) + counts.pairs * pair_flops(config)
    return layers, counts.predicted * 2 * config.hidden * config.vocab


def training_flops(counts: Counts, config: ModelConfig) -> float:
    """FLOPs of training on a document, three times the forward's: what ``sample_flops`` finds on its sample."""
    return 3 * sum(forward_flops(counts, config))


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


def saved_bytes(config: ModelConfig, size: int = 2) -> int:
    """Bytes that one layer keeps of one place for its backward, with a fused attention; ``size``: of a number in what
    products are computed in, bf16 by default.

    Both norms' inputs in fp32 and outputs, queries, keys, values and the attention's result, and of the feed-forward part
    gate, up, silu(gate) and their product.
    """
    keys = 2 * config.kv_heads * (config.hidden // config.heads)
    norms = 2 * (4 + size) * config.hidden
    return norms + size * (2 * config.hidden + keys) + size * 4 * config.intermediate
