"""Training of the transformer: one loop, whose stages are recipes (paper section 3)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor

from nextflow_ar.config import ModelConfig
from nextflow_ar.data.playground.mixture import MixtureConfig, SceneMixture
from nextflow_ar.data.tasks import WORD_CLASSES, TaskName, caption_corpus, document, plan_document
from nextflow_ar.model.checkpoint import Bundle, load_bundle, save_bundle
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import Batch, collate
from nextflow_ar.sequence.layout import TEXT_SCALE, LayoutOptions, build
from nextflow_ar.sequence.vocab import (
    PreTrainedTokenizerFast,
    Vocabulary,
    load_text_tokenizer,
    train_text_tokenizer,
)
from nextflow_ar.storage import write_folder
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.quantizer import SelfCorrection
from nextflow_ar.training.memory import keep_freed_memory
from nextflow_ar.training.optim import OptimizerConfig, StageOptimizer
from nextflow_ar.training.runs import Every, RunFolder, progress_bar, stop_request
from nextflow_ar.types import Codes, Document

Preview = Callable[[Bundle, int], list[np.ndarray]]
"""Draws rows of pictures for a sample sheet; given by the application, since training knows no sampling."""

GENERATION_DEFAULTS: dict[str, Any] = {
    "guidance": 3.0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 0.95,
    "think": False,
}


@dataclass(frozen=True)
class Source:
    """Part of every step's batch: ``rows`` documents of one task, padded to ``length`` tokens (more where one is longer).

    ``scales``: drawings are laid out up to this scale only (null: whole). The coarse scales decide what is drawn where;
    prefixes show many more of them in the same time. ``swap``: share of the colours and of the names in a response that
    are fed as another colour or name, targets unchanged, so that the next word has to follow from the picture or the
    prompt, not from the word before it. Not for responses that a picture follows: it would stop following its plan.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    task: TaskName
    rows: int
    length: int
    data: MixtureConfig
    scales: int | None = None
    swap: float = 0.0

    def __post_init__(self) -> None:
        if self.swap and self.task in ("text_to_image", "think_to_image"):
            raise ValueError(f"swap is for responses in words, not for {self.task}")
        if not 0 <= self.swap <= 1:
            raise ValueError(f"swap is a share from 0 to 1, got {self.swap}")


@dataclass(frozen=True)
class CorrectionConfig:
    """Self-correction of input codes: ``share`` of the cells from step ``start`` on, reached over ``ramp`` steps."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    share: float
    top_k: int
    temperature: float
    start: int
    ramp: int


@dataclass(frozen=True)
class ModelRecipe:
    """Recipe of one training stage of the transformer. ``start``: a checkpoint folder to go on from, or null.

    ``alpha``: scale reweighting. ``text_weight``: loss weight of a text token (an image token's mean is 1).
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: str
    out: Path
    seed: int
    image_tokenizer: Path
    text_entries: int
    start: Path | None
    steps: int
    alpha: float
    text_weight: float
    ema: float
    compile: bool
    sheet_seconds: float
    save_seconds: float
    optimizer: OptimizerConfig
    correction: CorrectionConfig
    sources: tuple[Source, ...]
    model: ModelConfig


class ModelTrainer:
    """Everything a stage holds: model, averages, frozen tokenizers, optimiser, data, run folder."""

    def __init__(self, recipe: ModelRecipe, values: dict[str, Any]) -> None:
        keep_freed_memory()
        self.recipe = recipe
        free = ("out", "steps", "sheet_seconds", "save_seconds", "compile", "optimizer", "correction")
        self.run = RunFolder(recipe.out, values, free)
        self.image_tokenizer = ImageTokenizer.from_pretrained(recipe.image_tokenizer)
        self.schedule = ScaleSchedule.square(self.image_tokenizer.config.num_scales)
        self.mixtures = [SceneMixture(source.data) for source in recipe.sources]
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.model = NextFlowModel(recipe.model)
        if recipe.start is not None:
            bundle = load_bundle(recipe.start)
            self.model.load_state_dict(bundle.model.state_dict())
            self.text_tokenizer = bundle.vocab.tokenizer
        else:
            self.model.initialise(self.generator)
            self.model.scale_inputs.start_from(self.image_tokenizer.quantizer.codebook)
            self.text_tokenizer = self._text_tokenizer()
        self.vocab = Vocabulary(self.text_tokenizer, recipe.model.text_vocab, recipe.model.codes)
        self.word_classes = word_classes(self.vocab)
        self.layout = LayoutOptions(
            recipe.model.rope_range, recipe.alpha, recipe.text_weight, recipe.model.context_images
        )
        self.averages = {k: p.detach().clone() for k, p in self.model.named_parameters()}
        self.optimizer = StageOptimizer(self.model.named_parameters(), recipe.optimizer)
        self.step = 0
        if (state := self.run.load()) is not None:
            self._restore(state)
        if recipe.compile:
            self.model.compile_backbone()

    def _text_tokenizer(self) -> PreTrainedTokenizerFast:
        folder = self.recipe.out / "text_tokenizer"
        if folder.is_dir():
            return load_text_tokenizer(folder)
        corpus = [text for mixture in self.mixtures for text in caption_corpus(mixture, 4000)]
        tokenizer = train_text_tokenizer(corpus, self.recipe.text_entries)

        def fill(target: Path) -> None:
            tokenizer.save_pretrained(target)

        write_folder(folder, fill)
        return tokenizer

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.averages = state["averages"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]

    def save(self) -> None:
        """Checkpoint everything that a bit-exact resume needs (batches follow from the step)."""
        self.run.save(
            {
                "model": self.model.state_dict(),
                "averages": self.averages,
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "step": self.step,
            }
        )

    def correction(self) -> SelfCorrection | None:
        """Self-correction at this step, or None while it is off."""
        c = self.recipe.correction
        reached = min(1.0, max(0.0, (self.step - c.start) / max(1, c.ramp)))
        share = c.share * reached
        return SelfCorrection(share, c.top_k, c.temperature) if share > 0 else None

    @torch.no_grad()
    def batch(self, number: int) -> Batch:
        """This step's batch of source ``number``: scenes, codes, documents, sequences."""
        source, mixture = self.recipe.sources[number], self.mixtures[number]
        numbers = range(self.step * source.rows, (self.step + 1) * source.rows)
        if source.task == "plan":
            documents = [plan_document(mixture, i) for i in numbers]
        else:
            documents = self._drawn(source, mixture, numbers)
        samples = [build(d, self.vocab, self.layout) for d in documents]
        longest = max(len(sample) for sample in samples)
        # A rare long text must not end a run; steps of 32 keep the number of compiled shapes small.
        batch = collate(samples, source.length if longest <= source.length else -(-longest // 32) * 32)
        return swap_words(batch, source.swap, self.word_classes, self.generator)

    def _drawn(self, source: Source, mixture: SceneMixture, numbers: range) -> list[Document]:
        scenes, pictures = mixture.pictures(numbers.start, len(numbers))
        with torch.autocast("cpu", torch.bfloat16):
            codes = self.image_tokenizer.quantizer.quantize(
                self.image_tokenizer.embed(_pixels(pictures)),
                self.schedule,
                correction=self.correction(),
                generator=self.generator,
            )
        pairs = [Codes(self.schedule, codes.target[i], codes.input[i]) for i in range(len(scenes))]
        return [
            document(source.task, scene, pair, mixture, i, source.scales)
            for i, scene, pair in zip(numbers, scenes, pairs, strict=True)
        ]

    def advance(self) -> dict[str, float]:
        """One step over all sources; returns loss, per-scale and text losses, captions' token accuracy."""
        batches = [self.batch(i) for i in range(len(self.recipe.sources))]
        weight = sum(float(b.weights.sum()) for b in batches)
        losses, scales, right = [], [], []
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                report = self.model.losses(batch)
            total = report.total / weight
            if not torch.isfinite(total):
                raise FloatingPointError(
                    f"the loss is not finite at step {self.step}: the last checkpoint is kept"
                )
            total.backward()
            losses.append(report.losses)
            scales.append(report.scales)
            right.append(report.right)
        norm = self.optimizer.step(self.recipe.optimizer.factor(self.step, self.recipe.steps))
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for average, parameter in zip(self.averages.values(), self.model.parameters(), strict=True):
                average.lerp_(parameter, 1 - decay)
        self.step += 1
        return _by_scale(torch.cat(losses), torch.cat(scales), torch.cat(right)) | {"norm": norm}

    def bundle(self) -> Bundle:
        """The averaged weights as a model ready to draw (shares nothing with the one in training)."""
        model = NextFlowModel(self.recipe.model)
        model.load_state_dict(self.model.state_dict())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.averages[name])
        return Bundle(
            model.eval().requires_grad_(False), self.image_tokenizer, self.vocab, dict(GENERATION_DEFAULTS)
        )

    def export(self, folder: Path, card: str) -> Path:
        """Write the averaged weights as a checkpoint folder."""
        bundle = self.bundle()
        save_bundle(folder, bundle.model, self.image_tokenizer, self.text_tokenizer, bundle.generation, card)
        return folder

    def fit(self, preview: Preview | None = None) -> Path:
        """Train to the recipe's last step; returns the finished checkpoint folder."""
        recipe = self.recipe
        save, sheet = Every(recipe.save_seconds), Every(recipe.sheet_seconds)
        rows = sum(source.rows for source in recipe.sources)
        started, first = time.time(), self.step
        with progress_bar("transformer", recipe.steps, self.step) as update, stop_request() as stop:
            while self.step < recipe.steps:
                found = self.advance()
                last = self.step == recipe.steps
                if self.step % 20 == 0 or last:
                    speed = rows * (self.step - first) / (time.time() - started)
                    self.run.log(
                        step=self.step, images=self.step * rows, images_per_s=round(speed, 1), **found
                    )
                    update(
                        self.step,
                        f"loss {found['loss']:.3f} text {found.get('text', 0.0):.3f} {speed:.0f} img/s",
                    )
                if preview is not None and (sheet() or last):
                    self.run.sheet(f"sheet_{self.step:06d}", preview(self.bundle(), self.step))
                if save() or last or stop():
                    self.save()
                if stop() and not last:
                    raise KeyboardInterrupt
        return self.export(recipe.out / "final", f"# {recipe.out.name}\n\nTrained for {self.step} steps.\n")


def word_classes(vocab: Vocabulary) -> list[Tensor]:
    """Ids of the words of every class of WORD_CLASSES that are one token within a sentence; classes of one are left out."""
    classes = [[ids[0] for w in words if len(ids := vocab.encode(" " + w)) == 1] for words in WORD_CLASSES]
    return [torch.tensor(ids) for ids in classes if len(ids) > 1]


def swap_words(batch: Batch, share: float, classes: list[Tensor], generator: torch.Generator) -> Batch:
    """The batch with ``share`` of each class's words in its responses fed as another word of the class.

    A response word is one that the place before it learns to predict. Targets, weights and images stay.
    """
    if share <= 0:
        return batch
    told = torch.zeros_like(batch.tokens, dtype=torch.bool)
    told[:, 1:] = (batch.targets[:, :-1] == batch.tokens[:, 1:]) & (batch.scales[:, 1:] == TEXT_SCALE)
    tokens = batch.tokens.clone()
    for ids in classes:
        chosen = told & torch.isin(batch.tokens, ids)
        chosen &= torch.rand(tokens.shape, generator=generator) < share
        tokens[chosen] = ids[torch.randint(len(ids), (int(chosen.sum()),), generator=generator)]
    return replace(batch, tokens=tokens)


def _pixels(pictures: np.ndarray) -> Tensor:
    from nextflow_ar.tokenizer.pixels import to_unit

    return to_unit(torch.from_numpy(pictures)).contiguous(memory_format=torch.channels_last)


def _by_scale(losses: Tensor, scales: Tensor, right: Tensor) -> dict[str, float]:
    image = scales >= 0
    out = {"loss": float(losses[image].mean()) if bool(image.any()) else float(losses.mean())}
    for scale in scales.unique().tolist():
        on = scales == scale
        out["text" if scale < 0 else f"scale_{scale + 1}"] = float(losses[on].mean())
        if scale < 0:
            out["text_right"] = float(right[on].float().mean())
    return out


def train_model(recipe: ModelRecipe, recipe_values: dict[str, Any], preview: Preview | None = None) -> Path:
    """Run one stage, resuming from its folder; returns the finished checkpoint folder."""
    return ModelTrainer(recipe, recipe_values).fit(preview)
