"""Memory that was used once goes back to the system: glibc keeps what threads have freed, and large pictures leave much."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable
from functools import lru_cache

EVERY = 2.0
"""Seconds between two looks."""


@lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # no glibc
        return None


def trim() -> bool:
    """Give freed memory of all threads back; takes milliseconds. Returns whether this system can."""
    found = _malloc_trim()
    if found is None:
        return False
    found(0)
    return True


async def trimming(done: Callable[[], float]) -> None:
    """For as long as the server runs: :func:`trim` from time to time, where ``done`` (what was answered) has grown."""
    before = done()
    while True:
        await asyncio.sleep(EVERY)
        if (now := done()) != before:
            before = now
            if not await asyncio.to_thread(trim):
                return
