"""Attention in training on a CPU, document by document: what lies between the documents of a packed row is never computed.

A row of 640 places that holds three documents has three times as many scores as they have, and a CPU pays for each
(benchmarks/attention.py). Both directions are operators that :func:`torch.compile` calls and does not look into, so that
documents of other lengths need no other compilation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

LONGEST = 640
"""Places up to which scores held in full are faster; beyond it torch's fused kernel catches up and needs less memory."""
_OVERHEAD = 128**2
"""Scores that take as long as starting on another document: short neighbours are computed together."""
_TOGETHER = 256
"""Places that neighbours have at most when they are computed together: many short ones would grow to a long square."""
_FEWEST = 90
"""Places of a span on average, at least: two neighbours that are not computed together have twice as many."""
_ROUND = 32
"""A window's length is a multiple of this: oneDNN compiles a kernel for every new shape of a product in bf16."""


@dataclass(frozen=True, eq=False)
class DocumentMask:
    """``unseen``: numbers to add to scores, the lowest there is where a query does not see a key, in what products are
    computed in. ``spans``: (row, start, end) of what is computed by itself, on the CPU; of no length where it is padding.
    """

    unseen: Float[Tensor, "b 1 l l"]
    spans: Int[Tensor, "s 3"]


def document_spans(documents: Int[Tensor, "b l"]) -> Int[Tensor, "s 3"]:
    """(row, start, end) of the documents, short neighbours together; padding (-1) is in none.

    Every batch of one shape has equally many, those of no length behind the others.
    """
    rows, length = documents.shape
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    found: list[list[int]] = []
    for row in range(rows):
        starts = [*first[row].nonzero()[:, 0].tolist(), length]
        mine: list[list[int]] = []
        for start, end in pairwise(starts):
            if documents[row, start] < 0:
                continue
            near = bool(mine) and mine[-1][2] == start and end - mine[-1][1] <= _TOGETHER
            if near and 2 * (start - mine[-1][1]) * (end - start) <= _OVERHEAD:
                mine[-1][2] = end
            else:
                mine.append([row, start, end])
        found += mine
    room = rows * (length // _FEWEST + 1)
    return torch.tensor(found + [[0, 0, 0]] * (room - len(found)))


def attend_by_document(
    query: Float[Tensor, "b h l d"],
    key: Float[Tensor, "b h l d"],
    value: Float[Tensor, "b h l d"],
    mask: DocumentMask,
    scaling: float,
) -> Float[Tensor, "b l h d"]:
    """Attention in the precision of the mask; padding gets zeros."""
    q, k, v = (t.to(mask.unseen.dtype) for t in (query * scaling, key, value))
    return _attend(q, k, v, mask.unseen, mask.spans)[0]


@dataclass(frozen=True)
class _Window:
    """Places of a row around a span, with room for the probabilities among them."""

    row: int
    start: int
    end: int
    first: int
    size: int
    offset: int

    @property
    def own(self) -> slice:
        """The span within the row."""
        return slice(self.start, self.end)

    @property
    def inner(self) -> slice:
        """The span within the window."""
        return slice(self.start - self.first, self.end - self.first)

    def of(self, x: Tensor) -> Tensor:
        """(h, size, d) of (b, h, l, d)."""
        return x[self.row, :, self.first : self.first + self.size]

    def scores(self, x: Tensor, heads: int) -> Tensor:
        """(h, size, size) of all that is held."""
        return x[self.offset : self.offset + heads * self.size**2].view(heads, self.size, self.size)


def _windows(spans: Tensor, heads: int, length: int) -> Iterator[_Window]:
    offset = 0
    for row, start, end in spans.tolist():
        if start == end:
            return
        size = end - start
        if size > LONGEST:
            yield _Window(row, start, end, start, size, offset)
            continue
        size = min(length, -(-size // _ROUND) * _ROUND)
        yield _Window(row, start, end, min(start, length - size), size, offset)
        offset += heads * size**2


def _room(query: Tensor, spans: Tensor) -> int:
    """Probabilities that the spans of any batch of this shape have at most."""
    rows, heads, length, _ = query.shape
    return rows * heads * min(length, LONGEST) * (length + _ROUND * (spans.shape[0] // rows))


@torch.library.custom_op("nextflow_ar::attend_by_document", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, unseen: Tensor, spans: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(b, l, h, d) of values; probabilities, one window behind the other; of long spans the logarithm of every sum."""
    rows, heads, length, size = query.shape
    out = query.new_zeros(rows, length, heads, size)
    held = query.new_empty(_room(query, spans))
    sums = query.new_empty(rows, heads, length if length > LONGEST else 0, dtype=torch.float32)
    for w in _windows(spans, heads, length):
        q, k, v = w.of(query), w.of(key), w.of(value)
        mask = unseen[w.row, :, w.first : w.first + w.size, w.first : w.first + w.size]
        if w.size <= LONGEST:
            scores = torch.baddbmm(mask.expand(heads, -1, -1), q, k.transpose(1, 2))
            powers = w.scores(held, heads)
            torch.softmax(scores, -1, out=powers)
            found = powers @ v
        else:
            found, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[None], k[None], v[None], attn_mask=mask[None], scale=1.0
            )
            found, sums[w.row, :, w.own] = found[0], total[0]
        out[w.row, w.own] = found[:, w.inner].transpose(0, 1)
    return out, held, sums


@torch.library.custom_op("nextflow_ar::attend_by_document_backward", mutates_args=())
def _attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    unseen: Tensor,
    spans: Tensor,
    out: Tensor,
    held: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, (b, h, l, d)."""
    rows, heads, length, size = query.shape
    found = tuple(query.new_zeros(rows, length, heads, size).transpose(1, 2) for _ in range(3))
    for w in _windows(spans, heads, length):
        q, k, v = w.of(query), w.of(key), w.of(value)
        # a window reaches into its neighbours, whose gradients are another window's
        above = query.new_zeros(heads, w.size, size)
        above[:, w.inner] = gradient[w.row, w.own].transpose(0, 1)
        if w.size <= LONGEST:
            powers = w.scores(held, heads)
            slope = torch.ops.aten._softmax_backward_data(above @ v.transpose(1, 2), powers, -1, powers.dtype)
            parts = slope @ k, slope.transpose(1, 2) @ q, powers.transpose(1, 2) @ above
        else:
            own, total = out[w.row, w.own].transpose(0, 1)[None], sums[w.row : w.row + 1, :, w.own]
            mask = unseen[w.row : w.row + 1, :, w.own, w.own]
            several = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                above[None], q[None], k[None], v[None], own, total, 0.0, False, attn_mask=mask, scale=1.0
            )
            parts = tuple(part[0] for part in several)
        for whole, part in zip(found, parts, strict=True):
            whole[w.row, :, w.own] = part[:, w.inner]
    return found[0], found[1], found[2]


@_attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, unseen: Tensor, spans: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, length, size = query.shape
    out = query.new_empty(rows, length, heads, size)
    sums = query.new_empty(rows, heads, length if length > LONGEST else 0, dtype=torch.float32)
    return out, query.new_empty(_room(query, spans)), sums


@_attend_backward.register_fake
def _(gradient: Tensor, query: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, length, size = query.shape
    found = [query.new_empty(rows, length, heads, size).transpose(1, 2) for _ in range(3)]
    return found[0], found[1], found[2]


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backwards(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_attend_backward(gradient, *ctx.saved_tensors), None, None


torch.library.register_autograd("nextflow_ar::attend_by_document", _backwards, setup_context=_keep)
