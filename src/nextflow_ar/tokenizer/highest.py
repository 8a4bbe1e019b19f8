"""The best of many entries in every row, without what argmax costs on a CPU."""

from __future__ import annotations

import math

from jaxtyping import Float, Int
from torch import Tensor, arange

_BLOCK = 64
"""Entries among which the best is looked for at once on a CPU."""


def highest(scores: Float[Tensor, "n v"]) -> tuple[Float[Tensor, "n 1"], Int[Tensor, " n"]]:
    """(N, 1) highest of (N, V) scores, and (N,) the first entry that has it.

    argmax over whole rows takes ten times as long on a CPU as the maxima alone (measured: two fifths of a softmax):
    there the block with the maximum is found first, then the entry in it.
    """
    wide = math.gcd(scores.shape[1], _BLOCK)
    if scores.device.type != "cpu" or wide < _BLOCK:
        return scores.amax(1, keepdim=True), scores.argmax(1)
    blocks = scores.unflatten(1, (-1, wide))
    tops = blocks.amax(2)
    block = tops.argmax(1)
    inside = blocks[arange(len(scores)), block].argmax(1)
    return tops.amax(1, keepdim=True), block * wide + inside
