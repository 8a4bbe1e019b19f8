"""What outlives a request within a budget of bytes: keys and values of prefixes, and codes of pictures.

A prefix is fed in parts (``Sample.parts``), each by itself, whether anything is kept or not. So what a part leaves in the
cache depends on the document up to its end alone, bit for bit, and a later request that begins alike takes it from here.
Words and pictures that were sampled are not taken over as they were: token by token they round differently than in one
piece. They are fed once more, in one step, with the turn that follows them.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nextflow_ar.sequence.layout import Sample
from nextflow_ar.types import Codes

PICTURE_BYTES = 16 * 2**20
"""Most bytes of codes of pictures that are kept."""


class Sized(Protocol):
    """What takes memory."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...


T = TypeVar("T", bound=Sized)


class Store(Generic[T]):
    """Values by key, the one longest unused let go first. Methods may be called in any thread.

    ``budget``: most bytes of all values, 0: nothing is kept. ``hits``: values found again.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.used, self.hits = max(0, budget), 0, 0
        self._values: OrderedDict[bytes, T] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: bytes) -> T | None:
        """The value of a key, used now."""
        with self._lock:
            found = self._values.get(key)
            if found is not None:
                self._values.move_to_end(key)
                self.hits += 1
            return found

    def put(self, key: bytes, value: T) -> None:
        """Keep a value; one larger than the whole budget is not kept."""
        if value.size > self.budget:
            return
        with self._lock:
            old = self._values.pop(key, None)
            self.used += value.size - (old.size if old is not None else 0)
            self._values[key] = value
            while self.used > self.budget:
                self.used -= self._values.popitem(last=False)[1].size

    def touch(self, keys: Iterable[bytes]) -> None:
        """Count these as used now, in this order."""
        with self._lock:
            for key in keys:
                if key in self._values:
                    self._values.move_to_end(key)

    def clear(self) -> bool:
        """Let everything go; returns whether there was anything."""
        with self._lock:
            some = bool(self._values)
            self._values.clear()
            self.used = 0
            return some


@dataclass(frozen=True, eq=False)
class KeptPart:
    """What a part of a prefix left behind. ``rows``: keys of all layers, then values, (2 * layers, H, n, D). ``hidden``:
    (D,) of its last place, from which the scores of what follows are computed.
    """

    rows: Float[Tensor, "m h n d"]
    hidden: Float[Tensor, " d"]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.rows.nbytes + self.hidden.nbytes

    def __len__(self) -> int:
        return self.rows.shape[2]


def part_key(before: bytes, part: Sample) -> bytes:
    """Name of a part by its exact content and that of everything before it (``before``: the name of the part before)."""
    digest = hashlib.sha256(before)
    for column in (part.tokens, part.positions, part.blocks, part.scales, part.lengths):
        digest.update(repr((tuple(column.shape), column.dtype)).encode())
        digest.update(column.contiguous().numpy().tobytes())
    for span in part.images:
        told = (span.boi, span.scales, span.closed, tuple(span.codes.schedule.grids), span.codes.input.shape)
        digest.update(repr(told).encode())
        digest.update(span.codes.input.contiguous().numpy().tobytes())
        if span.reference is not None:
            digest.update(b"copies" + span.reference.contiguous().numpy().tobytes())
    return digest.digest()


@dataclass(frozen=True, eq=False)
class KeptCodes:
    """Codes of a picture that was read or drawn."""

    codes: Codes

    @property
    def size(self) -> int:
        """Bytes, the bookkeeping about guessed."""
        return self.codes.target.nbytes + self.codes.input.nbytes + 512


def picture_key(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Name of a picture by its exact pixels."""
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def restored(parts: Iterable[Float[Tensor, "m h n d"]]) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of every layer, (1, H, n, D) each, of parts one behind the other."""
    whole = torch.cat(list(parts), dim=2)[:, None]
    layers = len(whole) // 2
    return list(whole[:layers].unbind(0)), list(whole[layers:].unbind(0))
