"""Multiscale 3D RoPE: the coordinates of every token (paper section 2.2, figure 4).

A coordinate triple is (row, column, scale). Text at position t is (t, t, t). Cell (i, j) of an H x W grid is
(C / sqrt(H * W) * (i + 0.5), C / sqrt(H * W) * (j + 0.5), s): grids of every resolution share one coordinate range.
The scale coordinate continues the text's count: ``<boi>`` at t is followed by blocks at t + 1 ... t + S, ``<eoi>`` at
t + S + 1.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float

from nextflow_ar.scales import Grid


def text_positions(start: int, count: int) -> Float[torch.Tensor, "3 n"]:
    """Coordinates of ``count`` text tokens, the first at ``start``."""
    return torch.arange(start, start + count, dtype=torch.float32).expand(3, count)


def grid_positions(grid: Grid, scale: float, constant_range: float) -> Float[torch.Tensor, "3 n"]:
    """Coordinates of a grid's cells in row-major order. ``scale``: the block's scale coordinate; C: constant_range."""
    out = _cells(grid, constant_range).clone()
    out[2] = scale
    return out


@lru_cache(maxsize=1024)
def _cells(grid: Grid, constant_range: float) -> torch.Tensor:
    """A grid's coordinates at scale 0: data is laid out thousands of times a second."""
    h, w = grid
    unit = constant_range / (h * w) ** 0.5
    with torch.inference_mode(False):
        rows = unit * (torch.arange(h, dtype=torch.float32) + 0.5)
        columns = unit * (torch.arange(w, dtype=torch.float32) + 0.5)
        return torch.stack([rows.repeat_interleave(w), columns.repeat(h), torch.zeros(h * w)])
