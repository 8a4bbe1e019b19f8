"""The engine: documents in, events out. Images grow scale by scale, text token by token, over a KV cache.

Requests of one call are drawn together. A row's result depends on its own document, settings and seed only: rows are
grouped by their prefix length rounded up to :data:`PREFIX_STEP`, so that every row meets the same shapes whatever else
is in the batch, and very small matrix products, for which libraries switch kernels, are padded up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nextflow_ar.generation.sampling import SamplingSettings, draw, guide, row_generators
from nextflow_ar.model.backbone import Cache, new_cache
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import collate
from nextflow_ar.sequence.blocks import block_mask
from nextflow_ar.sequence.layout import Sample, build, image_prefix, next_clock, scale_block
from nextflow_ar.types import Codes, Document, Done, Event, ImageReady, ScaleReady, TextDelta

PREFIX_STEP = 16
"""Prefixes are padded at their beginning to a multiple of this many places."""
_LEAST_PRODUCT = 12
"""Matrix products with fewer rows than this may be computed by other kernels, which round differently."""


class ContextError(ValueError):
    """A request does not fit the model's context: one line with both lengths."""


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """Draw an image after ``document``. ``unconditional``: the document that guidance contrasts with."""

    document: Document
    schedule: ScaleSchedule
    seed: int
    settings: SamplingSettings
    unconditional: Document = field(default_factory=lambda: Document(()))


@dataclass(frozen=True, eq=False)
class TextRequest:
    """Write text after ``document`` until the end marker, at most ``max_tokens`` tokens."""

    document: Document
    max_tokens: int
    seed: int
    settings: SamplingSettings


@dataclass(eq=False)
class _Rows:
    """Rows that advance together: their cache, which cached places are real, and where each row's next token stands."""

    cache: Cache
    seen: Tensor  # (R, K) bool
    clocks: list[tuple[int, int]]  # text position and block number that follow each prefix
    hidden: Tensor  # (R, D) of the last place


class Engine:
    """Sampling over one loaded checkpoint. Holds no state between calls: any number of them may be under way.

    ``max_rows``: rows of a batch, unconditional ones included; more requests are drawn one batch after the other.
    """

    def __init__(self, bundle: Bundle, max_rows: int = 64) -> None:
        self.bundle, self.max_rows = bundle, max(2, max_rows)
        self.model, self.vocab, self.layout = bundle.model, bundle.vocab, bundle.layout
        self.device = bundle.model.head.weight.device

    def images(self, requests: Sequence[ImageRequest]) -> Iterator[Event]:
        """Draw all requests; rows are numbered as given. Yields ScaleReady per row and scale, ImageReady, Done.

        Raises ContextError before anything is drawn when a request does not fit.
        """
        prefixes = [image_prefix(r.document, r.schedule, self.vocab, self.layout) for r in requests]
        without = [
            image_prefix(r.unconditional, r.schedule, self.vocab, self.layout) if r.settings.guided else None
            for r in requests
        ]
        groups: dict[tuple[int, ScaleSchedule], list[int]] = {}
        for i, request in enumerate(requests):
            longest = max(len(s) for s in (prefixes[i], without[i]) if s is not None)
            self._fits(longest + request.schedule.num_tokens - 1)
            request.settings.at(
                0, len(request.schedule)
            )  # a wrong number of values is an error before the work
            groups.setdefault((_rounded(longest), request.schedule), []).append(i)
        for (length, schedule), members in groups.items():
            width = max(1, self.max_rows // 2)
            for start in range(0, len(members), width):
                chosen = members[start : start + width]
                yield from self._draw(
                    [requests[i] for i in chosen], chosen, prefixes, without, length, schedule
                )

    def texts(self, requests: Sequence[TextRequest]) -> Iterator[Event]:
        """Write all requests; yields TextDelta as text grows and Done per row. Raises ContextError as :meth:`images`."""
        prefixes = [build(r.document, self.vocab, self.layout, close_last=True) for r in requests]
        groups: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            self._fits(len(prefixes[i]) + request.max_tokens)
            groups.setdefault(_rounded(len(prefixes[i])), []).append(i)
        for length, members in groups.items():
            for start in range(0, len(members), self.max_rows):
                chosen = members[start : start + self.max_rows]
                yield from self._write(
                    [requests[i] for i in chosen], chosen, [prefixes[i] for i in chosen], length
                )

    def _fits(self, length: int) -> None:
        limit = self.model.config.max_positions
        if length > limit:
            raise ContextError(f"the request takes {length} tokens, the model's context holds {limit}")

    @torch.inference_mode()
    def _prefill(self, samples: Sequence[Sample], length: int) -> _Rows:
        batch = collate(samples, length, align="right").to(self.device)
        cache = new_cache()
        mask = block_mask(batch.blocks, batch.documents)
        hidden = self.model.step(self.model.embed(batch), batch.positions, mask, cache)
        return _Rows(cache, batch.documents >= 0, [next_clock(s) for s in samples], hidden[:, -1])

    def _scores(self, hidden: Tensor, first: int, last: int) -> Tensor:
        """fp32 logits (M, last - first) of vocabulary entries ``first`` to ``last`` for (M, D) hidden states."""
        rows = hidden.shape[0]
        if rows < _LEAST_PRODUCT:
            hidden = torch.cat([hidden, hidden.new_zeros(_LEAST_PRODUCT - rows, hidden.shape[1])])
        return torch.nn.functional.linear(hidden, self.model.head.weight[first:last])[:rows].float()

    def _draw(
        self,
        requests: Sequence[ImageRequest],
        numbers: Sequence[int],
        prefixes: Sequence[Sample],
        without: Sequence[Sample | None],
        length: int,
        schedule: ScaleSchedule,
    ) -> Iterator[Event]:
        conditional = [prefixes[i] for i in numbers]
        others = [(place, s) for place, i in enumerate(numbers) if (s := without[i]) is not None]
        partner = {place: len(conditional) + j for j, (place, _) in enumerate(others)}
        samples = conditional + [s for _, s in others]
        if len(samples) == 1:
            samples = samples * 2
        owner = torch.tensor([*range(len(conditional)), *(place for place, _ in others)], device=self.device)
        if len(owner) < len(samples):
            owner = owner.repeat(2)
        generators = row_generators([r.seed for r in requests])
        rows = self._prefill(samples, length)
        hidden, scales = rows.hidden[:, None], len(schedule)
        codes = torch.empty(len(requests), 0, dtype=torch.long, device=self.device)
        for k in range(scales):
            codes = torch.cat([codes, self._sample(hidden, requests, partner, generators, k, scales)], dim=1)
            for place, number in enumerate(numbers):
                yield ScaleReady(number, k, scales, codes[place].cpu())
            if k + 1 < scales:
                hidden = self._grow(rows, codes[owner], schedule, k)
        for place, number in enumerate(numbers):
            yield ImageReady(number, Codes.plain(schedule, codes[place].cpu()))
            yield Done(number, "stop")

    @torch.inference_mode()
    def _sample(
        self,
        hidden: Tensor,
        requests: Sequence[ImageRequest],
        partner: dict[int, int],
        generators: Sequence[torch.Generator],
        k: int,
        scales: int,
    ) -> Tensor:
        """(requests, n) codes of scale ``k`` from (R, n, D) hidden states."""
        rows, n, _ = hidden.shape
        first = self.vocab.text_size
        logits = self._scores(hidden.flatten(0, 1), first, first + self.vocab.codes).view(rows, n, -1)
        out = []
        for place, request in enumerate(requests):
            guidance, temperature, top_k, top_p = request.settings.at(k, scales)
            scores = logits[place]
            if place in partner:
                scores = guide(scores, logits[partner[place]], guidance)
            out.append(draw(scores, temperature, top_k, top_p, generators[place]))
        return torch.stack(out)

    @torch.inference_mode()
    def _grow(self, rows: _Rows, codes: Tensor, schedule: ScaleSchedule, k: int) -> Tensor:
        """Feed the codes of scale ``k`` back; (R, n, D) hidden states that predict scale ``k + 1``."""
        # <boi> is the last place of every prefix: one before the clock and block that follow it.
        blocks = [
            scale_block(schedule, k + 1, clock - 1, block - 1, self.layout) for clock, block in rows.clocks
        ]
        x = self.model.embed_scale(codes, schedule, k, blocks[0])
        positions = torch.stack([b.positions for b in blocks], dim=1).to(self.device)
        rows.seen = torch.cat([rows.seen, rows.seen.new_ones(x.shape[:2])], dim=1)
        mask = rows.seen[:, None, None].expand(-1, 1, x.shape[1], -1)
        return self.model.step(x, positions, mask, rows.cache)

    def _write(
        self, requests: Sequence[TextRequest], numbers: Sequence[int], prefixes: list[Sample], length: int
    ) -> Iterator[Event]:
        prefixes = prefixes + [prefixes[0]] * (-len(prefixes) % 4)
        rows = self._prefill(prefixes, length)
        generators = row_generators([r.seed for r in requests])
        written: list[list[int]] = [[] for _ in requests]
        shown = [""] * len(requests)
        running = set(range(len(requests)))
        hidden = rows.hidden
        for step in range(max(r.max_tokens for r in requests)):
            tokens = self._next_tokens(hidden, requests, generators, running)
            for place in sorted(running):
                ended = int(tokens[place]) == self.vocab.end
                if not ended:
                    written[place].append(int(tokens[place]))
                yield from self._said(numbers[place], written[place], shown, place, final=ended)
                if ended or step + 1 == requests[place].max_tokens:
                    if not ended:
                        yield from self._said(numbers[place], written[place], shown, place, final=True)
                    running.discard(place)
                    yield Done(numbers[place], "stop" if ended else "length")
            if not running:
                return
            hidden = self._append(rows, tokens, step)

    def _said(
        self, number: int, ids: list[int], shown: list[str], place: int, *, final: bool
    ) -> Iterator[Event]:
        """The new text of a row, held back while a character is incomplete."""
        text = self.vocab.decode(ids)
        if not final and text.endswith("�"):
            return
        new = text[len(shown[place]) :]
        shown[place] = text
        if new:
            yield TextDelta(number, new)

    @torch.inference_mode()
    def _next_tokens(
        self,
        hidden: Tensor,
        requests: Sequence[TextRequest],
        generators: Sequence[torch.Generator],
        running: set[int],
    ) -> Tensor:
        logits = self._scores(hidden, 0, self.vocab.text_size)
        logits[:, self.vocab.never] = float("-inf")
        tokens = torch.full((hidden.shape[0],), self.vocab.end, dtype=torch.long, device=self.device)
        for place in sorted(running):
            _, temperature, top_k, top_p = requests[place].settings.at(0, 1)
            tokens[place] = draw(logits[place : place + 1], temperature, top_k, top_p, generators[place])[0]
        return tokens

    @torch.inference_mode()
    def _append(self, rows: _Rows, tokens: Tensor, step: int) -> Tensor:
        """Feed one text token per row; (R, D) hidden states."""
        places = torch.tensor(
            [clock + step for clock, _ in rows.clocks], dtype=torch.float32, device=self.device
        )
        rows.seen = torch.cat([rows.seen, rows.seen.new_ones(len(tokens), 1)], dim=1)
        x = self.model.embed_text(tokens[:, None])
        hidden = self.model.step(x, places.expand(3, -1)[..., None], rows.seen[:, None, None], rows.cache)
        return hidden[:, -1]


def _rounded(length: int) -> int:
    return -(-length // PREFIX_STEP) * PREFIX_STEP
