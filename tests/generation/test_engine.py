"""The engine: incremental logits equal teacher-forced ones, seeds decide rows whatever the batch, events come in order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nextflow_ar.generation.engine import ContextError, Engine, ImageRequest, TextRequest
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import collate, pack
from nextflow_ar.sequence.layout import build, image_prefix
from nextflow_ar.types import Codes, Document, Done, Image, ImageReady, Mark, ScaleReady, Text, TextDelta
from tests.conftest import TINY_MODEL, tiny_bundle

SQUARE = ScaleSchedule.square(5)
WIDE = ScaleSchedule.from_final((40, 100), 5)
PLAIN = SamplingSettings()


def codes_of(schedule: ScaleSchedule, seed: int) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    return Codes.plain(schedule, torch.randint(0, 24, (schedule.num_tokens,), generator=generator))


def image_logits(
    bundle: Bundle, document: Document, codes: Codes, before: list[Document] | None = None
) -> torch.Tensor:
    """Teacher-forced logits (T, V) of the last image, packed behind other documents and beside another row."""
    samples = [build(d, bundle.vocab, bundle.layout) for d in before or []]
    samples.append(build(Document((*document.segments, Image(codes, True))), bundle.vocab, bundle.layout))
    row = pack(samples)
    other = build(Document((Text("a cat"), Image(codes_of(WIDE, 9), True))), bundle.vocab, bundle.layout)
    batch = collate([other, row], max(len(other), len(row)) + 3)
    hidden = bundle.model.hidden(batch)
    start = row.images[-1].boi
    return bundle.model.logits(hidden[1, start : start + codes.schedule.num_tokens])


class Recorder(Engine):
    """Feeds given codes instead of sampled ones and keeps the logits of every scale."""

    def __init__(self, bundle: Bundle, codes: list[Codes]) -> None:
        super().__init__(bundle)
        self.given, self.seen = codes, []

    def _sample(self, hidden, requests, partner, generators, k, scales):  # type: ignore[override]
        self.seen.append(
            self._scores(hidden.flatten(0, 1), 0, self.model.config.vocab).view(*hidden.shape[:2], -1)
        )
        return torch.stack([codes.scale(k) for codes in self.given])


CONTEXTS = [
    Document((Text("a red circle on a blue background"),)),
    Document((Text("two dogs"),)),
    Document((Mark("<|im_start|>"), Text("user\n"), Image(codes_of(SQUARE, 5)), Text("make it green"))),
    Document(()),
]
VARIANTS = {
    "residual": TINY_MODEL,
    "accumulated": replace(TINY_MODEL, scale_input="accumulated"),
    "whole pictures": replace(TINY_MODEL, closing_input="accumulated"),
    "learned positions": replace(TINY_MODEL, positions="learned"),
    "grouped heads": replace(TINY_MODEL, kv_heads=1),
    "qwen sections": replace(TINY_MODEL, rope="qwen"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("schedule", [SQUARE, WIDE], ids=["square", "wide"])
def test_incremental_logits_equal_teacher_forced_ones(variant: str, schedule: ScaleSchedule) -> None:
    bundle = tiny_bundle(VARIANTS[variant])
    codes = [codes_of(schedule, i) for i in range(len(CONTEXTS))]
    settings = SamplingSettings(guidance=3.0)
    lengths = [len(image_prefix(d, schedule, bundle.vocab, bundle.layout)) for d in CONTEXTS]
    grouped: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        grouped.setdefault(-(-length // 16), []).append(i)
    assert len(grouped) >= 2
    for members in grouped.values():
        part = Recorder(bundle, [codes[i] for i in members])
        list(part.images([ImageRequest(CONTEXTS[i], schedule, i, settings) for i in members]))
        incremental = torch.cat(part.seen, dim=1)
        for place, i in enumerate(members):
            offset_documents = [Document((Text("a picture"), Image(codes_of(WIDE, 77), True)))] * (i % 3)
            forced = image_logits(bundle, CONTEXTS[i], codes[i], offset_documents)
            assert forced.std() > 0.5  # the comparison means something
            torch.testing.assert_close(incremental[place], forced, atol=1e-4, rtol=1e-4)
            alone = image_logits(bundle, Document(()), codes[i])
            torch.testing.assert_close(incremental[len(members) + place], alone, atol=1e-4, rtol=1e-4)


def test_incremental_text_logits_equal_teacher_forced_ones(bundle: Bundle) -> None:
    document = Document((Image(codes_of(SQUARE, 3)), Text("what is it?")))
    answer = "two dogs and a cat"
    full = build(Document((*document.segments, Text(answer, True))), bundle.vocab, bundle.layout)
    forced = bundle.model.logits(bundle.model.hidden(collate([full])))[0]
    ids = bundle.vocab.encode(answer)
    seen: list[torch.Tensor] = []

    class Forced(Engine):
        def _next_tokens(self, hidden, requests, generators, running):  # type: ignore[override]
            seen.append(self._scores(hidden, 0, self.model.config.vocab)[0])
            step = len(seen) - 1
            return torch.full((hidden.shape[0],), ids[step] if step < len(ids) else self.vocab.end)

    events = list(Forced(bundle).texts([TextRequest(document, 50, 0, PLAIN)]))
    torch.testing.assert_close(torch.stack(seen), forced[-len(ids) - 1 :], atol=1e-4, rtol=1e-4)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == answer
    assert events[-1] == Done(0, "stop")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    bundle = tiny_bundle()
    bundle.model.to(dtype)
    engine = Engine(bundle)
    hot = SamplingSettings(temperature=6.0)  # the random model is sure of itself
    settings = SamplingSettings(guidance=(1.0, 2.0), temperature=8.0, top_k=12, top_p=0.95)
    prompts = [
        "a red circle on a blue background",
        "two dogs",
        "a cat and a frog and a dog and a house, red background",
    ]
    requests = [
        ImageRequest(Document((Text(prompts[i % 3]),)), SQUARE, 100 + i, settings if i % 4 else hot)
        for i in range(11)
    ]

    def drawn(chosen: list[ImageRequest]) -> list[torch.Tensor]:
        found = {e.row: e.codes.target for e in engine.images(chosen) if isinstance(e, ImageReady)}
        return [found[i] for i in range(len(chosen))]

    together = drawn(requests)
    assert len({tuple(t.tolist()) for t in together}) == len(requests)
    for i in (0, 1, 5, 10):
        assert torch.equal(drawn([requests[i]])[0], together[i])
    assert all(torch.equal(a, b) for a, b in zip(drawn(requests[3:8]), together[3:8], strict=True))
    small = Engine(bundle, max_rows=4)
    again = {e.row: e.codes.target for e in small.images(requests) if isinstance(e, ImageReady)}
    assert all(torch.equal(again[i], t) for i, t in enumerate(together))


def test_text_rows_do_not_depend_on_their_batch(bundle: Bundle) -> None:
    settings = SamplingSettings(temperature=4.0, top_k=50)
    requests = [TextRequest(Document((Image(codes_of(SQUARE, i)),)), 12, i, settings) for i in range(5)]

    def written(chosen: list[TextRequest]) -> list[str]:
        texts = [""] * len(chosen)
        for event in Engine(bundle).texts(chosen):
            if isinstance(event, TextDelta):
                texts[event.row] += event.text
        return texts

    together = written(requests)
    assert len(set(together)) == 5
    assert [written([r])[0] for r in requests] == together


def test_events_of_two_images_come_scale_by_scale(bundle: Bundle) -> None:
    requests = [ImageRequest(Document((Text("two dogs"),)), SQUARE, s, PLAIN) for s in (1, 2)]
    events = list(Engine(bundle).images(requests))
    scales = [(e.scale, e.row, len(e.codes)) for e in events if isinstance(e, ScaleReady)]
    assert scales == [(k, row, SQUARE.offsets[k + 1]) for k in range(5) for row in (0, 1)]
    finished = [e for e in events if isinstance(e, ImageReady)]
    last = [e for e in events if isinstance(e, ScaleReady)][-2:]
    assert all(torch.equal(a.codes.target, b.codes) for a, b in zip(finished, last, strict=True))
    assert [e for e in events if isinstance(e, Done)] == [Done(0, "stop"), Done(1, "stop")]


def test_codes_stay_codes_and_text_stays_text(bundle: Bundle) -> None:
    events = Engine(bundle).images([ImageRequest(Document(()), SQUARE, s, PLAIN) for s in range(4)])
    drawn = torch.cat([e.codes.target for e in events if isinstance(e, ImageReady)])
    assert drawn.min() >= 0 and drawn.max() < 24
    ids: list[int] = []

    class Kept(Engine):
        def _append(self, rows, tokens, step):  # type: ignore[override]
            ids.extend(tokens.tolist())
            return super()._append(rows, tokens, step)

    list(
        Kept(bundle).texts(
            [
                TextRequest(Document((Text("two"),)), 40, s, SamplingSettings(temperature=3.0))
                for s in range(4)
            ]
        )
    )
    assert len(ids) > 50 and not set(ids) & set(bundle.vocab.never)


def test_length_ends_a_text_that_does_not_stop(bundle: Bundle) -> None:
    class Endless(Engine):
        def _next_tokens(self, hidden, requests, generators, running):  # type: ignore[override]
            return torch.full((hidden.shape[0],), bundle.vocab.encode("a")[0])

    events = list(Endless(bundle).texts([TextRequest(Document((Text("two"),)), 3, 0, PLAIN)]))
    assert events[-1] == Done(0, "length")
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == "aaa"


def test_what_does_not_fit_the_context_is_refused_before_any_work(bundle: Bundle) -> None:
    long = Document((Text("dog " * 300),))
    with pytest.raises(ContextError, match=r"takes \d+ tokens, the model's context holds 256"):
        next(Engine(bundle).images([ImageRequest(long, SQUARE, 0, PLAIN)]))
    with pytest.raises(ContextError):
        next(Engine(bundle).texts([TextRequest(Document((Text("a"),)), 1000, 0, PLAIN)]))
