"""Deterministic batches of scenes from a weighted mixture of levels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nextflow_ar.data.playground.scenes import LEVELS, Scene, SceneSampler, Split, level, render


@dataclass(frozen=True)
class MixtureConfig:
    """``levels``: name of a difficulty level -> weight. ``seed`` and ``split`` as in SceneSampler."""

    levels: dict[str, float]
    split: Split
    seed: int
    sprite_folder: Path | None = None
    photo_folder: Path | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.levels if name not in LEVELS]
        if unknown:
            raise ValueError(f"unknown playground level {unknown[0]!r}: one of {', '.join(LEVELS)}")
        if not self.levels or min(self.levels.values()) < 0 or sum(self.levels.values()) <= 0:
            raise ValueError("levels needs at least one level with a weight above 0")


class SceneMixture:
    """Scene ``i`` of the mixture: its level is drawn from (seed, i), so that any batch can be made anew at any time."""

    def __init__(self, config: MixtureConfig) -> None:
        self.config = config
        self.names = list(config.levels)
        weights = np.array([config.levels[n] for n in self.names], float)
        self._edges = np.cumsum(weights / weights.sum())
        folders = {"sprite_folder": config.sprite_folder, "photo_folder": config.photo_folder}
        self._samplers = [SceneSampler(level(n, **folders), config.split, config.seed) for n in self.names]

    def sampler(self, index: int) -> SceneSampler:
        """The level's sampler that makes scene ``index``."""
        draw = np.random.default_rng([self.config.seed, index, 7]).random()
        return self._samplers[min(int(np.searchsorted(self._edges, draw)), len(self.names) - 1)]

    def scene(self, index: int) -> Scene:
        """Scene ``index``."""
        return self.sampler(index).scene(index)

    def pictures(self, start: int, count: int) -> tuple[list[Scene], np.ndarray]:
        """Scenes ``start`` to ``start + count`` and their pictures, (count, H, W, 3) uint8."""
        scenes = [self.scene(i) for i in range(start, start + count)]
        return scenes, np.stack([render(scene, self.config.sprite_folder) for scene in scenes])
