"""The wide world's tasks as sources of batches: episodes are drawn, packed and laid out as drafts, whose pictures then
become codes on the device that trains (:mod:`~nextflow_ar.training.episode_feed`).

Nothing is remembered: the drafts of a step follow from the source and the step alone, so a resumed run goes on with the
very same ones and a step may be made ahead of its time, by a thread or by processes of their own.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch

from nextflow_ar.config import ConfigError, ImageTokenizerConfig, ModelConfig
from nextflow_ar.data.episodes import EpisodeSource, canvas_size
from nextflow_ar.data.packing import Packer
from nextflow_ar.data.playground.canvases import two_ways
from nextflow_ar.data.playground.curriculum import PLANNED, by_task, episode
from nextflow_ar.data.playground.episodes import Episode, Shown
from nextflow_ar.data.playground.planning import TOLD, planned_throughout, with_plan
from nextflow_ar.data.playground.world import COLOUR_NAMES, MANY, NAMES
from nextflow_ar.data.tasks import to_document
from nextflow_ar.model.flops import ALL_TRAINS, Passes, batch_flops, sample_flops
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import Batch, collate, pack
from nextflow_ar.sequence.layout import LayoutOptions, Sample, build
from nextflow_ar.sequence.vocab import Vocabulary
from nextflow_ar.tokenizer.image_tokenizer import canvas_schedule
from nextflow_ar.training.scenes import swap_words, word_classes
from nextflow_ar.types import Codes, Document

CLASSES: tuple[tuple[str, ...], ...] = (COLOUR_NAMES, NAMES, tuple(MANY.values()))
"""Words of the wide world that can stand in each other's place."""
_BLOCK = 16
"""Steps whose rows are packed in one go, where a step has few; what is left open at the end is not used."""
_ROWS = 12
_OPEN = 4
"""From so many rows a step on, or so many for every one that is held open, a step is packed by itself, so that any process
may make any step: within a block, whoever makes a step has to pack those before it too. What is left open is little beside
so many rows."""
_SPAN = 1 << 24
"""Numbers that a block of steps may use for its episodes."""
_AGAIN, _FAR = 8, 1 << 40
"""An episode whose drawn things are related in two ways is drawn anew up to so many times, from numbers this far on: its
plan does not say which of the two was asked for."""
_IN_VAIN = 2000
"""Episodes in a row that fit no row, until the recipe is held to be wrong."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """``pixels``: (N, H, W, 3) uint8, all on ``schedule``; the first ``given`` of them are shown, the others are drawn, and
    corrected where anything is. ``references``: (N,) the number of the picture that each could copy, or -1. ``seeds``: (N,)
    int64, of the random numbers that each is corrected by.
    """

    schedule: ScaleSchedule
    pixels: np.ndarray
    given: int
    references: np.ndarray
    seeds: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.references.shape != self.pixels.shape[:1]:
            raise ValueError("every picture has a reference, or -1")
        if self.seeds is not None and self.seeds.shape != self.pixels.shape[:1]:
            raise ValueError("every picture has a seed, or none has")


@dataclass(frozen=True, eq=False)
class Draft:
    """A batch whose pictures have no codes yet: every place of an image's ``codes`` is its number among the pictures of its
    schedule, and a target that will be a code is any number but IGNORED. ``tasks``: of every row's documents.
    ``weight``: sum of the loss weights, ``seen``: tokens, ``flops``: of training on it, ``skipped``: episodes that no row
    held, of the whole step.
    """

    batch: Batch
    pictures: tuple[Pictures, ...]
    tasks: tuple[tuple[str, ...], ...]
    weight: float
    seen: int
    flops: int
    skipped: int = 0


@dataclass(frozen=True)
class Place:
    """Which of a step's drafts are wanted: those of ``process`` of so many, its rows in ``parts`` batches."""

    process: int = 0
    processes: int = 1
    parts: int = 1


class EpisodeBatches:
    """The drafts of one source. Raises ConfigError where a canvas fits no schedule, or no episode a row."""

    def __init__(
        self,
        source: EpisodeSource,
        tokenizer: ImageTokenizerConfig,
        vocab: Vocabulary,
        layout: LayoutOptions,
        model: ModelConfig,
        passes: Passes = ALL_TRAINS,
    ) -> None:
        self.source, self.layout, self.model, self.passes = source, layout, model, passes
        # A text tokenizer of its own: it cannot be used by two threads at once, and a sample sheet may need the other.
        self.vocab = replace(vocab, tokenizer=deepcopy(vocab.tokenizer))
        self.classes = word_classes(self.vocab, CLASSES)
        self.tasks = by_task(source.tasks)
        self.schedules: dict[tuple[int, int], ScaleSchedule] = {}
        for name in source.canvases:
            size = canvas_size(name)
            try:
                self.schedules[size] = canvas_schedule(tokenizer, *size)
            except ValueError as error:
                raise ConfigError(f"canvas {name}: {error}") from None
            scales = len(self.schedules[size])
            if source.scales is not None and source.scales > scales:
                raise ConfigError(f"canvas {name} has {scales} scales, not {source.scales}")
            if scales > model.max_scales:
                raise ConfigError(
                    f"canvas {name} has {scales} scales, the model has embeddings for {model.max_scales}: max_scales"
                )
        self._blank = {s: _numbered(s, 0) for s in self.schedules.values()}
        alone = source.rows >= min(_ROWS, _OPEN * source.packing.open_rows)
        self._block = 1 if alone else _BLOCK
        self._budget = source.packing.budget * (1e12 if source.packing.mode == "compute" else 1)
        self._rows: Iterator[list[int]] = iter(())
        self._at = (-1, 0)  # block of steps, and the step in it that comes next
        self._open: dict[int, tuple[Episode, Sample]] = {}
        self._skipped = 0  # while the rows of the step that was asked for last were packed

    def episode(self, number: int) -> Episode:
        """Episode ``number`` of the source, without its condition if that is dropped. Raises ConfigError."""
        source = self.source
        rng = random.Random(f"nextflow-ar episodes {source.seed} {number}")
        task = rng.choices(tuple(self.tasks), tuple(self.tasks.values()))[0]
        canvas = canvas_size(rng.choices(tuple(source.canvases), tuple(source.canvases.values()))[0])
        try:
            found = episode(task, number, source.seed, source.split, canvas, source.level)
            for again in range(1, _AGAIN):
                if not any(part.supervised and two_ways(part.canvas) for part in found.pictures):
                    break
                found = episode(task, number + again * _FAR, source.seed, source.split, canvas, source.level)
        except RuntimeError as error:
            raise ConfigError(str(error)) from None
        if source.planned and task in PLANNED and rng.random() < source.planned:
            found = with_plan(found)
        elif source.planned and task in TOLD and rng.random() < source.planned:
            found = planned_throughout(found, rng, source.drawn)
        if source.scales == 0:  # neither rendered nor encoded
            return replace(found, parts=found.parts[:-1])
        if rng.random() < source.condition_dropout:
            drawn = [i for i, p in enumerate(found.parts) if isinstance(p, Shown) and p.supervised]
            found = replace(found, parts=found.parts[drawn[0] if drawn else 0 :])
        if source.picture_dropout and rng.random() < source.picture_dropout:
            found = replace(found, parts=tuple(p for p in found.parts if not isinstance(p, Shown)))
        return found

    def document(self, found: Episode, codes: Sequence[Codes]) -> Document:
        """Its document with the codes of its pictures."""
        return to_document(found, codes, dialogue=self.source.dialogue, scales=self.source.scales)

    def unseen(self, found: Episode) -> Document:
        """Its document, all codes 0."""
        return self.document(found, [self._blank[self.schedules[p.canvas.size]] for p in found.pictures])

    def _packed(self, block: int) -> Iterator[list[int]]:
        """Rows of a block of steps, without end, as numbers of episodes."""
        packing, vain = self.source.packing, 0
        packer = Packer(self._budget, longest=packing.longest, open_rows=packing.open_rows)
        for number in count(block * _SPAN):
            found = self.episode(number)
            sample = build(self.unseen(found), self.vocab, self.layout)
            length = len(sample)
            cost = sample_flops(sample, self.model) if packing.mode == "compute" else length
            if cost > self._budget or (packing.longest is not None and length > packing.longest):
                self._skipped, vain = self._skipped + 1, vain + 1
                if vain == _IN_VAIN:
                    raise ConfigError(
                        f"{_IN_VAIN} episodes one after the other ({', '.join(self.tasks)}) fit no row, the last with "
                        f"{length} tokens: raise the packing's budget"
                    )
                continue
            vain, self._open[number] = 0, (found, sample)
            row = [number] if packing.mode == "pad" else packer.add(number, cost, length)
            if told := packing.too_much(packer.most):
                raise ConfigError(f"sources of episodes: {told}")
            if row is not None:
                yield row

    def _numbers(self, step: int) -> list[list[int]]:
        """A step's rows as numbers of episodes; steps of a block are cheapest one after the other."""
        block, within = divmod(step, self._block)
        if self._at[0] != block or self._at[1] > within:
            self._open = {}
            self._rows, self._at = self._packed(block), (block, 0)
        for _ in range(self._at[1], within):
            for _ in range(self.source.rows):
                for number in next(self._rows):
                    del self._open[number]
        self._at = (block, within + 1)
        self._skipped = 0  # those of the steps before are theirs, whoever packs them once more
        return [next(self._rows) for _ in range(self.source.rows)]

    def drafts(self, step: int, place: Place) -> tuple[Draft, ...]:
        """One step's batches, in parts, without codes."""
        rows = [[self._open.pop(number) for number in row] for row in self._numbers(step)]
        mine = list(enumerate(rows))[place.process :: place.processes]
        split = [dict(mine[i :: place.parts]) for i in range(place.parts)]
        return tuple(self._draft(step, part, self._skipped if i == 0 else 0) for i, part in enumerate(split))

    def _draft(self, step: int, rows: dict[int, list[tuple[Episode, Sample]]], skipped: int) -> Draft:
        """``rows``: by their number in the whole step, from which everything random follows."""
        shown: dict[ScaleSchedule, tuple[list[Shown], list[Shown]]] = {}
        seeds: dict[int, int] = {}
        for number, row in rows.items():
            pictures = [picture for found, _ in row for picture in found.pictures]
            for picture, seed in zip(pictures, self._seeds(5, step, number, len(pictures)), strict=True):
                shown.setdefault(self.schedules[picture.canvas.size], ([], []))[picture.supervised].append(
                    picture
                )
                seeds[id(picture)] = seed
        numbers = {
            id(picture): number for two in shown.values() for number, picture in enumerate(two[0] + two[1])
        }
        references = {s: np.full(len(given + drawn), -1) for s, (given, drawn) in shown.items()}
        packed = []
        for row in rows.values():
            samples = []
            for found, sample in row:
                # images stand in a sample in the order of the episode's pictures
                spans = []
                for span, picture in zip(sample.images, found.pictures, strict=True):
                    schedule, number = span.codes.schedule, numbers[id(picture)]
                    before = spans[-1].codes.input if span.reference is not None else None
                    spans.append(replace(span, codes=_numbered(schedule, number), reference=before))
                    if before is not None:
                        references[schedule][number] = int(before[0])
                samples.append(replace(sample, images=tuple(spans)))
            packed.append(pack(samples))
        width = self.source.packing.width(max(map(len, packed)))
        batch = self._swapped(collate(packed, width), step, rows, [len(sample) for sample in packed])
        pictures = tuple(
            Pictures(
                schedule,
                np.stack([p.render() for p in given + drawn]),
                len(given),
                references[schedule],
                np.array([seeds[id(p)] for p in given + drawn]),
            )
            for schedule, (given, drawn) in shown.items()
        )
        return Draft(
            batch,
            pictures,
            tuple(tuple(found.task for found, _ in row) for row in rows.values()),
            float(batch.weights.sum()),
            int((batch.documents >= 0).sum()),
            batch_flops(batch, self.model, self.passes),
            skipped,
        )

    def _seeds(self, kind: int, step: int, row: int, count: int) -> list[int]:
        """So many seeds of a row, the same whichever process has it, beside whatever others."""
        found = np.random.SeedSequence([kind, self.source.seed, step, row]).generate_state(count, np.uint64)
        return found.view(np.int64).tolist()

    def _swapped(self, batch: Batch, step: int, rows: Iterable[int], lengths: Sequence[int]) -> Batch:
        """The batch with words swapped, row by row: a row's own numbers, and as many as it has places."""
        if self.source.swap <= 0:
            return batch
        tokens, bare = batch.tokens.clone(), replace(batch, images=())
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            (seed,) = self._seeds(6, step, row, 1)
            one = replace(
                bare,
                tokens=batch.tokens[i : i + 1, :length],
                targets=batch.targets[i : i + 1, :length],
                scales=batch.scales[i : i + 1, :length],
            )
            words = torch.Generator().manual_seed(seed)
            tokens[i, :length] = swap_words(one, self.source.swap, self.classes, words).tokens[0]
        return replace(batch, tokens=tokens)

    def peek(self, number: int) -> Iterator[Document]:
        """Documents of the first episodes, their codes left blank."""
        for i in range(number):
            yield self.unseen(self.episode(i))


def _numbered(schedule: ScaleSchedule, number: int) -> Codes:
    return Codes.plain(schedule, torch.full((schedule.num_tokens,), number))
