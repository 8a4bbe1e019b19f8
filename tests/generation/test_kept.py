"""What is kept between requests: prefixes are taken from there instead of being fed, and nothing comes out differently."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from nextflow_ar.generation.engine import Engine, ImageRequest, Request, Rounds, TextRequest, WriteRequest
from nextflow_ar.generation.kept import KeptCodes, Store, part_key, picture_key
from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.layout import build, image_prefix
from nextflow_ar.types import Codes, Document, Done, Event, Image, ImageReady, Mark, Text, TextDelta

SQUARE = ScaleSchedule.square(5)
HOT = SamplingSettings(temperature=6.0)
GUIDED = SamplingSettings(guidance=2.0, temperature=8.0, top_p=0.95)
PLENTY = 64 * 2**20


def codes_of(seed: int) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    return Codes.plain(SQUARE, torch.randint(0, 24, (SQUARE.num_tokens,), generator=generator))


def told(events: Iterator[Event] | list[Event]) -> dict[int, list[object]]:
    """By request: texts, codes and how it ended."""
    found: dict[int, list[object]] = {}
    for event in events:
        if isinstance(event, ImageReady):
            found.setdefault(event.row, []).append(tuple(event.codes.target.tolist()))
        elif isinstance(event, TextDelta):
            found.setdefault(event.row, []).append(event.text)
        elif isinstance(event, Done):
            found.setdefault(event.row, []).append(event.reason)
    return found


TALK = (Text("two dogs"), Text("a cat", True), Image(codes_of(1), True), Text("and a frog"))
MORE = (Text("red frogs", True), Text("a house"))


def test_a_prefix_is_cut_behind_pictures_and_where_turns_change(bundle: Bundle) -> None:
    def parts(*segments: Text | Image | Mark) -> list[int]:
        sample = build(Document(segments), bundle.vocab, bundle.layout, close_last=True)
        cut = sample.parts()
        for name in ("tokens", "positions", "blocks", "scales"):
            columns = torch.cat([getattr(part, name) for part in cut], dim=-1)
            assert torch.equal(columns, getattr(sample, name))
        assert [span.codes for part in cut for span in part.images] == [s.codes for s in sample.images]
        return [len(part) for part in cut]

    n = {text: len(bundle.vocab.encode(text)) for text in ("two dogs", "a cat", "and a frog", "red frogs")}
    picture = SQUARE.num_tokens + SQUARE.sizes[-1] + 1
    assert parts(Text("two dogs")) == [n["two dogs"]]
    assert parts(Text("two dogs"), Text("a cat", True)) == [n["two dogs"] + n["a cat"]]  # a plan is no turn
    assert parts(Image(codes_of(2))) == [picture]
    assert parts(Image(codes_of(2)), Image(codes_of(3)), Text("two dogs")) == [
        picture,
        picture,
        n["two dogs"],
    ]
    assert parts(*TALK) == [n["two dogs"], n["a cat"] + picture, n["and a frog"]]
    grown = parts(*TALK, Text("red frogs", True), Text("two dogs"))
    assert grown == [*parts(*TALK), n["red frogs"], n["two dogs"]]
    prefix = image_prefix(
        Document((Image(codes_of(2)), Text("two dogs"))), SQUARE, bundle.vocab, bundle.layout
    )
    assert [len(part) for part in prefix.parts()] == [picture, n["two dogs"] + 1]  # <boi>


def test_names_of_parts_tell_any_difference(bundle: Bundle) -> None:
    def named(*segments: Text | Image, before: bytes = b"") -> bytes:
        return part_key(before, build(Document(segments), bundle.vocab, bundle.layout, close_last=True))

    codes = codes_of(4)
    other = codes.target.clone()
    other[-1] = (other[-1] + 1) % 24
    names = [
        named(Image(codes)), named(Image(codes), before=b"x"), named(Image(Codes.plain(SQUARE, other))),
        named(Text("two dogs")), named(Text("two cats")), named(Image(codes_of(5))),
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert named(Image(codes)) == named(Image(Codes.plain(SQUARE, codes.target.clone())))


def test_a_conversation_goes_on_from_what_is_kept(bundle: Bundle) -> None:
    def turn(document: tuple[Text | Image, ...], seed: int) -> Request:
        return WriteRequest(Document(document), 8, 0, SQUARE, seed, HOT, GUIDED)

    keeping, plain = Engine(bundle, kept_bytes=PLENTY), Engine(bundle)
    first, second = turn(TALK, 1), turn((*TALK, *MORE), 2)
    assert told(keeping.run([first])) == told(plain.run([first]))
    assert keeping.reused == 0
    fed = keeping.fed
    assert told(keeping.run([second])) == told(plain.run([second]))
    whole = len(build(Document((*TALK, *MORE)), bundle.vocab, bundle.layout))
    before = len(build(Document(TALK), bundle.vocab, bundle.layout))
    assert keeping.reused == before and keeping.fed - fed == whole - before
    fed = keeping.fed
    assert told(keeping.run([second])) == told(plain.run([second]))  # the very same once more: nothing is fed
    assert keeping.fed == fed


def test_questions_about_one_picture_feed_it_once(bundle: Bundle) -> None:
    asked = [
        TextRequest(Document((Image(codes_of(7)), Text(question))), 12, i, HOT)
        for i, question in enumerate(("what is it?", "two dogs?", "is it red?", "what is it?"))
    ]
    plain = Engine(bundle)
    expected = told(plain.run(asked))
    picture = len(build(Document((Image(codes_of(7)),)), bundle.vocab, bundle.layout, close_last=True))
    questions = len({request.document.segments[1].text for request in asked})  # type: ignore[union-attr]
    words = sum(len(bundle.vocab.encode(text)) for text in ("what is it?", "two dogs?", "is it red?"))
    for together in (True, False):
        keeping = Engine(bundle, kept_bytes=PLENTY)
        found = told(keeping.run(asked)) if together else {}
        for i, request in enumerate(asked):
            if not together:
                found[i] = told(keeping.run([request]))[0]
        assert found == expected and questions == 3
        assert keeping.fed == picture + words and keeping.reused == 3 * picture + len(
            bundle.vocab.encode("what is it?")
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kept_rows_change_nothing_in_any_batch(bundle: Bundle, dtype: torch.dtype) -> None:
    from tests.conftest import tiny_bundle

    bundle = tiny_bundle()
    bundle.model.to(dtype)
    documents = [
        Document((Image(codes_of(i % 2)), Text(text)))
        for i, text in enumerate(("two dogs", "a cat", "a cat and a frog and a dog and a house", "red"))
    ]
    asked: list[Request] = [ImageRequest(d, SQUARE, i, GUIDED) for i, d in enumerate(documents * 2)]
    asked += [TextRequest(d, 9, i, HOT) for i, d in enumerate(documents)]
    expected = told(Engine(bundle).run(asked))
    keeping = Engine(bundle, kept_bytes=PLENTY)
    assert told(keeping.run(asked)) == expected
    assert told(keeping.run(asked)) == expected
    assert [told(keeping.run([request]))[0] for request in asked] == [expected[i] for i in range(len(asked))]
    small = Engine(bundle, max_rows=4, kept_bytes=PLENTY)
    rounds = Rounds(small)
    for i, request in enumerate(asked):
        rounds.submit(i, request)
    events: list[Event] = []
    while rounds.busy:
        events += list(rounds.step())
    assert told(events) == expected and small.reused > small.fed


def test_the_budget_holds_and_the_longest_unused_go_first(bundle: Bundle) -> None:
    one = TextRequest(Document((Image(codes_of(0)),)), 1, 0, HOT)
    probe = Engine(bundle, kept_bytes=PLENTY)
    list(probe.run([one]))
    size = probe.kept.used
    assert len(probe.kept) == 1 and size > SQUARE.num_tokens * 4
    few = Engine(bundle, kept_bytes=2 * size)
    pictures = [TextRequest(Document((Image(codes_of(i)),)), 1, 0, HOT) for i in range(3)]
    for i in (0, 1, 0, 2):  # 1 is the longest unused when 2 comes
        list(few.run([pictures[i]]))
        assert few.kept.used <= 2 * size
    fed = few.fed
    list(few.run([pictures[0]]))
    assert few.fed == fed
    list(few.run([pictures[1]]))
    assert few.fed > fed
    none = Engine(bundle, kept_bytes=size - 1)  # too large to be kept: nobody waits for it twice
    expected = told(Engine(bundle).run([one] * 3))
    assert told(none.run([one] * 3)) == expected and none.reused == 0 and len(none.kept) == 0


def test_what_is_kept_goes_when_memory_is_short(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    request = TextRequest(Document((Image(codes_of(3)), Text("two dogs"))), 6, 3, HOT)
    expected = told(Engine(bundle).run([request]))
    engine = Engine(bundle, kept_bytes=PLENTY)
    list(engine.run([request]))
    true_step, failures = bundle.model.step, [1]

    def step(*given: object) -> torch.Tensor:
        if failures:
            failures.pop()
            raise torch.OutOfMemoryError("no memory")
        return true_step(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(bundle.model, "step", step)
    assert told(engine.run([request])) == expected and not failures
    failures[:] = [1]
    engine.kept.clear()
    with pytest.raises(torch.OutOfMemoryError):  # nothing to let go
        list(engine.run([request]))


def test_a_store_lets_go_in_order() -> None:
    codes = codes_of(1)
    size = KeptCodes(codes).size
    store: Store[KeptCodes] = Store(3 * size)
    for key in (b"a", b"b", b"c"):
        store.put(key, KeptCodes(codes))
    store.touch([b"b", b"a", b"none"])
    store.put(b"d", KeptCodes(codes))
    assert store.get(b"c") is None and store.get(b"a") is not None and store.used == 3 * size
    store.put(b"d", KeptCodes(codes))
    assert store.used == 3 * size and store.hits == 1
    assert store.clear() and not store.clear() and store.used == 0
    off: Store[KeptCodes] = Store(0)
    off.put(b"a", KeptCodes(codes))
    assert off.get(b"a") is None


def test_pictures_are_encoded_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = NextFlowPipeline(bundle, kept_bytes=PLENTY)
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    encoded = []
    true = bundle.image_tokenizer.encode_bytes
    monkeypatch.setattr(bundle.image_tokenizer, "encode_bytes", lambda p: encoded.append(1) or true(p))
    first = pipeline.encode(picture)
    assert pipeline.encode(picture.copy()) is first and len(encoded) == 1
    assert torch.equal(NextFlowPipeline(bundle).encode(picture).target, first.target) and len(encoded) == 2
    drawn = codes_of(11)
    image = pipeline.decode(drawn)
    pipeline.remember(image, drawn)
    assert pipeline.encode(image) is drawn and len(encoded) == 2 and pipeline.pictures.hits == 2
    assert picture_key(picture[:, :35]) != picture_key(picture[:, 35:])
