"""Recipes of the image tokenizer's stages: what a stage trains, on which pictures, by which losses (paper section 2)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
from pydantic import ConfigDict
from torch import Tensor

from nextflow_ar.config import ConfigError, ImageTokenizerConfig, within
from nextflow_ar.data.pictures import PictureSource
from nextflow_ar.precision import Precision
from nextflow_ar.training.optim import OptimizerConfig


@dataclass(frozen=True)
class TokenizerLoss:
    """Weights of the losses; 0 leaves one out.

    ``mse``, ``l1``: on pixels in -1..1. ``ssim``: 1 - SSIM. ``perceptual``: by
    ``perceptual_kind``, the frozen teacher's features or LPIPS.
    ``semantic``: distillation by ``semantic_kind``. ``commitment``: features to their codes; ``codebook``: codes to their
    features (needed where the codebook learns by gradient). ``entropy``: clear choices, all codes in use.
    ``adversarial``: PatchGAN, from step ``adversarial_start`` on, times the adaptive weight.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    mse: float
    l1: float
    commitment: float
    ssim: float = 0.0
    semantic: float = 0.0
    semantic_kind: Literal["cosine", "l2"] = "cosine"
    perceptual: float = 0.0
    perceptual_kind: Literal["teacher", "lpips"] = "teacher"
    codebook: float = 0.0
    entropy: float = 0.0
    adversarial: float = 0.0
    adversarial_start: int = 0
    discriminator_channels: int = 64

    def __post_init__(self) -> None:
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.endswith("_kind")}
        within("at least 1", discriminator_channels=numbers.pop("discriminator_channels"))
        within("at least 0", **numbers)


@dataclass(frozen=True)
class ScaleDropout:
    """Which scales are decoded in training. ``share``: of the pictures for "nested", of the scales for "independent".

    "nested": such a picture is decoded from its first k scales, k uniform, so that coarse scales carry what matters.
    "independent": every scale but the first is left out with that chance (TokenFlow).
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: Literal["nested", "independent"]
    share: float

    def __post_init__(self) -> None:
        within("from 0 to 1", share=self.share)

    def mask(self, count: int, scales: int, generator: torch.Generator, share: float | None = None) -> Tensor:
        """(count, scales) bool; the first scale is always in. ``share``: instead of the recipe's own."""
        places, share = torch.arange(scales), self.share if share is None else share
        if self.kind == "independent":
            return (torch.rand(count, scales, generator=generator) >= share) | (places == 0)
        if scales == 1:
            return torch.ones(count, 1, dtype=torch.bool)
        nested = torch.rand(count, generator=generator) < share
        fewer = torch.randint(1, scales, (count,), generator=generator)
        return places < torch.where(nested, fewer, torch.full_like(fewer, scales))[:, None]


@dataclass(frozen=True)
class CodebookLearning:
    """``kind``: "ema" moves codes by moving averages of what they are assigned, with ``decay``; "gradient" by the
    optimiser. A code assigned less than ``revive_below`` times per step, in moving average, goes onto a cell of the batch.
    A codebook that comes with ``start`` goes on from where it is, every code as often used as the average one.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: Literal["ema", "gradient"]
    decay: float
    revive_below: float

    def __post_init__(self) -> None:
        within("at least 0 and below 1", decay=self.decay)
        within("at least 0", revive_below=self.revive_below)


@dataclass(frozen=True)
class TokenizerRecipe:
    """Recipe of one tokenizer stage.

    ``trains``: "pixel" (the pixel branch alone), "joint" (all; goes on from a "pixel" tokenizer, or from nothing), or
    "decoder" (the pixel decoder alone; encoder, codebook and so all codes stay as in ``start``; ``tokenizer`` may ask
    for more decoder blocks, which start as the identity, or for wider ones, which start anew; "joint" may ask for more
    blocks of both). ``teacher``: folder or
    Hub id of a SigLIP2. ``pixels``: per step and process. ``prefetch``: a thread of its own makes the next step's pictures.
    ``workers``: or so many processes do, for a GPU. ``precision``: see :class:`ModelRecipe`.
    ``fresh_semantics`` ("joint"): only the pixel branch is taken from ``start``; the student begins as the teacher again.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: str
    out: Path
    seed: int
    trains: Literal["pixel", "joint", "decoder"]
    start: Path | None
    teacher: str | None
    steps: int
    pixels: int
    optimizer: OptimizerConfig
    ema: float
    dropout: ScaleDropout
    codebook: CodebookLearning
    compile: bool
    sheet_seconds: float
    save_seconds: float
    loss: TokenizerLoss
    data: dict[str, PictureSource]
    heldout: dict[str, PictureSource]
    heldout_pixels: int
    tokenizer: ImageTokenizerConfig
    prefetch: bool = False
    fresh_semantics: bool = False
    workers: int = 0
    precision: Precision = "auto"

    def check(self) -> None:
        """Raises ConfigError, one line, for a senseless value, and where parts do not go together."""
        within("at least 1", steps=self.steps, pixels=self.pixels, heldout_pixels=self.heldout_pixels)
        within("at least 0", seed=self.seed, workers=self.workers)
        within("at least 0 and below 1", ema=self.ema)
        seconds = {"sheet_seconds": self.sheet_seconds, "save_seconds": self.save_seconds}
        within("a number of seconds of at least 0", **seconds)
        semantic = self.tokenizer.semantic is not None
        if self.trains == "pixel" and semantic:
            raise ConfigError(
                "trains: pixel goes with tokenizer.semantic: null and quantizer.semantic_dim: 0"
            )
        if self.trains == "joint" and not (semantic and self.teacher):
            raise ConfigError("trains: joint needs tokenizer.semantic and a teacher")
        if self.fresh_semantics and (self.trains != "joint" or self.start is None):
            raise ConfigError("fresh_semantics goes with trains: joint and a tokenizer to start from")
        if self.trains == "decoder" and self.start is None:
            raise ConfigError("trains: decoder needs a tokenizer to start from")
        if self.loss.perceptual and self.loss.perceptual_kind == "teacher" and not self.teacher:
            raise ConfigError("loss.perceptual needs a teacher, or perceptual_kind: lpips")
        gradient = self.codebook.kind == "gradient" or self.tokenizer.quantizer.refine > 0
        if gradient and self.trains != "decoder" and not self.loss.codebook:
            raise ConfigError("a codebook that learns by gradient, or refine, needs loss.codebook above 0")
