"""Keys and values of many rows, each at its own length: rows join, advance together where their shapes agree, and leave.

A row's real places are the first ``lengths[row]`` columns; new ones are written behind them in place. What a step sees is
cut at multiples of :data:`SPAN` columns, so a row meets the same shapes whatever other rows are beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

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
    """The cache that one forward pass fills, as transformers' attention layers call it (:meth:`update`).

    ``rows``: rows of the batch; the first ``live`` belong to someone, the rest repeat the first.
    """

    def __init__(self, rows: int, live: int) -> None:
        self.live = live
        self.lengths = [0] * rows
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._span = 0

    @classmethod
    def gather(cls, parts: Sequence[tuple[RowCache, int]], rows: int) -> RowCache:
        """The given (cache, row) pairs as one cache of ``rows`` rows, the first repeated behind them; what is not among
        them is let go. When they are one cache's live rows in order, that cache itself.
        """
        first = parts[0][0]
        same = all(cache is first and row == i for i, (cache, row) in enumerate(parts))
        if same and first.live == len(parts) and len(first.lengths) >= rows:
            first._narrow(rows)
            return first
        chosen = [*parts, *([parts[0]] * (rows - len(parts)))]
        out = cls(len(chosen), len(parts))
        out.lengths = [cache.lengths[row] for cache, row in chosen]
        longest = max(out.lengths)
        if longest:
            out.keys = [_stack([c.keys[i][r] for c, r in chosen], longest) for i in range(len(first.keys))]
            out.values = [
                _stack([c.values[i][r] for c, r in chosen], longest) for i in range(len(first.values))
            ]
        return out

    @classmethod
    def of(cls, keys: list[Tensor], values: list[Tensor]) -> RowCache:
        """A cache of the one row whose keys and values of every layer, (1, H, n, D), are given."""
        out = cls(1, 1)
        out.keys, out.values, out.lengths = keys, values, [keys[0].shape[2]]
        return out

    def cut(self, row: int, start: int, end: int) -> Float[Tensor, "m h n d"]:
        """A copy of a row's places: keys of all layers, then values."""
        return torch.stack([x[row, :, start:end] for x in (*self.keys, *self.values)])

    def _narrow(self, rows: int) -> None:
        if len(self.lengths) > rows:
            self.lengths = self.lengths[:rows]
            self.keys = [x[:rows] for x in self.keys]
            self.values = [x[:rows] for x in self.values]

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
        self, keys: Float[Tensor, "r h n d"], values: Float[Tensor, "r h n d"], layer: int, *_: Any, **__: Any
    ) -> tuple[Float[Tensor, "r h k d"], Float[Tensor, "r h k d"]]:
        """Write a layer's new keys and values behind what the rows have; returns what the step sees of that layer."""
        new = keys.shape[2]
        span = self.span(new)
        if layer == len(self.keys):
            self.keys.append(keys.new_zeros(*keys.shape[:2], _capacity(span), keys.shape[3]))
            self.values.append(keys.new_zeros(*keys.shape[:2], _capacity(span), keys.shape[3]))
        elif self.keys[layer].shape[2] < span:
            self.keys[layer] = _widened(self.keys[layer], _capacity(span))
            self.values[layer] = _widened(self.values[layer], _capacity(span))
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

    def get_seq_length(self, *_: Any) -> int:
        """Longest row: part of transformers' cache interface."""
        return max(self.lengths)


def _stack(parts: list[Tensor], length: int) -> Tensor:
    """(R, H, length, D) of rows (H, n, D), zeros where one is shorter."""
    return torch.stack(
        [p[:, :length] if p.shape[1] >= length else _widened(p[None], length)[0] for p in parts]
    )


def _capacity(span: int) -> int:
    """Columns to reserve: some to spare, so that rows that grow by single tokens are seldom copied."""
    return spanned(span)


def _widened(x: Tensor, columns: int) -> Tensor:
    """More columns, zeros."""
    return torch.cat([x, x.new_zeros(*x.shape[:2], columns - x.shape[2], x.shape[3])], dim=2)
