"""The engine: incremental logits equal teacher-forced ones, seeds decide rows whatever the batch, events come in order."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

from nextflow_ar.generation import engine as engine_module
from nextflow_ar.generation import jobs
from nextflow_ar.generation.engine import (
    ContextError,
    Engine,
    Failure,
    ImageRequest,
    QueueFull,
    Rounds,
    TextRequest,
    WriteRequest,
)
from nextflow_ar.generation.sampling import SamplingSettings, SettingError
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import collate, pack
from nextflow_ar.sequence.layout import build
from nextflow_ar.types import (
    Codes,
    Document,
    Done,
    Event,
    Image,
    ImageReady,
    Mark,
    ScaleReady,
    Text,
    TextDelta,
)
from nextflow_ar.wire import packed
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
    """Keeps the logits of every step over the whole vocabulary, by track, and answers with given codes or text."""

    def __init__(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, given: dict[int, list[int]]) -> None:
        super().__init__(bundle)
        self.seen: dict[int, list[torch.Tensor]] = {}
        left = {seed: list(ids) for seed, ids in given.items()}

        def forced(scores: torch.Tensor, *settings: object) -> torch.Tensor:
            generator = settings[-1]
            assert isinstance(generator, torch.Generator)
            ids = left[generator.initial_seed()]
            taken, left[generator.initial_seed()] = ids[: len(scores)], ids[len(scores) :]
            return torch.tensor(taken)

        monkeypatch.setattr(jobs, "draw", forced)

    def _score(self, tracks, hidden):  # type: ignore[override]
        scores = self.model.logits(hidden)
        for track, found in zip(tracks, scores, strict=False):
            if track.wants != "nothing":
                self.seen.setdefault(id(track), []).append(found)
        super()._score(tracks, hidden)


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
    "closing blocks alone": replace(
        TINY_MODEL, closing_input="accumulated", context_images="closing", positions="learned"
    ),
    "learned positions": replace(TINY_MODEL, positions="learned"),
    "learned positions on one axis": replace(TINY_MODEL, positions="learned_1d", scale_input="accumulated"),
    "closing blocks on one axis": replace(
        TINY_MODEL, closing_input="accumulated", context_images="closing", positions="learned_1d"
    ),
    "grouped heads": replace(TINY_MODEL, kv_heads=1),
    "qwen sections": replace(TINY_MODEL, rope="qwen"),
    "copies": replace(TINY_MODEL, copies=True),
    "copies of closing blocks": replace(
        TINY_MODEL, closing_input="accumulated", context_images="closing", copies=True
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("schedule", [SQUARE, WIDE], ids=["square", "wide"])
def test_incremental_logits_equal_teacher_forced_ones(
    variant: str, schedule: ScaleSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundle(VARIANTS[variant])
    codes = [codes_of(schedule, i) for i in range(len(CONTEXTS))]
    settings = SamplingSettings(guidance=3.0)
    engine = Recorder(bundle, monkeypatch, {i: c.target.tolist() for i, c in enumerate(codes)})
    rounds = Rounds(engine)
    for i, context in enumerate(CONTEXTS):
        rounds.submit(i, ImageRequest(context, schedule, i, settings))
    tracks = [job.tracks for job in rounds.waiting]
    while rounds.busy:
        list(rounds.step())
    for i, (own, partner) in enumerate(tracks):
        offset_documents = [Document((Text("a picture"), Image(codes_of(WIDE, 77), True)))] * (i % 3)
        forced = image_logits(bundle, CONTEXTS[i], codes[i], offset_documents)
        assert forced.std() > 0.5  # the comparison means something
        torch.testing.assert_close(torch.cat(engine.seen[id(own)]), forced, atol=1e-4, rtol=1e-4)
        alone = image_logits(bundle, Document(()), codes[i])
        torch.testing.assert_close(torch.cat(engine.seen[id(partner)]), alone, atol=1e-4, rtol=1e-4)


def test_incremental_text_logits_equal_teacher_forced_ones(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [Document((Image(codes_of(SQUARE, 3)), Text("what is it?"))), Document((Text("two"),))]
    answers = ["two dogs and a cat", "red frogs"]
    ids = [bundle.vocab.encode(answer) for answer in answers]
    engine = Recorder(bundle, monkeypatch, {i: [*part, bundle.vocab.end] for i, part in enumerate(ids)})
    rounds = Rounds(engine)
    for i, document in enumerate(documents):
        rounds.submit(i, TextRequest(document, 50, i, PLAIN))
    tracks = [job.track for job in rounds.waiting]
    events = []
    while rounds.busy:
        events += list(rounds.step())
    for i, (document, answer) in enumerate(zip(documents, answers, strict=True)):
        full = build(Document((*document.segments, Text(answer, True))), bundle.vocab, bundle.layout)
        forced = bundle.model.logits(bundle.model.hidden(collate([full])))[0]
        found = torch.cat(engine.seen[id(tracks[i])])
        torch.testing.assert_close(found, forced[-len(ids[i]) - 1 :], atol=1e-4, rtol=1e-4)
        assert "".join(e.text for e in events if isinstance(e, TextDelta) and e.row == i) == answer
        assert Done(i, "stop") in events


@pytest.mark.parametrize("copies", [False, True])
def test_what_the_model_writes_may_hold_images(copies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, an image, text, an image, text, written by one request beside others: logits as teacher forcing gives them."""
    bundle = tiny_bundle(replace(TINY_MODEL, copies=copies))
    prompt, vocab = Document((Text("two dogs"),)), bundle.vocab
    said = [vocab.encode(t) for t in ("a cat", " and a frog", " the end")]
    drawn = [codes_of(SQUARE, 21), codes_of(SQUARE, 22)]
    script = [
        *said[0], vocab.boi, *drawn[0].target.tolist(),
        *said[1], vocab.boi, *drawn[1].target.tolist(), *said[2], vocab.end,
    ]  # fmt: skip
    settings = SamplingSettings(guidance=2.0)
    other = codes_of(SQUARE, 5)
    engine = Recorder(bundle, monkeypatch, {7: script, 8: other.target.tolist()})
    rounds = Rounds(engine)
    rounds.submit(0, WriteRequest(prompt, 40, 2, SQUARE, 7, PLAIN, settings))
    events = [e for _ in range(3) for e in rounds.step()]
    rounds.submit(1, ImageRequest(Document((Text("a cat"),)), SQUARE, 8, settings))  # one that comes later
    track = rounds.active[0].track
    while rounds.busy:
        events += list(rounds.step())
    segments = [
        Text("a cat"),
        Image(drawn[0], True),
        Text(" and a frog"),
        Image(drawn[1], True),
        Text(" the end", True),
    ]
    full = build(Document((*prompt.segments, *segments)), vocab, bundle.layout)
    forced = bundle.model.logits(bundle.model.hidden(collate([full])))[0]
    places, at = [], len(vocab.encode("two dogs")) - 1
    closing = SQUARE.sizes[-1]
    for text, span in zip(said, (*full.images, None), strict=True):
        places += range(at, at + len(text) + 1)  # what follows each token, <boi> or the end included
        if span is not None:
            places += range(span.boi, span.boi + SQUARE.num_tokens)
            at = span.boi + SQUARE.num_tokens + closing  # <eoi>
    found = torch.cat(engine.seen[id(track)])
    torch.testing.assert_close(found, forced[places], atol=1e-4, rtol=1e-4)
    kinds = [type(e).__name__ for e in events if e.row == 0 and not isinstance(e, ScaleReady)]
    texts = "".join(e.text for e in events if isinstance(e, TextDelta))
    assert texts == "a cat and a frog the end" and kinds.count("ImageReady") == 2 and kinds[-1] == "Done"
    ready = [e.codes.target for e in events if isinstance(e, ImageReady) and e.row == 0]
    assert all(torch.equal(a, b.target) for a, b in zip(ready, drawn, strict=True))


def test_no_image_begins_where_none_is_left(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    hot = SamplingSettings(temperature=50.0)  # every entry about as likely
    document = Document((Text("two dogs"),))
    few = [
        WriteRequest(document, 30, images, SQUARE, seed, hot, PLAIN, ends=())
        for images in (0, 1)
        for seed in range(4)
    ]
    events = list(Engine(bundle).run(few))
    counts = [sum(isinstance(e, ImageReady) and e.row == i for e in events) for i in range(8)]
    assert counts[:4] == [0] * 4 and max(counts[4:]) <= 1
    assert [e for e in events if isinstance(e, Done) and e.row < 4] == [Done(i, "length") for i in range(4)]


def test_requests_come_and_go_between_steps(bundle: Bundle) -> None:
    settings = SamplingSettings(guidance=2.0, temperature=8.0)
    asked = [ImageRequest(Document((Text("two dogs"),)), SQUARE, s, settings) for s in range(4)]
    alone = [
        next(e.codes.target for e in Engine(bundle).images([r]) if isinstance(e, ImageReady)) for r in asked
    ]
    rounds, found = Rounds(Engine(bundle), most_waiting=4), {}
    writer = TextRequest(Document((Text("two"),)), 20, 1, SamplingSettings(temperature=4.0))
    rounds.submit(9, writer)
    for i, request in enumerate(asked):
        rounds.submit(i, request)
        found |= {e.row: e.codes.target for e in rounds.step() if isinstance(e, ImageReady)}
    assert rounds.cancel(2) and not rounds.cancel(2)
    done = []
    while rounds.busy:
        for event in rounds.step():
            if isinstance(event, ImageReady):
                found[event.row] = event.codes.target
            done += [event.row] if isinstance(event, Done) else []
    assert done == [0, 1, 3, 9]  # the text was first in and is last out: nobody waited for it
    assert sorted(found) == [0, 1, 3] and all(torch.equal(found[i], alone[i]) for i in found)
    small = Rounds(Engine(bundle, max_rows=2), most_waiting=1)
    small.submit(0, asked[0])
    with pytest.raises(QueueFull, match="1 requests wait already"):
        small.submit(1, asked[1])
    list(small.step())
    small.submit(1, asked[1])
    assert len(small.active) == 1 and len(small.waiting) == 1


class Unwritable(ArithmeticError):
    """An error that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("one line\nand another")
        self.why = lambda: None


@pytest.mark.parametrize("scale", [0, 2])
def test_a_request_that_fails_of_its_own_scores_leaves_the_others_alone(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, scale: int
) -> None:
    settings = SamplingSettings(guidance=2.0, temperature=8.0)
    asked = [ImageRequest(Document((Text("two dogs"),)), SQUARE, s, settings) for s in range(3)]
    text = TextRequest(Document((Text("two"),)), 8, 3, SamplingSettings(temperature=4.0))
    wanted = {
        (e.row, type(e)): e for e in Engine(bundle).run([*asked, text]) if isinstance(e, ImageReady | Done)
    }
    true_sample = jobs.Drawing.sample

    def sample(drawing: jobs.Drawing, generator: torch.Generator) -> None:
        if drawing.k == scale and generator.initial_seed() == 1:
            raise Unwritable
        true_sample(drawing, generator)

    monkeypatch.setattr(jobs.Drawing, "sample", sample)
    rounds = Rounds(Engine(bundle))
    for number, request in enumerate([*asked, text]):
        rounds.submit(number, request)
    found: list[Event | Failure] = []
    while rounds.busy:
        found += rounds.step()
    of_it = [e for e in found if e.row == 1]
    failure = of_it[-1]
    assert isinstance(failure, Failure) and isinstance(failure.error, Unwritable) and len(of_it) == scale + 1
    ends = {(e.row, type(e)): e for e in found if isinstance(e, ImageReady | Done)}
    assert set(ends) == {key for key in wanted if key[0] != 1}
    for (row, kind), event in ends.items():
        other = wanted[row, kind]
        if isinstance(event, ImageReady) and isinstance(other, ImageReady):
            assert torch.equal(event.codes.target, other.codes.target)
        else:
            assert event == other
    told = pickle.loads(packed(failure))  # as an engine's process passes it on
    assert told.row == 1 and str(told.error) == "Unwritable: one line"
    assert "Traceback" in told.error.__notes__[0] and "in sample" in told.error.__notes__[0]
    with pytest.raises(Unwritable):  # who asks for all of them himself hears of it
        list(Engine(bundle).run(asked))


SEVERAL = (1.0, 0.5, 0.2)


@pytest.mark.parametrize("name", ["guidance", "temperature", "top_k", "top_p"])
def test_settings_of_another_number_of_scales_make_no_request(name: str) -> None:
    said = Document((Text("two"),))
    values = (1.0, 1.0, 1.0) if name == "top_k" else SEVERAL
    wrong = SamplingSettings(**{name: values})
    shown = name.replace("_", "-")
    five = f"{shown} takes one value, two .* each of the 5 scales, got 3"
    words = f"{shown} takes one value for words, which have no scales, got 3"
    with pytest.raises(SettingError, match=five):
        ImageRequest(said, SQUARE, 0, wrong)
    with pytest.raises(SettingError, match=words):
        TextRequest(said, 8, 0, wrong)
    with pytest.raises(SettingError, match=words):
        WriteRequest(said, 8, 1, SQUARE, 0, wrong, PLAIN)
    with pytest.raises(SettingError, match=words):
        WriteRequest(said, 8, 1, SQUARE, 0, PLAIN, PLAIN, thoughts=8, thought_settings=wrong)
    with pytest.raises(SettingError, match=five):
        WriteRequest(said, 8, 1, SQUARE, 0, PLAIN, wrong)
    WriteRequest(said, 8, 0, SQUARE, 0, PLAIN, wrong)  # no picture can be drawn
    WriteRequest(said, 8, 1, ScaleSchedule.square(3), 0, PLAIN, wrong)


def test_images_begin_together_but_do_not_wait_long(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """While others are in work, an image waits up to GATHER rounds behind the last that began; alone, it does not."""
    asked = ImageRequest(Document((Text("two dogs"),)), SQUARE, 1, PLAIN)
    monkeypatch.setattr(engine_module, "GATHER", 3)
    rounds = Rounds(Engine(bundle))
    fed: list[int] = []
    feed = rounds.engine.feed
    monkeypatch.setattr(rounds.engine, "feed", lambda tracks: fed.append(len(tracks)) or feed(tracks))
    scales: dict[int, list[int]] = {}
    for number in range(1, 20):
        if number <= 3:  # the first goes at once; the second and third wait for round 4, and go together
            rounds.submit(number, asked)
        for event in rounds.step():
            if isinstance(event, ScaleReady):
                scales.setdefault(event.row, []).append(number)
    assert scales == {1: [1, 2, 3, 4, 5], 2: [4, 5, 6, 7, 8], 3: [4, 5, 6, 7, 8]}
    assert fed == [1, 1, 1, 1, 2, 1, 2, 2, 2, 2]


def test_images_wait_longer_for_those_that_are_planned(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "GATHER", 2)
    monkeypatch.setattr(engine_module, "GATHER_PLANNED", 9)
    image = ImageRequest(Document((Text("two dogs"),)), SQUARE, 1, PLAIN)
    began: dict[bool, dict[int, int]] = {}
    for plans in (False, True):
        text = TextRequest(
            Document((Text("two"),)), 40, 1, SamplingSettings(temperature=4.0), (), plans=plans
        )
        rounds = Rounds(Engine(bundle))
        rounds.submit(0, text)
        for number in range(1, 16):
            if number in (1, 4):
                rounds.submit(number, image)
            for event in rounds.step():
                if isinstance(event, ScaleReady):
                    began.setdefault(plans, {}).setdefault(event.row, number)
    assert began == {False: {1: 2, 4: 4}, True: {1: 9, 4: 9}}


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


def test_codes_stay_codes_and_text_stays_text(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    events = Engine(bundle).images([ImageRequest(Document(()), SQUARE, s, PLAIN) for s in range(4)])
    drawn = torch.cat([e.codes.target for e in events if isinstance(e, ImageReady)])
    assert drawn.min() >= 0 and drawn.max() < 24
    ids: list[int] = []
    true_draw = jobs.draw

    def kept(*given: object) -> torch.Tensor:
        out = true_draw(*given)  # type: ignore[arg-type]
        ids.extend(out.tolist())
        return out

    monkeypatch.setattr(jobs, "draw", kept)
    hot = SamplingSettings(temperature=3.0)
    list(Engine(bundle).texts([TextRequest(Document((Text("two"),)), 40, s, hot) for s in range(4)]))
    assert len(ids) > 50 and not set(ids) & set(bundle.vocab.never)


def test_length_ends_a_text_that_does_not_stop(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "draw", lambda *_: torch.tensor([bundle.vocab.encode("a")[0]]))
    events = list(Engine(bundle).texts([TextRequest(Document((Text("two"),)), 3, 0, PLAIN)]))
    assert events[-1] == Done(0, "length")
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == "aaa"


def test_what_does_not_fit_the_context_is_refused_before_any_work(bundle: Bundle) -> None:
    long = Document((Text("dog " * 300),))
    with pytest.raises(ContextError, match=r"takes \d+ tokens, the model's context holds 256"):
        next(Engine(bundle).images([ImageRequest(long, SQUARE, 0, PLAIN)]))
    with pytest.raises(ContextError):
        next(Engine(bundle).texts([TextRequest(Document((Text("a"),)), 1000, 0, PLAIN)]))
