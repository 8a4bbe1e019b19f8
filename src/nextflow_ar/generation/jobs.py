"""Requests under way, each a small state machine: what it feeds next, and what it makes of the scores that come back.

A job owns one or two tracks (sequences with a place in a cache): its own, and the unconditional one that guidance
contrasts with. It knows nothing of other jobs; the scheduler feeds the tracks of many in common batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nextflow_ar.generation.cache import RowCache, rounded
from nextflow_ar.generation.forcing import Forcing
from nextflow_ar.generation.kept import part_key
from nextflow_ar.generation.requests import ContextError, ImageRequest, Request, TextRequest, WriteRequest
from nextflow_ar.generation.sampling import SamplingSettings, draw, guide, guide_words
from nextflow_ar.generation.spoken import split
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.layout import LayoutOptions, Sample, build, image_prefix, next_clock, reference_of
from nextflow_ar.sequence.vocab import BOI, END_OF_TEXT, EOI, TURN_END, TURN_START, Vocabulary
from nextflow_ar.tokenizer.quantizer import MultiScaleQuantizer
from nextflow_ar.types import Codes, Done, Event, ImageReady, Planned, ScaleReady, TextDelta


@dataclass(frozen=True, eq=False)
class Feed:
    """What a track is fed next. One of ``sample`` (a prefix), ``token`` (of text; ``image_scales`` > 0: it begins an image
    of so many scales) and ``codes`` (T_so_far,) of ``schedule`` whose scale ``k`` (0-based) is the last. ``reference``:
    (T,) codes of the picture that the image could copy.
    """

    sample: Sample | None = None
    token: int = -1
    image_scales: int = 0
    codes: Tensor | None = None
    schedule: ScaleSchedule | None = None
    k: int = 0
    reference: Tensor | None = None

    @property
    def new(self) -> int:
        """Places that it takes, padding included."""
        if self.sample is not None:
            return rounded(len(self.sample))
        if self.schedule is None:
            return 1
        return self.schedule.sizes[min(self.k + 1, len(self.schedule) - 1)]


@dataclass(eq=False)
class Track:
    """One sequence: its place in a cache, where its next token stands, what it is to be fed, and whether the scores that
    it then gives are of codes or of text (``wants``). ``later``: parts of its prefix behind the one that is to be fed;
    ``names``: what part_key calls those up to that one; ``awaited``: the one that it let another track be fed first.
    """

    wants: str
    feed: Feed | None
    cache: RowCache | None = None
    row: int = 0
    clock: int = 0
    block: int = 0
    scores: Tensor | None = None
    later: list[Sample] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    awaited: bytes = b""

    @classmethod
    def behind(cls, wants: str, prefix: Sample) -> Track:
        """A new track that is to be fed a prefix, part by part."""
        first, *later = prefix.parts()
        return cls(wants, Feed(sample=first), later=later)

    def named(self) -> bytes:
        """Name of the part that is to be fed."""
        assert self.feed is not None and self.feed.sample is not None
        if not self.names:
            self.names.append(part_key(b"", self.feed.sample))
        return self.names[-1]

    def next_part(self) -> None:
        """Behind a part of the prefix: go on with the next one, if there is one."""
        if self.later:
            self.feed = Feed(sample=self.later.pop(0))
            if self.names:
                assert self.feed.sample is not None
                self.names.append(part_key(self.names[-1], self.feed.sample))

    @property
    def length(self) -> int:
        """Places that it has in its cache."""
        return self.cache.lengths[self.row] if self.cache is not None else 0

    @property
    def shape(self) -> tuple[object, ...]:
        """Tracks of the same shape can be fed together."""
        assert self.feed is not None
        kind = "sample" if self.feed.sample is not None else "token"
        at = (
            (self.feed.schedule, self.feed.k)
            if self.feed.codes is not None
            else (kind, self.feed.image_scales)
        )
        return self.feed.new, at

    def go_on(self, feed: Feed, wants: str) -> None:
        """What to feed next."""
        self.feed, self.wants, self.scores = feed, wants, None


class Drawing:
    """An image growing scale by scale on a track, with its unconditional partner."""

    def __init__(
        self,
        track: Track,
        partner: Track | None,
        schedule: ScaleSchedule,
        settings: SamplingSettings,
        forcing: Forcing | None = None,
        references: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> None:
        self.track, self.partner, self.schedule, self.settings = track, partner, schedule, settings
        self.forcing, self.references = forcing, references
        self.codes = torch.empty(0, dtype=torch.long)
        self.k = 0

    def sample(self, generator: torch.Generator) -> None:
        """Take the codes of the next scale from the tracks' scores."""
        scores = self.track.scores
        assert scores is not None
        guidance, temperature, top_k, top_p = self.settings.at(self.k, len(self.schedule))
        if self.partner is not None:
            assert self.partner.scores is not None
            scores = guide(scores, self.partner.scores, guidance)
        chosen = draw(scores, temperature, top_k, top_p, generator).cpu()
        if self.forcing is not None:
            chosen = self.forcing.choose(self.k, chosen)
        self.codes = torch.cat([self.codes, chosen])
        self.k += 1

    def feed(self) -> None:
        """Feed the last scale's codes back on both tracks."""
        for track, reference in zip((self.track, self.partner), self.references, strict=True):
            if track is not None:
                feed = Feed(codes=self.codes, schedule=self.schedule, k=self.k - 1, reference=reference)
                track.go_on(feed, "codes")

    @property
    def finished(self) -> bool:
        """All scales are sampled."""
        return self.k == len(self.schedule)


class Job:
    """One request under way. ``number``: what its events call it. ``quantizer``: for forced codes."""

    def __init__(
        self,
        number: int,
        request: Request,
        vocab: Vocabulary,
        layout: LayoutOptions,
        limit: int,
        quantizer: MultiScaleQuantizer,
    ) -> None:
        self.number, self.request, self.vocab, self.layout = number, request, vocab, layout
        self.generator = torch.Generator().manual_seed(request.seed)
        self.done = False
        self.drawing: Drawing | None = None
        self.images = 0
        self.drawn: Tensor | None = None  # codes of the last image
        self.written: list[int] = []
        self.counted = self.thought = 0  # tokens that were said, and those of plans
        self.shown = ""
        self.plan: str | None = None
        self.planned = 0  # tokens of the plan that grows
        self._closed: dict[frozenset[str], Tensor] = {}
        self.prefix = prefix = self._prefix()
        self._fits(prefix, limit)
        wants = "codes" if isinstance(request, ImageRequest) else "text"
        self.track = Track.behind(wants, prefix)
        self.other: Track | None = None  # the unconditional one of a text
        if isinstance(request, TextRequest) and request.guided and request.unconditional is not None:
            self.other = Track.behind("text", build(request.unconditional, vocab, layout, close_last=True))
        if isinstance(request, ImageRequest):
            forcing = None if request.forced is None else Forcing(request.forced, quantizer)
            self.drawing = self._drawing(request.settings, forcing)

    def _prefix(self) -> Sample:
        request = self.request
        if isinstance(request, ImageRequest):
            return image_prefix(request.document, request.schedule, self.vocab, self.layout)
        return build(request.document, self.vocab, self.layout, close_last=True)

    def _fits(self, prefix: Sample, limit: int) -> None:
        request = self.request
        need = len(prefix)
        if isinstance(request, ImageRequest):
            need += request.schedule.num_tokens - 1
            if request.settings.guided:
                without = image_prefix(request.unconditional, request.schedule, self.vocab, self.layout)
                need = max(need, len(without) + request.schedule.num_tokens - 1)
        else:
            need += request.max_tokens
        if isinstance(request, WriteRequest):
            need += request.max_images * (_whole(request.schedule) + request.thoughts)
        if need > limit:
            raise ContextError(f"the request takes {need} tokens, the model's context holds {limit}")

    def _partner(self) -> Track | None:
        request = self.request
        assert not isinstance(request, TextRequest)
        settings = request.settings if isinstance(request, ImageRequest) else request.image_settings
        if not settings.guided:
            return None
        sample = image_prefix(request.unconditional, request.schedule, self.vocab, self.layout)
        return Track.behind("codes", sample)

    def _drawing(self, settings: SamplingSettings, forcing: Forcing | None = None) -> Drawing:
        request = self.request
        assert not isinstance(request, TextRequest)
        own = self.drawn if self.drawn is not None else reference_of(request.document, request.schedule)
        references = own, reference_of(request.unconditional, request.schedule)
        return Drawing(self.track, self._partner(), request.schedule, settings, forcing, references)

    @property
    def tracks(self) -> list[Track]:
        """All tracks that hold cache, or will: the job's own first."""
        partner = self.drawing.partner if self.drawing is not None else self.other
        return [self.track] if partner is None else [self.track, partner]

    @property
    def starting(self) -> bool:
        """Whether its next step is the first of an image."""
        return self.drawing is not None and self.drawing.k == 0

    @property
    def width(self) -> int:
        """Most tracks that it has at once."""
        request = self.request
        if isinstance(request, TextRequest):
            return 2 if request.guided else 1
        settings = request.settings if isinstance(request, ImageRequest) else request.image_settings
        return 2 if settings.guided else 1

    def advance(self) -> Iterator[Event]:
        """Use the scores that the tracks were given: choose tokens or codes, say what is new, and set what to feed next."""
        if self.drawing is not None:
            yield from self._drawn(self.drawing)
        elif self.track.scores is not None:
            yield from self._wrote()
        else:  # the closing block is fed; the mark behind it comes next
            self.track.go_on(Feed(token=self.vocab.eoi), "text")

    def _drawn(self, drawing: Drawing) -> Iterator[Event]:
        drawing.sample(self.generator)
        yield ScaleReady(self.number, drawing.k - 1, len(drawing.schedule), drawing.codes)
        if not drawing.finished:
            drawing.feed()
            return
        yield ImageReady(self.number, Codes.plain(drawing.schedule, drawing.codes))
        self.drawing, self.drawn = None, drawing.codes
        request = self.request
        assert not isinstance(request, TextRequest)
        alone = isinstance(request, ImageRequest)
        if alone or (
            self.images == request.max_images and (request.last_image_ends or not request.max_tokens)
        ):
            yield from self._end("stop")
        else:
            feed = Feed(codes=drawing.codes, schedule=drawing.schedule, k=drawing.k - 1)
            self.track.go_on(feed, "nothing")

    def _wrote(self) -> Iterator[Event]:
        request = self.request
        assert not isinstance(request, ImageRequest) and self.track.scores is not None
        token = self._next_token(self.track.scores)
        ends = {self.vocab.special(name) for name in request.ends}
        begins = isinstance(request, WriteRequest) and token == self.vocab.boi
        if token in ends or begins:
            yield from self._said(final=True)
            if token in ends:
                yield from self._end("stop")
                return
            assert isinstance(request, WriteRequest)
            self.written, self.shown, self.plan, self.planned = [], "", None, 0
            self.images += 1
            self.track.go_on(Feed(token=token, image_scales=len(request.schedule)), "codes")
            self.drawing = self._drawing(request.image_settings)
            return
        self.written.append(token)
        last = self._count()
        yield from self._said(final=last)
        if last:
            yield from self._end("length")
        else:
            for track in self.tracks:
                track.go_on(Feed(token=token), "text")

    def _next_token(self, scores: Tensor) -> int:
        request = self.request
        assert not isinstance(request, ImageRequest)
        left = isinstance(request, WriteRequest) and self.images < request.max_images
        if (not self._words and not self._thoughts) or (left and 0 < self._thoughts <= self.planned):
            return self.vocab.boi
        scores = scores.masked_fill(self._never().to(scores.device), float("-inf"))
        if self._thoughts and self.plan is None and int(scores.argmax()) != self.vocab.boi:
            scores[..., self.vocab.boi] = float("-inf")  # by chance alone no picture begins without its plan
        guidance, temperature, top_k, top_p = self._wording().at(0, 1)
        if self.other is not None:
            assert self.other.scores is not None
            scores = guide_words(scores, self.other.scores, guidance)
        return int(draw(scores, temperature, top_k, top_p, self.generator)[0])

    def _wording(self) -> SamplingSettings:
        """Settings of the next token of text."""
        request = self.request
        assert not isinstance(request, ImageRequest)
        own = request.thought_settings if isinstance(request, WriteRequest) else None
        return request.settings if self.plan is None or own is None else own

    def _never(self) -> Tensor:
        """(V,) of the text entries: True for those that cannot be chosen now."""
        request = self.request
        allowed = set() if isinstance(request, ImageRequest) else set(request.ends)
        if isinstance(request, TextRequest) and self.counted < request.min_tokens:
            allowed = set()
        if isinstance(request, WriteRequest) and self.images < request.max_images:
            if not request.max_tokens or self.plan is not None:
                allowed = set()  # all images are wanted; and a plan is followed by its picture
            allowed.add(BOI)
        known = frozenset(allowed)
        if known not in self._closed:
            closed = torch.zeros(self.vocab.text_size, dtype=torch.bool)
            marks = (END_OF_TEXT, TURN_START, TURN_END, BOI, EOI)
            closed[[self.vocab.special(name) for name in marks if name not in allowed]] = True
            closed[len(self.vocab.tokenizer) :] = True
            self._closed[known] = closed
        return self._closed[known]

    def _said(self, *, final: bool) -> Iterator[Event]:
        """The new text, held back while a character is incomplete; plans are told apart."""
        text = self.vocab.decode(self.written)
        if not final and text.endswith("�"):
            return
        if self._thoughts:
            text = split(text, final=final)[0] if self._words else ""
            if final and self.plan:
                yield Planned(self.number, self.plan)
        new, self.shown = text[len(self.shown) :], text
        if new:
            yield TextDelta(self.number, new)

    @property
    def _thoughts(self) -> int:
        """Most tokens of a plan; 0 where plans are not told apart."""
        return self.request.thoughts if isinstance(self.request, WriteRequest) else 0

    @property
    def _words(self) -> bool:
        """Whether anything but plans may be written."""
        return not isinstance(self.request, ImageRequest) and self.request.max_tokens > 0

    def _count(self) -> bool:
        """Take note of a new token, of what is said or of a plan; whether it is the last: no more may be said, or a plan
        begins for which no image is left.
        """
        request = self.request
        assert not isinstance(request, ImageRequest)
        if self.plan is None:
            self.counted += 1
        else:
            self.planned, self.thought = self.planned + 1, self.thought + 1
        unsure = False
        if self._thoughts:
            text = self.vocab.decode(self.written)
            said, plan = split(text, final=False) if self._words else ("", text.strip())
            unsure = said != text
            if plan is not None and self.plan is None:
                self._recount(said)
            self.plan = plan
        if self.plan is not None:
            return isinstance(request, WriteRequest) and self.images == request.max_images
        return self._words and self.counted >= request.max_tokens and not unsure

    def _recount(self, said: str) -> None:
        """A plan has begun behind what is ``said``: the tokens of its mark were counted as said."""
        begun = len(self.written)
        while begun and len(self.vocab.decode(self.written[:begun])) > len(said):
            begun -= 1
        self.planned = len(self.written) - begun
        self.counted, self.thought = self.counted - self.planned, self.thought + self.planned

    def _end(self, reason: str) -> Iterator[Event]:
        self.done = True
        yield Done(self.number, reason, self.counted + self.thought)


def _whole(schedule: ScaleSchedule) -> int:
    """Places of an image with its marks and its closing block."""
    return schedule.num_tokens + schedule.sizes[-1] + 1


def settle(track: Track) -> None:
    """Move a track's clock past what it was fed. While an image grows, the clock stays behind its ``<boi>``."""
    feed = track.feed
    assert feed is not None
    if feed.sample is not None:
        track.clock, track.block = next_clock(feed.sample)
    elif feed.schedule is None:
        track.clock, track.block = track.clock + 1, track.block + 1
    elif feed.k + 1 == len(feed.schedule):  # the closing block
        track.clock, track.block = track.clock + len(feed.schedule), track.block + len(feed.schedule)
    track.feed = None
