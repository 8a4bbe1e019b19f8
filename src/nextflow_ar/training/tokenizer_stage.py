"""Training of the image tokenizer: both branches jointly, or the pixel decoder alone on frozen codes (paper 2.3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor
from torch.nn import functional as F

from nextflow_ar.config import ImageTokenizerConfig
from nextflow_ar.data.playground.mixture import MixtureConfig, SceneMixture
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.pixels import to_bytes, to_unit
from nextflow_ar.training.memory import keep_freed_memory
from nextflow_ar.training.optim import OptimizerConfig, StageOptimizer
from nextflow_ar.training.runs import Every, RunFolder, progress_bar, stop_request
from nextflow_ar.training.teacher import load_teacher


@dataclass(frozen=True)
class TokenizerLoss:
    """Weights of the tokenizer's losses. ``l1``, ``mse``: on pixels in -1..1. ``semantic``: 1 - cosine to the teacher."""

    mse: float
    l1: float
    semantic: float
    commitment: float


@dataclass(frozen=True)
class TokenizerRecipe:
    """Recipe of one tokenizer stage.

    ``trains``: "all", or "decoder" (encoder, codebook and so all codes stay as in ``start``; ``tokenizer`` may then ask
    for a larger pixel decoder). ``nested``: share of pictures decoded from their first k scales only, k uniform.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: str
    out: Path
    seed: int
    trains: Literal["all", "decoder"]
    start: Path | None
    teacher: Path | None
    steps: int
    batch: int
    optimizer: OptimizerConfig
    ema: float
    nested: float
    codebook_decay: float
    revive_below: float
    compile: bool
    sheet_seconds: float
    save_seconds: float
    loss: TokenizerLoss
    data: MixtureConfig
    heldout: MixtureConfig
    tokenizer: ImageTokenizerConfig


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture of a uint8 batch, from its mean squared error."""
    error = (a.float() - b.float()).square().flatten(1).mean(1).clamp_min(1e-3)
    return 10 * torch.log10(255.0**2 / error)


class TokenizerTrainer:
    """Everything one stage holds: model, averages, optimiser, data, run folder."""

    def __init__(self, recipe: TokenizerRecipe, values: dict[str, Any]) -> None:
        keep_freed_memory()
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.run = RunFolder(recipe.out, values, ("out", "sheet_seconds", "save_seconds"))
        self.schedule = ScaleSchedule.square(recipe.tokenizer.num_scales)
        self.model = ImageTokenizer(recipe.tokenizer)
        self._start_from(recipe)
        self.teacher = None
        if recipe.teacher is not None and recipe.trains == "all":
            self.teacher, _ = load_teacher(recipe.teacher)
            if recipe.start is None:
                self.model.semantic_encoder.load_state_dict(self.teacher.state_dict())
        self.trained = self.model.decoder if recipe.trains == "decoder" else self.model
        if recipe.trains == "decoder":
            self.model.requires_grad_(False)
            self.model.decoder.requires_grad_(True)
        self.averages = {k: p.detach().clone() for k, p in self.trained.named_parameters()}
        self.optimizer = StageOptimizer(self.trained.named_parameters(), recipe.optimizer)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.data = SceneMixture(recipe.data)
        self.heldout = torch.from_numpy(SceneMixture(recipe.heldout).pictures(0, 256)[1])
        self.step = 0
        if (state := self.run.load()) is not None:
            self._restore(state)
        self._features, self._render = self.model.features, self.model.render
        if recipe.compile:
            self._features, self._render = torch.compile(self._features), torch.compile(self._render)

    def _start_from(self, recipe: TokenizerRecipe) -> None:
        if recipe.start is None:
            return
        old = ImageTokenizer.from_pretrained(recipe.start)
        same_decoder = old.config == recipe.tokenizer
        state = {k: v for k, v in old.state_dict().items() if same_decoder or not k.startswith("decoder.")}
        self.model.load_state_dict(state, strict=same_decoder)

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        q = self.model.quantizer
        for name in ("ema_count", "ema_sum", "scale_counts"):
            getattr(q, name).copy_(state["quantizer"][name])
        self.averages = state["averages"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]

    def save(self) -> None:
        """Checkpoint everything that a bit-exact resume needs."""
        q = self.model.quantizer
        statistics = {name: getattr(q, name) for name in ("ema_count", "ema_sum", "scale_counts")}
        self.run.save(
            {
                "model": self.model.state_dict(),
                "quantizer": statistics,
                "averages": self.averages,
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "step": self.step,
            }
        )

    def _keep(self, count: int) -> Tensor:
        """How many scales of each picture are decoded: all, or for the nested share a uniform 1..S-1."""
        scales = len(self.schedule)
        nested = torch.rand(count, generator=self.generator) < self.recipe.nested
        fewer = torch.randint(1, scales, (count,), generator=self.generator)
        return torch.where(nested, fewer, torch.full_like(fewer, scales))

    def losses(self, pixels: Tensor) -> dict[str, Tensor]:
        """Loss terms of one batch; moves the codebook when the codebook is trained."""
        recipe, weights = self.recipe, self.recipe.loss
        joint = recipe.trains == "all"
        keep = self._keep(len(pixels))
        with torch.set_grad_enabled(joint), torch.autocast("cpu", torch.bfloat16):
            features = self._features(pixels)
        trace: list[tuple[int, Tensor, Tensor]] = []
        quantized = self.model.quantizer.quantize(features, self.schedule, keep=keep, trace=trace)
        if joint:
            self.revived = self.model.quantizer.learn(
                trace, decay=recipe.codebook_decay, revive_below=recipe.revive_below, generator=self.generator
            )
            straight = features + (quantized.features - features).detach()
        else:
            straight = quantized.features
        with torch.autocast("cpu", torch.bfloat16):
            out = self._render(straight)
        out = out.float()
        terms = {"mse": F.mse_loss(out, pixels) * weights.mse, "l1": F.l1_loss(out, pixels) * weights.l1}
        if joint:
            terms["commitment"] = F.mse_loss(features, quantized.features) * weights.commitment
        if self.teacher is not None and joint:
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    goal = self.teacher(pixels)
                read = self.model.semantics(straight)
            terms["semantic"] = (
                1 - F.cosine_similarity(read.float(), goal.float(), dim=1)
            ).mean() * weights.semantic
        return terms

    def _advance(self) -> dict[str, float]:
        recipe = self.recipe
        _, pictures = self.data.pictures(self.step * recipe.batch, recipe.batch)
        pixels = to_unit(torch.from_numpy(pictures)).contiguous(memory_format=torch.channels_last)
        terms = self.losses(pixels)
        loss = torch.stack(list(terms.values())).sum()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is not finite at step {self.step}: the last checkpoint is kept"
            )
        loss.backward()
        self.optimizer.step(recipe.optimizer.factor(self.step, recipe.steps))
        decay = min(recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, parameter in self.trained.named_parameters():
                self.averages[name].lerp_(parameter, 1 - decay)
        self.step += 1
        return {name: float(value.detach()) for name, value in terms.items()}

    @torch.no_grad()
    def evaluate(self) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Held-out PSNR of the averaged weights at every scale prefix, usage per scale, and rows for a sheet."""
        backup = {k: p.detach().clone() for k, p in self.trained.named_parameters()}
        parameters = dict(self.trained.named_parameters())
        for name, average in self.averages.items():
            parameters[name].copy_(average)
        found, rows = evaluate_tokenizer(self.model, self.heldout, self.schedule)
        for name, old in backup.items():
            parameters[name].copy_(old)
        usage, perplexity = self.model.quantizer.usage()
        found["usage"] = [round(float(u), 3) for u in usage]
        found["perplexity"] = [round(float(p), 1) for p in perplexity]
        return found, rows

    def fit(self) -> Path:
        """Train to the recipe's last step; returns the folder of the finished tokenizer."""
        recipe = self.recipe
        save, sheet = Every(recipe.save_seconds), Every(recipe.sheet_seconds)
        with (
            progress_bar(f"tokenizer ({recipe.trains})", recipe.steps, self.step) as update,
            stop_request() as stop,
        ):
            while self.step < recipe.steps:
                terms = self._advance()
                last = self.step == recipe.steps
                if self.step % 50 == 0 or last:
                    self.run.log(step=self.step, revived=getattr(self, "revived", 0), **terms)
                    update(self.step, " ".join(f"{k} {v:.4f}" for k, v in terms.items()))
                if sheet() or last:
                    found, rows = self.evaluate()
                    self.run.log(step=self.step, **found)
                    self.run.sheet(f"sheet_{self.step:06d}", rows)
                if save() or last or stop():
                    self.save()
                if stop() and not last:
                    raise KeyboardInterrupt
        parameters = dict(self.trained.named_parameters())
        with torch.no_grad():
            for name, average in self.averages.items():
                parameters[name].copy_(average)
        self.model.save_pretrained(recipe.out / "final")
        return recipe.out / "final"


@torch.no_grad()
def evaluate_tokenizer(
    model: ImageTokenizer, pictures: Tensor, schedule: ScaleSchedule, shown: int = 16
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Mean PSNR (dB) over uint8 pictures after each scale prefix, whole-codebook usage, and rows of pictures."""
    model.eval()
    psnrs, rows, seen = [], [pictures[:shown].numpy()], []
    codes = torch.cat([model.encode_bytes(part).target for part in pictures.split(64)])
    for k in range(1, len(schedule) + 1):
        parts = [model.decode_bytes(part, schedule, k) for part in codes.split(64)]
        decoded = torch.cat(parts)
        psnrs.append(float(psnr(decoded, pictures).mean()))
        if k in (1, 2, 4, 6, len(schedule)):
            rows.append(decoded[:shown].numpy())
    counts = torch.bincount(codes.flatten(), minlength=model.config.quantizer.codebook_size)
    seen = float((counts > 0).float().mean())
    model.train()
    return {
        "psnr": round(psnrs[-1], 2),
        "psnr_by_scale": [round(p, 2) for p in psnrs],
        "codes_used": seen,
    }, rows


def train_tokenizer(recipe: TokenizerRecipe, recipe_values: dict[str, Any]) -> Path:
    """Run one tokenizer stage, resuming from its folder; returns the finished tokenizer's folder."""
    return TokenizerTrainer(recipe, recipe_values).fit()


__all__ = ["TokenizerRecipe", "TokenizerTrainer", "evaluate_tokenizer", "psnr", "to_bytes", "train_tokenizer"]
