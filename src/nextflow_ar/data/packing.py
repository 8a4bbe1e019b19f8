"""Putting samples into rows of equal cost: by length, or by compute, streaming and resumable.

Rows of equal length are not equally long to compute: attention grows with the square of a document, and an image's
last grid sees all before it. Rows of equal compute keep all processes of a step equally busy (paper section 3.3: 4.1
times the useful tokens of padding, against 3.4 for equal length).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Bin:
    """A row in the making: the numbers of its samples, and their cost and length so far."""

    items: list[int] = field(default_factory=list)
    cost: float = 0.0
    length: int = 0


class Packer:
    """First-fit packing over a stream of (number, cost, length), in one pass, the same every time.

    ``budget``: cost that a row may have; ``longest``: length that it may have besides (None: any). ``open_rows``: rows
    held open at once; the more, the fuller they get. :meth:`state` and :meth:`restore` carry it over a restart in
    mid-stream. ``most``: length of the longest row so far. Raises ValueError for an item that no row can hold.
    """

    def __init__(self, budget: float, *, longest: int | None = None, open_rows: int = 32) -> None:
        if budget <= 0 or open_rows < 1:
            raise ValueError("budget is above 0 and open_rows at least 1")
        self.budget, self.longest, self.open_rows = budget, longest, open_rows
        self._bins: list[Bin] = []
        self.taken = self.most = 0

    def _fits(self, row: Bin, cost: float, length: int) -> bool:
        return row.cost + cost <= self.budget and (
            self.longest is None or row.length + length <= self.longest
        )

    def add(self, number: int, cost: float, length: int) -> list[int] | None:
        """Place one item; returns a row's numbers when one had to be closed for it."""
        if not self._fits(Bin(), cost, length):
            raise ValueError(
                f"sample {number} costs {cost:g} at length {length}: more than a row may (budget {self.budget:g}, "
                f"length {self.longest})"
            )
        self.taken += 1
        for row in self._bins:
            if self._fits(row, cost, length):
                break
        else:
            row = Bin()
            self._bins.append(row)
        row.items.append(number)
        row.cost += cost
        row.length += length
        self.most = max(self.most, row.length)
        return self._close() if len(self._bins) > self.open_rows else None

    def _close(self) -> list[int]:
        fullest = max(range(len(self._bins)), key=lambda i: (self._bins[i].cost, -i))
        return self._bins.pop(fullest).items

    def finish(self) -> Iterator[list[int]]:
        """The rows that are still open, fullest first."""
        while self._bins:
            yield self._close()

    def pack(self, items: Iterable[tuple[int, float, int]]) -> Iterator[list[int]]:
        """Rows of a whole stream."""
        for item in items:
            closed = self.add(*item)
            if closed is not None:
                yield closed
        yield from self.finish()

    def state(self) -> dict[str, Any]:
        """Plain values that later items do not change: how many were taken, and the open rows."""
        return {"taken": self.taken, "open": [[list(b.items), b.cost, b.length] for b in self._bins]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken; the next item is number ``taken`` of the stream."""
        self.taken = state["taken"]
        self._bins = [Bin(list(items), cost, length) for items, cost, length in state["open"]]
