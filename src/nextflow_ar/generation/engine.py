"""The engine: documents in, events out. Images grow scale by scale, text token by token, over a KV cache.

Requests of any kind and at any place share the work: in every round each of them takes one step, and those that meet the
same shapes take it in one batch. A row's result depends on its own document, settings and seed only: spans of the cache
are rounded up, rows of one span attend together (cache.py), and very small matrix products, for which libraries switch
kernels, are padded up.
"""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from nextflow_ar.generation.cache import Caches, RowCache, spanned
from nextflow_ar.generation.jobs import Job, Track, settle
from nextflow_ar.generation.kept import KeptPart, Store, restored
from nextflow_ar.generation.requests import (
    ContextError,
    ImageRequest,
    QueueFull,
    Request,
    TextRequest,
    WriteRequest,
)
from nextflow_ar.model.backbone import Cache
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.model.steady import LEAST_ROWS, keep_steady, steady_scores
from nextflow_ar.sequence.batch import collate
from nextflow_ar.sequence.blocks import block_mask
from nextflow_ar.sequence.layout import scale_block
from nextflow_ar.types import Event

__all__ = [
    "ContextError",
    "Engine",
    "Failure",
    "Figures",
    "ImageRequest",
    "QueueFull",
    "Request",
    "Rounds",
    "TextRequest",
    "WriteRequest",
]


@dataclass(frozen=True)
class Figures:
    """What an engine counts: parts of prefixes found kept, places of prefixes taken from there and computed, and bytes that
    kept ones take.
    """

    hits: int = 0
    reused: int = 0
    fed: int = 0
    used: int = 0

    def __add__(self, other: Figures) -> Figures:
        return Figures(
            self.hits + other.hits, self.reused + other.reused, self.fed + other.fed, self.used + other.used
        )


@dataclass(frozen=True)
class Failure:
    """Request ``row`` is given up: what came back for it could not be used, or it is gone with what an engine of
    its own was at. Those beside it go on.
    """

    row: int
    error: Exception

    def __reduce__(self) -> tuple[type[Failure], tuple[int, Exception]]:
        """To another process its line goes, and its trace as a note: not every error can be written down and read again."""
        line = f"{type(self.error).__name__}: {self.error}".partition("\n")[0][:300]
        told = RuntimeError(line)
        told.add_note("".join(traceback.format_exception(self.error)))
        return Failure, (self.row, told)


class Engine:
    """Sampling over one loaded checkpoint. Any number of calls may be under way; what they leave to each other are kept
    prefixes alone, which change no result.

    ``max_rows``: sequences in work at once, unconditional ones included; more requests wait for a place. ``kept_bytes``:
    how much of the caches of prefixes is kept for requests that begin alike (0: nothing); let go when memory is short.
    ``fed``, ``reused``: places of prefixes that were computed, and that were taken from there.
    """

    def __init__(self, bundle: Bundle, max_rows: int = 64, kept_bytes: int = 0) -> None:
        self.bundle, self.max_rows = bundle, max(2, max_rows)
        self.kept: Store[KeptPart] = Store(kept_bytes)
        self.fed = self.reused = 0
        self.model, self.vocab, self.layout = bundle.model, bundle.vocab, bundle.layout
        self.device = bundle.model.head.weight.device
        keep_steady(self.model.backbone)

    def images(self, requests: Sequence[ImageRequest]) -> Iterator[Event]:
        """Draw all requests; rows are numbered as given. Yields ScaleReady per row and scale, ImageReady, Done.

        Raises ContextError before anything is drawn when a request does not fit.
        """
        return self.run(requests)

    def texts(self, requests: Sequence[TextRequest]) -> Iterator[Event]:
        """Write all requests; yields TextDelta as text grows and Done per row. Raises ContextError as :meth:`images`."""
        return self.run(requests)

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Answer requests of any kind together; rows are numbered as given. Raises ContextError before any work, and what
        one of them fails of.
        """
        rounds = Rounds(self)
        for number, request in enumerate(requests):
            rounds.submit(number, request)
        while rounds.busy:
            for event in rounds.step():
                if isinstance(event, Failure):
                    raise event.error
                yield event

    @property
    def figures(self) -> Figures:
        """What was counted so far."""
        return Figures(self.kept.hits, self.reused, self.fed, self.kept.used)

    def job(self, number: int, request: Request) -> Job:
        """The state machine of a request. Raises ContextError."""
        quantizer = self.bundle.image_tokenizer.quantizer
        return Job(number, request, self.vocab, self.layout, self.model.config.max_positions, quantizer)

    @torch.inference_mode()
    def resume(self, tracks: Sequence[Track]) -> tuple[list[Track], list[Track]]:
        """Give tracks what is kept of their prefixes. Returns those that are to be fed now, and those that begin like one
        of them: they find kept, a little later, what it is fed.
        """
        if not self.kept.budget:
            return list(tracks), []
        now, waiting, complete, names = [], [], [], set()
        for track in tracks:
            if track.feed is None or track.feed.sample is None:
                now.append(track)
                continue
            last = self._take(track)
            if track.feed is None:
                complete.append((track, last))
            elif track.named() in names and track.named() != track.awaited:
                track.awaited = track.named()  # once: what is too large to be kept is not found
                waiting.append(track)
            else:
                names.add(track.named())
                now.append(track)
        if complete:
            hidden = torch.stack([last.hidden for _, last in complete if last is not None])
            self._score([track for track, _ in complete], hidden[:, None])
        return now, waiting

    def _take(self, track: Track) -> KeptPart | None:
        """Move a track behind the parts of its prefix that are kept; returns the last of them."""
        found: list[KeptPart] = []
        while track.feed is not None and (part := self.kept.get(track.named())) is not None:
            found.append(part)
            settle(track)
            track.next_part()
        if found:
            had = [] if track.cache is None else [track.cache.cut(track.row, 0, track.length)]
            track.cache, track.row = RowCache.of(*restored([*had, *(part.rows for part in found)])), 0
            self.kept.touch(reversed(track.names))  # what others may share is let go last
            self.reused += sum(len(part) for part in found)
        return found[-1] if found else None

    def feed(self, tracks: Sequence[Track]) -> None:
        """Feed tracks of one shape in one batch and give each the scores that it wants. Where memory is short, what is
        kept is let go.
        """
        try:
            self._feed(tracks)
        except torch.OutOfMemoryError:
            if not self.kept.clear():
                raise
            self._feed(tracks)

    @torch.inference_mode()
    def _feed(self, tracks: Sequence[Track]) -> None:
        new = tracks[0].shape[0]
        assert isinstance(new, int)
        rows = max(len(tracks), -(-LEAST_ROWS // new))
        fed = [*tracks, *([tracks[0]] * (rows - len(tracks)))]
        cache = self._caches(tracks, new)
        feed = tracks[0].feed
        assert feed is not None
        real, inner, copied = [new] * len(tracks), None, None
        if feed.sample is not None:
            samples = [t.feed.sample for t in fed if t.feed is not None and t.feed.sample is not None]
            batch = collate(samples, new).to(self.device)
            x, positions = self.model.embed(batch), batch.positions
            inner, real = block_mask(batch.blocks, batch.documents), [len(s) for s in samples]
        elif feed.schedule is not None:
            x, positions, copied = self._scale_inputs(fed)
        else:
            x, positions = self._token_inputs(fed)
        hidden = self.model.step(x, positions, cache.mask(new, inner, self.device), cast(Cache, cache))
        cache.advance(real)
        if copied is not None:
            hidden = self.model.point(hidden, copied)
        hidden = hidden[: len(tracks)]
        if feed.sample is not None:  # only what stands behind the prefix is asked for
            last = torch.tensor(real, device=self.device) - 1
            hidden = hidden[torch.arange(len(tracks), device=self.device), last][:, None]
        for track, (part, row) in zip(tracks, cache.places(), strict=True):
            track.cache, track.row = part, row
        if feed.sample is not None:
            self._keep(tracks, real, hidden)
        for track in tracks:
            settle(track)
            if feed.sample is not None:
                track.next_part()
        whole = [row for row, track in enumerate(tracks) if track.feed is None]
        if len(whole) == len(tracks):
            self._score(tracks, hidden)
        elif whole:
            self._score([tracks[row] for row in whole], hidden[whole])

    @staticmethod
    def _caches(tracks: Sequence[Track], new: int) -> Caches:
        """The caches of tracks that are sorted by length, those of one span together."""
        parts = []
        for (_, span), some in groupby(tracks, key=lambda t: (t.cache is None, spanned(t.length + new))):
            group = list(some)
            old = [(t.cache, t.row) for t in group if t.cache is not None]
            parts.append(RowCache.gather(old, span) if old else RowCache(len(group)))
        return Caches(parts)

    def _keep(self, tracks: Sequence[Track], real: Sequence[int], hidden: Tensor) -> None:
        for row, track in enumerate(tracks):
            self.fed += real[row]
            if self.kept.budget and track.cache is not None:
                rows = track.cache.cut(track.row, track.length - real[row], track.length)
                self.kept.put(track.named(), KeptPart(rows, hidden[row, -1].clone()))

    def _scale_inputs(self, tracks: Sequence[Track]) -> tuple[Tensor, Tensor, Tensor | None]:
        """(R, n, D) inputs and (3, R, n) positions of the block behind the last scale of growing images, and the (R, n)
        codes that would copy there.
        """
        feeds = [t.feed for t in tracks if t.feed is not None]
        schedule, k = feeds[0].schedule, feeds[0].k
        assert schedule is not None
        codes = torch.stack([f.codes for f in feeds if f.codes is not None]).to(self.device)
        # <boi> is one before the clock and block that follow it.
        blocks = [scale_block(schedule, k + 1, t.clock - 1, t.block - 1, self.layout) for t in tracks]
        copied = None
        if self.layout.copies and k + 1 < len(schedule) and any(f.reference is not None for f in feeds):
            none = torch.full((schedule.num_tokens,), -1)
            reference = torch.stack([none if f.reference is None else f.reference for f in feeds])
            copied = self.model.scale_inputs.copied(reference.to(self.device), codes, schedule, k + 1, k + 2)
        x = self.model.embed_scale(codes, schedule, k, blocks[0], copied)
        return x, torch.stack([b.positions for b in blocks], dim=1).to(self.device), copied

    def _token_inputs(self, tracks: Sequence[Track]) -> tuple[Tensor, Tensor]:
        """(R, 1, D) inputs and (3, R, 1) positions of one text token each; a ``<boi>`` carries its image's tags."""
        feeds = [t.feed for t in tracks if t.feed is not None]
        x = self.model.embed_text(torch.tensor([[f.token] for f in feeds], device=self.device))
        if feeds[0].image_scales:
            scale, length = torch.zeros(1, 1, dtype=torch.long), torch.tensor([[feeds[0].image_scales]])
            x = x + self.model.scale_inputs.tags(scale.to(self.device), length.to(self.device)).to(x.dtype)
        places = torch.tensor([float(t.clock) for t in tracks], device=self.device)
        return x, places.expand(3, -1)[..., None]

    def _score(self, tracks: Sequence[Track], hidden: Float[Tensor, "r n d"]) -> None:
        split = self.vocab.text_size
        for wants, first, last in (("text", 0, split), ("codes", split, split + self.vocab.codes)):
            rows = [row for row, track in enumerate(tracks) if track.wants == wants]
            if rows:
                scores = steady_scores(hidden[rows], self.model.head.weight[first:last])
                for row, found in zip(rows, scores, strict=True):
                    tracks[row].scores = found


GATHER, GATHER_PLANNED = 8, 24
"""Rounds that an image may wait for others to begin with it: where none is planned yet, and where some are."""


class Rounds:
    """Requests in work together: :meth:`step` takes each of them one step further, so none waits for a whole other one.

    Requests come and go at any time between steps. ``most_waiting``: how many may wait for a place (None: any number).
    """

    def __init__(self, engine: Engine, most_waiting: int | None = None) -> None:
        self.engine, self.most_waiting = engine, most_waiting
        self.waiting: deque[Job] = deque()
        self.active: list[Job] = []
        self.round = self.began = 0

    @property
    def max_rows(self) -> int:
        """Sequences in work at once."""
        return self.engine.max_rows

    @property
    def figures(self) -> Figures:
        """What the engine counted."""
        return self.engine.figures

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.active)

    def submit(self, number: int, request: Request) -> None:
        """Take a request on; its events carry ``number``. Raises QueueFull or ContextError."""
        if self.most_waiting is not None and len(self.waiting) >= self.most_waiting:
            raise QueueFull(f"{self.most_waiting} requests wait already: try again later")
        self.take(self.engine.job(number, request))

    def take(self, job: Job) -> None:
        """Take on a job that :meth:`Engine.job` made; no limit holds here."""
        self.waiting.append(job)

    def cancel(self, number: int) -> bool:
        """Drop a request; its part of the cache is free with the next step. Returns whether it was there."""
        before = len(self.waiting) + len(self.active)
        self.waiting = deque(job for job in self.waiting if job.number != number)
        self.active = [job for job in self.active if job.number != number]
        return len(self.waiting) + len(self.active) < before

    def clear(self) -> None:
        """Drop all requests."""
        self.waiting.clear()
        self.active = []

    def close(self) -> None:
        """Nothing is to be ended here; see Engines."""

    def step(self) -> Iterator[Event | Failure]:
        """One step of every active request; yields what is new, request by request. One that fails of its own scores is
        dropped, and its last news is a Failure. Raises what they fail of together, when a batch is fed.
        """
        self._admit()
        self.round += 1
        working = self._gathered()
        left = [track for job in working for track in job.tracks if track.feed is not None]
        while left:  # prefixes of several parts take several turns
            now, waiting = self.engine.resume(left)
            groups: dict[tuple[object, ...], list[Track]] = {}
            for track in now:
                groups.setdefault(track.shape, []).append(track)
            for tracks in groups.values():  # rows of one length side by side are written at once
                self.engine.feed(sorted(tracks, key=lambda track: track.length))
            left = [track for track in (*now, *waiting) if track.feed is not None]
        for job in working:
            if job not in self.active:
                continue
            try:
                yield from job.advance()
            except Exception as error:
                if job in self.active:
                    self.active.remove(job)
                yield Failure(job.number, error)
                continue
            if job.done and job in self.active:
                self.active.remove(job)

    def _gathered(self) -> list[Job]:
        """The jobs that take a step now: an image that has not begun waits up to :data:`GATHER` rounds behind the last that
        did, so that images go through their scales together; not when nothing else is in work. While others are being
        planned in words, which takes longer than an image does, it waits for those.
        """
        going = [job for job in self.active if not job.starting]
        planned = any(isinstance(job.request, TextRequest) and job.request.plans for job in going)
        if not going or self.round - self.began >= (GATHER_PLANNED if planned else GATHER):
            if len(going) < len(self.active):
                self.began = self.round
            return list(self.active)
        return going

    def _admit(self) -> None:
        taken = sum(job.width for job in self.active)
        while self.waiting and (not self.active or taken + self.waiting[0].width <= self.engine.max_rows):
            job = self.waiting.popleft()
            self.active.append(job)
            taken += job.width
