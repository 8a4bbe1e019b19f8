"""The transformer: parity with transformers' own stack, chunked loss and its gradients, inputs, packing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch.nn import functional as F
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from nextflow_ar.model import embeddings
from nextflow_ar.model.backbone import axis_frequencies, text_config
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.model.embeddings import sinusoid
from nextflow_ar.model.loss import Teacher, chunked_linear_cross_entropy
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.scales import BASE_SIZES, ScaleSchedule
from nextflow_ar.sequence.batch import collate, pack
from nextflow_ar.sequence.blocks import block_mask
from nextflow_ar.sequence.layout import IGNORED, LayoutOptions, build
from nextflow_ar.tokenizer.quantizer import resize
from nextflow_ar.types import Codes, Document, Image, Text
from tests.conftest import TINY_MODEL, tiny_bundle, tiny_model

SQUARE = ScaleSchedule.square(4)


def codes(seed: int, schedule: ScaleSchedule = SQUARE) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    return Codes.plain(schedule, torch.randint(0, 24, (schedule.num_tokens,), generator=generator))


@pytest.mark.parametrize("kv_heads", [3, 1])
def test_text_logits_equal_transformers_own_model(bundle: Bundle, kv_heads: int) -> None:
    config = replace(TINY_MODEL, rope="qwen", rope_theta=1_000_000.0, kv_heads=kv_heads)
    model = tiny_model(config)
    theirs = Qwen2_5_VLTextModel(text_config(config)).eval()
    missing = theirs.load_state_dict(model.backbone.state_dict(), strict=True)
    assert not missing.missing_keys and not missing.unexpected_keys
    sample = build(
        Document((Text("a red circle on a blue background and two dogs"),)), bundle.vocab, LayoutOptions(8.0)
    )
    batch = collate([sample])
    ours = model.logits(model.hidden(batch))
    hidden = theirs(input_ids=batch.tokens).last_hidden_state  # causal, positions 0, 1, 2, ... by itself
    torch.testing.assert_close(ours, model.head(hidden), atol=1e-4, rtol=1e-4)


def test_every_axis_has_its_own_frequencies() -> None:
    ladder = axis_frequencies(TINY_MODEL)
    assert ladder.tolist() == pytest.approx(
        [1, 0.1, 1, 100 ** (-1 / 3), 100 ** (-2 / 3), 1, 100 ** (-1 / 3), 100 ** (-2 / 3)]
    )
    model = tiny_model()
    assert torch.equal(model.backbone.rotary_emb.inv_freq, ladder)


@pytest.mark.parametrize("rope", ["qwen", "per_axis"])
@torch.no_grad()
def test_an_empty_model_becomes_the_one_whose_weights_it_is_given(rope: Literal["qwen", "per_axis"]) -> None:
    model = tiny_model(replace(TINY_MODEL, rope=rope, rope_theta=1e6))
    empty = NextFlowModel.empty(model.config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    for name, buffer in model.named_buffers():
        assert torch.equal(dict(empty.named_buffers())[name], buffer), name
    weights = model.state_dict()
    empty.load_state_dict(weights, assign=True)
    assert all(p.data_ptr() == weights[name].data_ptr() for name, p in empty.named_parameters())
    batch = collate([build(Document((Text("two dogs"),)), tiny_bundle().vocab, LayoutOptions(8.0))])
    assert torch.equal(empty.eval().hidden(batch), model.hidden(batch))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_loss_and_gradients_equal_the_plain_ones(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 9, generator=generator, requires_grad=True)
    weight = torch.randn(31, 9, generator=generator, requires_grad=True)
    targets = torch.randint(0, 31, (23,), generator=generator)
    weights = torch.rand(23, generator=generator)
    total, losses, best = chunked_linear_cross_entropy(hidden, weight, targets, weights, chunk)
    (3 * total).backward()
    found = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    logits = hidden @ weight.T
    plain = F.cross_entropy(logits, targets, reduction="none")
    (3 * (plain * weights).sum()).backward()
    torch.testing.assert_close(losses, plain)
    torch.testing.assert_close(total, (plain * weights).sum())
    assert torch.equal(best, logits.argmax(1))
    torch.testing.assert_close(found[0], hidden.grad)
    torch.testing.assert_close(found[1], weight.grad)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_teacher_s_distributions_are_aimed_at(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 9, generator=generator, requires_grad=True)
    weight = torch.randn(31, 9, generator=generator, requires_grad=True)
    teacher = Teacher(torch.randn(23, 5, generator=generator), torch.randn(31, 5, generator=generator), share)
    targets = torch.randint(0, 31, (23,), generator=generator)
    weights = torch.rand(23, generator=generator)
    total, losses, best = chunked_linear_cross_entropy(hidden, weight, targets, weights, 7, teacher)
    (3 * total).backward()
    found = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    logits = hidden @ weight.T
    aim = share * (teacher.hidden @ teacher.head.T).softmax(1) + (1 - share) * F.one_hot(targets, 31)
    plain = (F.cross_entropy(logits, aim, reduction="none") * weights).sum()
    (3 * plain).backward()
    torch.testing.assert_close(total, plain)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))  # as ever
    assert torch.equal(best, logits.argmax(1))
    torch.testing.assert_close(found[0], hidden.grad)
    torch.testing.assert_close(found[1], weight.grad)


@pytest.mark.parametrize(("dtype", "closeness"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_large_vocabulary_is_taken_in_bands(dtype: torch.dtype, closeness: float) -> None:
    """20,000 entries: three bands of the head, twelve rows of the softmax at a time, chunks of 64 places."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(150, 16, generator=generator).to(dtype).requires_grad_()
    weight = (0.5 * torch.randn(20000, 16, generator=generator)).requires_grad_()
    targets = torch.randint(0, 20000, (150,), generator=generator)
    weights = torch.rand(150, generator=generator)
    total, losses, best = chunked_linear_cross_entropy(hidden, weight, targets, weights, 64)
    (total / 3).backward()
    found = hidden.grad.float(), weight.grad
    assert found[1].dtype == torch.float32
    other, head = hidden.detach().float().requires_grad_(), weight.detach().requires_grad_()
    logits = other @ head.T
    plain = F.cross_entropy(logits, targets, reduction="none")
    ((plain * weights).sum() / 3).backward()
    torch.testing.assert_close(losses, plain, atol=0.05 if dtype == torch.bfloat16 else 1e-4, rtol=1e-3)
    assert float((best == logits.argmax(1)).float().mean()) > 0.9  # bf16 logits may tie
    for ours, theirs in zip(found, (other.grad, head.grad), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < closeness
    with pytest.raises(RuntimeError, match="once only"):
        total.backward()


def test_a_place_that_is_nearly_right_keeps_its_small_gradient_in_bf16() -> None:
    """The slope of the target is p - 1, taken in fp32: 1 - p of 4e-4 would be nothing in bf16."""
    hidden = torch.tensor([[8.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], requires_grad=True)
    total = chunked_linear_cross_entropy(hidden, weight, torch.tensor([0]), torch.ones(1))[0]
    total.backward()
    p = 1 / (1 + math.exp(-8.0))
    assert float(hidden.grad) == pytest.approx(p - 1, rel=0.01)
    assert weight.grad[:, 0].tolist() == pytest.approx([8 * (p - 1), 8 * (1 - p)], rel=0.01)


def test_the_loss_of_a_batch_is_the_weighted_cross_entropy_of_its_targets(bundle: Bundle) -> None:
    options = LayoutOptions(12.0, alpha=0.9, text_weight=2.0)
    document = Document((Text("two dogs"), Image(codes(1), True), Text("a cat", True)))
    batch = collate(
        [build(document, bundle.vocab, options), build(Document((Text("a", True),)), bundle.vocab, options)]
    )
    report = bundle.model.losses(batch)
    logits = bundle.model.logits(bundle.model.hidden(batch))
    plain = F.cross_entropy(logits.transpose(1, 2), batch.targets, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(report.total, (plain * batch.weights).sum(), atol=1e-3, rtol=1e-4)
    assert float(report.weight) == pytest.approx(float(batch.weights.sum()))
    on = batch.targets != IGNORED
    assert len(report.losses) == int(on.sum())
    counts = {scale: int((report.scales == scale).sum()) for scale in (-1, 0, 1, 2, 3)}
    # text: "a cat" and end, <boi>, "a" would need a place before it, so only its end
    assert counts == {-1: 1 + len(bundle.vocab.encode("a cat")) + 1 + 1, 0: 1, 1: 4, 2: 9, 3: 16}


def test_residual_inputs_are_one_grid_enlarged_and_accumulated_ones_are_not() -> None:
    model = tiny_model()
    inputs, image = model.scale_inputs, codes(3)
    inputs.code_scale.fill_(2.0)
    block = inputs.block(image.target[None], SQUARE, 1)  # after 2x2, fed at 3x3
    vectors = inputs.code_embed.weight[image.scale(1)].T.reshape(1, 10, 2, 2)
    torch.testing.assert_close(
        block, 2 * F.interpolate(vectors, size=(3, 3), mode="bicubic"), atol=1e-5, rtol=1e-5
    )
    closing = inputs.block(image.target[None], SQUARE, 3)
    torch.testing.assert_close(closing, 2 * inputs.code_embed.weight[image.scale(3)].T.reshape(1, 10, 4, 4))
    summed = tiny_model(replace(TINY_MODEL, scale_input="accumulated")).scale_inputs
    whole = sum(
        F.interpolate(
            summed.code_embed.weight[image.scale(j)].T.reshape(1, 10, n, n), size=(4, 4), mode="bicubic"
        )
        for j, n in ((0, 1), (1, 2))
    )
    torch.testing.assert_close(
        summed.block(image.target[None], SQUARE, 1), resize(whole, (3, 3), "area"), atol=1e-5, rtol=1e-5
    )


def test_the_closing_block_may_hold_the_whole_picture() -> None:
    inputs = tiny_model(replace(TINY_MODEL, closing_input="accumulated")).scale_inputs
    image = codes(3)
    whole = sum(
        F.interpolate(
            inputs.code_embed.weight[image.scale(j)].T.reshape(1, 10, n, n), size=(4, 4), mode="bicubic"
        )
        for j, n in ((0, 1), (1, 2), (2, 3), (3, 4))
    )
    torch.testing.assert_close(inputs.block(image.target[None], SQUARE, 3), whole, atol=1e-5, rtol=1e-5)
    plain = tiny_model().scale_inputs
    for k in range(3):  # the blocks before it are fed residuals as ever
        assert torch.equal(
            inputs.block(image.target[None], SQUARE, k), plain.block(image.target[None], SQUARE, k)
        )
    one = image.target[None]
    alone = inputs.vectors(one, SQUARE, 0, True)  # the closing block without the scales
    behind = inputs.vectors(one, SQUARE, 4, True)[:, -SQUARE.sizes[-1] :]
    torch.testing.assert_close(alone, behind, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("scale_input", ["residual", "accumulated"])
@pytest.mark.parametrize("closing_input", ["residual", "accumulated"])
def test_one_matrix_makes_all_blocks_that_are_made_one_by_one(
    monkeypatch: pytest.MonkeyPatch, scale_input: str, closing_input: str
) -> None:
    config = replace(TINY_MODEL, scale_input=scale_input, closing_input=closing_input)
    inputs, several = tiny_model(config).scale_inputs, torch.stack([codes(3).target, codes(4).target])
    for scales, closed in ((0, True), (1, False), (3, False), (4, False), (4, True)):
        monkeypatch.setattr(embeddings, "_LINEAR", 1024)
        at_once = inputs.vectors(several, SQUARE, scales, closed)
        monkeypatch.setattr(embeddings, "_LINEAR", 0)
        one_by_one = inputs.vectors(several, SQUARE, scales, closed)
        torch.testing.assert_close(at_once, one_by_one, atol=1e-5, rtol=1e-5)


def test_scale_and_length_tags() -> None:
    inputs = tiny_model().scale_inputs
    scales, lengths = torch.tensor([[-1, 0, 2]]), torch.tensor([[0, 4, 18]])
    tags = inputs.tags(scales, lengths)[0]
    assert float(tags[0].abs().sum()) == 0
    for place, (scale, length) in ((1, (0, 4)), (2, (2, 18))):
        angles = length * torch.exp(-math.log(1000.0) * torch.arange(24) / 24)
        torch.testing.assert_close(
            sinusoid(torch.tensor(length), 48), torch.cat([angles.sin(), angles.cos()])
        )
        wanted = inputs.scale_embed.weight[scale] + inputs.length_embed(
            torch.cat([angles.sin(), angles.cos()])
        )
        torch.testing.assert_close(tags[place], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", ["rope", "learned", "learned_1d"])
def test_packing_and_padding_change_nothing(bundle: Bundle, positions: str) -> None:
    model = tiny_model(replace(TINY_MODEL, positions=positions))
    wide = ScaleSchedule.from_final((40, 100), 3)
    documents = [
        Document.text_to_image("two dogs", codes(1)),
        Document.image_to_text(codes(2, wide), "a cat"),
        Document.text_to_image("a red circle", codes(3), scales=2),
    ]
    samples = [build(d, bundle.vocab, bundle.layout) for d in documents]
    together = model.hidden(collate([pack(samples), samples[0]], 140))
    ended = model.hidden(collate([pack(samples)], 140, align="right"))
    at = 0
    for sample in samples:
        alone = model.hidden(collate([sample]))[0]
        torch.testing.assert_close(together[0, at : at + len(sample)], alone, atol=1e-4, rtol=1e-4)
        start = 140 - sum(map(len, samples)) + at
        torch.testing.assert_close(ended[0, start : start + len(sample)], alone, atol=1e-4, rtol=1e-4)
        at += len(sample)


@torch.no_grad()
def test_learned_positions_of_one_axis(bundle: Bundle) -> None:
    """RoPE has the count of blocks alone, and every cell of every scale a row; by hand for 2x2 and its wide sister 1x4."""
    model = tiny_model(replace(TINY_MODEL, positions="learned_1d"))
    table = model.scale_inputs.place_embed.weight
    assert len(table) == ScaleSchedule.square(18).num_tokens - 1
    square, wide = ScaleSchedule.square(3), ScaleSchedule.from_final((32, 128), 3)
    assert (square.grids[1:], wide.grids[1:]) == (((2, 2), (3, 3)), ((1, 4), (2, 6)))
    assert torch.equal(model.scale_inputs.places(square, (0, 1, 2)), table[[*range(13), *range(4, 13)]])
    left, right = (table[0] + table[2]) / 2, (table[1] + table[3]) / 2  # the middle of both rows
    wanted = torch.stack([left, 0.75 * left + 0.25 * right, 0.25 * left + 0.75 * right, right])
    torch.testing.assert_close(model.scale_inputs.places(wide, (0,)), wanted)
    batch = collate([build(Document.text_to_image("two dogs", codes(1)), bundle.vocab, bundle.layout)])
    moved = batch.positions.clone()
    moved[:2] += torch.rand(moved[:2].shape)  # rows and columns
    flat, both = model, tiny_model(replace(TINY_MODEL, positions="learned"))
    for one, same in ((flat, True), (both, False)):
        x, mask = one.embed(batch), block_mask(batch.blocks, batch.documents)
        found = one.backbone.run(x, batch.positions, mask), one.backbone.run(x, moved, mask)
        assert torch.equal(*found) == same
    later = batch.positions + torch.tensor([0.0, 0.0, 1.0])[:, None, None] * (batch.scales >= 1)
    assert not torch.equal(flat.backbone.run(x, later, mask), flat.backbone.run(x, batch.positions, mask))


@torch.no_grad()
def test_a_place_in_the_picture_means_the_same_in_all_shapes() -> None:
    """A table that says where a square grid's cells are says where the cells of other grids are; but beyond the middles of
    the outermost cells, where it says what those say.
    """
    model = NextFlowModel(replace(TINY_MODEL, positions="learned_1d"))
    table, start = model.scale_inputs.place_embed.weight.zero_(), 0
    for side in BASE_SIZES[1:]:
        middles = (torch.arange(side) + 0.5) / side
        table[start : start + side * side, 0] = middles.repeat_interleave(side)
        table[start : start + side * side, 1] = middles.repeat(side)
        start += side * side
    tall = ScaleSchedule.from_final((104, 36), 12)
    for k in range(11):
        (h, w), half = tall.grids[k + 1], 0.5 / BASE_SIZES[k + 1]
        found = model.scale_inputs.places(tall, (k,)).view(h, w, -1)
        rows, columns = ((torch.arange(n) + 0.5) / n for n in (h, w))
        wanted = torch.stack([rows[:, None].expand(h, w), columns.expand(h, w)], -1).clamp(half, 1 - half)
        torch.testing.assert_close(found[..., :2], wanted, atol=1e-5, rtol=0)


def test_learned_positions_by_number_are_what_they_were() -> None:
    inputs = tiny_model(replace(TINY_MODEL, positions="learned")).scale_inputs
    wide = ScaleSchedule.from_final((32, 128), 3)
    assert inputs.place_embed is not None and len(inputs.place_embed.weight) == 64 * 64
    assert torch.equal(
        inputs.places(wide, (0, 1, 2)), inputs.place_embed.weight[[*range(4), *range(12), *range(12)]]
    )


def test_a_fresh_model_is_exactly_undecided() -> None:
    model = NextFlowModel(TINY_MODEL)
    model.initialise(torch.Generator().manual_seed(0))
    sample_codes = codes(1)
    vocab_size = TINY_MODEL.vocab
    hidden = torch.randn(3, 48)
    assert float(model.logits(hidden).abs().max()) == 0
    losses = chunked_linear_cross_entropy(
        hidden, model.head.weight, torch.tensor([1, 5, 300]), torch.ones(3)
    )[1]
    assert losses.tolist() == pytest.approx([math.log(vocab_size)] * 3)
    model.scale_inputs.start_from(torch.full((24, 10), 0.5) * torch.tensor([1.0, -1.0] * 5))
    block = model.scale_inputs.block(sample_codes.target[None], SQUARE, 3)
    assert float(block.std()) == pytest.approx(1.0, abs=0.05)


def test_frequencies_stay_in_fp32_when_weights_are_cast() -> None:
    model = tiny_model()
    before = model.backbone.rotary_emb.inv_freq.clone()
    model = model.to(torch.bfloat16)
    assert model.head.weight.dtype == torch.bfloat16
    assert torch.equal(model.backbone.rotary_emb.inv_freq, before) and before.dtype == torch.float32
