"""Keys and values of many rows, each at its own length: rows join, advance together where their shapes agree, and leave.

A row's real places are the first ``lengths[row]`` columns; new ones are written behind them in place. What a row sees is
cut at multiples of :data:`SPAN` columns, so it meets the same shapes whatever other rows are beside it; rows of one span
are held together (:class:`RowCache`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nextflow_ar.model.attention import RowGroups

BUCKET = 16
"""Prefixes are padded to multiples of this."""
SPAN = 64
"""What a step sees of the cache is rounded up to multiples of this: the wider, the more rows share their shapes."""


def rounded(length: int) -> int:
    """``length`` up to the next multiple of :data:`BUCKET`."""
    return -(-length // BUCKET) * BUCKET


def spanned(length: int) -> int:
    """``length`` up to the next multiple of :data:`SPAN`."""
    return -(-length // SPAN) * SPAN


class RowCache:
    """Keys and values of ``rows`` rows that see equally many columns (:meth:`span`)."""

    def __init__(self, rows: int) -> None:
        self.lengths = [0] * rows
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @classmethod
    def gather(cls, parts: Sequence[tuple[RowCache, int]], columns: int) -> RowCache:
        """The given (cache, row) pairs as one cache with room for ``columns``; what is not among them is let go. When they
        are all of one cache's rows in order, that cache itself.
        """
        first = parts[0][0]
        same = all(cache is first and row == i for i, (cache, row) in enumerate(parts))
        if same and len(first.lengths) == len(parts):
            return first
        out = cls(len(parts))
        out.lengths = [cache.lengths[row] for cache, row in parts]
        for layer in range(len(first.keys)):
            out.keys.append(_stack([c.keys[layer][r] for c, r in parts], out.lengths, columns))
            out.values.append(_stack([c.values[layer][r] for c, r in parts], out.lengths, columns))
        return out

    @classmethod
    def of(cls, keys: list[Tensor], values: list[Tensor]) -> RowCache:
        """A cache of the one row whose keys and values of every layer, (1, H, n, D), are given."""
        out = cls(1)
        out.keys, out.values, out.lengths = keys, values, [keys[0].shape[2]]
        return out

    def cut(self, row: int, start: int, end: int) -> Float[Tensor, "m h n d"]:
        """A copy of a row's places: keys of all layers, then values."""
        return torch.stack([x[row, :, start:end] for x in (*self.keys, *self.values)])

    def span(self, new: int) -> int:
        """Columns that a step of ``new`` places sees."""
        return spanned(max(self.lengths) + new)

    def mask(self, new: int, inner: Bool[Tensor, "r 1 n n"] | None) -> Bool[Tensor, "r 1 n k"]:
        """What the next ``new`` places of every row see: all that it has, and of each other what ``inner`` says (None:
        all).
        """
        device = self.keys[0].device if self.keys else (inner.device if inner is not None else "cpu")
        columns = torch.arange(self.span(new), device=device)
        offset = (
            columns - torch.tensor(self.lengths, device=device)[:, None]
        )  # (R, K): which new place a column is
        if inner is None:
            return (offset < new)[:, None, None].expand(-1, 1, new, -1)
        place = offset.clamp(0, new - 1)[:, None, None].expand(-1, 1, new, -1)
        among = inner.gather(3, place) & ((offset >= 0) & (offset < new))[:, None, None]
        return among | (offset < 0)[:, None, None]

    def update(
        self, keys: Float[Tensor, "r h n d"], values: Float[Tensor, "r h n d"], layer: int
    ) -> tuple[Float[Tensor, "r h k d"], Float[Tensor, "r h k d"]]:
        """Write a layer's new keys and values behind what the rows have; returns what the step sees of that layer."""
        new = keys.shape[2]
        span = self.span(new)
        if layer == len(self.keys):
            self.keys.append(keys.new_zeros(*keys.shape[:2], span, keys.shape[3]))
            self.values.append(keys.new_zeros(*keys.shape[:2], span, keys.shape[3]))
        elif self.keys[layer].shape[2] < span:
            self.keys[layer] = _widened(self.keys[layer], span)
            self.values[layer] = _widened(self.values[layer], span)
        runs = self._runs()
        for store, given in ((self.keys[layer], keys), (self.values[layer], values)):
            for start, end, length in runs:
                store[start:end, :, length : length + new] = given[start:end]
        return self.keys[layer][:, :, :span], self.values[layer][:, :, :span]

    def _runs(self) -> list[tuple[int, int, int]]:
        """(start, end, length) of neighbouring rows of one length."""
        found: list[tuple[int, int, int]] = []
        for row, length in enumerate(self.lengths):
            if found and found[-1][2] == length:
                found[-1] = (found[-1][0], row + 1, length)
            else:
                found.append((row, row + 1, length))
        return found

    def advance(self, real: Sequence[int]) -> None:
        """Keep the first ``real[row]`` of each row's new places; padding behind them is written over later."""
        self.lengths = [length + more for length, more in zip(self.lengths, real, strict=True)]


class Caches:
    """The caches of all rows of one forward pass, as transformers' attention layers call it (:meth:`update`).

    Rows of different spans share all of a step but their attention. Rows behind those of ``parts`` belong to nobody and
    leave nothing.
    """

    def __init__(self, parts: Sequence[RowCache]) -> None:
        self.parts = tuple(parts)

    def mask(self, new: int, inner: Bool[Tensor, "r 1 n n"] | None, device: torch.device) -> RowGroups:
        """What the next ``new`` places of every row see; ``inner`` as in :meth:`RowCache.mask`."""
        masks = (
            part.mask(new, None if inner is None else inner[rows]).to(device) for part, rows in self._spread()
        )
        return RowGroups(tuple(masks))

    def update(
        self, keys: Float[Tensor, "r h n d"], values: Float[Tensor, "r h n d"], layer: int, *_: Any, **__: Any
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Write a layer's new keys and values behind what the rows have; returns what each part's rows see there."""
        seen = [part.update(keys[rows], values[rows], layer) for part, rows in self._spread()]
        return tuple(k for k, _ in seen), tuple(v for _, v in seen)

    def advance(self, real: Sequence[int]) -> None:
        """Keep the first ``real[row]`` of each row's new places."""
        for part, rows in self._spread():
            part.advance(real[rows])

    def places(self) -> Iterator[tuple[RowCache, int]]:
        """Where every row is: its part, and its number there."""
        for part in self.parts:
            for row in range(len(part.lengths)):
                yield part, row

    def get_seq_length(self, *_: Any) -> int:
        """Longest row: part of transformers' cache interface."""
        return max(max(part.lengths) for part in self.parts)

    def _spread(self) -> Iterator[tuple[RowCache, slice]]:
        start = 0
        for part in self.parts:
            end = start + len(part.lengths)
            yield part, slice(start, end)
            start = end


def _stack(parts: Sequence[Tensor], lengths: Sequence[int], columns: int) -> Tensor:
    """(R, H, columns, D): what rows (H, n, D) hold up to their lengths, zeros behind it."""
    out = parts[0].new_empty(len(parts), parts[0].shape[0], columns, parts[0].shape[2])
    for row, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        out[row, :, :length] = part[:, :length]
        out[row, :, length:] = 0
    return out


def _widened(x: Tensor, columns: int) -> Tensor:
    """More columns, zeros."""
    return torch.cat([x, x.new_zeros(*x.shape[:2], columns - x.shape[2], x.shape[3])], dim=2)
