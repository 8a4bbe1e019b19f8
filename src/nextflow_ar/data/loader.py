"""Extracted shards as an endless stream of packed rows, whose state is a few plain values (paper section 3.3).

Everything follows from the source's settings and the state: which document comes next, what is done to it, which row it is
packed into. The stream is the same for any number of processes; each takes its share of the rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import ConfigDict

from nextflow_ar.config import ModelConfig
from nextflow_ar.data.extraction import CodeShards, as_document
from nextflow_ar.data.packing import Packer
from nextflow_ar.data.transforms import drop_condition, invert, plan, task_of
from nextflow_ar.model.flops import sample_flops
from nextflow_ar.sequence.batch import pack
from nextflow_ar.sequence.layout import LayoutOptions, Sample, build
from nextflow_ar.sequence.vocab import Vocabulary
from nextflow_ar.storage import StorageError
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.types import Document

_LOG = logging.getLogger(__name__)
_GROUP = 4
"""Shards that are read together and whose rows are shuffled among each other."""
_STEP = 64
"""Rows of varying length are padded to a multiple of this many places, which keeps the number of shapes small."""


@dataclass(frozen=True)
class ShardFolder:
    """One extraction of a mixture. ``weight``: its share of the documents, relative to the others'.

    ``invert``: probability that a text-to-image document becomes captioning, ``question``: what is asked about its picture
    then (the ``caption`` of generation.json, if the model is to say it when nobody asks anything else).
    ``planned``: probability that a text-to-image document says its prompt once more as the plan in words that stands before
    a picture (for models with ``think`` in generation.json). ``condition_dropout``: probability that what stands before a
    drawn picture is left out, for guidance. ``dialogue``: chat marks around every turn.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    folder: Path
    weight: float = 1.0
    invert: float = 0.0
    condition_dropout: float = 0.0
    dialogue: bool = False
    question: str = ""
    planned: float = 0.0

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"weight is above 0, got {self.weight}")
        for name in ("invert", "condition_dropout", "planned"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability from 0 to 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Packing:
    """How documents share rows. ``mode``: "pad" one document a row, "length" rows of at most ``budget`` tokens,
    "compute" rows of at most ``budget`` TFLOPs (forward and backward).

    ``longest``: tokens that a row may have besides ("compute"). ``open_rows``: rows held open at once. A document that no
    row can hold is left out, and counted.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    mode: Literal["pad", "length", "compute"]
    budget: float
    longest: int | None = None
    open_rows: int = 32

    def __post_init__(self) -> None:
        if self.budget <= 0 or self.open_rows < 1:
            raise ValueError("budget is above 0 and open_rows at least 1")
        if self.longest is not None and self.mode != "compute":
            raise ValueError("longest goes with the mode compute; in the others the budget is the length")

    def width(self, longest: int) -> int:
        """Places of a batch whose longest row has ``longest``."""
        if self.mode == "length":
            return int(self.budget)
        wide = -(-longest // _STEP) * _STEP
        return max(longest, min(wide, int(self.budget))) if self.mode == "pad" else wide


@dataclass(frozen=True)
class ShardSource:
    """Part of every step: ``rows`` packed rows, over all processes, of the mixture of ``folders``."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: Literal["shards"]
    rows: int
    folders: tuple[ShardFolder, ...]
    packing: Packing
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or not self.folders:
            raise ValueError("a source of shards has at least one row and one folder")


class Place(NamedTuple):
    """Where a document stands: number of the folder, pass over it, group of shards, place in the group's order."""

    folder: int
    epoch: int
    group: int
    offset: int


@dataclass(frozen=True, eq=False)
class PackedRow:
    """One row. ``tasks``: of its documents, in order."""

    sample: Sample
    tasks: tuple[str, ...]


class _Folder:
    """The endless order of one extraction: every pass shuffles the shards, and the rows of a few shards together."""

    def __init__(self, settings: ShardFolder, shards: CodeShards, number: int, seed: int) -> None:
        self.settings, self.shards, self.number, self.seed = settings, shards, number, seed
        listed = [(path.name, path.stat().st_size) for path in shards.files]
        self.print = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
        self.groups = -(-len(shards.files) // _GROUP)
        self.epoch = self.group = self.offset = self.accepted = self.skipped = 0
        self._read: OrderedDict[tuple[int, int], tuple[Any, np.ndarray]] = OrderedDict()

    def _group(self, epoch: int, group: int) -> tuple[Any, np.ndarray]:
        """Table of a group of shards, and the order of its rows; the last two groups are kept."""
        if (epoch, group) not in self._read:
            order = np.random.default_rng([1, self.seed, self.number, epoch]).permutation(
                len(self.shards.files)
            )
            chosen = order[group * _GROUP : (group + 1) * _GROUP]
            table = self.shards.table([self.shards.files[i] for i in chosen])
            rng = np.random.default_rng([2, self.seed, self.number, epoch, group])
            self._read[epoch, group] = (table, rng.permutation(table.num_rows))
            while len(self._read) > 2:
                self._read.popitem(last=False)
        return self._read[epoch, group]

    def next(self) -> Place:
        """The place of the next document. Raises StorageError where there is none."""
        for _ in range(2 * self.groups):
            _, order = self._group(self.epoch, self.group)
            place = Place(self.number, self.epoch, self.group, self.offset)
            found = self.offset < len(order)
            self.offset += 1
            if self.offset >= len(order):
                self.group, self.offset = self.group + 1, 0
            if self.group == self.groups:
                self.epoch, self.group = self.epoch + 1, 0
            if found:
                return place
        raise StorageError(f"{self.settings.folder}: the extraction holds no document")

    def parts(self, place: Place) -> list[dict[str, Any]]:
        """The record at a place."""
        table, order = self._group(place.epoch, place.group)
        return table.slice(int(order[place.offset]), 1).to_pylist()[0]["parts"]

    def state(self) -> dict[str, Any]:
        names = ("print", "epoch", "group", "offset", "accepted", "skipped")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, Any]) -> None:
        if state["print"] != self.print:
            raise StorageError(
                f"{self.settings.folder}: its shards are not those that the checkpoint was made with: "
                "train in another run folder"
            )
        for name, value in state.items():
            setattr(self, name, value)


class ShardLoader:
    """The rows of one source. Raises StorageError when a folder holds no extraction or one of another tokenizer."""

    def __init__(
        self,
        source: ShardSource,
        tokenizer: ImageTokenizer,
        vocab: Vocabulary,
        layout: LayoutOptions,
        model: ModelConfig,
    ) -> None:
        self.source, self.vocab, self.layout, self.model = source, vocab, layout, model
        self.folders = [
            _Folder(f, CodeShards(f.folder, tokenizer), i, source.seed) for i, f in enumerate(source.folders)
        ]
        weights = np.array([f.weight for f in source.folders])
        self._edges = np.cumsum(weights / weights.sum())
        packing = source.packing
        self._budget = packing.budget * (1e12 if packing.mode == "compute" else 1)
        self._packer = Packer(self._budget, longest=packing.longest, open_rows=packing.open_rows)
        self._pending: dict[int, tuple[Place, Sample, str]] = {}
        self.drawn = 0

    @property
    def skipped(self) -> int:
        """Documents that no row could hold, so far."""
        return sum(folder.skipped for folder in self.folders)

    def _draw(self) -> tuple[int, Place]:
        """Number and place of the stream's next document."""
        number, self.drawn = self.drawn, self.drawn + 1
        draw = np.random.default_rng([3, self.source.seed, number]).random()
        chosen = min(int(np.searchsorted(self._edges, draw, side="right")), len(self.folders) - 1)
        return number, self.folders[chosen].next()

    def _document(self, number: int, place: Place) -> Document:
        folder = self.folders[place.folder]
        settings, parts = folder.settings, folder.parts(place)
        turned, without, planned = np.random.default_rng([4, self.source.seed, number]).random(3)
        if turned < settings.invert:
            parts = invert(parts, settings.question)
        elif planned < settings.planned:
            parts = plan(parts)
        if without < settings.condition_dropout:
            parts = drop_condition(parts)
        return as_document(parts, dialogue=settings.dialogue)

    def _laid_out(self, number: int, place: Place) -> tuple[Place, Sample, str]:
        document = self._document(number, place)
        return place, build(document, self.vocab, self.layout), task_of(document)

    def _fits(self, cost: float, length: int) -> bool:
        longest = self.source.packing.longest
        return cost <= self._budget and (longest is None or length <= longest)

    def _numbers(self) -> list[int]:
        """The documents of the next row."""
        mode = self.source.packing.mode
        while True:
            number, place = self._draw()
            found = self._laid_out(number, place)
            length, folder = len(found[1]), self.folders[place.folder]
            cost = sample_flops(found[1], self.model) if mode == "compute" else length
            if not self._fits(cost, length):
                folder.skipped += 1
                if folder.skipped == 1:
                    _LOG.warning(
                        "%s: a document of %d tokens fits no row and is left out",
                        folder.settings.folder,
                        length,
                    )
                if folder.epoch and not folder.accepted:
                    raise StorageError(
                        f"{folder.settings.folder}: no document of it fits a row ({folder.skipped} are too long): "
                        "raise the packing's budget"
                    )
                continue
            folder.accepted += 1
            self._pending[number] = found
            row = [number] if mode == "pad" else self._packer.add(number, cost, length)
            if row is not None:
                return row

    def rows(self, process: int = 0, processes: int = 1) -> list[PackedRow]:
        """One step's rows: those of ``process``. Every process goes through the whole stream, so that its state is the same
        for all and a run may go on with another number of them.
        """
        out = []
        for i in range(self.source.rows):
            found = [self._pending.pop(number) for number in self._numbers()]
            if i % processes == process:
                out.append(PackedRow(pack([f[1] for f in found]), tuple(f[2] for f in found)))
        return out

    def peek(self, count: int) -> Iterator[Document]:
        """The first ``count`` documents from here on, as they would be laid out; the loader stays where it is."""
        state = self.state()
        for _ in range(count):
            yield self._document(*self._draw())
        self.restore(state)

    def state(self) -> dict[str, Any]:
        """Plain values: how far every folder is, and which documents wait in open rows."""
        return {
            "drawn": self.drawn,
            "folders": [folder.state() for folder in self.folders],
            "packer": self._packer.state(),
            "pending": [[number, *found[0]] for number, found in self._pending.items()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken. Raises StorageError when the shards are others by now."""
        if len(state["folders"]) != len(self.folders):
            raise StorageError("the checkpoint was made with another number of shard folders")
        for folder, values in zip(self.folders, state["folders"], strict=True):
            folder.restore(values)
        self.drawn = state["drawn"]
        self._packer.restore(state["packer"])
        waiting = sorted((Place(*place), number) for number, *place in state["pending"])
        found = {number: self._laid_out(number, place) for place, number in waiting}
        self._pending = {number: found[number] for number, *_ in state["pending"]}
