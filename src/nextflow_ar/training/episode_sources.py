"""The wide world's tasks as sources of batches: episodes are drawn, packed, encoded and laid out at every step.

Nothing is remembered: the rows of a step follow from the source, the step and the self-correction alone, so a resumed run
goes on with the very same ones and a step may be made ahead of its time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import count

import numpy as np
import torch
from torch import Tensor

from nextflow_ar.config import ConfigError, ModelConfig
from nextflow_ar.data.episodes import EpisodeSource, canvas_size
from nextflow_ar.data.loader import PackedRow
from nextflow_ar.data.packing import Packer
from nextflow_ar.data.playground.curriculum import by_task, episode
from nextflow_ar.data.playground.episodes import Episode, Shown
from nextflow_ar.data.playground.world import COLOUR_NAMES, MANY, NAMES
from nextflow_ar.data.tasks import to_document
from nextflow_ar.model.flops import sample_flops
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import Batch, collate, pack
from nextflow_ar.sequence.layout import LayoutOptions, Sample, build
from nextflow_ar.sequence.vocab import Vocabulary
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.pixels import to_unit
from nextflow_ar.tokenizer.quantizer import SelfCorrection
from nextflow_ar.training.prefetch import Ahead
from nextflow_ar.training.scenes import swap_words, word_classes
from nextflow_ar.types import Codes, Document

CLASSES: tuple[tuple[str, ...], ...] = (COLOUR_NAMES, NAMES, tuple(MANY.values()))
"""Words of the wide world that can stand in each other's place."""
_BLOCK = 16
"""Steps whose rows are packed in one go; what is left open at the end is not used."""
_SPAN = 1 << 24
"""Numbers that a block of steps may use for its episodes."""
_IN_VAIN = 2000
"""Episodes in a row that fit no row, until the recipe is held to be wrong."""
_PIXELS = 1 << 18
"""Pixels of pictures that are encoded at once (64 pictures of 64 px)."""
_FILLED = (2, 4, 8, 16)
"""Pictures encoded at once are filled up to one of these or a multiple of the last: convolutions are compiled anew for
every size of batch on a CPU, which costs more than the pictures too many."""


class EpisodeBatches:
    """The rows of one source. Raises ConfigError where a canvas fits no schedule, or no episode a row."""

    def __init__(
        self,
        source: EpisodeSource,
        tokenizer: ImageTokenizer,
        vocab: Vocabulary,
        layout: LayoutOptions,
        model: ModelConfig,
    ) -> None:
        self.source, self.tokenizer, self.layout, self.model = source, tokenizer, layout, model
        # A text tokenizer of its own: it cannot be used by two threads at once, and a sample sheet may need the other.
        self.vocab = replace(vocab, tokenizer=deepcopy(vocab.tokenizer))
        self.classes = word_classes(self.vocab, CLASSES)
        self.tasks = by_task(source.tasks)
        self.schedules: dict[tuple[int, int], ScaleSchedule] = {}
        for name in source.canvases:
            size = canvas_size(name)
            try:
                self.schedules[size] = tokenizer.schedule_for(*size)
            except ValueError as error:
                raise ConfigError(f"canvas {name}: {error}") from None
            if source.scales is not None and source.scales > len(self.schedules[size]):
                raise ConfigError(
                    f"canvas {name} has {len(self.schedules[size])} scales, not {source.scales}"
                )
        self._blank = {
            size: Codes.plain(s, torch.zeros(s.num_tokens, dtype=torch.long))
            for size, s in self.schedules.items()
        }
        self._budget = source.packing.budget * (1e12 if source.packing.mode == "compute" else 1)
        self._rows: Iterator[list[int]] = iter(())
        self._at = (-1, 0)  # block of steps, and the step in it that comes next
        self._open: dict[int, Episode] = {}
        self.skipped = 0

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

    def _unseen(self, found: Episode) -> Document:
        return self.document(found, [self._blank[p.canvas.size] for p in found.pictures])

    def _packed(self, block: int) -> Iterator[list[int]]:
        """Rows of a block of steps, without end, as numbers of episodes."""
        packing, vain = self.source.packing, 0
        packer = Packer(self._budget, longest=packing.longest, open_rows=packing.open_rows)
        for number in count(block * _SPAN):
            found = self.episode(number)
            sample = build(self._unseen(found), self.vocab, self.layout)
            length = len(sample)
            cost = sample_flops(sample, self.model) if packing.mode == "compute" else length
            if cost > self._budget or (packing.longest is not None and length > packing.longest):
                self.skipped, vain = self.skipped + 1, vain + 1
                if vain == _IN_VAIN:
                    raise ConfigError(
                        f"{_IN_VAIN} episodes one after the other ({', '.join(self.tasks)}) fit no row, the last with "
                        f"{length} tokens: raise the packing's budget"
                    )
                continue
            vain, self._open[number] = 0, found
            row = [number] if packing.mode == "pad" else packer.add(number, cost, length)
            if row is not None:
                yield row

    def _numbers(self, step: int) -> list[list[int]]:
        """A step's rows as numbers of episodes; steps of a block are cheapest one after the other."""
        block, within = divmod(step, _BLOCK)
        if self._at[0] != block or self._at[1] > within:
            self._open = {}
            self._rows, self._at = self._packed(block), (block, 0)
        for _ in range(self._at[1], within):
            for _ in range(self.source.rows):
                for number in next(self._rows):
                    del self._open[number]
        self._at = (block, within + 1)
        return [next(self._rows) for _ in range(self.source.rows)]

    def rows(
        self, step: int, correction: SelfCorrection | None, process: int = 0, processes: int = 1
    ) -> list[PackedRow]:
        """One step's rows: those of ``process``. Self-correction samples differ with the number of processes."""
        numbers = self._numbers(step)
        found = [[self._open.pop(number) for number in row] for row in numbers][process::processes]
        seed = np.random.default_rng([5, self.source.seed, step, process]).integers(1 << 62)
        generator = torch.Generator(self.tokenizer.device).manual_seed(int(seed))
        pictures = [p for row in found for one in row for p in one.pictures]
        codes = iter(self.encode(pictures, correction, generator))
        out = []
        for row in found:
            samples = [self._sample(one, [next(codes) for _ in one.pictures]) for one in row]
            out.append(PackedRow(pack(samples), tuple(one.task for one in row)))
        return out

    def _sample(self, found: Episode, codes: Sequence[Codes]) -> Sample:
        return build(self.document(found, codes), self.vocab, self.layout)

    @torch.no_grad()
    def encode(
        self, pictures: Sequence[Shown], correction: SelfCorrection | None, generator: torch.Generator
    ) -> list[Codes]:
        """Codes of pictures, those of one size together; only pictures to be drawn are self-corrected."""
        groups: dict[tuple[tuple[int, int], bool], list[int]] = {}
        for i, picture in enumerate(pictures):
            corrected = picture.supervised and correction is not None
            groups.setdefault((picture.canvas.size, corrected), []).append(i)
        found: dict[int, Codes] = {}
        for (size, corrected), members in groups.items():
            step, schedule = max(1, _PIXELS // (size[0] * size[1])), self.schedules[size]
            for some in (members[i : i + step] for i in range(0, len(members), step)):
                filled = next(
                    (n for n in _FILLED if n >= len(some)), -(-len(some) // _FILLED[-1]) * _FILLED[-1]
                )
                rendered = [pictures[i].render() for i in some]
                shown = torch.from_numpy(np.stack(rendered + rendered[-1:] * (filled - len(some))))
                target, fed = self._quantized(shown, schedule, correction if corrected else None, generator)
                found |= {i: Codes(schedule, target[j], fed[j]) for j, i in enumerate(some)}
        return [found[i] for i in range(len(pictures))]

    def _quantized(
        self,
        shown: Tensor,
        schedule: ScaleSchedule,
        correction: SelfCorrection | None,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Target and input codes, (N, T) each, of pictures (N, H, W, 3) uint8."""
        device = self.tokenizer.device
        pixels = to_unit(shown.to(device)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            codes = self.tokenizer.quantizer.quantize(
                self.tokenizer.embed(pixels), schedule, correction=correction, generator=generator
            )
        return codes.target.cpu(), codes.input.cpu()

    def batch(self, rows: Sequence[PackedRow], step: int) -> Batch:
        """Some rows of a step as one batch, words swapped."""
        samples = [row.sample for row in rows]
        found = collate(samples, self.source.packing.width(max(map(len, samples))))
        seed = np.random.default_rng([6, self.source.seed, step]).integers(1 << 62)
        return swap_words(found, self.source.swap, self.classes, torch.Generator().manual_seed(int(seed)))

    def peek(self, number: int) -> Iterator[Document]:
        """Documents of the first episodes, their codes left blank."""
        for i in range(number):
            yield self._unseen(self.episode(i))


class EpisodeRows:
    """The rows of all of a recipe's sources of episodes, made in place or, with ``prefetch``, a step ahead.

    ``correction``: self-correction of a step. ``process``, ``processes``: whose rows. ``steps``: of the whole run.
    """

    def __init__(
        self,
        sources: dict[int, EpisodeBatches],
        correction: Callable[[int], SelfCorrection | None],
        process: int,
        processes: int,
        prefetch: bool,
        steps: int,
    ) -> None:
        self.sources, self.correction = sources, correction
        self.process, self.processes = process, processes
        self._ahead = Ahead(self._all, steps) if prefetch and sources else None

    def _one(self, number: int, step: int) -> list[PackedRow]:
        return self.sources[number].rows(step, self.correction(step), self.process, self.processes)

    def _all(self, step: int) -> dict[int, list[PackedRow]]:
        return {number: self._one(number, step) for number in self.sources}

    def rows(self, number: int, step: int) -> list[PackedRow]:
        """A step's rows of source ``number``."""
        return self._one(number, step) if self._ahead is None else self._ahead.get(step)[number]

    @property
    def skipped(self) -> int:
        """Episodes that no row could hold, since this process began."""
        return sum(source.skipped for source in self.sources.values())

    def close(self) -> None:
        """End the thread of ``prefetch``."""
        if self._ahead is not None:
            self._ahead.close()
