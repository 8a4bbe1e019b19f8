"""Models that are none: one that gives every right answer, and one that gives those of other items."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nextflow_ar.data.playground.episodes import Said
from nextflow_ar.evaluation.world.asking import Ask, Reply
from nextflow_ar.evaluation.world.lines import Item

Lookup = Callable[[tuple[str, str, int]], Item]


class Oracle:
    """Answers with the truth; with ``astray`` with that of the item so many numbers on. Pictures may go ``through`` a
    tokenizer.
    """

    def __init__(
        self, item_of: Lookup, astray: int = 0, through: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> None:
        self.item_of, self.astray, self.through = item_of, astray, through

    def __call__(self, asks: Sequence[Ask]) -> list[Reply]:
        """The answers."""
        return [self._reply(ask.key) for ask in asks]

    def _reply(self, key: tuple[str, str, int]) -> Reply:
        line, split, number = key
        found = self.item_of((line, split, number + self.astray))
        out: list[str | np.ndarray] = []
        for part in found.answer:
            if isinstance(part, Said):
                out.append(part.text)
            else:
                picture = part.render()
                out.append(picture if self.through is None else self.through(picture))
        return tuple(out)
