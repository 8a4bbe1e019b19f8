"""Training of the image tokenizer in the paper's three stages (section 2): pixel branch, both jointly, larger decoder.

One loop runs all of them; a recipe says which part trains, on which pictures, by which losses.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nextflow_ar.config import ConfigError
from nextflow_ar.data.pictures import PictureBatch, PictureMixture
from nextflow_ar.precision import mixed_precision, precision_name
from nextflow_ar.storage import write_atomic
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.losses import (
    PatchDiscriminator,
    Perceptual,
    adaptive_weight,
    feature_distance,
    hinge_discriminator,
    hinge_generator,
    lpips_distance,
    semantic_distance,
    structure_distance,
)
from nextflow_ar.tokenizer.metrics import frechet_distance, psnr, ssim
from nextflow_ar.tokenizer.pixels import to_unit
from nextflow_ar.tokenizer.quantizer import Trace
from nextflow_ar.tokenizer.semantic import SemanticEncoder
from nextflow_ar.training.bound import SEMANTIC, check_bound, module_print
from nextflow_ar.training.crew import Crew
from nextflow_ar.training.growth import start_from, without_semantics
from nextflow_ar.training.memory import keep_freed_memory
from nextflow_ar.training.optim import StageOptimizer
from nextflow_ar.training.parallel import World
from nextflow_ar.training.prefetch import Ahead
from nextflow_ar.training.runs import Every, Pace, RunFolder, Stopped, progress_bar, stop_request
from nextflow_ar.training.sharded import move_averages
from nextflow_ar.training.tokenizer_recipe import ScaleDropout, TokenizerLoss, TokenizerRecipe

T = TypeVar("T")
Told = tuple[PictureBatch, dict[str, str]]
"""A batch, and which files turned out to be unreadable on the way to it: file -> why."""
_AVERAGES = ("ema_count", "ema_sum", "scale_counts")
"""Of the quantiser, what its state dict lacks."""


class TokenizerTrainer:
    """Everything one stage holds: model, averages, optimisers, data, run folder."""

    def __init__(self, recipe: TokenizerRecipe, values: dict[str, Any], seconds: float | None = None) -> None:
        keep_freed_memory()
        recipe.check()
        self.recipe = recipe
        self.world = World.join()
        self.pace = Pace(recipe.steps, seconds, self.world.size)
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        torch.manual_seed(recipe.seed)
        size = recipe.tokenizer.downsample
        self.data = PictureMixture(recipe.data, recipe.pixels, size, recipe.seed)
        self.heldout = {
            name: PictureMixture({name: source}, recipe.heldout_pixels, size, 0, strict=False).batch(0)
            for name, source in recipe.heldout.items()
        }
        free = ("out", "steps", "sheet_seconds", "save_seconds", "prefetch", "workers", "precision")
        self.run = RunFolder(recipe.out, values, free)
        self.teacher = self._teacher()
        self.model = self._model().to(self.device)
        self.joint = recipe.trains != "decoder"
        if not self.joint:
            self.model.requires_grad_(False)
            self.model.decoder.requires_grad_(True)
        elif recipe.codebook.kind == "gradient":
            self.model.quantizer.learn_by_gradient()
        named = [(k, p) for k, p in self.model.named_parameters() if p.requires_grad]
        # A revived code jumps; its average would lag behind, so codes are never averaged.
        self.averages = {k: p.detach().clone() for k, p in named if k != "quantizer.codebook"}
        self.optimizer = StageOptimizer(named, recipe.optimizer)
        self.perceptual = self._perceptual()
        self.discriminator = None
        if recipe.loss.adversarial:
            self.discriminator = PatchDiscriminator(recipe.loss.discriminator_channels).to(self.device)
            config = replace(recipe.optimizer, muon_lr=0.0)
            self.critic = StageOptimizer(self.discriminator.named_parameters(), config)
        self.generator = torch.Generator().manual_seed(recipe.seed + self.world.rank)
        self.step = self.revived = 0
        self.broken: dict[str, str] = {}
        """Files that were passed over so far, by any process as far as it has said so, and why."""
        self._unsaid: dict[str, str] = {}
        # Number of the batch that the first process has at step 0, were there always as many processes.
        self._first = 0
        self.bound = {} if self.teacher is None else {SEMANTIC: module_print(self.teacher)}
        if (state := self.run.load()) is not None:
            self._restore(state)
        place = self._first + self.world.rank, self.world.size
        self._batch = _telling(self.data, *place)
        self._ahead = Ahead(self._batch, self.pace.steps) if recipe.prefetch and not recipe.workers else None
        self._crew: Crew[Told] | None = None
        if recipe.workers:
            self._crew = Crew(partial(_picturing, recipe, *place), self.pace.steps, recipe.workers)
        self._embed, self._render = self.model.embed, self.model.render
        if recipe.compile:
            self._embed, self._render = torch.compile(self._embed), torch.compile(self._render)

    def _teacher(self) -> SemanticEncoder | None:
        if self.recipe.teacher is None:
            return None
        asked = self.recipe.tokenizer.semantic
        teacher, found = SemanticEncoder.from_pretrained(
            self.recipe.teacher, asked.decoder_layers if asked else 1
        )
        if asked is not None and found != asked:
            raise ConfigError(
                f"{self.recipe.teacher}: the teacher is {found}, tokenizer.semantic says {asked}"
            )
        return teacher.to(self.device)

    def _model(self) -> ImageTokenizer:
        recipe = self.recipe
        model = ImageTokenizer(recipe.tokenizer)
        if recipe.trains == "joint" and self.teacher is not None and model.semantic_encoder is not None:
            model.semantic_encoder.load_state_dict(self.teacher.state_dict())
        if recipe.start is not None:
            larger = {"pixel": (), "joint": ("encoder", "decoder"), "decoder": ("decoder",)}[recipe.trains]
            old = ImageTokenizer.from_pretrained(recipe.start)
            if recipe.fresh_semantics and old.config.semantic is not None:
                old = without_semantics(old)
            start_from(model, old, larger)
        return model

    def _perceptual(self) -> Perceptual | None:
        if not self.recipe.loss.perceptual:
            return None
        if self.recipe.loss.perceptual_kind == "lpips":
            return lpips_distance()
        assert self.teacher is not None
        return feature_distance(self.teacher)

    def _restore(self, state: dict[str, Any]) -> None:
        check_bound(state.get("bound", {}), self.bound, self.recipe.out)
        self.model.load_state_dict(state["model"])
        q, averages = self.model.quantizer, state["quantizer"]
        for name in _AVERAGES:
            getattr(q, name).copy_(averages[name])
        q.ema_weight = averages.get("ema_weight", 1.0)  # older checkpoints: as if the zeros were long past
        self.averages = {k: v.to(self.device) for k, v in state["averages"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.critic.load_state_dict(state["critic"])
        self.step, size = state["step"], self.world.size
        self.broken = dict(state.get("broken", {}))  # older checkpoints: only what is found from here on
        # As many processes may not have made the steps before: none of their batches comes again, none is left out.
        self._first = state.get("batches", self.step * size) - self.step * size
        # One state per process; a single one where one process ran, and of older checkpoints. A process that has none
        # there draws numbers of its own, not the first one's again.
        states, rank = state.get("generators", [state["generator"]]), self.world.rank
        if rank < len(states):
            self.generator.set_state(states[rank])
        else:
            self.generator.manual_seed(self.recipe.seed + rank + self.world.size * self.step)

    def save(self) -> None:
        """Checkpoint everything that a bit-exact resume needs. All processes call this together, and none returns before
        it is written. Raises StorageError, on every one, where it cannot be.
        """
        states = self._exchange(self.generator.get_state())
        self.run.save_together(self.world, lambda: self._state(states))

    def _state(self, generators: list[Tensor]) -> dict[str, Any]:
        if self.broken:
            write_atomic(self.run.path / "broken.json", json.dumps(self.broken, indent=1).encode())
        q = self.model.quantizer
        state = {
            "model": self.model.state_dict(),
            "quantizer": {name: getattr(q, name) for name in _AVERAGES} | {"ema_weight": q.ema_weight},
            "averages": self.averages,
            "optimizer": self.optimizer.state_dict(),
            "generator": generators[0],
            "step": self.step,
            "batches": self._first + self.step * self.world.size,
            "bound": self.bound,
            "broken": self.broken,
        }
        if self.world.size > 1:
            state["generators"] = generators
        if self.discriminator is not None:
            state["discriminator"] = self.discriminator.state_dict()
            state["critic"] = self.critic.state_dict()
        return state

    def _exchange(self, said: T) -> list[T]:
        """What every process says, by rank; they also learn from one another which files cannot be read."""
        found = self.world.gather((said, self._unsaid))
        self._unsaid = {}
        for _, broken in found:
            self.broken |= broken
        return [theirs for theirs, _ in found]

    def losses(self, batch: PictureBatch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Weighted loss terms of one batch, the pictures and what was made of them; moves the codebook where it trains."""
        recipe, weights, q = self.recipe, self.recipe.loss, self.model.quantizer
        pixels = to_unit(torch.from_numpy(batch.pictures).to(self.device))
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        share = self.data.sources[batch.source].dropout
        mask = recipe.dropout.mask(len(pixels), len(batch.schedule), self.generator, share).to(self.device)
        with torch.set_grad_enabled(self.joint), self._autocast():
            features = self._embed(pixels)
        trace: Trace = []
        skip = recipe.dropout.kind == "independent"
        quantized = q.quantize(features, batch.schedule, mask=mask, skip=skip, trace=trace)
        terms: dict[str, Tensor] = {}
        straight = quantized.features
        if self.joint:
            self.revived = q.learn(
                trace,
                decay=recipe.codebook.decay,
                revive_below=recipe.codebook.revive_below,
                generator=self.generator,
                add=self.world.add,
                share=self.world.share,
            )
            straight = features + (quantized.features - features).detach()
            terms["commitment"] = F.mse_loss(features, quantized.features) * weights.commitment
            if weights.codebook:
                summed = q.accumulate(quantized.target, batch.schedule, mask=mask)
                terms["codebook"] = F.mse_loss(summed, features.detach()) * weights.codebook
            if weights.entropy:
                found = q.uncertainty(features, quantized.target, batch.schedule, generator=self.generator)
                terms["entropy"] = found * weights.entropy
        with self._autocast():
            out = self._render(straight)
        out = out.float()
        terms["mse"] = F.mse_loss(out, pixels) * weights.mse
        terms["l1"] = F.l1_loss(out, pixels) * weights.l1
        if weights.ssim:
            terms["ssim"] = structure_distance(out, pixels) * weights.ssim
        if self.perceptual is not None:
            with self._autocast():
                terms["perceptual"] = self.perceptual(out, pixels) * weights.perceptual
        if self.joint and weights.semantic and self.teacher is not None:
            with self._autocast():
                with torch.no_grad():
                    goal = self.teacher(pixels)
                read = self.model.semantics(straight)
            terms["semantic"] = semantic_distance(read, goal, weights.semantic_kind) * weights.semantic
        return terms, pixels, out

    def _autocast(self) -> torch.autocast:
        return mixed_precision(self.device, self.recipe.precision)

    def _adversarial(self, terms: dict[str, Tensor], out: Tensor) -> None:
        """Add the generator's side of the PatchGAN, weighted so that it pulls as hard as the reconstruction."""
        if self.discriminator is None or self.step < self.recipe.loss.adversarial_start:
            return
        last = self.model.decoder.last_weight
        drawn = torch.stack([terms[k] for k in ("mse", "l1", "ssim", "perceptual") if k in terms]).sum()
        self.discriminator.requires_grad_(False)
        with self._autocast():
            term = hinge_generator(self.discriminator(out))
        self.discriminator.requires_grad_(True)
        terms["adversarial"] = term * adaptive_weight(drawn, term, last) * self.recipe.loss.adversarial

    def _criticise(self, pixels: Tensor, out: Tensor, factor: float) -> float:
        assert self.discriminator is not None
        with self._autocast():
            scores = self.discriminator(pixels), self.discriminator(out.detach())
        loss = hinge_discriminator(*scores)
        loss.backward()
        self.world.average_gradients(self.discriminator.parameters())
        self._stop_if_broken("the critic's loss", loss, self.critic.step(factor))
        return float(loss.detach())

    def _stop_if_broken(self, what: str, loss: Tensor, norm: Tensor) -> None:
        finite = torch.isfinite(loss.detach()) & torch.isfinite(norm)
        if self.world.any(not finite):  # for all: the others would wait for ever
            raise FloatingPointError(
                f"{what} or its gradient is not finite at step {self.step}: the last checkpoint is kept"
            )

    def batch(self) -> PictureBatch:
        """This step's."""
        if self._crew is not None:
            batch, broken = self._crew.get(self.step)
        else:
            batch, broken = self._batch(self.step) if self._ahead is None else self._ahead.get(self.step)
        self._unsaid |= broken
        return batch

    def advance(self) -> dict[str, float]:
        """One step; returns this process's loss terms. Raises FloatingPointError, naming the step, where the loss, its
        gradient or one of the critic's is not finite on any process; what the step has changed is not to be saved.
        """
        recipe = self.recipe
        batch = self.batch()
        factor = recipe.optimizer.factor(self.step, self.pace.steps)
        terms, pixels, out = self.losses(batch)
        self._adversarial(terms, out)
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        self.world.average_gradients(self.optimizer.parameters)
        norm = self.optimizer.step(factor)
        # A gradient may overflow behind a loss that is finite: nothing that it touched is saved.
        self._stop_if_broken("the loss", loss, norm)
        told = torch.stack([value.detach() for value in terms.values()]).tolist()
        found = dict(zip(terms, told, strict=True)) | {"norm": float(norm)}
        if self.discriminator is not None and self.step >= recipe.loss.adversarial_start:
            found["critic"] = self._criticise(pixels, out, factor)
        decay = min(recipe.ema, (1 + self.step) / (10 + self.step))
        move_averages(self.averages, dict(self.model.named_parameters()), decay)
        self.step += 1
        return found

    @torch.no_grad()
    def _averaged(self) -> dict[str, Tensor]:
        """Put the averages into the model; returns what was there."""
        parameters = dict(self.model.named_parameters())
        backup = {k: parameters[k].detach().clone() for k in self.averages}
        for name, average in self.averages.items():
            parameters[name].copy_(average)
        return backup

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Held-out scores of the averaged weights by set, usage per scale; writes a sheet per set."""
        backup = self._averaged()
        found: dict[str, Any] = {}
        for name, batch in self.heldout.items():
            scores, rows = evaluate_tokenizer(self.model, batch, self.teacher)
            found |= {f"{name}_{key}": value for key, value in scores.items()}
            zoom = 2 if batch.pictures.shape[1] <= 64 else 1
            self.run.sheet(f"sheet_{self.step:06d}_{name}", rows, zoom)
        self.model.load_state_dict(backup, strict=False)
        usage, perplexity = self.model.quantizer.usage()
        found["usage"] = [round(float(u), 3) for u in usage]
        found["perplexity"] = [round(float(p), 1) for p in perplexity]
        return found

    def _tell(self, terms: dict[str, float], update: Callable[[int, str], None]) -> None:
        """Log the step: the mean terms of all processes, who call this together. ``update``: the progress bar's."""
        every = self._exchange(terms)
        if self.world.rank:
            return
        means = {name: sum(theirs[name] for theirs in every) / len(every) for name in terms}
        # Codes are revived by the counts of all processes, so each of them has the whole number.
        self.run.log(step=self.step, revived=self.revived, broken=len(self.broken), **means)
        update(self.step, " ".join(f"{k} {v:.4f}" for k, v in means.items() if v))

    def fit(self) -> Path:
        """Train to the recipe's last step; returns the folder of the finished tokenizer."""
        recipe, first = self.recipe, self.world.rank == 0
        if first:
            self.run.rewind(self.step)
            recipe.optimizer.warn(self.pace.steps)
        save, sheet = Every(recipe.save_seconds), Every(recipe.sheet_seconds)
        told = precision_name(self.device, recipe.precision)
        bar = progress_bar(f"tokenizer ({recipe.trains}, {told})", recipe.steps, self.step, shown=first)
        with bar as update, stop_request() as stop:
            while self.step < self.pace.steps:
                terms = self.advance()
                self.pace.passed(self.step)
                last = self.step == self.pace.steps
                if self.step % 50 == 0 or last:
                    self._tell(terms, update)
                asked = self.world.any(stop())  # a signal may reach one process a step before the others
                if self.world.any(first and save()) or last or asked:
                    self.save()
                if first and (sheet() or last):
                    self.run.log(step=self.step, **self.evaluate())
                if asked and not last:
                    raise Stopped(self.step, recipe.out)
        for maker in (self._ahead, self._crew):
            if maker is not None:
                maker.close()
        self._averaged()
        if first:
            self.model.save_pretrained(recipe.out / "final")
        self.world.leave()
        return recipe.out / "final"


def _telling(data: PictureMixture, first: int, processes: int) -> Callable[[int], Told]:
    """What makes a step's batch, ``processes`` after the step before's, and tells of every unreadable file once."""
    told: set[str] = set()

    def make(step: int) -> Told:
        batch = data.batch(first + step * processes)
        broken = {path: why for path, why in data.broken().items() if path not in told}
        told.update(broken)
        return batch, broken

    return make


def _picturing(recipe: TokenizerRecipe, first: int, processes: int) -> Callable[[int], Told]:
    """:func:`_telling` in a process of its own."""
    data = PictureMixture(recipe.data, recipe.pixels, recipe.tokenizer.downsample, recipe.seed)
    return _telling(data, first, processes)


@torch.no_grad()
def evaluate_tokenizer(
    model: ImageTokenizer, batch: PictureBatch, extractor: SemanticEncoder | None = None, shown: int = 12
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """PSNR (dB) and SSIM, PSNR after each scale prefix, share of codes used, Fréchet distance over the extractor's mean
    features; and rows of pictures: originals, then prefixes of 1, 2, 4, ... and all scales.
    """
    model.eval()
    device, schedule = model.device, batch.schedule
    pictures = torch.from_numpy(batch.pictures)
    part = max(1, (1 << 18) // (pictures.shape[1] * pictures.shape[2]))
    codes = torch.cat([model.quantize(to_unit(p.to(device)), schedule).target for p in pictures.split(part)])
    psnrs, rows = [], [batch.pictures[:shown]]
    for k in range(1, len(schedule) + 1):
        decoded = torch.cat([model.decode_bytes(c, schedule, k).cpu() for c in codes.split(part)])
        psnrs.append(float(psnr(decoded, pictures).mean()))
        if k in (1, 2, 4, 6, len(schedule)):
            rows.append(decoded[:shown].numpy())
    similar = torch.cat([ssim(a, b) for a, b in zip(decoded.split(part), pictures.split(part), strict=True)])
    used = torch.bincount(codes.flatten(), minlength=model.config.quantizer.codebook_size) > 0
    model.train()
    found = {
        "psnr": round(psnrs[-1], 2),
        "ssim": round(float(similar.mean()), 4),
        "psnr_by_scale": [round(p, 2) for p in psnrs],
        "codes_used": round(float(used.float().mean()), 4),
    }
    if extractor is not None:
        means = [
            torch.cat([extractor(to_unit(p.to(device))).mean((2, 3)).cpu() for p in x.split(part)])
            for x in (pictures, decoded)
        ]
        found["frechet_teacher"] = round(frechet_distance(*means), 4)
    return found, rows


def train_tokenizer(recipe: TokenizerRecipe, values: dict[str, Any], seconds: float | None = None) -> Path:
    """Run one tokenizer stage, resuming from its folder; returns the finished tokenizer's folder."""
    return TokenizerTrainer(recipe, values, seconds).fit()


__all__ = [
    "ScaleDropout",
    "TokenizerLoss",
    "TokenizerRecipe",
    "TokenizerTrainer",
    "evaluate_tokenizer",
    "train_tokenizer",
]
