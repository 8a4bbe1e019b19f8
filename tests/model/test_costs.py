"""Closed forms against the layout's own samples, the real model's parameters, and what autograd keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextflow_ar.config import ModelConfig
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.model.costs import (
    Counts,
    ImageShape,
    MarkShape,
    Shape,
    TextShape,
    count,
    forward_flops,
    parameters,
    saved_bytes,
    shapes,
    training_flops,
)
from nextflow_ar.model.flops import sample_flops, visible_pairs
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.layout import IGNORED, LayoutOptions, build
from nextflow_ar.sequence.vocab import TURN_END
from nextflow_ar.types import Codes, Document, Image, Mark, Segment, Text
from tests.conftest import TINY_MODEL, tiny_bundle

QWEN = replace(
    TINY_MODEL, text_vocab=152064, codes=16384, code_dim=40, hidden=3584, layers=28, heads=28, kv_heads=4,
    intermediate=18944, max_positions=128000, rope="qwen", rope_theta=1e6, rope_sections=(16, 24, 24),
)  # fmt: skip


def test_a_document_by_hand() -> None:
    two = ScaleSchedule.square(2)  # 1 + 4 cells
    # three tokens see 1 + 2 + 3; <boi> (4) sees 4; the 2x2 block sees 8 each
    assert count([TextShape(3), ImageShape(two, True)]) == Counts(8, 6 + 4 + 4 * 8, 1 + 5)
    # <boi> 1, grid 4 x 5, closing block 4 x 9, <eoi> 10, two tokens 11 + 12; <eoi> predicts the first, and so on to the end
    assert count([ImageShape(two), TextShape(2, True)]) == Counts(12, 1 + 20 + 36 + 10 + 23, 3)
    assert count([ImageShape(two), TextShape(2, True)], "closing") == Counts(8, 1 + 4 * 5 + 6 + 15, 3)
    assert count([TextShape(4, True)]) == Counts(4, 10, 4)
    assert Counts(1, 2, 3).times(2) + Counts(1, 1, 1) == Counts(3, 5, 7)


@pytest.mark.parametrize("scales", [1, 4, 12, 16, 18])
@pytest.mark.parametrize("context", ["scales", "closing"])
def test_every_kind_of_document_counts_as_the_layout_lays_it_out(scales: int, context: str) -> None:
    if scales > 12 and context == "closing":
        scales = 12
    bundle, schedule = tiny_bundle(), ScaleSchedule.square(scales)
    codes = Codes.plain(schedule, torch.zeros(schedule.num_tokens, dtype=torch.long))
    words = "two dogs and a cat"
    n = len(bundle.vocab.encode(words))
    kinds: list[tuple[list[Segment], list[Shape]]] = [
        ([Text(words, True)], [TextShape(n, True)]),
        ([Text(words), Image(codes, True)], [TextShape(n), ImageShape(schedule, True)]),
        ([Image(codes), Text(words, True)], [ImageShape(schedule), TextShape(n, True)]),
        (
            [Image(codes), Text(words), Image(codes, True)],
            [ImageShape(schedule), TextShape(n), ImageShape(schedule, True)],
        ),
        (
            [Text(words, True), Image(codes, True)] * 2,
            [TextShape(n, True), ImageShape(schedule, True)] * 2,
        ),
    ]
    config = replace(TINY_MODEL, closing_input="accumulated")
    for segments, expected in kinds:
        options = LayoutOptions(12.0, context_images=context)  # type: ignore[arg-type]
        sample, found = build(Document(tuple(segments)), bundle.vocab, options), count(expected, context)
        predicted = int((sample.targets != IGNORED).sum())
        assert found == Counts(len(sample), visible_pairs(sample.blocks), predicted), expected
        assert 3 * sum(forward_flops(found, config)) == sample_flops(sample, config)


def blank(scales: int) -> Codes:
    schedule = ScaleSchedule.from_final((60, 68) if scales % 2 else (64, 64), scales)
    return Codes.plain(schedule, torch.zeros(schedule.num_tokens, dtype=torch.long))


BLANK = {scales: blank(scales) for scales in (1, 2, 3, 5)}
SEGMENTS = st.one_of(
    st.builds(Text, st.sampled_from(["", "a", "two dogs", "a red cat on it"]), st.booleans()),
    st.builds(Mark, st.just(TURN_END), st.booleans()),
    st.builds(
        Image, st.sampled_from(list(BLANK.values())), st.booleans(), st.none(), st.booleans()
    ),
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(SEGMENTS, max_size=6), st.sampled_from([0, 1, 2, 5]), st.booleans(), st.booleans())
def test_any_document_counts_and_costs_what_its_sample_does(
    bundle: Bundle, segments: list[Segment], cut: int, supervised: bool, closing: bool
) -> None:
    """Empty texts, marks, begun and cut pictures, in any order."""
    if cut:
        segments = [*segments, Image(BLANK[5], supervised, cut)]
    vocab, context = bundle.vocab, "closing" if closing else "scales"
    document = Document(tuple(segments))
    found = count(shapes(document, lambda text: len(vocab.encode(text))), context)
    if not found.tokens:
        with pytest.raises(ValueError, match="at least one token"):
            build(document, vocab, LayoutOptions(12.0))
        return
    sample = build(document, vocab, LayoutOptions(12.0, context_images=context))  # type: ignore[arg-type]
    predicted = int((sample.targets != IGNORED).sum())
    assert found == Counts(len(sample), visible_pairs(sample.blocks), predicted)
    for config in (TINY_MODEL, QWEN):  # as whole numbers: packing compares sums of them
        cost = training_flops(found, config)
        assert isinstance(cost, int) and cost == sample_flops(sample, config)


def test_a_response_in_pieces_by_hand() -> None:
    """Three tokens, two more, then the end: the place before each predicts it."""
    found = count([TextShape(4), TextShape(3, True), TextShape(2, True)])
    assert (found.tokens, found.predicted) == (9, 6)
    assert found == count([TextShape(4), TextShape(5, True)])


def test_marks_and_cut_pictures_by_hand() -> None:
    three = ScaleSchedule.square(3)  # 1 + 4 + 9 cells
    # two tokens 1 + 2, <boi> 3, 2x2 block 4 x 7; the last token predicts <boi>, which and the block predict the codes
    assert count([TextShape(2), ImageShape(three, True, 2)]) == Counts(7, 3 + 3 + 28, 1 + 5)
    # a response that learns the mark behind it: its first token from the mark before it, then the mark, no end
    turn = [MarkShape(), TextShape(2, True), MarkShape(True)]
    assert count(turn) == Counts(4, 10, 3)
    assert count([TextShape(1), ImageShape(three, begun=True)]) == Counts(15, 1 + 2 + 4 * 6 + 9 * 15, 1)
    with pytest.raises(ValueError, match="nothing can follow an image"):
        count([ImageShape(three, True, 2), TextShape(2)])


@pytest.mark.parametrize(
    "config",
    [
        TINY_MODEL,
        replace(TINY_MODEL, positions="learned", copies=True),
        replace(TINY_MODEL, positions="learned_1d", max_scales=5),
        replace(QWEN, positions="learned_1d"),
        QWEN,
    ],
)
def test_parameters_are_what_the_model_holds(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = NextFlowModel(config)
    found = parameters(config)
    assert found.total == sum(p.numel() for p in model.parameters())
    assert found.layer == sum(p.numel() for p in model.backbone.layers[0].parameters())
    assert found.head == model.head.weight.numel()
    assert found.inputs == sum(p.numel() for p in model.scale_inputs.parameters())


def test_the_paper_s_model_is_a_7b() -> None:
    found = parameters(QWEN)
    assert (found.layer, found.head) == (233_057_792, 168_448 * 3584)
    assert found.total == pytest.approx(7.7e9, rel=0.02)


def test_saved_bytes_are_near_what_autograd_keeps() -> None:
    """A layer more keeps so much more, counted at the tensors that autograd saves (weights and masks left out)."""
    length = 64

    def kept(layers: int) -> int:
        config = replace(TINY_MODEL, hidden=96, heads=3, kv_heads=1, intermediate=256, layers=layers,
                         rope_sections=(4, 6, 6))  # fmt: skip
        model = NextFlowModel(config)
        model.initialise(torch.Generator().manual_seed(0))
        model = model.bfloat16()
        own = {p.data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            if x.data_ptr() not in own and x.is_floating_point() and x.shape[-2:] != (length, length):
                seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        positions = torch.zeros(3, 1, length)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        x = torch.randn(1, length, 96, dtype=torch.bfloat16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            out = model.backbone.run(x, positions, mask)
            total = sum(seen.values())
            del out
        return total

    config = replace(TINY_MODEL, hidden=96, heads=3, kv_heads=1, intermediate=256, rope_sections=(4, 6, 6))
    found = (kept(3) - kept(1)) / 2 / length
    assert saved_bytes(config) == 2 * 6 * 96 + 2 * (2 * 96 + 64) + 8 * 256
    assert 0.8 < found / saved_bytes(config) < 1.25, found
