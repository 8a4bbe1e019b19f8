"""Weighted cross-entropy of a linear head, chunk by chunk: no logits of the whole batch are ever held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from nextflow_ar.tokenizer.highest import highest

HELD_LOGITS = 2**26
"""Logits held at once, whatever the vocabulary: 128 MiB in bf16."""
_ENTRIES = 2**13
"""Entries of the vocabulary whose rows of the head are cast or summed at once."""
_SOFTMAX_CPU, _SOFTMAX_GPU = 2**18, 2**26
"""Logits brought to fp32 at once: on a CPU as many as its second cache holds (measured: twice as fast as 2**22)."""
_PLACES = 256
"""Places in bf16 on a CPU are filled up to a multiple of this: oneDNN compiles a kernel for every new number of rows
(measured: 20 ms a product), and a batch rarely has as many supervised places as the one before it."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """Another model's ``hidden`` states of the same places, before its ``head``: ``share`` of what a place is to say is
    what that model says there, the rest is the target.
    """

    hidden: Float[Tensor, "n e"]
    head: Float[Tensor, "v e"]
    share: float


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients too, so that each chunk's logits live once and are dropped."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor,
        chunk: int,
        teacher: Teacher | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        best = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight)
            told = None if teacher is None else (_logits(teacher.hidden[part], teacher.head), teacher.share)
            losses[part], best[part], aimed = _softmax(
                logits, targets[part], weights[part], need_hidden or need_weight, told
            )
            total += (aimed * weights[part]).sum()
            if grad_hidden is not None:
                grad_hidden[part] = _product(logits, weight)
            if grad_weight is not None:
                _add_product(grad_weight, logits, hidden[part])
            del logits, told  # before the next chunk's are made
        ctx.found = grad_hidden, grad_weight
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses, best)
        return total, losses, best

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if ctx.found is None:
            raise RuntimeError("the chunked loss scales its gradients in place: go back through it once only")
        # Scaled in place and let go of, so that no second gradient of the head's size is ever made.
        (grad_hidden, grad_weight), ctx.found = ctx.found, None
        scale = grads[0]
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(scale.to(grad_hidden.dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _bands(entries: int) -> Iterator[slice]:
    return (slice(start, start + _ENTRIES) for start in range(0, entries, _ENTRIES))


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """``hidden @ weight.T`` in ``hidden``'s dtype."""
    if len(weight) <= _ENTRIES:
        return hidden @ weight.to(hidden.dtype).T
    logits = hidden.new_empty(len(hidden), len(weight))
    for band in _bands(len(weight)):
        logits[:, band] = hidden @ weight[band].to(hidden.dtype).T
    return logits


def _softmax(
    logits: Tensor, targets: Tensor, weights: Tensor, slope: bool, told: tuple[Tensor, float] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) losses, (N,) best entries and (N,) losses against what is aimed at of (N, V) logits, in fp32. ``told``: a
    teacher's logits, and the share that they have in what is aimed at.

    With ``slope`` the logits are overwritten by the gradient of the weighted losses with respect to them.
    """
    losses, best = torch.empty_like(weights, dtype=torch.float32), torch.empty_like(targets)
    aimed = losses if told is None else torch.empty_like(losses)
    held = _SOFTMAX_CPU if logits.device.type == "cpu" else _SOFTMAX_GPU
    rows = max(1, held // logits.shape[1])
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        chance = logits[part].float()  # the logits themselves where those are fp32
        index, weight = targets[part, None], weights[part, None].float()
        top, best[part] = highest(chance)
        picked = chance.gather(1, index) - top
        chance.sub_(top)
        share, other, similar = 0.0, None, 0.0
        if told is not None:
            share, other = told[1], told[0][part].float().softmax(1)
            similar = torch.linalg.vecdot(other, chance)[:, None]
        total = chance.exp_().sum(1, keepdim=True)
        losses[part] = (total.log() - picked)[:, 0]
        if told is not None:
            aimed[part] = (total.log() - (1 - share) * picked - share * similar)[:, 0]
        if slope:
            chance.mul_(weight / total).scatter_add_(1, index, -(1 - share) * weight)
            if other is not None:
                chance.sub_(other.mul_(share * weight))
            logits[part] = chance
    return losses, best, aimed


def _product(slope: Tensor, weight: Tensor) -> Tensor:
    """``slope @ weight``, summed over bands of the vocabulary in fp32."""
    if len(weight) <= _ENTRIES:
        return slope @ weight.to(slope.dtype)
    total = torch.zeros(len(slope), weight.shape[1], dtype=torch.float32, device=slope.device)
    for band in _bands(len(weight)):
        total += slope[:, band] @ weight[band].to(slope.dtype)
    return total


def _add_product(total: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """``total += slope.T @ hidden``, a band of the vocabulary at a time."""
    for band in _bands(len(total)):
        if hidden.dtype == torch.float32:
            total[band].addmm_(slope[:, band].T, hidden)
        else:
            total[band] += slope[:, band].T @ hidden


def chunked_linear_cross_entropy(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
    chunk: int | None = None,
    teacher: Teacher | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Sum over places of ``weights * cross_entropy(hidden @ weight.T, targets)``.

    Returns (the sum, differentiable once in ``hidden`` and ``weight``; (N,) unweighted losses in nats; (N,) best entries).
    Products run in ``hidden``'s dtype, the softmax in fp32. ``chunk``: places at once (None: 4,096 on a CPU, 16,384 on
    a GPU); fewer with a large vocabulary, so that at most 2**26 logits are held (paper section 3.3, fused loss).
    ``teacher``: the sum is of cross-entropies against its distributions, too; what else is returned is of the targets.
    """
    chunk = chunk or (4096 if hidden.device.type == "cpu" else 16384)
    models = 1 if teacher is None else 2
    chunk = min(chunk, max(64, HELD_LOGITS // (models * len(weight))))
    count = len(hidden)
    if hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16:
        more = -count % _PLACES
        hidden = pad(hidden, (0, 0, 0, more))
        targets, weights = pad(targets, (0, more)), pad(weights, (0, more))
        if teacher is not None:
            teacher = replace(teacher, hidden=pad(teacher.hidden, (0, 0, 0, more)))
    given = hidden, weight, targets, weights, chunk, teacher
    total, losses, best = _ChunkedLinearCrossEntropy.apply(*given)  # pyright: ignore
    return total, losses[:count], best[:count]
