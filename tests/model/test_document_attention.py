"""Attention document by document is attention under the block mask, forwards, backwards and compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import scaled_dot_product_attention

from nextflow_ar.model import attention, document_attention
from nextflow_ar.model.document_attention import DocumentMask, attend_by_document, document_spans
from nextflow_ar.sequence.batch import collate
from nextflow_ar.sequence.blocks import block_mask
from nextflow_ar.sequence.layout import LayoutOptions, build
from nextflow_ar.types import Document, Text
from tests.conftest import tiny_bundle, tiny_model

LENGTHS = ((130, 7, 9, 120, 30), (290,), (3, 200, 86))  # of the documents of rows of 300, padded


def _rows() -> tuple[Tensor, Tensor]:
    documents = torch.full((len(LENGTHS), 300), -1)
    for row, lengths in enumerate(LENGTHS):
        numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        documents[row, : len(numbers)] = numbers
    blocks = (torch.rand(documents.shape, generator=torch.Generator().manual_seed(1)) < 0.2).cumsum(1)
    return blocks, documents


def _given(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, DocumentMask, Tensor]:
    blocks, documents = _rows()
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(3, 2, 300, 16, generator=generator).requires_grad_() for _ in range(3))
    seen = block_mask(blocks, documents)
    unseen = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return query, key, value, DocumentMask(unseen, document_spans(documents)), seen


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("dtype", "longest", "closeness"),
    [(torch.float32, 640, 1e-5), (torch.float32, 128, 1e-5), (torch.bfloat16, 640, 0.03)],
)
def test_as_the_block_mask_forwards_and_backwards(
    dtype: torch.dtype, longest: int, closeness: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_attention, "LONGEST", longest)  # 128: the fused kernel for the long ones
    query, key, value, mask, seen = _given(dtype)
    own = (_rows()[1] >= 0)[:, :, None, None]
    exact = [x.detach().double().requires_grad_() for x in (query, key, value)]
    want = scaled_dot_product_attention(*exact, attn_mask=seen, scale=0.25).transpose(1, 2) * own
    torch._dynamo.reset()
    # Inductor's cache on disk would not know that LONGEST is another
    backend = "inductor" if longest == 640 else "aot_eager"
    run = (
        torch.compile(attend_by_document, dynamic=False, backend=backend) if compiled else attend_by_document
    )
    found = run(query, key, value, mask, 0.25)
    assert found.dtype == dtype and not found[~own.expand_as(found)].any()
    slope = torch.randn(want.shape, dtype=torch.float64)  # of padding, too: it must go nowhere
    wanted = torch.autograd.grad((want * slope).sum(), exact)
    got = torch.autograd.grad((found.double() * slope).sum(), (query, key, value))
    for a, b in zip((found, *got), (want, *wanted), strict=True):
        assert (a.double() - b).abs().max() < closeness * b.abs().max()


def test_other_documents_need_no_other_compilation() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    run = torch.compile(attend_by_document, backend=counter, dynamic=False)
    query, key, value, mask, _ = _given(torch.float32)
    run(query, key, value, mask, 0.25)
    other = DocumentMask(mask.unseen, document_spans(torch.zeros(3, 300, dtype=torch.long)))
    run(query, key, value, other, 0.25)
    assert counter.frame_count == 1


def test_the_operators_keep_torchs_rules() -> None:
    query, key, value, mask, _ = _given(torch.float32)
    torch.library.opcheck(
        document_attention._attend,
        (query, key, value, mask.unseen, mask.spans),
        # probabilities beyond the windows are never written
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_spans_are_the_documents_with_short_neighbours_together() -> None:
    _, documents = _rows()
    spans = document_spans(documents)
    # 130 and 7 are cheaper together than apart, 146 and 120 are not
    assert spans[:5].tolist() == [[0, 0, 146], [0, 146, 296], [1, 0, 290], [2, 0, 203], [2, 203, 289]]
    assert spans.shape == (3 * 4, 3) and not spans[5:].any()
    worst = torch.arange(910)[None] // 91  # the shortest that are all computed apart
    assert document_spans(worst)[:10].tolist() == [[0, s, s + 91] for s in range(0, 910, 91)]
    tiny = document_spans(torch.arange(910)[None])  # together, but not all of them
    assert tiny[:4, 1:].tolist() == [[0, 256], [256, 512], [512, 768], [768, 910]]
    assert tiny.shape == document_spans(worst).shape and not tiny[4:].any()
    torn = torch.full((1, 100), -1)
    torn[0, 2:4], torn[0, 5:6] = 0, 1  # neither padding nor what lies beyond it is taken along
    assert document_spans(torn).tolist() == [[0, 2, 4], [0, 5, 6]]


def test_used_in_training_of_long_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, documents = _rows()
    seen, hidden = block_mask(blocks, documents), torch.zeros(3, 300, 8, requires_grad=True)
    assert isinstance(attention.mask_of_rows(seen, hidden, documents), DocumentMask)
    assert isinstance(attention.mask_of_rows(seen, hidden), Tensor)
    short = attention.mask_of_rows(seen[..., :256, :256], hidden, documents[:, :256])
    assert isinstance(short, Tensor) and short.dtype == torch.float32
    with torch.no_grad():
        assert attention.mask_of_rows(seen, hidden, documents) is seen
    assert attention.mask_of_rows(seen, hidden.double(), documents) is seen


def test_adapters_train_document_by_document() -> None:
    """Their embeddings are frozen, and yet there is a backward pass through attention."""
    blocks, documents = _rows()
    seen, frozen = block_mask(blocks, documents), torch.zeros(3, 300, 8)
    assert attention.mask_of_rows(seen, frozen, documents) is seen
    assert isinstance(attention.mask_of_rows(seen, frozen, documents, trains=True), DocumentMask)
    model = tiny_model()
    sample = build(Document((Text("two dogs"),)), tiny_bundle().vocab, LayoutOptions(8.0))
    batch, masks = collate([sample], 300), []
    model.runner = lambda x, _, mask: masks.append(mask) or x
    model.hidden(batch)
    model.backbone.layers[0].self_attn.q_proj.weight.requires_grad_()
    model.hidden(batch)
    with torch.no_grad():
        model.hidden(batch)
    assert [isinstance(mask, DocumentMask) for mask in masks] == [False, True, False]
