"""Guided answers: two tracks of words, what they are contrasted with, and that a batch changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nextflow_ar.generation.engine import Engine, Rounds, TextRequest
from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.generation.sampling import SamplingSettings, guide_words
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import collate
from nextflow_ar.sequence.layout import build
from nextflow_ar.types import Codes, Document, Done, Image, Text
from tests.conftest import tiny_bundle

SQUARE = ScaleSchedule.square(5)
GUIDED = SamplingSettings(guidance=3.0, temperature=0.0)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return tiny_bundle()


def request(seed: int, settings: SamplingSettings = GUIDED, tokens: int = 8) -> TextRequest:
    generator = torch.Generator().manual_seed(seed)
    codes = Codes.plain(SQUARE, torch.randint(0, 24, (SQUARE.num_tokens,), generator=generator))
    question = Text("what is this")
    return TextRequest(
        Document((Image(codes), question)), tokens, seed, settings, unconditional=Document((question,))
    )


def written(bundle: Bundle, requests: list[TextRequest]) -> list[list[int]]:
    rounds = Rounds(Engine(bundle))
    for number, one in enumerate(requests):
        rounds.submit(number, one)
    jobs = list(rounds.waiting)
    while rounds.busy:
        list(rounds.step())
    return [job.written for job in jobs]


def test_guided_words_by_hand() -> None:
    seen = torch.tensor([[0.5, 0.3, 0.19, 0.01]]).log()
    blind = torch.tensor([[0.8, 0.1, 1e-7, 0.1 - 1e-7]]).log()
    found = guide_words(seen, blind, 2.0)[0]
    wanted = [
        2 * math.log(0.5) - math.log(0.8),
        2 * math.log(0.3) - math.log(0.1),
        2 * math.log(0.19) - math.log(1e-3),
    ]
    assert found[:3].tolist() == pytest.approx(wanted, abs=1e-5)
    assert found[3] == -math.inf  # under a twentieth of the best
    assert guide_words(seen + 3, blind - 2, 2.0)[0].tolist() == pytest.approx(found.tolist(), abs=1e-5)


def test_tokens_are_those_of_teacher_forcing(bundle: Bundle) -> None:
    """Word by word: both documents with what was written so far, whole, against the engine's two tracks."""
    asked = request(3)
    assert asked.unconditional is not None
    rounds = Rounds(Engine(bundle))
    rounds.submit(0, asked)
    job = rounds.waiting[0]
    assert job.width == 2
    while rounds.busy:
        list(rounds.step())
    assert len(job.written) >= 4

    def after(document: Document, tokens: list[int]) -> Tensor:
        segments = (*document.segments, *((Text(bundle.vocab.decode(tokens)),) if tokens else ()))
        sample = build(Document(segments), bundle.vocab, bundle.layout, close_last=True)
        return bundle.model.logits(bundle.model.hidden(collate([sample])))[0, -1:]

    with torch.no_grad():
        for number, token in enumerate(job.written):
            before = job.written[:number]
            if bundle.vocab.encode(bundle.vocab.decode(before)) != before:
                continue  # these pieces are another text's
            seen, blind = after(asked.document, before), after(asked.unconditional, before)
            seen[:, job._never().nonzero()[:, 0]] = -math.inf
            scores = guide_words(seen, blind, 3.0)[0]
            assert scores.max() - scores[token] < 1e-3


def test_alone_or_in_a_batch_and_without_guidance(bundle: Bundle) -> None:
    several = [request(seed, SamplingSettings(guidance=3.0)) for seed in range(4)]
    alone = [written(bundle, [one])[0] for one in several]
    assert written(bundle, several) == alone
    plain = [request(seed, SamplingSettings()) for seed in range(4)]
    assert not plain[0].guided and several[0].guided
    bare = [TextRequest(p.document, p.max_tokens, p.seed, p.settings) for p in plain]
    assert written(bundle, plain) == written(bundle, bare) != alone


def test_cancelled_in_the_middle(bundle: Bundle) -> None:
    rounds = Rounds(Engine(bundle, max_rows=2))
    rounds.submit(0, request(0, tokens=30))
    rounds.submit(1, request(1))
    list(rounds.step())
    assert len(rounds.active) == 1 and rounds.cancel(0)
    done = [e.row for _ in range(60) if rounds.busy for e in rounds.step() if isinstance(e, Done)]
    assert done == [1]


def test_describe_takes_the_checkpoints_guidance(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = NextFlowPipeline(bundle)
    picture = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8).numpy()
    asked: list[TextRequest] = []
    texts = pipeline.engine.texts
    monkeypatch.setattr(pipeline.engine, "texts", lambda given: asked.extend(given) or texts(given))
    monkeypatch.setitem(bundle.generation, "answer_guidance", 2.5)
    pipeline.describe(picture, question="what is this", max_tokens=2)
    pipeline.describe(picture, question="what is this", max_tokens=2, guidance=1.0)
    pipeline.describe(picture, max_tokens=2)
    assert [r.settings.guidance for r in asked] == [2.5, 1.0, 2.5]
    assert [r.guided for r in asked] == [
        True,
        False,
        False,
    ]  # without a question nothing is left to contrast with
