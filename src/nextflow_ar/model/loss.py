"""Weighted cross-entropy of a linear head, chunk by chunk: no logits of the whole batch are ever held."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients too, so that each chunk's logits live once and are dropped."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        compute = hidden.dtype
        matrix = weight.to(compute)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        best = torch.empty(len(hidden), dtype=torch.long, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ matrix.T).float()
            index = targets[part, None]
            best[part] = logits.argmax(1)
            picked = logits.gather(1, index)[:, 0]
            normaliser = logits.logsumexp(1)
            losses[part] = normaliser - picked
            if need_hidden or need_weight:
                slope = logits.sub_(normaliser[:, None]).exp_()
                slope.scatter_add_(1, index, torch.full_like(index, -1, dtype=slope.dtype))
                slope = slope.mul_(weights[part, None]).to(compute)
                if grad_hidden is not None:
                    grad_hidden[part] = slope @ matrix
                if grad_weight is not None:
                    grad_weight += (slope.T @ hidden[part]).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(losses, best)
        return (losses * weights).sum(), losses, best

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        grad_hidden = None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype)
        grad_weight = None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def chunked_linear_cross_entropy(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    targets: Int[Tensor, " n"],
    weights: Float[Tensor, " n"],
    chunk: int = 4096,
) -> tuple[Float[Tensor, ""], Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Sum over places of ``weights * cross_entropy(hidden @ weight.T, targets)``.

    Returns (the sum, differentiable in ``hidden`` and ``weight``; (N,) unweighted losses in nats; (N,) best entries).
    Products run in ``hidden``'s dtype, the softmax in fp32; at most (chunk, V) logits are held.
    """
    return _ChunkedLinearCrossEntropy.apply(hidden, weight, targets, weights, chunk)  # pyright: ignore
