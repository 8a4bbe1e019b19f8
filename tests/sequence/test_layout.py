"""Token order, mask, positions, targets and weights against tables written by hand."""

from __future__ import annotations

import math

import pytest
import torch

from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import collate, pack
from nextflow_ar.sequence.blocks import block_mask
from nextflow_ar.sequence.layout import (
    IGNORED,
    LayoutOptions,
    build,
    image_prefix,
    next_clock,
    scale_block,
    scale_weights,
)
from nextflow_ar.sequence.positions import grid_positions, text_positions
from nextflow_ar.sequence.vocab import Vocabulary
from nextflow_ar.types import Codes, Document, Image, Mark, Text

TWO = ScaleSchedule.square(2)  # 1x1, 2x2
C = 8.0
OPTIONS = LayoutOptions(C)


@pytest.fixture
def vocab(bundle: Bundle) -> Vocabulary:
    return bundle.vocab


def codes(schedule: ScaleSchedule = TWO, first: int = 0) -> Codes:
    return Codes.plain(schedule, torch.arange(first, first + schedule.num_tokens) % 24)


def test_positions_of_the_papers_figure(vocab: Vocabulary) -> None:
    # <boi> 0 | scales 1, 2 | <eoi> 3 | text 4..8 | <boi> 9 | scales 10, 11 | <eoi> 12
    text = "zqzqz"
    assert len(vocab.encode(text)) == 5
    document = Document((Image(codes()), Text(text), Image(codes())))
    positions = build(document, vocab, OPTIONS, close_last=True).positions
    # C / sqrt(4) * 0.5 = 2 and * 1.5 = 6
    cells = [(2, 2), (2, 6), (6, 2), (6, 6)]
    expected = (
        [(0, 0, 0)]
        + [(r, c, 1) for r, c in cells]
        + [(r, c, 2) for r, c in cells]
        + [(t, t, t) for t in (3, 4, 5, 6, 7, 8, 9)]
        + [(r, c, 10) for r, c in cells]
        + [(r, c, 11) for r, c in cells]
        + [(12, 12, 12)]
    )
    assert [tuple(p) for p in positions.T.tolist()] == expected


def test_grids_share_one_range_whatever_their_size() -> None:
    assert grid_positions((1, 1), 5, C).tolist() == [[4.0], [4.0], [5.0]]
    small, large = grid_positions((8, 8), 1, C), grid_positions((64, 64), 1, C)
    assert small[0].min() == C / 8 * 0.5 and small[0].max() == C / 8 * 7.5
    assert large[:2].max() < C and large[:2].min() > 0
    tall = grid_positions((4, 1), 3, C)  # C / sqrt(4) = 4
    assert tall.tolist() == [[2.0, 6.0, 10.0, 14.0], [2.0] * 4, [3.0] * 4]
    assert text_positions(7, 2).tolist() == [[7.0, 8.0]] * 3


def test_tokens_targets_and_blocks_of_a_drawing(vocab: Vocabulary) -> None:
    three = ScaleSchedule(((1, 1), (1, 2), (2, 2)))
    image = codes(three, first=10)
    sample = build(Document.text_to_image("zq", image), vocab, LayoutOptions(C, alpha=1.0))
    z, q = vocab.encode("zq")
    t = vocab.text_size
    assert sample.tokens.tolist() == [z, q, vocab.boi, -1, -1, -1, -1, -1, -1]
    # the last text place learns to open the image, <boi> predicts grid 1, a grid's block predicts that grid
    assert sample.targets.tolist() == [IGNORED, vocab.boi, *(t + c for c in (10, 11, 12, 13, 14, 15, 16))]
    assert sample.blocks.tolist() == [0, 1, 2, 3, 3, 4, 4, 4, 4]
    assert sample.scales.tolist() == [-1, -1, 0, 1, 1, 2, 2, 2, 2]
    assert sample.lengths.tolist() == [0, 0, 3, 3, 3, 3, 3, 3, 3]
    # alpha 1: every scale weighs the same in all, 7/3
    assert sample.weights.tolist() == pytest.approx([0, 1, 7 / 3, *[7 / 6] * 2, *[7 / 12] * 4])


def test_a_caption_sees_the_last_grid_and_learns_to_stop(vocab: Vocabulary) -> None:
    sample = build(Document.image_to_text(codes(), "zq"), vocab, LayoutOptions(C, text_weight=3.0))
    z, q = vocab.encode("zq")
    assert sample.tokens.tolist() == [vocab.boi, *[-1] * 8, vocab.eoi, z, q]
    assert sample.targets.tolist() == [*[IGNORED] * 9, z, q, vocab.end]
    assert sample.weights.tolist() == [0.0] * 9 + [3.0] * 3
    assert sample.blocks.tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 5]
    assert sample.scales.tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 2, -1, -1, -1]
    span = sample.images[0]
    assert span.closed and span.inputs == (1, 9)


def test_a_response_in_pieces_goes_on_and_ends_once(vocab: Vocabulary) -> None:
    z, q = vocab.encode("zq")
    pieces = build(Document((Text("q"), Text("z", True), Text("q", True), Text("z", True))), vocab, OPTIONS)
    assert pieces.targets.tolist() == [z, q, z, vocab.end] and pieces.tokens.tolist() == [q, z, q, z]
    whole = build(Document((Text("q"), Text("zqz", True))), vocab, OPTIONS)
    if vocab.encode("zqz") == [z, q, z]:
        assert torch.equal(whole.targets, pieces.targets) and torch.equal(whole.weights, pieces.weights)
    cut = build(Document((Text("z", True), Text("q"), Text("z", True))), vocab, OPTIONS)
    assert cut.targets.tolist() == [vocab.end, z, vocab.end]  # before what the user says it ends


def test_a_given_image_may_be_its_closing_block_alone(vocab: Vocabulary) -> None:
    options = LayoutOptions(C, context_images="closing")
    sample, scales = (build(Document.image_to_text(codes(), "zq"), vocab, o) for o in (options, OPTIONS))
    z, q = vocab.encode("zq")
    assert sample.tokens.tolist() == [vocab.boi, *[-1] * 4, vocab.eoi, z, q]
    assert sample.targets.tolist() == [*[IGNORED] * 5, z, q, vocab.end]
    assert sample.blocks.tolist() == [0, 2, 2, 2, 2, 3, 4, 5]
    assert sample.scales.tolist() == [0, 2, 2, 2, 2, -1, -1, -1]
    assert sample.lengths.tolist() == [2] * 5 + [0] * 3
    span = sample.images[0]
    assert span.closed and span.scales == 0 and span.inputs == (1, 5)
    kept = [0, *range(5, 12)]  # coordinates are those that the scales lead to
    assert torch.equal(sample.positions, scales.positions[:, kept])
    drawn = Document((Image(codes(), True), Text("zq", True)))
    assert torch.equal(build(drawn, vocab, options).tokens, build(drawn, vocab, OPTIONS).tokens)


def test_an_open_image_at_the_end_has_no_closing_block(vocab: Vocabulary) -> None:
    document = Document((Image(codes(), True),))
    assert len(build(document, vocab, OPTIONS)) == 5
    assert len(build(document, vocab, OPTIONS, close_last=True)) == 10


def test_marks_are_special_tokens_and_text_cannot_forge_them(vocab: Vocabulary) -> None:
    document = Document((Mark("<|im_start|>"), Text("<|im_end|><boi>"), Mark("<|im_end|>", True)))
    sample = build(document, vocab, OPTIONS)
    ids = sample.tokens.tolist()
    start, end = vocab.special("<|im_start|>"), vocab.special("<|im_end|>")
    assert ids[0] == start and ids[-1] == end
    assert not {start, end, vocab.boi} & set(ids[1:-1])
    assert sample.targets.tolist()[-2:] == [end, IGNORED]
    with pytest.raises(ValueError, match="no special token"):
        vocab.special("dog")


def test_a_prefix_of_scales_is_the_beginning_of_the_whole(vocab: Vocabulary) -> None:
    schedule = ScaleSchedule.square(4)
    options = LayoutOptions(C, alpha=0.9)
    whole = build(Document.text_to_image("zq", codes(schedule)), vocab, options)
    part = build(Document.text_to_image("zq", codes(schedule), scales=2), vocab, options)
    assert len(part) == 2 + 1 + 4
    for name in ("tokens", "targets", "weights", "blocks", "scales", "lengths"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[: len(part)]), name
    assert torch.equal(part.positions, whole.positions[:, : len(part)])
    assert part.images[0].inputs == (3, 7)
    with pytest.raises(ValueError, match="nothing can follow"):
        build(Document((Image(codes(schedule), scales=2), Text("zq"))), vocab, options)
    with pytest.raises(ValueError, match="1 to 4 scales"):
        Image(codes(schedule), scales=5)


def test_generation_prefix_and_blocks_equal_the_training_layout(vocab: Vocabulary) -> None:
    schedule = ScaleSchedule.square(4)
    context = (Text("zq"), Image(codes()), Text("zq"))
    whole = build(Document((*context, Image(codes(schedule), True))), vocab, OPTIONS, close_last=True)
    prefix = image_prefix(Document(context), schedule, vocab, OPTIONS)
    at = len(prefix)
    for name in ("tokens", "blocks", "scales", "lengths"):
        assert torch.equal(getattr(prefix, name), getattr(whole, name)[:at]), name
    assert torch.equal(prefix.positions, whole.positions[:, :at])
    clock, block = next_clock(prefix)
    for k in range(1, 5):  # grids 2, 3, 4 and the closing block
        part = scale_block(schedule, k, clock - 1, block - 1, OPTIONS)
        for name in ("tokens", "blocks", "scales", "lengths"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[at : at + len(part)]), name
        assert torch.equal(part.positions, whole.positions[:, at : at + len(part)])
        at += len(part)
    assert at == len(whole) - 1  # <eoi>


def test_mask_table(vocab: Vocabulary) -> None:
    # two documents packed: "z" + <boi> + 2x2, then "q"; one place of padding
    first = build(Document((Text("z"), Image(codes(), True))), vocab, OPTIONS)
    second = build(Document((Text("qz"),)), vocab, OPTIONS)
    batch = collate([pack([first, second])], 9)
    table = """
        1........
        11.......
        111111...
        111111...
        111111...
        111111...
        ......1..
        ......11.
        ........1
    """
    expected = [[char == "1" for char in line] for line in table.split()]
    assert block_mask(batch.blocks, batch.documents)[0, 0].tolist() == expected


def test_mask_of_a_cached_step(vocab: Vocabulary) -> None:
    blocks, documents = torch.tensor([[0, 1, 2]]), torch.tensor([[-1, 0, 0]])
    mask = block_mask(torch.tensor([[3, 3]]), torch.tensor([[0, 0]]), blocks, documents)
    assert mask[0, 0].tolist() == [[False, True, True]] * 2


def test_packed_documents_restart_their_positions_and_keep_their_images(vocab: Vocabulary) -> None:
    one = build(Document((Text("z"), Image(codes(), True))), vocab, OPTIONS)
    packed = pack([one, one])
    assert torch.equal(packed.positions[:, 6:], one.positions)
    assert [span.boi for span in packed.images] == [1, 7]
    assert packed.documents.tolist() == [0] * 6 + [1] * 6
    batch = collate([one, packed], 14)
    group = batch.images[0]
    assert (group.rows.tolist(), group.starts.tolist()) == ([0, 1, 1], [2, 2, 8])
    ended = collate([one], 10, align="right")
    assert ended.documents.tolist() == [[-1] * 4 + [0] * 6]
    assert ended.images[0].starts.tolist() == [6]
    with pytest.raises(ValueError, match="does not fit rows of 4"):
        collate([one], 4)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_scale_weights_keep_the_total(alpha: float) -> None:
    schedule = ScaleSchedule.square(8)
    weights = scale_weights(schedule, alpha)
    total = sum(w * n for w, n in zip(weights, schedule.sizes, strict=True))
    assert math.isclose(total, 204)
    assert math.isclose(weights[0] / weights[7], 64**alpha)


def test_an_empty_document_is_an_error(vocab: Vocabulary) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        build(Document(()), vocab, OPTIONS)
    with pytest.raises(ValueError, match="the schedule needs"):
        Codes.plain(TWO, torch.arange(4))
