"""The wide world's tasks as sources of batches: episodes are drawn, packed and laid out as drafts, whose pictures then
become codes on the device that trains.

Nothing is remembered: the batches of a step follow from the source, the step and the self-correction alone, so a resumed run
goes on with the very same ones and a step may be made ahead of its time, by a thread or by processes of their own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import numpy as np
import torch
from torch import Tensor

from nextflow_ar.config import ConfigError, ImageTokenizerConfig, ModelConfig
from nextflow_ar.data.episodes import EpisodeSource, canvas_size
from nextflow_ar.data.packing import Packer
from nextflow_ar.data.playground.curriculum import by_task, episode
from nextflow_ar.data.playground.episodes import Episode, Shown
from nextflow_ar.data.playground.world import COLOUR_NAMES, MANY, NAMES
from nextflow_ar.data.tasks import to_document
from nextflow_ar.model.flops import batch_flops, sample_flops
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import Batch, collate, pack
from nextflow_ar.sequence.layout import IGNORED, LayoutOptions, Sample, build
from nextflow_ar.sequence.vocab import Vocabulary
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer, canvas_schedule
from nextflow_ar.tokenizer.pixels import to_unit
from nextflow_ar.tokenizer.quantizer import SelfCorrection
from nextflow_ar.training.crew import Crew
from nextflow_ar.training.prefetch import Ahead
from nextflow_ar.training.scenes import swap_words, word_classes
from nextflow_ar.types import Codes, Document

CLASSES: tuple[tuple[str, ...], ...] = (COLOUR_NAMES, NAMES, tuple(MANY.values()))
"""Words of the wide world that can stand in each other's place."""
_BLOCK = 16
"""Steps whose rows are packed in one go, where a step has few; what is left open at the end is not used."""
_ROWS = 64
"""From so many rows a step on, every step is packed by itself: what is left open is little beside them."""
_SPAN = 1 << 24
"""Numbers that a block of steps may use for its episodes."""
_IN_VAIN = 2000
"""Episodes in a row that fit no row, until the recipe is held to be wrong."""
_PIXELS = {"cpu": 1 << 18, "cuda": 1 << 22}
"""Pixels of pictures that are encoded at once (64 pictures of 64 px on a CPU)."""
_FILLED = (2, 4, 8, 16)
"""Pictures encoded at once are filled up to one of these or a multiple of the last: convolutions are compiled anew for
every size of batch on a CPU, which costs more than the pictures too many."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """``pixels``: (N, H, W, 3) uint8, all on ``schedule``; the first ``given`` of them are shown, the others are drawn, and
    corrected where anything is.
    """

    schedule: ScaleSchedule
    pixels: np.ndarray
    given: int


@dataclass(frozen=True, eq=False)
class Draft:
    """A batch whose pictures have no codes yet: every place of an image's ``codes`` is its number among the pictures of its
    schedule, and a target that will be a code is any number but IGNORED. ``tasks``: of every row's documents.
    ``weight``: sum of the loss weights, ``seen``: tokens, ``flops``: of training on it, ``skipped``: episodes that no row held.
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
    ) -> None:
        self.source, self.layout, self.model = source, layout, model
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
            if source.scales is not None and source.scales > len(self.schedules[size]):
                raise ConfigError(
                    f"canvas {name} has {len(self.schedules[size])} scales, not {source.scales}"
                )
        self._blank = {s: _numbered(s, 0) for s in self.schedules.values()}
        self._block = _BLOCK if source.rows < _ROWS else 1
        self._budget = source.packing.budget * (1e12 if source.packing.mode == "compute" else 1)
        self._rows: Iterator[list[int]] = iter(())
        self._at = (-1, 0)  # block of steps, and the step in it that comes next
        self._open: dict[int, tuple[Episode, Sample]] = {}
        self._skipped = 0

    def episode(self, number: int) -> Episode:
        """Episode ``number`` of the source, without its condition if that is dropped. Raises ConfigError."""
        source = self.source
        rng = random.Random(f"nextflow-ar episodes {source.seed} {number}")
        task = rng.choices(tuple(self.tasks), tuple(self.tasks.values()))[0]
        canvas = canvas_size(rng.choices(tuple(source.canvases), tuple(source.canvases.values()))[0])
        try:
            found = episode(task, number, source.seed, source.split, canvas, source.level)
        except RuntimeError as error:
            raise ConfigError(str(error)) from None
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
        return [next(self._rows) for _ in range(self.source.rows)]

    def drafts(self, step: int, place: Place) -> tuple[Draft, ...]:
        """One step's batches, in parts, without codes."""
        skipped = self._skipped
        rows = [[self._open.pop(number) for number in row] for row in self._numbers(step)]
        skipped = self._skipped - skipped
        mine = rows[place.process :: place.processes]
        seed = np.random.default_rng([6, self.source.seed, step]).integers(1 << 62)
        words = torch.Generator().manual_seed(int(seed))
        out = []
        for i in range(place.parts):
            out.append(self._draft(mine[i :: place.parts], words, skipped if i == 0 else 0))
        return tuple(out)

    def _draft(
        self, rows: Sequence[Sequence[tuple[Episode, Sample]]], words: torch.Generator, skipped: int
    ) -> Draft:
        shown: dict[ScaleSchedule, tuple[list[Shown], list[Shown]]] = {}
        for row in rows:
            for found, _ in row:
                for picture in found.pictures:
                    schedule = self.schedules[picture.canvas.size]
                    shown.setdefault(schedule, ([], []))[picture.supervised].append(picture)
        numbers = {
            id(picture): number for two in shown.values() for number, picture in enumerate(two[0] + two[1])
        }
        packed = []
        for row in rows:
            samples = []
            for found, sample in row:
                # images stand in a sample in the order of the episode's pictures
                spans = tuple(
                    replace(span, codes=_numbered(span.codes.schedule, numbers[id(picture)]))
                    for span, picture in zip(sample.images, found.pictures, strict=True)
                )
                samples.append(replace(sample, images=spans))
            packed.append(pack(samples))
        width = self.source.packing.width(max(map(len, packed)))
        batch = swap_words(collate(packed, width), self.source.swap, self.classes, words)
        pictures = tuple(
            Pictures(schedule, np.stack([p.render() for p in given + drawn]), len(given))
            for schedule, (given, drawn) in shown.items()
        )
        return Draft(
            batch,
            pictures,
            tuple(tuple(found.task for found, _ in row) for row in rows),
            float(batch.weights.sum()),
            int((batch.documents >= 0).sum()),
            batch_flops(batch, self.model),
            skipped,
        )

    def peek(self, number: int) -> Iterator[Document]:
        """Documents of the first episodes, their codes left blank."""
        for i in range(number):
            yield self.unseen(self.episode(i))


def _numbered(schedule: ScaleSchedule, number: int) -> Codes:
    return Codes.plain(schedule, torch.full((schedule.num_tokens,), number))


class Filler:
    """Drafts to batches: pictures become codes on the image tokenizer's device, where the batches stay."""

    def __init__(self, tokenizer: ImageTokenizer, text_size: int) -> None:
        self.tokenizer, self.text_size = tokenizer, text_size

    @torch.no_grad()
    def filled(
        self, draft: Draft, correction: SelfCorrection | None, generator: torch.Generator | None
    ) -> Batch:
        """The batch with the codes of its pictures; only those to be drawn are self-corrected."""
        device = self.tokenizer.device
        batch = draft.batch.to(device)
        codes = {p.schedule: self._codes(p, correction, generator) for p in draft.pictures}
        targets, width, groups = batch.targets.flatten(), batch.shape[1], []
        for group in batch.images:
            numbers = group.codes[:, 0]
            target, fed = (found[numbers] for found in codes[group.schedule])
            count = group.schedule.offsets[group.scales]
            if count:  # <boi> and the places behind it predict the codes of the scales that are laid out
                places = (group.rows * width + group.starts - 1)[:, None]
                places = places + torch.arange(count, device=device)
                learnt = targets[places]
                targets[places] = torch.where(learnt == IGNORED, learnt, target[:, :count] + self.text_size)
            groups.append(replace(group, codes=fed))
        return replace(batch, targets=targets.view_as(batch.targets), images=tuple(groups))

    def _codes(
        self, pictures: Pictures, correction: SelfCorrection | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """(N, T) target and input codes."""
        given = self._encoded(pictures.pixels[: pictures.given], pictures.schedule, None, None)
        drawn = self._encoded(pictures.pixels[pictures.given :], pictures.schedule, correction, generator)
        found = [*given, *drawn]
        return torch.cat([target for target, _ in found]), torch.cat([fed for _, fed in found])

    def _encoded(
        self,
        pixels: np.ndarray,
        schedule: ScaleSchedule,
        correction: SelfCorrection | None,
        generator: torch.Generator | None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.tokenizer.device
        step = max(1, _PIXELS[device.type] // (pixels.shape[1] * pixels.shape[2]))
        for some in (pixels[i : i + step] for i in range(0, len(pixels), step)):
            shown = torch.from_numpy(some)
            if device.type == "cpu":
                filled = next((n for n in _FILLED if n >= len(some)), -(-len(some) // _FILLED[-1]) * _FILLED[-1])
                shown = torch.cat([shown, shown[-1:].expand(filled - len(some), -1, -1, -1)])
            seen = to_unit(shown.to(device)).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16):
                codes = self.tokenizer.quantizer.quantize(
                    self.tokenizer.embed(seen), schedule, correction=correction, generator=generator
                )
            yield codes.target[: len(some)], codes.input[: len(some)]


Units = Callable[[int], tuple[Draft, ...]]
"""Drafts by the number of their unit: that of the step times the number of sources, plus the place of the source."""


def drafting(
    sources: Sequence[EpisodeSource],
    tokenizer: ImageTokenizerConfig,
    vocab: Vocabulary,
    layout: LayoutOptions,
    model: ModelConfig,
    place: Place,
) -> Units:
    """What a process of its own makes drafts with."""
    made = [EpisodeBatches(source, tokenizer, vocab, layout, model) for source in sources]
    return lambda unit: made[unit % len(made)].drafts(unit // len(made), place)


class EpisodeFeed:
    """The batches of all of a recipe's sources of episodes: made in place, a step ahead by a thread (``prefetch``), or by
    ``workers`` processes. Whoever makes them, they are the same. ``steps``: of the whole run.
    """

    def __init__(
        self,
        sources: dict[int, EpisodeSource],
        tokenizer: ImageTokenizer,
        vocab: Vocabulary,
        layout: LayoutOptions,
        model: ModelConfig,
        correction: Callable[[int], SelfCorrection | None],
        place: Place,
        *,
        prefetch: bool = False,
        workers: int = 0,
        steps: int,
    ) -> None:
        self.filler, self.correction, self.place = Filler(tokenizer, vocab.text_size), correction, place
        self.sources = {
            number: EpisodeBatches(source, tokenizer.config, vocab, layout, model)
            for number, source in sources.items()
        }
        self._numbers, self.skipped = list(sources), 0
        self._ahead = Ahead(self._step, steps) if prefetch and sources and not workers else None
        self._crew: Crew[tuple[Draft, ...]] | None = None
        if workers and sources:
            make = partial(
                drafting, tuple(sources.values()), tokenizer.config, vocab, layout, model, place
            )
            self._crew = Crew(make, steps * len(sources), workers)

    def batches(self, number: int, step: int) -> tuple[tuple[Draft, Batch], ...]:
        """Of source ``number`` at a step: its parts as drafts, and with codes."""
        found = self._made(number, step) if self._ahead is None else self._ahead.get(step)[number]
        self.skipped += sum(draft.skipped for draft, _ in found)
        return found

    def _made(self, number: int, step: int) -> tuple[tuple[Draft, Batch], ...]:
        if self._crew is None:
            drafts = self.sources[number].drafts(step, self.place)
        else:
            drafts = self._crew.get(step * len(self._numbers) + self._numbers.index(number))
        source = self.sources[number].source
        seed = np.random.default_rng([5, source.seed, step, self.place.process]).integers(1 << 62)
        generator = torch.Generator(self.filler.tokenizer.device).manual_seed(int(seed))
        correction = self.correction(step)
        return tuple((draft, self.filler.filled(draft, correction, generator)) for draft in drafts)

    def _step(self, step: int) -> dict[int, tuple[tuple[Draft, Batch], ...]]:
        return {number: self._made(number, step) for number in self.sources}

    def close(self) -> None:
        """End the thread or the processes."""
        if self._ahead is not None:
            self._ahead.close()
        if self._crew is not None:
            self._crew.close()
