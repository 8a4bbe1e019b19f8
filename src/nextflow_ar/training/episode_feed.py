"""Drafts of the wide world's episodes as batches: made in place, ahead, or by processes; their pictures become codes on the
device that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextflow_ar.config import ImageTokenizerConfig, ModelConfig
from nextflow_ar.data.episodes import EpisodeSource
from nextflow_ar.model.flops import ALL_TRAINS, Passes
from nextflow_ar.precision import mixed_precision
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import Batch, joined
from nextflow_ar.sequence.layout import IGNORED, LayoutOptions
from nextflow_ar.sequence.vocab import Vocabulary
from nextflow_ar.tokenizer.correction import corrected_codes
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.pixels import to_unit
from nextflow_ar.tokenizer.quantizer import SelfCorrection, kept_features
from nextflow_ar.training.crew import Crew
from nextflow_ar.training.episode_sources import Draft, EpisodeBatches, Pictures, Place
from nextflow_ar.training.prefetch import Ahead

TOGETHER = 16
"""Steps whose pictures are encoded at once on a GPU."""
_PIXELS = {"cpu": 1 << 18, "cuda": 1 << 20}
"""Pixels of pictures that are encoded at once (64 pictures of 64 px on a CPU)."""
_FILLED = (2, 4, 8, 16)
"""Pictures encoded at once are filled up to one of these or a multiple of the last: convolutions are compiled anew for
every size of batch on a CPU, which costs more than the pictures too many."""


def merged(drafts: Sequence[Draft]) -> Draft:
    """Drafts of one width as one; their pictures get new numbers."""
    found: dict[ScaleSchedule, list[Pictures]] = {}
    for draft in drafts:
        for p in draft.pictures:
            found.setdefault(p.schedule, []).append(p)
    shown = {schedule: sum(p.given for p in several) for schedule, several in found.items()}
    before = {schedule: (0, shown[schedule]) for schedule in found}
    batches = []
    for draft in drafts:
        images = []
        for group in draft.batch.images:
            mine = next(p.given for p in draft.pictures if p.schedule == group.schedule)
            starts = before[group.schedule]
            reference = None if group.reference is None else _moved(group.reference, mine, *starts)
            codes = _moved(group.codes, mine, *starts)
            images.append(replace(group, codes=codes, reference=reference))
        batches.append(replace(draft.batch, images=tuple(images)))
        for p in draft.pictures:
            first, second = before[p.schedule]
            before[p.schedule] = first + p.given, second + len(p.pixels) - p.given
    return Draft(
        joined(batches),
        tuple(gathered(several) for several in found.values()),
        tuple(row for draft in drafts for row in draft.tasks),
        sum(draft.weight for draft in drafts),
        sum(draft.seen for draft in drafts),
        sum(draft.flops for draft in drafts),
        sum(draft.skipped for draft in drafts),
    )


def _moved(numbers: Tensor, given: int, first: int, second: int) -> Tensor:
    """Numbers of pictures, where the ``given`` ones' begin at ``first`` from now on and the drawn ones' at ``second``."""
    moved = torch.where(numbers < given, numbers + first, numbers - given + second)
    return torch.where(numbers < 0, numbers, moved)


def gathered(several: Sequence[Pictures]) -> Pictures:
    """Pictures of one schedule: all given ones, then all drawn ones."""
    given, drawn = 0, sum(p.given for p in several)
    count, moved = drawn, []
    for p in several:
        moved.append(_moved(torch.from_numpy(p.references), p.given, given, drawn).numpy())
        given, drawn = given + p.given, drawn + len(p.pixels) - p.given
    parts = [slice(p.given) for p in several], [slice(p.given, None) for p in several]

    def together(found: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([x[part] for way in parts for x, part in zip(found, way, strict=True)])

    seeds = [p.seeds for p in several if p.seeds is not None]
    known = together(seeds) if len(seeds) == len(several) else None
    pixels, references = together([p.pixels for p in several]), together(moved)
    return Pictures(several[0].schedule, pixels, count, references, known)


class Filler:
    """Drafts to batches: pictures become codes on the image tokenizer's device, where the batches stay."""

    def __init__(self, tokenizer: ImageTokenizer, text_size: int) -> None:
        self.tokenizer, self.text_size = tokenizer, text_size

    @torch.no_grad()
    def filled(
        self,
        drafts: Sequence[Draft],
        correction: SelfCorrection | None,
        shares: Sequence[float] | None = None,
    ) -> list[Batch]:
        """The batches with the codes of their pictures, those of a kind encoded together; only pictures to be drawn are
        self-corrected. ``shares``: of cells, for each draft, where they are not the correction's.
        """
        tables: list[dict[ScaleSchedule, tuple[Tensor, ...]]] = [{} for _ in drafts]
        groups = [group for draft in drafts for group in draft.batch.images]
        schedules = dict.fromkeys(p.schedule for draft in drafts for p in draft.pictures)
        for schedule in schedules:
            have = [
                (i, p) for i, draft in enumerate(drafts) for p in draft.pictures if p.schedule == schedule
            ]
            together = gathered([p for _, p in have])
            wanted = None
            if shares is not None:
                each = [np.full(len(p.pixels) - p.given, shares[i], np.float32) for i, p in have]
                wanted = np.concatenate([np.zeros(together.given, np.float32), *each])
            found = self._encoded(together, correction, wanted)
            copying = (g.scales for g in groups if g.schedule == schedule and g.reference is not None)
            if scales := max(copying, default=0):
                found = *found, self._copied(together, found[1], scales)
            shown, drawn = 0, together.given
            for i, p in have:
                more = len(p.pixels) - p.given
                tables[i][schedule] = tuple(
                    torch.cat([x[shown : shown + p.given], x[drawn : drawn + more]]) for x in found
                )
                shown, drawn = shown + p.given, drawn + more
        return [self._with(draft.batch, table) for draft, table in zip(drafts, tables, strict=True)]

    def _with(self, batch: Batch, codes: dict[ScaleSchedule, tuple[Tensor, ...]]) -> Batch:
        """A draft's batch with (N, T) target and input codes of the pictures of every schedule, and those that copy."""
        device = self.tokenizer.device
        batch = batch.to(device)
        targets, width, groups = batch.targets.flatten(), batch.shape[1], []
        for group in batch.images:
            numbers = group.codes[:, 0]
            target, fed = (found[numbers] for found in codes[group.schedule][:2])
            count = group.schedule.offsets[group.scales]
            if count:  # <boi> and the places behind it predict the codes of the scales that are laid out
                places = (group.rows * width + group.starts - 1)[:, None]
                places = places + torch.arange(count, device=device)
                learnt = targets[places]
                targets[places] = torch.where(learnt == IGNORED, learnt, target[:, :count] + self.text_size)
            reference, copied = group.reference, None
            if reference is not None:
                known = codes[group.schedule][1][reference[:, 0].clamp_min(0)]
                reference = torch.where(reference < 0, reference, known)
                copied = codes[group.schedule][2][numbers, : max(0, count - 1)]
            groups.append(replace(group, codes=fed, reference=reference, copied=copied))
        return replace(batch, targets=targets.view_as(batch.targets), images=tuple(groups))

    def _encoded(
        self, found: Pictures, correction: SelfCorrection | None, shares: np.ndarray | None
    ) -> tuple[Tensor, Tensor]:
        """(N, T) target and input codes of pictures; the given ones are not corrected. Those that could copy another one
        come after it, and take over its features where nothing changed (:func:`kept_features`). ``shares``: (N,) of cells
        to correct, where it is not the correction's for all that are drawn.
        """
        quantizer, schedule, device = self.tokenizer.quantizer, found.schedule, self.tokenizer.device
        features = self._features(found.pixels)
        target = torch.empty(len(features), schedule.num_tokens, dtype=torch.long, device=device)
        fed = torch.empty_like(target)
        for wave in waves(found.references):
            copied, mine = found.references[wave], features[wave]
            if (copied >= 0).all():
                old = quantizer.accumulate(fed[copied], schedule)
                same = torch.from_numpy((found.pixels[wave] == found.pixels[copied]).all(-1)).to(device)
                mine = kept_features(mine, old, same)
            if correction is None:
                codes = quantizer.quantize(mine, schedule)
                target[wave], fed[wave] = codes.target, codes.input
                continue
            if found.seeds is None:
                raise ValueError("only pictures that have seeds can be corrected")
            share = np.where(wave < found.given, 0.0, correction.share) if shares is None else shares[wave]
            target[wave], fed[wave] = corrected_codes(
                quantizer, mine, schedule, correction,
                torch.from_numpy(share.astype(np.float32)).to(device), torch.from_numpy(found.seeds[wave]).to(device),
            )  # fmt: skip
        return target, fed

    def _copied(self, found: Pictures, fed: Tensor, scales: int) -> Tensor:
        """(N, V) codes behind the first one of ``scales`` scales that would copy what each picture could copy; -1 where
        there is nothing.
        """
        quantizer, schedule = self.tokenizer.quantizer, found.schedule
        mine = torch.from_numpy((found.references >= 0).nonzero()[0]).to(fed.device)
        copied = torch.full((len(fed), schedule.offsets[scales] - 1), -1, device=fed.device)
        if scales > 1 and len(mine):
            theirs = torch.from_numpy(found.references).to(fed.device)[mine]
            copied[mine] = quantizer.copied(fed[theirs], fed[mine], schedule, 1, scales)
        return copied

    def _features(self, pixels: np.ndarray) -> Tensor:
        """(N, C, h, w) fp32 features of pictures, some at a time."""
        device, out = self.tokenizer.device, []
        step = max(1, _PIXELS[device.type] // (pixels.shape[1] * pixels.shape[2]))
        for first in range(0, len(pixels), step):
            shown = torch.from_numpy(pixels[first : first + step])
            count = filled = len(shown)
            if device.type == "cuda":
                filled = step
            else:
                filled = next((n for n in _FILLED if n >= count), -(-count // _FILLED[-1]) * _FILLED[-1])
            shown = torch.cat([shown, shown[-1:].expand(filled - count, -1, -1, -1)])
            seen = to_unit(shown.to(device)).contiguous(memory_format=torch.channels_last)
            with mixed_precision(device):
                out.append(self.tokenizer.embed(seen)[:count].float())
        return torch.cat(out)


def waves(references: np.ndarray) -> Iterator[np.ndarray]:
    """Numbers of pictures in the order in which they can be encoded: those without a reference, then those whose reference
    is among them, and so on. Raises ValueError where references go round.
    """
    done = np.zeros(len(references), dtype=bool)
    ready = references < 0
    while ready.any():
        yield ready.nonzero()[0]
        done |= ready
        ready = ~done & done[references] & (references >= 0)
    if not done.all():
        raise ValueError("a picture cannot be its own reference")


Drafts = dict[int, tuple[Draft, ...]]
"""A step's, by the number of their source."""


@dataclass(frozen=True)
class Drafting:
    """All that a process needs to make the drafts of any step."""

    sources: dict[int, EpisodeSource]
    tokenizer: ImageTokenizerConfig
    vocab: Vocabulary
    layout: LayoutOptions
    model: ModelConfig
    place: Place
    passes: Passes = ALL_TRAINS

    def batches(self) -> dict[int, EpisodeBatches]:
        """The sources, ready to be asked."""
        return {
            number: EpisodeBatches(source, self.tokenizer, self.vocab, self.layout, self.model, self.passes)
            for number, source in self.sources.items()
        }

    def each(self) -> Callable[[int], Drafts]:
        """What makes a step's drafts from its number."""
        made = self.batches()
        return lambda step: {number: one.drafts(step, self.place) for number, one in made.items()}

    def together(self) -> Callable[[int], list[Draft]]:
        """The same, those of one width as one."""
        each = self.each()
        return lambda step: _by_width(each(step))


def _by_width(drafts: Drafts) -> list[Draft]:
    found: dict[int, list[Draft]] = {}
    for several in drafts.values():
        for draft in several:
            found.setdefault(draft.batch.shape[1], []).append(draft)
    return [merged(several) for several in found.values()]


class EpisodeFeed:
    """The batches of all of a recipe's sources of episodes: made in place, a step ahead by a thread (``prefetch``), or by
    ``workers`` processes. Whoever makes them, they are the same. ``together``: what has one width comes as one batch.
    ``steps``: of the whole run.
    """

    def __init__(
        self,
        drafting: Drafting,
        tokenizer: ImageTokenizer,
        correction: Callable[[int], SelfCorrection | None],
        *,
        together: bool = False,
        prefetch: bool = False,
        workers: int = 0,
        steps: int,
    ) -> None:
        self.drafting, self.correction, self._together = drafting, correction, together
        self.filler = Filler(tokenizer, drafting.vocab.text_size)
        self.sources, self.skipped, self._steps = drafting.batches(), 0, steps
        self._group: tuple[int, list[list[tuple[Draft, Batch]]]] = (-1, [])
        self._ahead = Ahead(self._step, steps) if prefetch and self.sources and not workers else None
        self._crew: Crew[Any] | None = None
        if workers and self.sources:
            self._crew = Crew(drafting.together if together else drafting.each, steps, workers)
        self._current: tuple[int, Drafts] = (-1, {})

    def batches(self, number: int, step: int) -> list[tuple[Draft, Batch]]:
        """Of source ``number`` at a step: its parts as drafts, and with codes."""
        found = self._made(number, step) if self._ahead is None else self._ahead.get(step)[number]
        self.skipped += sum(draft.skipped for draft, _ in found)
        return found

    def together(self, step: int) -> list[tuple[Draft, Batch]]:
        """Of all sources at a step, what has one width in one batch, for a GPU that small batches leave idle. The pictures
        of several steps are encoded at once: it is the number of operations that takes time.
        """
        group, place = divmod(step, TOGETHER)
        if self._group[0] != group:
            steps = range(group * TOGETHER, min((group + 1) * TOGETHER, self._steps))
            each = [self._joined(at) for at in steps]
            drafts = [draft for several in each for draft in several]
            found = [self.correction(at) for at in steps]
            shares = [0.0 if one is None else one.share for one in found]
            shares = [share for share, several in zip(shares, each, strict=True) for _ in several]
            correction = next((one for one in found if one is not None), None)
            batches = iter(self.filler.filled(drafts, correction, shares))
            self._group = group, [[(draft, next(batches)) for draft in several] for several in each]
        found = self._group[1][place]
        self.skipped += sum(draft.skipped for draft, _ in found)
        return found

    def _joined(self, step: int) -> list[Draft]:
        if self._crew is not None:
            return self._crew.get(step)
        return _by_width({n: one.drafts(step, self.drafting.place) for n, one in self.sources.items()})

    def _drafts(self, number: int, step: int) -> tuple[Draft, ...]:
        if self._crew is None:
            return self.sources[number].drafts(step, self.drafting.place)
        if self._current[0] != step:
            self._current = step, self._crew.get(step)
        return self._current[1][number]

    def _made(self, number: int, step: int) -> list[tuple[Draft, Batch]]:
        drafts = self._drafts(number, step)
        return list(zip(drafts, self.filler.filled(drafts, self.correction(step)), strict=True))

    def _step(self, step: int) -> dict[int, list[tuple[Draft, Batch]]]:
        return {number: self._made(number, step) for number in self.sources}

    def close(self) -> None:
        """End the thread or the processes."""
        if self._ahead is not None:
            self._ahead.close()
        if self._crew is not None:
            self._crew.close()
