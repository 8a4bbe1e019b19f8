"""Scale schedules: which grids an image is predicted on, coarse to fine (paper section 2.2).

An image is a list of S grids ``(h_1, w_1) = (1, 1), ..., (h_S, w_S)``. The square base below and one final grid per
aspect ratio fix every schedule; nothing else in the project derives a grid. Below 12 scales several aspect ratios round to
one last grid and differ in the grids before it: all pictures of that size, whether they are extracted, read or drawn, then
have the schedule of the ratio nearest to that grid's own (:func:`final_of`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

Grid = tuple[int, int]

BASE_SIZES: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64)
"""Side of the square grid at every scale of the full (1024 px) schedule."""

LEVELS: dict[int, int] = {256: 12, 512: 16, 1024: 18}
"""Resolution level in pixels (downsampling 16) -> number of scales."""

_TALL: tuple[Grid, ...] = (
    (128, 32), (124, 32), (120, 32), (116, 32), (112, 36), (104, 36), (108, 36), (100, 40), (96, 40), (92, 44),
    (88, 44), (84, 44), (84, 48), (80, 48), (76, 52), (72, 52), (72, 56), (68, 56), (68, 60), (64, 60),
)  # fmt: skip

FINAL_GRIDS: tuple[Grid, ...] = tuple([(w, h) for h, w in _TALL] + [(64, 64)] + list(reversed(_TALL)))
"""The 41 final grids (h, w) of the 1024 px level, widest (1:4) first, tallest (4:1) last."""


@dataclass(frozen=True)
class ScaleSchedule:
    """The grids of one image, coarse to fine.

    ``grids``: ``(h, w)`` per scale, the first always ``(1, 1)``. Tokens of an image are its grids one after the other,
    each in row-major order.
    """

    grids: tuple[Grid, ...]

    def __post_init__(self) -> None:
        if not self.grids or self.grids[0] != (1, 1):
            raise ValueError(f"a scale schedule starts with the grid (1, 1), got {self.grids[:1]}")
        if any(h < 1 or w < 1 for h, w in self.grids):
            raise ValueError("every grid of a scale schedule has at least one row and one column")

    @classmethod
    def from_final(cls, final: Grid = (64, 64), num_scales: int = len(BASE_SIZES)) -> ScaleSchedule:
        """Schedule of the first ``num_scales`` scales for a final grid of the 1024 px level.

        Grid k is ``(round(b_k * H / 64), round(b_k * W / 64))``, half to even, at least 1; grid 1 is ``(1, 1)``.
        Raises ValueError when ``num_scales`` is not in 1..18.
        """
        if not 1 <= num_scales <= len(BASE_SIZES):
            raise ValueError(f"the number of scales is 1 to {len(BASE_SIZES)}, got {num_scales}")
        grids = [
            (max(1, round(b * final[0] / 64)), max(1, round(b * final[1] / 64)))
            for b in BASE_SIZES[:num_scales]
        ]
        return cls(((1, 1), *grids[1:]))

    @classmethod
    def square(cls, num_scales: int) -> ScaleSchedule:
        """The square schedule of ``num_scales`` scales (8 scales: 8x8 and 204 tokens; 18: 64x64 and 10,084)."""
        return cls.from_final((64, 64), num_scales)

    @classmethod
    def nearest(cls, height: float, width: float, num_scales: int) -> ScaleSchedule:
        """Schedule of the canvas whose aspect ratio is nearest (in log ratio) to ``height : width``; the first wins a tie.

        Raises ValueError for sides that are not positive or a ratio beyond 1:4 or 4:1 by more than a tenth.
        """
        if height <= 0 or width <= 0:
            raise ValueError(f"an image size is two positive numbers, got {width}x{height}")
        ratio = height / width
        if not 0.25 / 1.1 <= ratio <= 4 * 1.1:
            raise ValueError(
                f"no schedule covers {width}x{height}: aspect ratios from 1:4 to 4:1 are accepted"
            )
        best = min(FINAL_GRIDS, key=lambda g: max(g[0] / g[1] / ratio, ratio / (g[0] / g[1])))
        last = cls.from_final(best, num_scales).final
        return cls.from_final(_finals(num_scales)[last], num_scales)

    def __len__(self) -> int:
        return len(self.grids)

    def __iter__(self) -> Iterator[Grid]:
        return iter(self.grids)

    @property
    def final(self) -> Grid:
        """The last grid (h_S, w_S)."""
        return self.grids[-1]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of each scale."""
        return tuple(h * w for h, w in self.grids)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Index of each scale's first token within the image, and the total as the last entry (S + 1 entries)."""
        out = [0]
        for size in self.sizes:
            out.append(out[-1] + size)
        return tuple(out)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole image (T)."""
        return self.offsets[-1]

    @cached_property
    def canonical(self) -> bool:
        """Whether it is the one schedule that pictures on its last grid have (shards of before may hold another one)."""
        final = final_of(self.final, len(self))
        return final is not None and ScaleSchedule.from_final(final, len(self)).grids == self.grids

    def prefix(self, num_scales: int) -> ScaleSchedule:
        """The first ``num_scales`` scales as a schedule of their own."""
        if not 1 <= num_scales <= len(self):
            raise ValueError(f"this schedule has 1 to {len(self)} scales, got {num_scales}")
        return ScaleSchedule(self.grids[:num_scales])

    def image_size(self, downsample: int) -> tuple[int, int]:
        """(height, width) in pixels of the picture that the final grid covers."""
        return self.final[0] * downsample, self.final[1] * downsample


def final_of(grid: Grid, num_scales: int) -> Grid | None:
    """Which of :data:`FINAL_GRIDS` fixes the schedule of a picture whose last of ``num_scales`` grids is ``grid`` (h, w):
    of several that round to it the nearest to its own ratio, the first of a tie; None where none does.

    Raises ValueError when ``num_scales`` is not in 1..18.
    """
    return _finals(num_scales).get(grid)


@cache
def _finals(num_scales: int) -> dict[Grid, Grid]:
    """Every last grid of a level -> its entry in FINAL_GRIDS."""
    found: dict[Grid, list[Grid]] = {}
    for final in FINAL_GRIDS:
        found.setdefault(ScaleSchedule.from_final(final, num_scales).final, []).append(final)
    return {
        (h, w): min(several, key=lambda g: max(g[0] * w / (g[1] * h), g[1] * h / (g[0] * w)))
        for (h, w), several in found.items()
    }
