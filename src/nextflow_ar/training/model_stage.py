"""Training of the transformer: one loop, whose stages are recipes (paper section 3)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextflow_ar.config import ConfigError, from_dict, to_dict
from nextflow_ar.data.episodes import EpisodeSource, episode_texts
from nextflow_ar.data.loader import ShardLoader
from nextflow_ar.data.playground.mixture import SceneMixture
from nextflow_ar.model.checkpoint import Bundle, load_bundle, save_bundle
from nextflow_ar.model.flops import batch_flops
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import Batch, collate
from nextflow_ar.sequence.layout import LayoutOptions
from nextflow_ar.sequence.vocab import (
    PreTrainedTokenizerFast,
    Vocabulary,
    load_text_tokenizer,
    train_text_tokenizer,
)
from nextflow_ar.storage import write_folder
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.quantizer import SelfCorrection
from nextflow_ar.training import adapters
from nextflow_ar.training.episode_sources import EpisodeBatches, EpisodeRows
from nextflow_ar.training.memory import keep_freed_memory
from nextflow_ar.training.meters import Board, LossMeter, Speedometer, peak_of
from nextflow_ar.training.optim import StageOptimizer
from nextflow_ar.training.parallel import World
from nextflow_ar.training.recipe import CorrectionConfig, ModelRecipe, ShardSource, Source
from nextflow_ar.training.runs import Every, RunFolder, progress_bar, stop_request
from nextflow_ar.training.scenes import SceneBatches, swap_words, word_classes
from nextflow_ar.training.selftest import check_agreement, check_data, self_test
from nextflow_ar.training.trainable import choose
from nextflow_ar.types import Document

Preview = Callable[[Bundle, int], list[np.ndarray]]
"""Draws rows of pictures for a sample sheet; given by the application, since training knows no sampling."""

GENERATION_DEFAULTS: dict[str, Any] = {
    "guidance": 3.0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 0.95,
    "think": False,
}
MAY_CHANGE = (
    "out", "steps", "sheet_seconds", "save_seconds", "compile", "optimizer", "correction", "checkpointing", "peak",
    "tensorboard", "prefetch",
)  # fmt: skip
"""Keys that a resumed run may have otherwise than before."""
_CORPUS = 4000
_LOOK = 64
"""Documents of every source that the self-test looks at."""


@dataclass(frozen=True, eq=False)
class Material:
    """One source's part of a step: batches to be computed one after the other, and for every row of each, the tasks of its
    documents.
    """

    batches: tuple[Batch, ...]
    tasks: tuple[tuple[tuple[str, ...], ...], ...]


class ModelTrainer:
    """Everything a stage holds: model, averages, frozen tokenizers, optimiser, data, run folder."""

    def __init__(self, recipe: ModelRecipe, values: dict[str, Any]) -> None:
        keep_freed_memory()
        self.world = World.join()
        recipe.check(self.world.size)
        self.recipe = recipe
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self.run = RunFolder(recipe.out, values, MAY_CHANGE, known=_with_defaults)
        self.image_tokenizer = ImageTokenizer.from_pretrained(recipe.image_tokenizer, self.device)
        self.schedule = ScaleSchedule.square(self.image_tokenizer.config.num_scales)
        self.scenes = {
            i: SceneBatches(source, self.image_tokenizer)
            for i, source in enumerate(recipe.sources)
            if isinstance(source, Source)
        }
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.model, self.text_tokenizer = self._start()
        self.config = self.model.config
        self.vocab = Vocabulary(self.text_tokenizer, self.config.text_vocab, self.config.codes)
        check_agreement(self.model, self.image_tokenizer, self.vocab)
        self.word_classes = word_classes(self.vocab)
        self.layout = LayoutOptions(
            self.config.rope_range, recipe.alpha, recipe.text_weight, self.config.context_images
        )
        self.loaders = {
            i: ShardLoader(source, self.image_tokenizer, self.vocab, self.layout, self.config)
            for i, source in enumerate(recipe.sources)
            if isinstance(source, ShardSource)
        }
        episodes = {
            i: EpisodeBatches(source, self.image_tokenizer, self.vocab, self.layout, self.config)
            for i, source in enumerate(recipe.sources)
            if isinstance(source, EpisodeSource)
        }
        self.episodes = EpisodeRows(
            episodes, recipe.correction.at, self.world.rank, self.world.size, recipe.prefetch, recipe.steps
        )
        if recipe.lora is not None:
            adapters.add_adapters(self.model, recipe.lora, self.generator)
        self.model = self.model.to(self.device)
        self.trainable = choose(self.model, self.vocab, recipe)
        if recipe.checkpointing:
            self.model.checkpoint_activations()
        named = [(k, p) for k, p in self.model.named_parameters() if p.requires_grad]
        self.averages = {k: p.detach().clone() for k, p in named}
        self.optimizer = StageOptimizer(named, recipe.optimizer, self.trainable.rows)
        self.speed = Speedometer(None, self.world.size)
        self.step = self.documents = self.tokens = 0
        if (state := self.run.load()) is not None:
            self._restore(state)
        if self.world.rank == 0:
            self.run.rewind(self.step)
        if recipe.compile:
            self.model.compile_backbone()

    @property
    def mixtures(self) -> list[SceneMixture]:
        """The playground sources' scenes."""
        return [scenes.mixture for scenes in self.scenes.values()]

    def _start(self) -> tuple[NextFlowModel, PreTrainedTokenizerFast]:
        """The untrained or started model, and the text tokenizer that goes with it."""
        recipe = self.recipe
        if recipe.start is not None:
            bundle = load_bundle(recipe.start)
            if recipe.model is not None and bundle.model.config != recipe.model:
                ours, theirs = to_dict(recipe.model), to_dict(bundle.model.config)
                differ = ", ".join(sorted(k for k in ours if ours[k] != theirs[k]))
                # What is fed to the closing block is no weight: a stage may change it.
                if any(ours[k] != theirs[k] for k in ours if k not in _NO_WEIGHT):
                    raise ConfigError(
                        f"{recipe.start}: its architecture is not the recipe's (differs in {differ})"
                    )
            model = NextFlowModel(recipe.model or bundle.model.config)
            model.load_state_dict(bundle.model.state_dict())
            return model, bundle.vocab.tokenizer
        assert recipe.model is not None
        model = NextFlowModel(recipe.model)
        model.initialise(self.generator)
        codebook = self.image_tokenizer.quantizer.codebook
        if (
            codebook.shape == model.scale_inputs.code_embed.weight.shape
        ):  # the self-test tells where it is not
            model.scale_inputs.start_from(codebook.cpu())
        return model, self._text_tokenizer()

    def _text_tokenizer(self) -> PreTrainedTokenizerFast:
        """The run's own text tokenizer, trained on what the sources say; the first process makes it."""
        folder = self.recipe.out / "text_tokenizer"
        if self.world.rank == 0 and not folder.is_dir():
            self._train_text_tokenizer(folder)
        self.world.add(torch.zeros(1, device=self.device))  # all wait for it
        return load_text_tokenizer(folder)

    def _train_text_tokenizer(self, folder: Path) -> None:
        corpus = [text for scenes in self.scenes.values() for text in scenes.texts(_CORPUS)]
        for source in self.recipe.sources:
            if isinstance(source, ShardSource):
                corpus += shard_texts(source, self.image_tokenizer, _CORPUS)
            elif isinstance(source, EpisodeSource):
                corpus += episode_texts(source, _CORPUS)
        tokenizer = train_text_tokenizer(corpus, self.recipe.text_entries)

        def fill(target: Path) -> None:
            tokenizer.save_pretrained(target)

        write_folder(folder, fill)

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"], strict=self.recipe.lora is None)
        self.averages = {k: v.to(self.device) for k, v in state["averages"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]
        self.documents, self.tokens = state.get("seen", (0, 0))
        for number, loader in self.loaders.items():
            loader.restore(state["loaders"][str(number)])

    def save(self) -> None:
        """Checkpoint everything that a bit-exact resume needs (playground batches follow from the step)."""
        if self.world.rank:
            return
        model = self.model.state_dict()
        if self.recipe.lora is not None:  # the rest is in the folder that the run starts from
            model = {k: v for k, v in model.items() if k in self.averages}
        self.run.save(
            {
                "model": model,
                "averages": self.averages,
                "optimizer": self.optimizer.state_dict(),
                "generator": self.generator.get_state(),
                "step": self.step,
                "seen": (self.documents, self.tokens),
                "loaders": {str(number): loader.state() for number, loader in self.loaders.items()},
            }
        )

    def correction(self) -> SelfCorrection | None:
        """Self-correction at this step, or None while it is off."""
        return self.recipe.correction.at(self.step)

    def batch(self, number: int) -> Batch:
        """This step's batch of source ``number``; a source of shards moves on by it."""
        (batch,) = self.material(number, 1).batches
        return batch

    def material(self, number: int, parts: int) -> Material:
        """This step's rows of source ``number`` that are this process's, in so many batches."""
        source, world = self.recipe.sources[number], self.world
        if isinstance(source, ShardSource):
            rows = self.loaders[number].rows(world.rank, world.size)
            split = [rows[i::parts] for i in range(parts)]
            samples = [[row.sample for row in some] for some in split]
            widths = [source.packing.width(max(map(len, some))) for some in samples]
            batches = tuple(collate(some, width) for some, width in zip(samples, widths, strict=True))
            return Material(batches, tuple(tuple(row.tasks for row in some) for some in split))
        if isinstance(source, EpisodeSource):
            rows = self.episodes.rows(number, self.step)
            split = [rows[i::parts] for i in range(parts)]
            batches = tuple(self.episodes.sources[number].batch(some, self.step) for some in split)
            return Material(batches, tuple(tuple(row.tasks for row in some) for some in split))
        batch = self.scenes[number].batch(
            self.step, self.vocab, self.layout, self.word_classes, self.correction(), self.generator
        )
        if parts * world.size == 1:
            return Material((batch,), (((source.task,),) * source.rows,))
        step = parts * world.size
        batches = tuple(batch.part(world.rank + i * world.size, step) for i in range(parts))
        return Material(batches, (((source.task,),) * (source.rows // step),) * parts)

    def advance(self) -> dict[str, float]:
        """One step over all sources; returns losses and accuracies by scale and by task, and the gradient's norm."""
        begun, flops, seen, documents = time.perf_counter(), 0, 0, 0
        material = [self.material(i, self.recipe.accumulate) for i in range(len(self.recipe.sources))]
        parts = [(b, t) for m in material for b, t in zip(m.batches, m.tasks, strict=True)]
        weight = sum(float(batch.weights.sum()) for batch, _ in parts)
        if self.world.size > 1:
            # Gradients are averaged over processes, the loss is one over all of their tokens.
            weight = float(self.world.add(torch.tensor(weight, device=self.device))) / self.world.size
        meter = LossMeter()
        for batch, tasks in parts:
            flops += batch_flops(batch, self.config)
            seen += int((batch.documents >= 0).sum())
            documents += sum(map(len, tasks))
            batch = batch.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16):
                report = self.model.losses(batch)
            total = report.total / weight
            if not torch.isfinite(total):
                raise FloatingPointError(
                    f"the loss is not finite at step {self.step}: the last checkpoint is kept"
                )
            total.backward()
            meter.add(batch, tasks, report)
        norm = self._update()
        self.step += 1
        self.documents += documents * self.world.size
        self.tokens += seen * self.world.size
        self.speed.add(time.perf_counter() - begun, flops, seen, documents)
        return meter.values() | {"norm": norm}

    def _update(self) -> float:
        recipe = self.recipe
        self.world.average_gradients(self.model.parameters())
        idle = self.trainable.idle(self.step, self.optimizer.names)
        norm = self.optimizer.step(recipe.optimizer.factor(self.step, recipe.steps), idle)
        decay = min(recipe.ema, (1 + self.step) / (10 + self.step))
        trained = (p for p in self.model.parameters() if p.requires_grad)
        with torch.no_grad():
            for average, parameter in zip(self.averages.values(), trained, strict=True):
                average.lerp_(parameter, 1 - decay)
        return norm

    def bundle(self) -> Bundle:
        """The averaged weights as a model ready to draw (shares nothing with the one in training), adapters merged."""
        weights: dict[str, Tensor] = dict(self.model.state_dict()) | self.averages
        model = NextFlowModel(self.config)
        model.load_state_dict(
            {k.replace(".base_layer.", "."): v for k, v in weights.items() if "lora_" not in k}
        )
        if self.recipe.lora is not None:
            scaling = self.recipe.lora.alpha / self.recipe.lora.rank
            adapters.merge_into(model, adapters.adapter_weights(self.averages), scaling)
        return Bundle(
            model.to(self.device).eval().requires_grad_(False),
            self.image_tokenizer,
            self.vocab,
            dict(GENERATION_DEFAULTS),
        )

    def export(self, folder: Path, card: str) -> Path:
        """Write the averaged weights as a checkpoint folder; of adapters, themselves, as ``adapter`` beside it, too."""
        if self.recipe.lora is not None and self.recipe.start is not None:
            adapters.save_adapter(
                folder.parent / "adapter", self.averages, self.recipe.lora, self.recipe.start
            )
        bundle = self.bundle()
        save_bundle(folder, bundle.model, self.image_tokenizer, self.text_tokenizer, bundle.generation, card)
        return folder

    def documents_ahead(self) -> Iterator[Document]:
        """The first documents of every source from here on; nothing moves."""
        for number in range(len(self.recipe.sources)):
            source = self.loaders.get(number) or self.episodes.sources.get(number)
            yield from (source or self.scenes[number]).peek(_LOOK)

    def self_test(self) -> None:
        """What is checked before the first step. Raises SelfTestError, one line; logs what the data does not teach."""
        self_test(self.model, self.image_tokenizer, self.vocab, self.layout)
        check_data(self.documents_ahead())

    def fit(self, preview: Preview | None = None) -> Path:
        """Train to the recipe's last step; returns the finished checkpoint folder."""
        recipe, first = self.recipe, self.world.rank == 0
        if self.step < recipe.steps:
            self.self_test()
        self.speed = Speedometer(peak_of(recipe.peak, self.device), self.world.size)
        board = Board(recipe.out) if recipe.tensorboard and first else None
        save, sheet = Every(recipe.save_seconds), Every(recipe.sheet_seconds)
        with progress_bar("transformer", recipe.steps, self.step) as update, stop_request() as stop:
            while self.step < recipe.steps:
                found = self.advance()
                last = self.step == recipe.steps
                if (self.step % 20 == 0 or last) and first:
                    update(self.step, self._report(found, board))
                if preview is not None and first and (sheet() or last):
                    self.run.sheet(f"sheet_{self.step:06d}", preview(self.bundle(), self.step))
                if save() or last or stop():
                    self.save()
                if stop() and not last:
                    raise KeyboardInterrupt
        if board is not None:
            board.close()
        self.episodes.close()
        if first:
            card = f"# {recipe.out.name}\n\nTrained for {self.step} steps.\n"
            self.export(recipe.out / "final", card)
        self.world.leave()
        return recipe.out / "final"

    def _report(self, found: dict[str, float], board: Board | None) -> str:
        """Write a line of metrics; returns the progress bar's note."""
        speed = self.speed.read()
        counts = {"documents": self.documents, "tokens": self.tokens}
        if self.loaders or self.episodes.sources:
            counts["skipped"] = sum(loader.skipped for loader in self.loaders.values())
            counts["skipped"] += self.episodes.skipped
        self.run.log(step=self.step, **counts, **speed, **found)
        if board is not None:
            board.log(self.step, counts | speed | found)
        return f"loss {found['loss']:.3f} text {found.get('text', 0.0):.3f} {speed['tokens_per_s']:.0f} tok/s"


_NO_WEIGHT = ("closing_input", "scale_input", "rope_range", "rope_theta", "rope", "max_positions", "rms_eps")
"""Keys of the architecture that no weight's shape follows from: a stage may differ in them from what it starts from."""


def shard_texts(source: ShardSource, tokenizer: ImageTokenizer, count: int) -> list[str]:
    """Texts of the first rows of every extraction of a source, to train a text tokenizer on."""
    from nextflow_ar.data.extraction import CodeShards

    return [t for f in source.folders for t in CodeShards(f.folder, tokenizer).texts(count)]


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe of an earlier version with the keys that came later."""
    return to_dict(from_dict(ModelRecipe, values))


def train_model(recipe: ModelRecipe, recipe_values: dict[str, Any], preview: Preview | None = None) -> Path:
    """Run one stage, resuming from its folder; returns the finished checkpoint folder."""
    return ModelTrainer(recipe, recipe_values).fit(preview)


__all__ = [
    "CorrectionConfig",
    "Material",
    "ModelRecipe",
    "ModelTrainer",
    "Preview",
    "Source",
    "swap_words",
    "train_model",
    "word_classes",
]
