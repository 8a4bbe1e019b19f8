"""Batches of pictures for the image tokenizer: a weighted mixture of playground, photographs and textures.

One batch has one source and one schedule (its bucket); the number of pictures follows from a budget of pixels. Everything
follows from (seed, step), so that a resumed run sees what the first would have seen.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ConfigDict

from nextflow_ar.config import ConfigError
from nextflow_ar.data.photos import PhotoFolder
from nextflow_ar.data.playground.canvases import canvas_sizes
from nextflow_ar.data.playground.curriculum import by_task, episode
from nextflow_ar.data.playground.mixture import MixtureConfig, SceneMixture
from nextflow_ar.data.playground.scenes import Split
from nextflow_ar.data.textures import dead_leaves
from nextflow_ar.scales import BASE_SIZES, FINAL_GRIDS, Grid, ScaleSchedule

_LOG = logging.getLogger(__name__)
_MOST = 1 << 16  # episodes of a step have numbers of their own


@dataclass(frozen=True)
class PictureSource:
    """One source. ``weight``: its share of the steps.

    ``kind`` "playground": scenes of ``playground`` (a canvas of 64 pixels). "world": pictures of the wide world's episodes,
    ``tasks`` (weights of tasks or groups, docs/playground.md) at ``level``, of any size and a ratio up to 2. "photos":
    crops of the pictures in ``folder``; ``optional``: leave the source out when the folder is not there. "textures":
    dead leaves. ``scales``: levels to draw from, each equally likely (canvas side = BASE_SIZES[scales - 1] * downsample).
    ``ratios``: "square", "all" 41, or "own" (photographs only): each picture in the bucket of its own aspect ratio.
    ``dropout``: share of the scale dropout for these pictures (null: the recipe's).
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: Literal["playground", "world", "photos", "textures"]
    weight: float
    seed: int = 0
    scales: tuple[int, ...] = (8,)
    ratios: Literal["square", "all", "own"] = "square"
    playground: MixtureConfig | None = None
    tasks: dict[str, float] | None = None
    level: Literal["world", "blocks", "hues", "shades", "wide"] = "world"
    split: Split = "train"
    folder: Path | None = None
    optional: bool = False
    dropout: float | None = None

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError("weight is above 0")
        if not self.scales or not all(1 <= s <= len(BASE_SIZES) for s in self.scales):
            raise ValueError(f"scales are from 1 to {len(BASE_SIZES)}")
        if (self.kind == "playground") != (self.playground is not None):
            raise ValueError("playground goes with the kind playground")
        if (self.kind == "world") != (self.tasks is not None):
            raise ValueError("tasks goes with the kind world")
        if self.tasks is not None and "plain" in by_task(self.tasks):
            raise ValueError("the task plain has no pictures")
        if (self.kind == "photos") != (self.folder is not None):
            raise ValueError("folder goes with the kind photos")
        if self.dropout is not None and not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout is a share from 0 to 1, got {self.dropout}")
        if self.ratios == "own" and self.kind != "photos":
            raise ValueError("ratios: own goes with the kind photos")


@dataclass(frozen=True, eq=False)
class PictureBatch:
    """``pictures``: (B, H, W, 3) uint8, all on ``schedule``. ``source``: the name it has in the recipe."""

    pictures: np.ndarray
    schedule: ScaleSchedule
    source: str


class PictureMixture:
    """The batches of a recipe's ``data``. Raises ConfigError when no source is left, or (``strict``) a folder has fewer
    pictures than a batch.
    """

    def __init__(
        self,
        sources: dict[str, PictureSource],
        pixels: int,
        downsample: int,
        seed: int,
        *,
        strict: bool = True,
    ) -> None:
        self.pixels, self.downsample, self.seed = pixels, downsample, seed
        self.sources = {k: s for k, s in sources.items() if not self._left_out(k, s)}
        if not self.sources:
            raise ConfigError("the recipe's data names no source that is there")
        self.names = list(self.sources)
        weights = np.array([self.sources[name].weight for name in self.names])
        self._edges = np.cumsum(weights / weights.sum())
        self._scenes = {k: SceneMixture(s.playground) for k, s in self.sources.items() if s.playground}
        self._folders = {k: PhotoFolder(s.folder) for k, s in self.sources.items() if s.folder}
        for name, folder in self._folders.items():
            largest = max(self.count(ScaleSchedule.square(s)) for s in self.sources[name].scales)
            if strict and len(folder.files) < largest:
                raise ConfigError(
                    f"{folder.folder}: {len(folder.files)} usable pictures are too few for batches of {largest} "
                    f"(source {name!r}); add pictures, or lower the recipe's pixels"
                )

    @staticmethod
    def _left_out(name: str, source: PictureSource) -> bool:
        if source.folder is None or not source.optional or source.folder.is_dir():
            return False
        _LOG.warning("%s: no such folder, the source %r is left out", source.folder, name)
        return True

    def count(self, schedule: ScaleSchedule) -> int:
        """Pictures per batch on this schedule."""
        height, width = schedule.image_size(self.downsample)
        return max(1, self.pixels // (height * width))

    def broken(self) -> dict[str, str]:
        """Files that were passed over so far, and why."""
        return {str(path): why for f in self._folders.values() for path, why in f.broken.items()}

    def batch(self, step: int) -> PictureBatch:
        """Batch number ``step``."""
        rng = np.random.default_rng([self.seed, step])
        name = self.names[min(int(np.searchsorted(self._edges, rng.random())), len(self.names) - 1)]
        source = self.sources[name]
        scales = int(rng.choice(source.scales))
        if source.tasks is not None:
            return self._world(source, source.tasks, name, scales, step, rng.random())
        bucket = self._bucket(source, name, rng.random())
        schedule = ScaleSchedule.from_final(bucket or (64, 64), scales)
        count = self.count(schedule)
        if name in self._scenes:
            # Scenes are numbered through over the steps; other sources' steps leave their numbers out.
            return PictureBatch(self._scenes[name].pictures(step * count, count)[1], schedule, name)
        height, width = schedule.image_size(self.downsample)
        seeds = [(source.seed, step, i) for i in range(count)]
        if name in self._folders:
            own = bucket if source.ratios == "own" else None
            crops = [self._folders[name].crop(seed, height, width, own) for seed in seeds]
        else:
            crops = [dead_leaves(seed, height, width) for seed in seeds]
        return PictureBatch(np.stack(crops), schedule, name)

    def _world(
        self, source: PictureSource, tasks: dict[str, float], name: str, scales: int, step: int, draw: float
    ) -> PictureBatch:
        sizes = canvas_sizes(scales)
        canvas = sizes[int(draw * len(sizes))] if source.ratios == "all" else sizes[0]
        schedule = ScaleSchedule.nearest(*canvas, scales)
        spread = by_task(tasks)
        pictures: list[np.ndarray] = []
        for number in range(self.count(schedule)):
            rng = random.Random(f"nextflow-ar pictures {source.seed} {step} {number}")
            task = rng.choices(tuple(spread), tuple(spread.values()))[0]
            shown = episode(
                task, step * _MOST + number, source.seed, source.split, canvas, source.level
            ).pictures
            pictures.append(rng.choice(shown).render())
        return PictureBatch(np.stack(pictures), schedule, name)

    def _bucket(self, source: PictureSource, name: str, draw: float) -> Grid | None:
        if source.ratios == "own":
            return self._folders[name].bucket(draw)
        return FINAL_GRIDS[min(int(draw * len(FINAL_GRIDS)), 40)] if source.ratios == "all" else None
