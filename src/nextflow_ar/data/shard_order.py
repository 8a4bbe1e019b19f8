"""The documents of one extraction in an endless order, and what their lengths follow from."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from nextflow_ar.data.code_shards import CodeShard, CodeShards
from nextflow_ar.data.token_counts import TokenCounter
from nextflow_ar.storage import StorageError

_GROUP = 4
"""Shards that are read together and whose rows are shuffled among each other."""
_SLAB = 256
"""Documents whose texts' tokens are counted at once."""
_COUNTS = 1 << 25
"""Texts of an extraction whose number of tokens is kept from one pass to the next (4 bytes each)."""


class Place(NamedTuple):
    """Where a document stands: number of the folder, pass over it, group of shards, place in the group's order."""

    folder: int
    epoch: int
    group: int
    offset: int


_Waiting = Any
"""A document that waits for its row: None while its group is there, then an Arrow table of its record, or (file, row)."""


class _Shard:
    """A shard whose records are known but for their codes. ``tokens``: of every part that is a text, -1 not counted yet."""

    def __init__(self, file: CodeShard, tokens: np.ndarray | None, counter: TokenCounter) -> None:
        self.file = file
        self._codes: dict[int, Any] = {}  # groups of its rows, whole
        self._parts: list[tuple[Any, ...]] = []
        lengths: list[int] = []
        told: list[np.ndarray] = []
        names = ("role", "supervised", "text", "final", "scales")
        known = file.counted == counter.fingerprint
        for chunk in file.outlines()["parts"].chunks:
            lengths += chunk.value_lengths().to_pylist()
            flat = chunk.flatten()
            self._parts += zip(*(flat.field(name).to_pylist() for name in names), strict=True)
            if known:
                told.append(flat.field("tokens").fill_null(-1).to_numpy())
        self._starts = [0, *accumulate(lengths)]
        if known and told:
            tokens = np.concatenate(told)
        self.tokens = np.full(len(self._parts), -1, dtype=np.int32) if tokens is None else tokens

    def outline(self, row: int) -> list[dict[str, Any]]:
        """The record at a row, its codes left out."""
        return [
            {"role": role, "supervised": supervised, "text": text, "final": final, "scales": scales}
            for role, supervised, text, final, scales in self._parts[
                self._starts[row] : self._starts[row + 1]
            ]
        ]

    def texts(self, row: int) -> Iterator[tuple[int, str]]:
        """Number within the shard, and text, of the parts of a record that are texts."""
        for number in range(self._starts[row], self._starts[row + 1]):
            if (text := self._parts[number][2]) is not None:
                yield number, text

    def parts(self, row: int) -> list[dict[str, Any]]:
        """The record at a row, whole. Rows whose codes were read with it are kept."""
        group, within = self.file.place(row)
        if group not in self._codes:
            self._codes[group] = self.file.group(group)
        return _parts(self._codes[group], within)

    def kept(self, row: int) -> Any:
        """A record of its own, if its codes were read, so that the others' can go."""
        group, within = self.file.place(row)
        return self._codes[group].take([within]) if group in self._codes else None


def _parts(table: Any, row: int) -> list[dict[str, Any]]:
    return table.slice(row, 1).to_pylist()[0]["parts"]


class _Group:
    """Shards that are read together. ``order``: of their rows."""

    def __init__(self, shards: list[_Shard], rng: np.random.Generator) -> None:
        self.shards = shards
        self._ends = np.cumsum([shard.file.rows for shard in shards])
        self.order = rng.permutation(int(self._ends[-1]))
        self._slabs: set[int] = set()

    def find(self, offset: int) -> tuple[_Shard, int]:
        """The shard, and the row in it, of a place in the order."""
        row = int(self.order[offset])
        number = int(np.searchsorted(self._ends, row, side="right"))
        return self.shards[number], row - int(self._ends[number - 1] if number else 0)

    def tokens(self, offset: int, counter: TokenCounter) -> dict[str, int]:
        """Tokens of every text of the record at a place. Those of records near it are counted with them."""
        slab = offset // _SLAB
        if slab not in self._slabs:
            self._slabs.add(slab)
            end = min((slab + 1) * _SLAB, len(self.order))
            found = [self.find(i) for i in range(slab * _SLAB, end)]
            new = [
                (shard, *one) for shard, row in found for one in shard.texts(row) if shard.tokens[one[0]] < 0
            ]
            for (shard, number, _), tokens in zip(new, counter([text for *_, text in new]), strict=True):
                shard.tokens[number] = tokens
        shard, row = self.find(offset)
        return {text: int(shard.tokens[number]) for number, text in shard.texts(row)}


class ShardOrder:
    """The endless order of one extraction, number ``number`` of a source: every pass shuffles the shards, and the rows of a
    few shards together. Outlines of records, parts without codes, and the tokens of their texts come first; codes are read
    where a record is taken, with those of its neighbours in the file.
    """

    def __init__(self, shards: CodeShards, number: int, seed: int, counter: TokenCounter) -> None:
        self.shards, self.number, self.seed, self.folder = shards, number, seed, shards.files[0].parent
        self.counter = counter
        listed = [(path.name, path.stat().st_size) for path in shards.files]
        self.print = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
        self.groups = -(-len(shards.files) // _GROUP)
        self.epoch = self.group = self.offset = self.accepted = self.skipped = 0
        self._read: OrderedDict[tuple[int, int], _Group] = OrderedDict()
        self._tokens: dict[int, np.ndarray] = {}  # of the shards' texts, from earlier passes
        self._waiting: dict[Place, _Waiting] = {}  # accepted

    def _group(self, epoch: int, group: int) -> _Group:
        """A group of shards; the last two are kept."""
        if (epoch, group) not in self._read:
            order = np.random.default_rng([1, self.seed, self.number, epoch]).permutation(
                len(self.shards.files)
            )
            chosen = order[group * _GROUP : (group + 1) * _GROUP].tolist()
            found = [_Shard(self.shards.shard(i), self._tokens.get(i), self.counter) for i in chosen]
            for i, shard in zip(chosen, found, strict=True):
                if shard.file.counted != self.counter.fingerprint and self._held() < _COUNTS:
                    self._tokens[i] = shard.tokens
            rng = np.random.default_rng([2, self.seed, self.number, epoch, group])
            self._read[epoch, group] = _Group(found, rng)
            while len(self._read) > 2:
                self._put_away(*self._read.popitem(last=False))
        return self._read[epoch, group]

    def _held(self) -> int:
        return sum(map(len, self._tokens.values()))

    def _put_away(self, name: tuple[int, int], group: _Group) -> None:
        """What still waits for its row is kept, where its codes were read; where they were not, in all likelihood its row
        will be another process's.
        """
        for place, held in self._waiting.items():
            if held is None and (place.epoch, place.group) == name:
                shard, row = group.find(place.offset)
                kept = shard.kept(row)
                self._waiting[place] = (shard.file, row) if kept is None else kept

    def next(self) -> Place:
        """The place of the next document. Raises StorageError where there is none."""
        for _ in range(2 * self.groups):
            order = self._group(self.epoch, self.group).order
            place = Place(self.number, self.epoch, self.group, self.offset)
            found = self.offset < len(order)
            self.offset += 1
            if self.offset >= len(order):
                self.group, self.offset = self.group + 1, 0
            if self.group == self.groups:
                self.epoch, self.group = self.epoch + 1, 0
            if found:
                return place
        raise StorageError(f"{self.folder}: the extraction holds no document")

    def outline(self, place: Place) -> list[dict[str, Any]]:
        """The record at a place, its codes left out."""
        shard, row = self._group(place.epoch, place.group).find(place.offset)
        return shard.outline(row)

    def tokens(self, place: Place) -> dict[str, int]:
        """How many tokens every text of the record at a place has."""
        return self._group(place.epoch, place.group).tokens(place.offset, self.counter)

    def accept(self, place: Place) -> None:
        """The document at a place will go into a row."""
        self.accepted += 1
        self._waiting[place] = None

    def leave(self, place: Place) -> None:
        """Its row is another process's."""
        del self._waiting[place]

    def take(self, place: Place) -> list[dict[str, Any]]:
        """Its record, once. Raises StorageError for codes that cannot be read."""
        held = self._waiting.pop(place)
        if held is None:
            return self.parts(place)
        if isinstance(held, tuple):
            file, row = held
            group, within = file.place(row)
            return _parts(file.group(group), within)
        return _parts(held, 0)

    def parts(self, place: Place) -> list[dict[str, Any]]:
        """The record at a place. Raises StorageError for codes that cannot be read."""
        shard, row = self._group(place.epoch, place.group).find(place.offset)
        return shard.parts(row)

    def wait_for(self, places: list[Place]) -> None:
        """Nothing but these documents waits for its row; they are found, group by group."""
        self._waiting = dict.fromkeys(places)
        for epoch, group in sorted({(place.epoch, place.group) for place in places}):
            self._group(epoch, group)

    @property
    def position(self) -> tuple[int, int, int]:
        """(pass, group, place in its order) of the next document."""
        return self.epoch, self.group, self.offset

    @position.setter
    def position(self, value: tuple[int, int, int]) -> None:
        self.epoch, self.group, self.offset = value

    def state(self) -> dict[str, Any]:
        """Plain values: which shards they are, how far the order is, and what was taken and left out."""
        names = ("print", "epoch", "group", "offset", "accepted", "skipped")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken. Raises StorageError when the shards are others by now."""
        if state["print"] != self.print:
            raise StorageError(
                f"{self.folder}: its shards are not those that the checkpoint was made with: "
                "train in another run folder"
            )
        for name, value in state.items():
            setattr(self, name, value)
