"""FLOPs of a sample against torch's own counter and against the mask itself."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from nextflow_ar.model.flops import pair_flops, sample_flops, token_flops, visible_pairs
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import collate, pack
from nextflow_ar.sequence.blocks import block_mask
from nextflow_ar.sequence.layout import LayoutOptions, build
from nextflow_ar.types import Codes, Document, Image, Text
from tests.conftest import TINY_MODEL, tiny_bundle

SQUARE = ScaleSchedule.square(4)


def document() -> Document:
    codes = Codes.plain(SQUARE, torch.arange(SQUARE.num_tokens) % 24)
    return Document((Text("two dogs"), Image(codes, True), Text("a red circle", True)))


def test_visible_pairs_are_what_the_mask_shows() -> None:
    bundle = tiny_bundle()
    sample = build(document(), bundle.vocab, LayoutOptions(12.0))
    mask = block_mask(sample.blocks[None], sample.documents[None])
    assert visible_pairs(sample.blocks) == int(mask.sum())
    assert visible_pairs(torch.tensor([0, 1, 1, 1, 2])) == 1 + 3 * 4 + 5


def test_flops_equal_torchs_counter_up_to_the_mask() -> None:
    bundle = tiny_bundle()
    sample = build(document(), bundle.vocab, LayoutOptions(12.0))
    batch = collate([sample])
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        mask = block_mask(batch.blocks, batch.documents)
        bundle.model.backbone.run(torch.randn(1, len(sample), 48), batch.positions, mask)
    length = len(sample)
    # torch multiplies whole matrices; the mask's share is what is counted here
    dense = length * token_flops(TINY_MODEL) + length * length * pair_flops(TINY_MODEL)
    assert 0.97 < counter.get_total_flops() / dense < 1.03


def test_a_packed_row_costs_what_its_samples_cost() -> None:
    bundle = tiny_bundle()
    one = build(document(), bundle.vocab, LayoutOptions(12.0))
    row = pack([one, one, one])
    assert sample_flops(row, TINY_MODEL) == 3 * sample_flops(one, TINY_MODEL)
    assert sample_flops(one, TINY_MODEL) == 3 * sample_flops(one, TINY_MODEL, training=False)
    wider = replace(TINY_MODEL, intermediate=128)
    assert sample_flops(one, wider) - sample_flops(one, TINY_MODEL) == 3 * len(one) * 2 * 2 * 3 * 48 * 64
