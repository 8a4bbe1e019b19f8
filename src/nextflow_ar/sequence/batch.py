"""Samples to batches: padded rows, or several samples packed into one row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.layout import IGNORED, TEXT_SCALE, ImageSpan, Sample


@dataclass(frozen=True, eq=False)
class ImageGroup:
    """All images of a batch that share a schedule, the number of scales laid out (0: the closing block alone), and whether
    they are closed.

    ``codes``: (N, T) input codes. ``rows``, ``starts``: (N,) the batch row and the position of the first fed place.
    ``reference``: (N, T) input codes of the picture that each would copy, -1 where there is none; None: of no image.
    ``copied``: (N, V) the codes that would do so at the fed places, where whoever made the batch has found them already.
    """

    schedule: ScaleSchedule
    scales: int
    closed: bool
    codes: Tensor
    rows: Tensor
    starts: Tensor
    reference: Tensor | None = None
    copied: Tensor | None = None

    def places(self, length: int, count: int) -> Tensor:
        """(N, count) of the first fed places of every image, in rows of ``length`` places that are laid end to end."""
        steps = torch.arange(count, device=self.rows.device)
        return (self.rows * length + self.starts)[:, None] + steps

    def mapped(self, change: Callable[[Tensor], Tensor]) -> ImageGroup:
        """The group with every column changed."""
        known = (name for name in ("reference", "copied") if getattr(self, name) is not None)
        names = ("codes", "rows", "starts", *known)
        return replace(self, **{name: change(getattr(self, name)) for name in names})


@dataclass(frozen=True, eq=False)
class Batch:
    """Columns of :class:`~nextflow_ar.sequence.layout.Sample`, each with a leading batch axis ((B, L), positions
    (3, B, L)), and the images by group.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    positions: Tensor
    blocks: Tensor
    scales: Tensor
    lengths: Tensor
    documents: Tensor
    images: tuple[ImageGroup, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L)."""
        return self.tokens.shape[0], self.tokens.shape[1]

    def part(self, start: int, step: int) -> Batch:
        """Rows ``start``, ``start + step``, ... as a batch of their own."""
        columns = {name: getattr(self, name)[start::step] for name in _PAD}
        groups = []
        for g in self.images:
            on = g.rows % step == start
            if not bool(on.any()):
                continue
            found = g.mapped(lambda x, on=on: x[on])
            groups.append(replace(found, rows=found.rows // step))
        return Batch(**columns, positions=self.positions[:, start::step], images=tuple(groups))

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        columns = {
            name: getattr(self, name).to(device)
            for name in (
                "tokens",
                "targets",
                "weights",
                "positions",
                "blocks",
                "scales",
                "lengths",
                "documents",
            )
        }
        groups = tuple(g.mapped(lambda x: x.to(device)) for g in self.images)
        return Batch(**columns, images=groups)


_PAD = {
    "tokens": 0,
    "targets": IGNORED,
    "weights": 0.0,
    "blocks": 0,
    "scales": TEXT_SCALE,
    "lengths": 0,
    "documents": -1,
}


def pack(samples: Sequence[Sample]) -> Sample:
    """One sample that holds several one after the other; each keeps its own positions and sees only itself."""
    if len(samples) == 1:
        return samples[0]
    columns: dict[str, Any] = {
        name: torch.cat([getattr(s, name) for s in samples]) for name in _PAD if name != "documents"
    }
    documents, images, offset, number = [], [], 0, 0
    for sample in samples:
        documents.append(sample.documents + number)
        images += [replace(span, boi=span.boi + offset) for span in sample.images]
        number += int(sample.documents.max().item()) + 1
        offset += len(sample)
    positions = torch.cat([s.positions for s in samples], dim=1)
    return Sample(**columns, positions=positions, documents=torch.cat(documents), images=tuple(images))


def collate(
    samples: Sequence[Sample], length: int | None = None, *, align: Literal["left", "right"] = "left"
) -> Batch:
    """Rows of ``length`` places (default: the longest sample). Raises ValueError when a sample is longer.

    ``align``: "left" pads at the end (training); "right" pads at the beginning, so that all rows end together
    (generation prefixes).
    """
    longest = max(len(s) for s in samples)
    length = length or longest
    if longest > length:
        raise ValueError(f"a sample of {longest} tokens does not fit rows of {length}")
    starts = [length - len(s) if align == "right" else 0 for s in samples]

    def column(name: str) -> Tensor:
        first: Tensor = getattr(samples[0], name)
        out = torch.full((len(samples), length), _PAD[name], dtype=first.dtype)
        for row, (sample, start) in enumerate(zip(samples, starts, strict=True)):
            out[row, start : start + len(sample)] = getattr(sample, name)
        return out

    positions = torch.zeros(3, len(samples), length)
    for row, (sample, start) in enumerate(zip(samples, starts, strict=True)):
        positions[:, row, start : start + len(sample)] = sample.positions
    return Batch(
        **{name: column(name) for name in _PAD}, positions=positions, images=_groups(samples, starts)
    )


def joined(batches: Sequence[Batch]) -> Batch:
    """Several batches of one width as one, rows in order; images of a kind come together.

    Raises ValueError for batches of several widths.
    """
    if len(batches) == 1:
        return batches[0]
    widths = sorted({batch.shape[1] for batch in batches})
    if len(widths) > 1:
        raise ValueError(f"only batches of one width can be joined, got {', '.join(map(str, widths))}")
    columns = {name: torch.cat([getattr(b, name) for b in batches]) for name in _PAD}
    found: dict[tuple[ScaleSchedule, int, bool, bool], list[ImageGroup]] = {}
    offset = 0
    for batch in batches:
        for group in batch.images:
            key = (group.schedule, group.scales, group.closed, group.reference is not None)
            found.setdefault(key, []).append(replace(group, rows=group.rows + offset))
        offset += batch.shape[0]
    images = tuple(
        replace(
            several[0],
            **{name: torch.cat([getattr(g, name) for g in several]) for name in ("codes", "rows", "starts")},
            reference=torch.cat([g.reference for g in several if g.reference is not None])
            if copies
            else None,
        )
        for (*_, copies), several in found.items()
    )
    return Batch(**columns, positions=torch.cat([b.positions for b in batches], dim=1), images=images)


def _groups(samples: Sequence[Sample], starts: Sequence[int]) -> tuple[ImageGroup, ...]:
    found: dict[tuple[ScaleSchedule, int, bool, bool], list[tuple[int, int, ImageSpan]]] = {}
    for row, (sample, start) in enumerate(zip(samples, starts, strict=True)):
        for span in sample.images:
            key = (span.codes.schedule, span.scales, span.closed, span.reference is not None)
            found.setdefault(key, []).append((row, start + span.boi + 1, span))
    return tuple(
        ImageGroup(
            schedule,
            scales,
            closed,
            torch.stack([span.codes.input for *_, span in members]),
            torch.tensor([row for row, _, _ in members]),
            torch.tensor([start for _, start, _ in members]),
            torch.stack([s.reference for *_, s in members if s.reference is not None]) if copies else None,
        )
        for (schedule, scales, closed, copies), members in found.items()
    )
