"""From documents to token sequences and back: the only place that knows the order of tokens.

An image of S scales takes ``<boi>``, then one block per grid 2..S, then, when anything follows it, one more block with
the codes of grid S, then ``<eoi>``. ``<boi>`` predicts grid 1; the block at (h_k, w_k) is fed the codes of grid k-1
enlarged to that grid and predicts grid k; the closing block is fed grid S's own codes and predicts nothing.
Training samples and generation prefixes both come from :func:`build`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.positions import grid_positions, text_positions
from nextflow_ar.sequence.vocab import Vocabulary
from nextflow_ar.types import Codes, Document, Image, Mark, Text

IGNORED = -100
"""Target of a position that predicts nothing."""

TEXT_SCALE = -1
"""Scale index of positions that belong to no image."""


@dataclass(frozen=True)
class LayoutOptions:
    """``constant_range``: C of Multiscale 3D RoPE. ``alpha``: exponent of scale reweighting (0: plain mean).

    ``text_weight``: loss weight of a text token, where an image's tokens weigh 1 on average. ``context_images``: how an
    image that is given is laid out, with all its scales or as its closing block alone; drawn ones have their scales.
    ``copies``: a drawn image is told which picture it could copy (:func:`reference_of`).
    """

    constant_range: float
    alpha: float = 0.0
    text_weight: float = 1.0
    context_images: Literal["scales", "closing"] = "scales"
    copies: bool = False


@dataclass(frozen=True, eq=False)
class ImageSpan:
    """An image within a sample: where its ``<boi>`` stands, how many of its scales are laid out (0: the closing block
    alone), and whether the closing block follows them. ``reference``: (T,) input codes of the picture before it, which a
    drawn one could copy.
    """

    codes: Codes
    boi: int
    scales: int
    closed: bool
    reference: Tensor | None = None

    @property
    def inputs(self) -> tuple[int, int]:
        """Positions [start, end) of the blocks that are fed codes."""
        schedule = self.codes.schedule
        closing = schedule.sizes[-1] if self.closed else 0
        return self.boi + 1, self.boi + max(1, schedule.offsets[self.scales]) + closing


@dataclass(frozen=True, eq=False)
class Sample:
    """One document as a sequence of length L.

    ``tokens``: (L,) text ids, -1 where codes are fed. ``targets``: (L,) ids to predict at that place, IGNORED where
    none. ``weights``: (L,) loss weights. ``positions``: (3, L) as in positions.py. ``blocks``: (L,) of the mask rule.
    ``scales``: (L,) which scale a place predicts (0-based), the closing block S, text TEXT_SCALE. ``lengths``: (L,)
    number of scales of the image a place belongs to, 0 for text. ``documents``: (L,) -1 for padding. ``cuts``: places
    at which a prefix is fed in parts, so that what stands before them can be kept: behind an image, and where turns change.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    positions: Tensor
    blocks: Tensor
    scales: Tensor
    lengths: Tensor
    documents: Tensor
    images: tuple[ImageSpan, ...]
    cuts: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def parts(self) -> tuple[Sample, ...]:
        """The sample cut at its ``cuts``; positions and blocks stay those of the whole."""
        ends = (*self.cuts, len(self))
        return tuple(self._part(start, end) for start, end in zip((0, *self.cuts), ends, strict=True))

    def _part(self, start: int, end: int) -> Sample:
        names = ("tokens", "targets", "weights", "blocks", "scales", "lengths", "documents")
        columns = {name: getattr(self, name)[start:end] for name in names}
        images = tuple(replace(s, boi=s.boi - start) for s in self.images if start <= s.boi < end)
        return Sample(**columns, positions=self.positions[:, start:end], images=images)


def scale_weights(schedule: ScaleSchedule, alpha: float) -> list[float]:
    """Loss weight of a token of each scale: 1 / (h * w) ** alpha, scaled so that all tokens together weigh their number.

    Paper section 3.3, "scale reweighting".
    """
    raw = [size**-alpha for size in schedule.sizes]
    factor = schedule.num_tokens / sum(r * size for r, size in zip(raw, schedule.sizes, strict=True))
    return [r * factor for r in raw]


class _Builder:
    """Grows the columns of a sample segment by segment."""

    def __init__(self, vocab: Vocabulary, options: LayoutOptions) -> None:
        self.vocab, self.options = vocab, options
        self.tokens: list[int] = []
        self.targets: list[int] = []
        self.weights: list[float] = []
        self.blocks: list[int] = []
        self.scales: list[int] = []
        self.lengths: list[int] = []
        self.positions: list[Tensor] = []
        self.run = (0, 0)  # first position and number of text tokens that `positions` does not hold yet
        self.images: list[ImageSpan] = []
        self.last: Codes | None = None
        self.cuts: list[int] = []
        self.clock = 0  # next text position
        self.block = 0

    def predict(self, token: int) -> None:
        """Let the last place predict ``token``."""
        if self.targets and self.targets[-1] == IGNORED:
            self.targets[-1], self.weights[-1] = token, self.options.text_weight

    def text(self, ids: Sequence[int], *, scale: int = TEXT_SCALE, length: int = 0) -> None:
        self.tokens += ids
        self.targets += [IGNORED] * len(ids)
        self.weights += [0.0] * len(ids)
        self.blocks += range(self.block, self.block + len(ids))
        self.scales += [scale] * len(ids)
        self.lengths += [length] * len(ids)
        start, count = self.run
        self.run = (start if count else self.clock, count + len(ids))
        self.block += len(ids)
        self.clock += len(ids)

    def end_run(self) -> None:
        """Positions of the text that has come since the last grid."""
        if self.run[1]:
            self.positions.append(text_positions(*self.run))
        self.run = (0, 0)

    def grid(
        self, grid: tuple[int, int], scale: int, length: int, targets: Sequence[int], weight: float
    ) -> None:
        size = grid[0] * grid[1]
        self.tokens += [-1] * size
        self.targets += targets
        self.weights += [weight] * size
        self.blocks += [self.block] * size
        self.scales += [scale] * size
        self.lengths += [length] * size
        self.end_run()
        self.positions.append(grid_positions(grid, self.clock, self.options.constant_range))
        self.block += 1
        self.clock += 1

    def supervised_text(self, ids: Sequence[int], end: int | None) -> None:
        if ids:
            self.predict(ids[0])
            first = len(self.targets)
            self.text(ids)
            last = len(self.targets) - 1
            self.targets[first:last] = ids[1:]
            self.weights[first:last] = [self.options.text_weight] * (last - first)
        if end is not None:
            self.predict(end)

    def image(self, image: Image, *, closed: bool) -> None:
        schedule, codes = image.codes.schedule, image.codes
        if image.supervised or image.begun:
            self.predict(self.vocab.boi)
        boi, total = len(self.tokens), len(schedule)
        if closed and not image.supervised and self.options.context_images == "closing":
            self.glance(image)
            return
        laid = image.scales or total
        if closed and laid < total:
            raise ValueError("nothing can follow an image of which only the first scales are laid out")
        weights = scale_weights(schedule, self.options.alpha) if image.supervised else [0.0] * total
        goal = [IGNORED] * schedule.num_tokens
        if image.supervised:
            goal = [self.vocab.text_size + c for c in codes.target.tolist()]
        self.text([self.vocab.boi], scale=0, length=total)
        self.targets[-1], self.weights[-1] = goal[0], weights[0]
        for k in range(1, laid):
            part = goal[schedule.offsets[k] : schedule.offsets[k + 1]]
            self.grid(schedule.grids[k], k, total, part, weights[k])
        if closed:
            self.grid(schedule.final, total, total, [IGNORED] * schedule.sizes[-1], 0.0)
            self.text([self.vocab.eoi])
        before = self.last if self.options.copies and image.supervised else None
        self.images.append(ImageSpan(codes, boi, laid, closed, _input_of(before, schedule)))
        self.last = codes

    def glance(self, image: Image) -> None:
        """An image as its closing block alone. Coordinates and block numbers are those that its scales would lead to."""
        schedule, boi = image.codes.schedule, len(self.tokens)
        self.text([self.vocab.boi], scale=0, length=len(schedule))
        self.end_run()
        self.clock += len(schedule) - 1
        self.block += len(schedule) - 1
        self.grid(schedule.final, len(schedule), len(schedule), [IGNORED] * schedule.sizes[-1], 0.0)
        self.text([self.vocab.eoi])
        self.images.append(ImageSpan(image.codes, boi, 0, True))
        self.last = image.codes

    def segments(self, document: Document, *, close_last: bool) -> None:
        last = len(document.segments) - 1
        # What the model says last is fed with what it answers: a plan in words is no turn of its own.
        given = max((i for i, one in enumerate(document.segments) if not one.supervised), default=-1)
        for i, segment in enumerate(document.segments):
            before = document.segments[i - 1] if i else segment
            turned = before.supervised != segment.supervised and i <= given
            if self.tokens and (isinstance(before, Image) or turned) and i:
                self.cuts.append(len(self.tokens))
            if isinstance(segment, Text):
                ids = self.vocab.encode(segment.text)
                if segment.supervised:
                    # What a response learns to end with is what follows in it: an image, more text, or the turn's end.
                    after = document.segments[i + 1] if i < last else None
                    begun = isinstance(after, Image) and after.begun
                    goes_on = begun or (after is not None and after.supervised)
                    self.supervised_text(ids, None if goes_on else self.vocab.end)
                else:
                    self.text(ids)
            elif isinstance(segment, Mark):
                ids = [self.vocab.special(segment.token)]
                if segment.supervised:
                    self.predict(ids[0])
                self.text(ids)
            else:
                self.image(segment, closed=i < last or close_last)

    def sample(self) -> Sample:
        self.end_run()
        return Sample(
            tokens=_column(self.tokens),
            targets=_column(self.targets),
            weights=torch.from_numpy(np.array(self.weights, dtype=np.float32)),
            positions=torch.cat(self.positions, dim=1) if self.positions else torch.zeros(3, 0),
            blocks=_column(self.blocks),
            scales=_column(self.scales),
            lengths=_column(self.lengths),
            documents=torch.zeros(len(self.tokens), dtype=torch.long),
            images=tuple(self.images),
            cuts=tuple(dict.fromkeys(cut for cut in self.cuts if cut < len(self.tokens))),
        )


def _column(values: list[int]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int64))  # from a list, torch takes three times as long


def _input_of(before: Codes | None, schedule: ScaleSchedule) -> Tensor | None:
    return before.input if before is not None and before.schedule == schedule else None


def reference_of(document: Document, schedule: ScaleSchedule) -> Tensor | None:
    """(T,) codes of the picture that an image drawn behind ``document`` could copy: the one before it, if it is of the
    same schedule.
    """
    images = [s.codes for s in document.segments if isinstance(s, Image)]
    return _input_of(images[-1] if images else None, schedule)


def build(
    document: Document, vocab: Vocabulary, options: LayoutOptions, *, close_last: bool = False
) -> Sample:
    """Lay a document out.

    ``close_last``: close an image even when it ends the document, so that text can be generated after it.
    Raises ValueError for a document without tokens.
    """
    builder = _Builder(vocab, options)
    builder.segments(document, close_last=close_last)
    if not builder.tokens:
        raise ValueError("a document needs at least one token")
    return builder.sample()


def scale_block(schedule: ScaleSchedule, k: int, clock: int, block: int, options: LayoutOptions) -> Sample:
    """The input block that predicts scale ``k`` (1-based count of finished scales: k=1 predicts grid 2) of a growing
    image whose ``<boi>`` stood at text position ``clock`` and block ``block``; k = S is the closing block.

    Its ``tokens`` are all -1: the caller feeds the codes of grid k.
    """
    grid = schedule.grids[k] if k < len(schedule) else schedule.final
    size = grid[0] * grid[1]
    return Sample(
        tokens=torch.full((size,), -1),
        targets=torch.full((size,), IGNORED),
        weights=torch.zeros(size),
        positions=grid_positions(grid, clock + k, options.constant_range),
        blocks=torch.full((size,), block + k),
        scales=torch.full((size,), k),
        lengths=torch.full((size,), len(schedule)),
        documents=torch.zeros(size, dtype=torch.long),
        images=(),
    )


def next_clock(sample: Sample) -> tuple[int, int]:
    """(text position, block number) of the token that would follow a sample."""
    return int(sample.positions[2].max().item()) + 1, int(sample.blocks.max().item()) + 1


def image_prefix(
    document: Document, schedule: ScaleSchedule, vocab: Vocabulary, options: LayoutOptions
) -> Sample:
    """Lay out what precedes a new image: the document's segments and the image's ``<boi>``, whose place predicts grid 1.

    Identical to the beginning of :func:`build` for the document with the image appended. The document may be empty.
    """
    builder = _Builder(vocab, options)
    builder.segments(document, close_last=True)
    builder.text([vocab.boi], scale=0, length=len(schedule))
    return builder.sample()
