"""The next step's data in the background, while this one is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


def _stay_in_autocast() -> None:
    # Whichever thread leaves its outermost autocast empties the cache of cast weights for all of them. In the middle of
    # the other thread's forward pass that changes how gradients are rounded; this thread never leaves.
    torch.autocast_increment_nesting()


class Ahead(Generic[T]):
    """What ``make`` gives for every step, made by one thread of its own a step ahead.

    ``make`` has to follow from the step alone: then nothing differs from calling it in place. An error inside it is raised
    by :meth:`get`. ``steps``: how many there are; nothing is made beyond them.
    """

    def __init__(self, make: Callable[[int], T], steps: int) -> None:
        self._make, self._steps = make, steps
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=_stay_in_autocast)
        self._found: dict[int, Future[T]] = {}

    def get(self, step: int) -> T:
        """Of this step, as often as asked; the step after it begins to be made."""
        kept = {n: f for n, f in self._found.items() if n in (step, step + 1)}
        for number, future in self._found.items():
            if number not in kept:
                future.cancel()
        self._found = kept
        if step not in kept:
            kept[step] = self._thread.submit(self._make, step)
        value = kept[step].result()
        if step + 1 < self._steps and step + 1 not in kept:
            kept[step + 1] = self._thread.submit(self._make, step + 1)
        return value

    def close(self) -> None:
        """Wait for what is being made, and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._found = {}
