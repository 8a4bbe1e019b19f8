"""Memory that was used once goes back to the system: glibc keeps what threads have freed, and large pictures leave much."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import time
from collections.abc import Callable
from functools import lru_cache

EVERY, PART = 2.0, 0.01
"""Least seconds between two looks, and the most of the time that may be spent with them."""


@lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # no glibc
        return None


def trim() -> bool:
    """Give freed memory of all threads back; takes milliseconds. Returns whether this system can.

    An error that was answered holds the picture that it was about until the collector of cycles comes by: that goes
    first.
    """
    gc.collect()
    found = _malloc_trim()
    if found is None:
        return False
    found(0)
    return True


def settle_in() -> None:
    """What is loaded by now stays for good: the collector of cycles, which :func:`trim` calls, need not look at it."""
    gc.collect()
    gc.freeze()


class Tidy:
    """:func:`trim` from time to time, for a loop that says when something is done."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self) -> None:
        """Something is done: freed memory goes back, unless that took its share of the time already."""
        began = time.monotonic()
        if began >= self._next:
            trim()
            ended = time.monotonic()
            self._next = ended + max(EVERY, (ended - began) / PART)


async def trimming(done: Callable[[], float]) -> None:
    """For as long as the server runs: :func:`trim` from time to time, where ``done`` (what was answered) has grown."""
    before, pause = done(), EVERY
    while True:
        await asyncio.sleep(pause)
        if (now := done()) != before:
            before, began = now, time.perf_counter()
            if not await asyncio.to_thread(trim):
                return
            pause = max(EVERY, (time.perf_counter() - began) / PART)
