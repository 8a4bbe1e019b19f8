"""Multiscale 3D RoPE: the coordinates of every token (paper section 2.2, figure 4).

A coordinate triple is (row, column, scale). Text at position t is (t, t, t). Cell (i, j) of an H x W grid is
(C / sqrt(H * W) * (i + 0.5), C / sqrt(H * W) * (j + 0.5), s): grids of every resolution share one coordinate range.
The scale coordinate continues the text's count: ``<boi>`` at t is followed by blocks at t + 1 ... t + S, ``<eoi>`` at
t + S + 1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float

from nextflow_ar.scales import Grid


def text_positions(start: int, count: int) -> Float[torch.Tensor, "3 n"]:
    """Coordinates of ``count`` text tokens, the first at ``start``."""
    return torch.arange(start, start + count, dtype=torch.float32).expand(3, count)


def grid_positions(grid: Grid, scale: float, constant_range: float) -> Float[torch.Tensor, "3 n"]:
    """Coordinates of a grid's cells in row-major order. ``scale``: the block's scale coordinate; C: constant_range."""
    h, w = grid
    unit = constant_range / (h * w) ** 0.5
    rows = unit * (torch.arange(h, dtype=torch.float32) + 0.5)
    columns = unit * (torch.arange(w, dtype=torch.float32) + 0.5)
    return torch.stack(
        [
            rows.repeat_interleave(w),
            columns.repeat(h),
            torch.full((h * w,), float(scale), dtype=torch.float32),
        ]
    )
