"""Extracted shards as an endless stream of packed rows, whose state is a few plain values (paper section 3.3).

Everything follows from the source's settings and the state: which document comes next, what is done to it, which row it is
packed into. The stream is the same for any number of processes: each goes through all of it by what documents cost, which
needs their texts' lengths and no codes, and lays out its share of the rows.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict

from nextflow_ar.config import ModelConfig, within
from nextflow_ar.data.code_shards import CodeShards, as_document, lacks
from nextflow_ar.data.packing import Packer
from nextflow_ar.data.shard_order import Place, ShardOrder
from nextflow_ar.data.token_counts import TokenCounter
from nextflow_ar.data.transforms import drop_condition, invert, plan, task_of
from nextflow_ar.model.costs import count as counts
from nextflow_ar.model.costs import shapes, training_flops
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import pack
from nextflow_ar.sequence.dialogue import turns
from nextflow_ar.sequence.layout import LayoutOptions, Sample, build
from nextflow_ar.sequence.vocab import Vocabulary
from nextflow_ar.storage import StorageError
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.pictures import Fit
from nextflow_ar.types import Codes, Document, Image, Text

_LOG = logging.getLogger(__name__)
_PLACES = 1 << 17
"""Of one row, more than any training computes at once."""
_STEP = 64
"""Rows of varying length are padded to a multiple of this many places, which keeps the number of shapes small."""


def _up(places: int) -> int:
    return -(-places // _STEP) * _STEP


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
    row can hold is left out, and counted. ``widths``: rows of equal compute are padded to so many widths from one length to
    twice it; each is compiled once, and the more, the less is padding.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    mode: Literal["pad", "length", "compute"]
    budget: float
    longest: int | None = None
    open_rows: int = 32
    widths: int = 7

    def __post_init__(self) -> None:
        if self.budget <= 0 or self.open_rows < 1:
            raise ValueError("budget is above 0 and open_rows at least 1")
        if self.longest is not None and self.longest < 1:
            raise ValueError(f"longest is at least 1, got {self.longest}")
        if not 1 <= self.widths <= 64:
            raise ValueError(f"widths is from 1 to 64, got {self.widths}")
        if self.longest is not None and self.mode != "compute":
            raise ValueError("longest goes with the mode compute; in the others the budget is the length")

    def too_much(self, most: int) -> str:
        """What is wrong with a budget of compute that lets a row have ``most`` places, more than anybody computes at once:
        it was meant as one of tokens, and fills the memory. "" for any other.
        """
        if self.mode != "compute" or most <= _PLACES:
            return ""
        return (
            f"a row of {self.budget:g} TFLOPs holds more than {_PLACES:,} places of this model: give packing a smaller "
            "budget, or longest"
        )

    def width(self, longest: int) -> int:
        """Places of one whose longest row has ``longest``: in "compute" up to ``2 ** (1 / widths)`` times that, and 64."""
        if self.mode == "length":
            return int(self.budget)
        if self.mode == "pad":
            return max(longest, min(_up(longest), int(self.budget)))
        top = _up(self.longest or _STEP)
        halvings = (
            math.floor(self.widths * math.log2(top / longest)) + 1
        )  # in parts; one too far down, for what is rounded
        return next(
            wide
            for k in count(halvings, -1)
            if (wide := _up(round(top * 2 ** (-k / self.widths)))) >= longest
        )


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
        within("at least 0", seed=self.seed)
        if self.rows < 1 or not self.folders:
            raise ValueError("a source of shards has at least one row and one folder")


@dataclass(frozen=True, eq=False)
class PackedRow:
    """One row. ``tasks``: of its documents, in order."""

    sample: Sample
    tasks: tuple[str, ...]


_Made = tuple[list[PackedRow], dict[str, Any]]
"""A step's rows, and the stream's state behind them."""


@lru_cache(maxsize=4096)
def _blank(final: tuple[int, int], scales: int) -> Codes:
    """A picture of which nothing but its schedule is known."""
    schedule = ScaleSchedule.from_final(final, scales)
    return Codes.plain(schedule, torch.zeros(1, dtype=torch.long).expand(schedule.num_tokens))


def _outlined(parts: list[dict[str, Any]], *, dialogue: bool) -> Document:
    """What ``as_document`` makes of a record, with blank pictures."""
    pairs: list[tuple[str, Text | Image]] = []
    for part in parts:
        if part["text"] is not None:
            pairs.append((part["role"], Text(part["text"], part["supervised"])))
        else:
            height, width = part["final"]
            pairs.append((part["role"], Image(_blank((height, width), part["scales"]), part["supervised"])))
    return Document(turns(pairs) if dialogue else tuple(segment for _, segment in pairs))


class _Stream:
    """The rows of one source, one step after the other."""

    def __init__(
        self,
        source: ShardSource,
        tokenizer: ImageTokenizer,
        vocab: Vocabulary,
        layout: LayoutOptions,
        model: ModelConfig,
    ) -> None:
        self.source, self.vocab, self.layout, self.model = source, vocab, layout, model
        counter = TokenCounter(vocab.tokenizer)
        self.orders = [
            ShardOrder(CodeShards(f.folder, tokenizer), i, source.seed, counter)
            for i, f in enumerate(source.folders)
        ]
        for order in self.orders:
            if (scales := order.shards.config.num_scales) > model.max_scales:
                raise StorageError(
                    f"{order.folder}: its pictures have {scales} scales, the model has embeddings for {model.max_scales}: "
                    f"extract with --scales {model.max_scales}"
                )
        weights = np.array([f.weight for f in source.folders])
        self._edges = np.cumsum(weights / weights.sum())
        packing = source.packing
        self._budget = packing.budget * (1e12 if packing.mode == "compute" else 1)
        self._packer = Packer(self._budget, longest=packing.longest, open_rows=packing.open_rows)
        self._pending: dict[int, Place] = {}
        self._down = tokenizer.config.downsample
        self._canvases: Counter[str] = Counter()
        self._astray: set[int] = set()  # folders, of which it was told
        self._other: dict[str, int] = {}  # tokens of what stands in no record: roles, questions
        self.drawn = 0

    def _draw(self) -> tuple[int, Place]:
        """Number and place of the stream's next document."""
        number, self.drawn, chosen = self.drawn, self.drawn + 1, 0
        if len(self.orders) > 1:
            draw = np.random.default_rng([3, self.source.seed, number]).random()
            chosen = min(int(np.searchsorted(self._edges, draw, side="right")), len(self.orders) - 1)
        return number, self.orders[chosen].next()

    def _changed(self, number: int, place: Place, parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A record as this document of the stream has it."""
        settings = self.source.folders[place.folder]
        if not (settings.invert or settings.planned or settings.condition_dropout):
            return parts  # most of the time goes into setting up a generator
        turned, without, planned = np.random.default_rng([4, self.source.seed, number]).random(3)
        if turned < settings.invert:
            parts = invert(parts, settings.question)
        elif planned < settings.planned:
            parts = plan(parts)
        if without < settings.condition_dropout:
            parts = drop_condition(parts)
        return parts

    def _document(self, number: int, place: Place, parts: list[dict[str, Any]]) -> Document:
        dialogue = self.source.folders[place.folder].dialogue
        return as_document(self._changed(number, place, parts), dialogue=dialogue)

    def _outline(self, number: int, place: Place) -> Document:
        """What :meth:`_document` is, with blank pictures."""
        parts = self._changed(number, place, self.orders[place.folder].outline(place))
        return _outlined(parts, dialogue=self.source.folders[place.folder].dialogue)

    def _measured(self, place: Place, document: Document) -> tuple[float, int]:
        """Cost and length of a document: those of the sample that would be laid out, found without it."""
        known = self.orders[place.folder].tokens(place)

        def tokens(text: str) -> int:
            if (n := known.get(text)) is None and (n := self._other.get(text)) is None:
                n = self._other[text] = len(self.vocab.encode(text))
            return n

        found = counts(shapes(document, tokens), self.layout.context_images)
        length = int(found.tokens)
        if not length:
            raise ValueError("a document needs at least one token")
        in_compute = self.source.packing.mode == "compute"
        return training_flops(found, self.model) if in_compute else length, length

    def _fits(self, cost: float, length: int) -> bool:
        longest = self.source.packing.longest
        return cost <= self._budget and (longest is None or length <= longest)

    def _numbers(self) -> list[int]:
        """The documents of the next row."""
        while True:
            number, place = self._draw()
            order = self.orders[place.folder]
            document = self._outline(number, place)
            while not self._fits(*(measured := self._measured(place, document))):
                self._skip(order, measured[1])
                # of the same folder, whose share is of what it keeps; what is done to it is drawn anew
                number, self.drawn, place = self.drawn, self.drawn + 1, order.next()
                document = self._outline(number, place)
            order.accept(place)
            self._count(order, document)
            self._pending[number] = place
            pad = self.source.packing.mode == "pad"
            row = [number] if pad else self._packer.add(number, *measured)
            if told := self.source.packing.too_much(self._packer.most):
                raise StorageError(f"{order.folder}: {told}")
            if row is not None:
                return row

    def _skip(self, order: ShardOrder, length: int) -> None:
        """A document fits no row. Raises StorageError where none of its folder does."""
        order.skipped += 1
        if order.skipped == 1:
            _LOG.warning("%s: a document of %d tokens fits no row and is left out", order.folder, length)
        if order.epoch and not order.accepted:
            limit = "" if self.source.packing.longest is None else " or its longest"
            raise StorageError(
                f"{order.folder}: no document of it fits a row ({order.skipped} are too long): "
                f"raise the packing's budget{limit}"
            )

    def _count(self, order: ShardOrder, document: Document) -> None:
        """Count a document's pictures by their canvases."""
        for schedule in (s.codes.schedule for s in document.segments if isinstance(s, Image)):
            height, width = schedule.image_size(self._down)
            self._canvases[f"{width}x{height}"] += 1
            if not schedule.canonical and order.number not in self._astray:
                self._astray.add(order.number)
                _LOG.warning(
                    "%s: it has pictures on schedules that inference has not, as versions of before made them (such as one "
                    "of %dx%d): extract again makes their shards anew", order.folder, width, height,
                )  # fmt: skip

    def _row(self, found: list[tuple[int, Place]]) -> PackedRow:
        documents = [
            self._document(number, place, self.orders[place.folder].take(place)) for number, place in found
        ]
        samples = [build(document, self.vocab, self.layout) for document in documents]
        return PackedRow(pack(samples), tuple(map(task_of, documents)))

    def rows(self, process: int, processes: int) -> list[PackedRow]:
        """One step's rows: those of ``process``."""
        out = []
        for i in range(self.source.rows):
            found = [(number, self._pending.pop(number)) for number in self._numbers()]
            if i % processes == process:
                out.append(self._row(found))
            else:
                for _, place in found:
                    self.orders[place.folder].leave(place)
        return out

    def ahead(self, state: dict[str, Any], count: int) -> list[tuple[int, Document]]:
        """The first ``count`` documents behind ``state``, as they would be laid out, each with its folder's number; the
        stream stays where it is.
        """
        drawn, positions = self.drawn, [order.position for order in self.orders]
        self.drawn = state["drawn"]
        for order, there in zip(self.orders, state["folders"], strict=True):
            order.position = there["epoch"], there["group"], there["offset"]
        places = [self._draw() for _ in range(count)]
        self.drawn = drawn
        for order, position in zip(self.orders, positions, strict=True):
            order.position = position
        return [
            (place.folder, self._document(number, place, self.orders[place.folder].parts(place)))
            for number, place in places
        ]

    def state(self) -> dict[str, Any]:
        """How far every folder is, and which documents wait in open rows."""
        return {
            "drawn": self.drawn,
            "folders": [order.state() for order in self.orders],
            "packer": self._packer.state(),
            "pending": [[number, *place] for number, place in self._pending.items()],
            "canvases": dict(self._canvases),
        }

    def restore(self, state: dict[str, Any]) -> None:
        if len(state["folders"]) != len(self.orders):
            raise StorageError("the checkpoint was made with another number of shard folders")
        for order, values in zip(self.orders, state["folders"], strict=True):
            order.restore(values)
        self.drawn = state["drawn"]
        self._packer.restore(state["packer"])
        self._canvases = Counter(state.get("canvases", {}))  # a checkpoint of before has none
        self._pending = {number: Place(*place) for number, *place in state["pending"]}
        for order in self.orders:
            order.wait_for([place for place in self._pending.values() if place.folder == order.number])


class ShardLoader:
    """The rows of one source. Raises StorageError when a folder holds no extraction or one of another tokenizer.

    ``prefetch``: a thread makes a step's rows while the step before it is computed. They are the same, the state is that of
    the rows that were given out, and an error is raised where the rows that it kept from being made are asked for.
    """

    def __init__(
        self,
        source: ShardSource,
        tokenizer: ImageTokenizer,
        vocab: Vocabulary,
        layout: LayoutOptions,
        model: ModelConfig,
        *,
        prefetch: bool = False,
    ) -> None:
        self._stream = _Stream(source, tokenizer, vocab, layout, model)
        self._state = self._stream.state()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards") if prefetch else None
        self._next: tuple[tuple[int, int], Future[_Made]] | None = None

    def incomplete(self) -> list[str]:
        """A line for every folder that lacks shards although it has later ones, and one where folders show pictures in two
        ways, of which the model will be shown but one.
        """
        told = []
        for order in self._stream.orders:
            if lost := lacks(order.folder, order.shards.files):
                told.append(lost)
        if len(self.fits) > 1:
            padded = [o.folder for o in self._stream.orders if o.shards.config.fit == "pad"]
            told.append(
                f"{padded[0]} has padded pictures, other folders cropped ones: extract all with one --fit"
            )
        return told

    @property
    def fits(self) -> set[Fit]:
        """How the pictures of its folders got onto their canvases."""
        return {order.shards.config.fit for order in self._stream.orders}

    @property
    def canvases(self) -> dict[str, int]:
        """WIDTHxHEIGHT -> pictures of that size so far, in all processes' rows. Behind a checkpoint of before they were
        counted: since then.
        """
        return dict(self._state["canvases"])

    @property
    def skipped(self) -> int:
        """Documents that no row could hold, so far."""
        return sum(folder["skipped"] for folder in self._state["folders"])

    def rows(self, process: int = 0, processes: int = 1) -> list[PackedRow]:
        """One step's rows: those of ``process``. Every process goes through the whole stream, so that its state is the same
        for all and a run may go on with another number of them.
        """
        share = process, processes
        if self._thread is None:
            rows, self._state = self._make(share)
            return rows
        if self._next is not None and self._next[0] != share:
            self.restore(self._state)
        if self._next is None:
            self._next = share, self._thread.submit(self._make, share)
        rows, self._state = self._next[1].result()
        self._next = share, self._thread.submit(self._make, share)
        return rows

    def _make(self, share: tuple[int, int]) -> _Made:
        return self._stream.rows(*share), self._stream.state()

    def _wait(self) -> None:
        """Until nobody moves the stream."""
        if self._next is not None:
            wait([self._next[1]])

    def peek(self, count: int) -> Iterator[Document]:
        """The first ``count`` documents from here on, as they would be laid out; the loader stays where it is."""
        self._wait()
        return (document for _, document in self._stream.ahead(self._state, count))

    def peek_folders(self, count: int) -> list[tuple[ShardFolder, list[Document]]]:
        """The same by folder."""
        self._wait()
        ahead, folders = self._stream.ahead(self._state, count), self._stream.source.folders
        return [(one, [d for k, d in ahead if k == i]) for i, one in enumerate(folders)]

    def state(self) -> dict[str, Any]:
        """Plain values: how far every folder is, and which documents wait in open rows, behind the rows given out."""
        return self._state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken. Raises StorageError when the shards are others by now."""
        self._wait()
        self._next = None
        self._stream.restore(state)
        self._state = self._stream.state()

    def close(self) -> None:
        """Wait for what is being made, and end the thread. The loader gives out no more rows then."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
