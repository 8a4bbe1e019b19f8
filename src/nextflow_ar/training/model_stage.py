"""Training of the transformer: one loop, whose stages are recipes (paper section 3)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nextflow_ar.config import ModelConfig
from nextflow_ar.data.episodes import EpisodeSource
from nextflow_ar.data.loader import ShardLoader
from nextflow_ar.model.checkpoint import Bundle, load_architecture, load_bundle, load_generation, save_bundle
from nextflow_ar.model.flops import batch_flops
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.precision import best_dtype, mixed_precision, precision_name
from nextflow_ar.sequence.batch import Batch, collate
from nextflow_ar.sequence.layout import LayoutOptions
from nextflow_ar.sequence.vocab import PreTrainedTokenizerFast, Vocabulary, load_text_tokenizer
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.quantizer import SelfCorrection
from nextflow_ar.training import adapters, selftest
from nextflow_ar.training.bound import bindings, check_bound
from nextflow_ar.training.carrying import carry_from
from nextflow_ar.training.distributed_checkpoint import export_bundle
from nextflow_ar.training.episode_feed import Drafting, EpisodeFeed
from nextflow_ar.training.episode_sources import Place
from nextflow_ar.training.material import CORPUS, Part, as_parts, own_tokenizer, taught_defaults
from nextflow_ar.training.memory import keep_freed_memory
from nextflow_ar.training.meters import Board, LossMeter, Speedometer, peak_of
from nextflow_ar.training.new_words import new_rows
from nextflow_ar.training.optim import StageOptimizer
from nextflow_ar.training.parallel import World
from nextflow_ar.training.recipe import (
    GENERATION_DEFAULTS,
    MAY_CHANGE,
    ModelRecipe,
    ShardSource,
    Source,
    in_dialogue,
    with_defaults,
)
from nextflow_ar.training.runs import Every, Pace, RunFolder, Stopped, progress_bar, stop_request
from nextflow_ar.training.scenes import SceneBatches, swap_words, word_classes
from nextflow_ar.training.sharded import move_averages, start_averages, trained
from nextflow_ar.training.sharded_optim import ShardedOptimizer
from nextflow_ar.training.sharded_stage import Shards, State
from nextflow_ar.training.taught import Taught
from nextflow_ar.training.trainable import Trainable, agreed, begin_with, choose, passes
from nextflow_ar.types import Document

Preview = Callable[[Bundle, int], list[np.ndarray]]
"""Draws rows of pictures for a sample sheet; given by the application, since training knows no sampling."""

_LOG = logging.getLogger(__name__)
_TOLD = 20
"""Steps from one line of metrics to the next."""


class ModelTrainer:
    """Everything a stage holds: model, averages, frozen tokenizers, optimiser, data, run folder."""

    _unseen: tuple[int, Tensor] | None = None  # a step whose loss nobody has looked at yet

    def __init__(self, recipe: ModelRecipe, values: dict[str, Any], seconds: float | None = None) -> None:
        keep_freed_memory()
        self.world = World.join()
        self.pace = Pace(recipe.steps, seconds, self.world.size)
        recipe.check(self.world.size)
        self.recipe = recipe
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        spread = recipe.sharding
        self.run = RunFolder(recipe.out, values, MAY_CHANGE, with_defaults, spread is not None)
        self.shards = None if spread is None else Shards(spread, self.world, recipe.out)
        self.image_tokenizer = ImageTokenizer.from_pretrained(recipe.image_tokenizer, self.device)
        self.scenes = {
            i: SceneBatches(source, self.image_tokenizer)
            for i, source in enumerate(recipe.sources)
            if isinstance(source, Source)
        }
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.base, self.generation = recipe.base, dict(GENERATION_DEFAULTS)
        if all(in_dialogue(source) for source in recipe.sources):
            self.generation["dialogue"] = True
        self.config, self.text_tokenizer = self._architecture()
        self.generation |= recipe.generation
        self.vocab = Vocabulary(self.text_tokenizer, self.config.text_vocab, self.config.codes)
        self.model, self.trainable = self._start()
        self.model.scale_inputs.ask(self.image_tokenizer.quantizer)
        self.taught = Taught(recipe, self.model, self.vocab, self.image_tokenizer)
        self.word_classes = word_classes(self.vocab)
        c, weights = self.config, (recipe.alpha, recipe.text_weight)
        self.layout = LayoutOptions(c.rope_range, *weights, c.context_images, c.copies)
        self.loaders = {
            i: ShardLoader(source, self.image_tokenizer, self.vocab, self.layout, c, prefetch=recipe.prefetch)
            for i, source in enumerate(recipe.sources)
            if isinstance(source, ShardSource)
        }
        together = recipe.together if recipe.together is not None else cuda
        # Shards are gathered in every pass: all processes need as many, and what has one width differs between them.
        self.together = together and recipe.accumulate == 1 and not self.spread
        self.parameters = trained(self.model)
        self.passes = passes(recipe, self.parameters)
        drafting = Drafting(
            {i: source for i, source in enumerate(recipe.sources) if isinstance(source, EpisodeSource)},
            self.image_tokenizer.config, self.vocab, self.layout, self.config,
            Place(self.world.rank, self.world.size, recipe.accumulate), self.passes,
        )  # fmt: skip
        self.episodes = EpisodeFeed(
            drafting, self.image_tokenizer, recipe.correction.at, together=self.together,
            prefetch=recipe.prefetch and not self.together, workers=recipe.workers, steps=self.pace.steps,
        )  # fmt: skip
        averaged = recipe.ema > 0 or recipe.lora is not None  # else they would be the weights once more
        self.averages = start_averages(self.parameters) if averaged else {}
        self.optimizer = self._optimizer()
        self.speed = Speedometer(None, self.world.size)
        self.step = self.documents = self.tokens = 0
        self.looks_late = cuda and self.world.size == 1  # waits for no step before the next one is under way
        self.bound = bindings(recipe, self.text_tokenizer, self.image_tokenizer, self.trainable.rows)
        self._resume()
        if self.world.rank == 0:
            self.run.rewind(self.step)
        self.compiled = not (recipe.compile or (spread is not None and spread.compile and not self.spread))

    @property
    def spread(self) -> bool:
        """Whether no process holds the whole model."""
        return self.shards is not None and self.shards.spread

    def _architecture(self) -> tuple[ModelConfig, PreTrainedTokenizerFast]:
        """The model's configuration and the text tokenizer that goes with it."""
        recipe = self.recipe
        if self.base is None:
            assert recipe.model is not None
            return recipe.model, self._text_tokenizer()
        stored, tokenizer = load_architecture(self.base)
        self.generation |= load_generation(self.base)
        return agreed(recipe, stored, tell=self.world.rank == 0), tokenizer

    def _start(self) -> tuple[NextFlowModel, Trainable]:
        """The untrained or started model, in shards or on its device, and what of it trains."""
        recipe, chosen = self.recipe, []
        codebook = self.image_tokenizer.quantizer.codebook.cpu()
        learnt = self.base if recipe.codes == "kept" else None
        fits = codebook.shape == (self.config.codes, self.config.code_dim)  # the self-test tells where not
        if self.shards is not None and self.shards.spread:
            model = self.shards.model(
                self.config,
                lambda empty: chosen.append(choose(empty, self.vocab, recipe)),
                self.base,
                self.generator,
                codebook if fits else None,
                flex=recipe.flex,
                shapes=recipe.shapes,
            )
            selftest.check_agreement(model, self.image_tokenizer, self.vocab, learnt)
            return model, chosen[0]
        if self.base is not None:
            model = NextFlowModel.empty(self.config)
            begin_with(model, load_bundle(self.base).model)
            if recipe.codes == "anew" and fits:
                model.codes_anew(codebook)
            if recipe.codes == "carried" and fits and not self.run.resumes:
                carry_from(self.base, model, self.image_tokenizer, recipe.seed)
        else:
            model = NextFlowModel(self.config)
            model.initialise(self.generator)
            if fits:
                model.scale_inputs.start_from(codebook)
        selftest.check_agreement(model, self.image_tokenizer, self.vocab, learnt)
        if recipe.lora is not None:
            adapters.add_adapters(model, recipe.lora, self.generator)
        model = model.to(self.device)
        trainable = choose(model, self.vocab, recipe)
        if recipe.checkpointing or (recipe.sharding is not None and recipe.sharding.recompute):
            model.checkpoint_activations()
        return model, trainable

    def _optimizer(self) -> StageOptimizer | ShardedOptimizer:
        rates, rows = self.recipe.optimizer, self.trainable.rows
        replays = (*self.scenes.values(), *self.episodes.sources.values())
        rows.update(new_rows(self.recipe, self.image_tokenizer, self.vocab, replays))
        if self.shards is None:
            return StageOptimizer(self.parameters.items(), rates, rows)
        return self.shards.optimizer(self.parameters, rates, rows)

    def _text_tokenizer(self) -> PreTrainedTokenizerFast:
        """The run's own text tokenizer, trained on what the sources say; the first process makes it."""
        folder = self.recipe.out / "text_tokenizer"
        kept = self.run.resumes and folder.is_dir()  # one left without a checkpoint may be of other sources
        if self.world.rank == 0 and not kept:
            texts = [text for scenes in self.scenes.values() for text in scenes.texts(CORPUS)]
            own_tokenizer(self.recipe, texts, self.image_tokenizer, folder)
        self.world.add(torch.zeros(1, device=self.device))  # all wait for it
        return load_text_tokenizer(folder)

    def _state(self) -> State:
        assert isinstance(self.optimizer, ShardedOptimizer)
        return State(self.model, self.averages, self.optimizer, self.generator)

    def _resume(self) -> None:
        state = self.run.load() if self.shards is None else self.shards.load(self._state())
        if state is None:
            return
        check_bound(state.get("bound", {}), self.bound, self.recipe.out)
        if isinstance(self.optimizer, StageOptimizer):
            self.model.load_state_dict(state["model"], strict=self.recipe.lora is None)
            self.averages = {k: v.to(self.device) for k, v in state["averages"].items()}
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
        self.step, (self.documents, self.tokens) = state["step"], state.get("seen", (0, 0))
        self.episodes.skipped = state.get("skipped", 0)
        for number, loader in self.loaders.items():
            loader.restore(state["loaders"][str(number)])

    def save(self, *, background: bool = False) -> None:
        """Checkpoint everything that a bit-exact resume needs (playground batches follow from the step).

        All processes call this together. ``background`` lets a sharded run's training go on meanwhile.
        """
        self._stop_if_broken()
        facts = {
            "step": self.step,
            "bound": self.bound,
            "seen": (self.documents, self.tokens),
            "skipped": self.episodes.skipped,
            "loaders": {str(number): loader.state() for number, loader in self.loaders.items()},
        }
        if self.shards is not None:
            self.shards.save(self.step, self._state(), facts, background=background)
            return
        self.run.save_together(self.world, lambda: self._whole_state() | facts)

    def _whole_state(self) -> dict[str, Any]:
        assert isinstance(self.optimizer, StageOptimizer)
        model = self.model.state_dict()
        if self.recipe.lora is not None:  # the rest is in the folder that the run starts from
            model = {k: v for k, v in model.items() if k in self.averages}
        return {
            "model": model,
            "averages": self.averages,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def correction(self) -> SelfCorrection | None:
        """Self-correction at this step, or None while it is off."""
        return self.recipe.correction.at(self.step)

    def batch(self, number: int) -> Batch:
        """This step's batch of source ``number``, where it is not computed in parts; a source of shards moves on by it."""
        (part,) = self.material(number)
        return part.batch

    def material(self, number: int) -> tuple[Part, ...]:
        """This step's rows of source ``number`` that are this process's, in the recipe's number of parts."""
        source, world, parts = self.recipe.sources[number], self.world, self.recipe.accumulate
        if isinstance(source, ShardSource):
            rows = self.loaders[number].rows(world.rank, world.size)
            split = [rows[i::parts] for i in range(parts)]
            samples = [[row.sample for row in some] for some in split]
            widths = [source.packing.width(max(map(len, some))) for some in samples]
            batches = [collate(some, width) for some, width in zip(samples, widths, strict=True)]
            tasks = [tuple(row.tasks for row in some) for some in split]
            made = (self._part(b, t) for b, t in zip(batches, tasks, strict=True))
            return tuple(replace(part, replays=self.taught.shards) for part in made)
        if isinstance(source, EpisodeSource):
            return tuple(as_parts(self.episodes.batches(number, self.step)))
        batch = self.scenes[number].batch(
            self.step, self.vocab, self.layout, self.word_classes, self.correction(), self.generator
        )
        if parts * world.size == 1:
            return (self._part(batch, ((source.task,),) * source.rows),)
        step = parts * world.size
        tasks = ((source.task,),) * (source.rows // step)
        return tuple(self._part(batch.part(world.rank + i * world.size, step), tasks) for i in range(parts))

    def _parts(self) -> list[Part]:
        """All that this step computes."""
        alone = [
            part
            for i in range(len(self.recipe.sources))
            if not (self.together and i in self.episodes.sources)
            for part in self.material(i)
        ]
        return alone + (as_parts(self.episodes.together(self.step)) if self.together else [])

    def _part(self, batch: Batch, tasks: tuple[tuple[str, ...], ...]) -> Part:
        seen, flops = int((batch.documents >= 0).sum()), batch_flops(batch, self.config, self.passes)
        return Part(batch, tasks, float(batch.weights.sum()), seen, flops)

    def advance(self, *, told: bool = True) -> dict[str, float]:
        """One step over all sources; returns losses and accuracies by scale and by task, and the gradient's norm, of all
        processes' rows. Without ``told``, nothing: on a GPU that takes as long as a small model's step. Raises
        FloatingPointError where the loss or its gradient is not finite; on one GPU, in the step after it.
        """
        if not self.compiled:  # what comes before the first step has shapes of its own
            self.model.compile_backbone(flex=self.recipe.flex, shapes=self.recipe.shapes)
            self.taught.compile(flex=self.recipe.flex)
            self.compiled = True
        begun, size = time.perf_counter(), self.world.size
        parts = self._parts()
        weight = sum(part.weight for part in parts)
        seen, flops = sum(part.seen for part in parts), sum(part.flops for part in parts)
        documents = sum(len(row) for part in parts for row in part.tasks)
        if size > 1:
            # Gradients are averaged over processes, the loss is one over all of their tokens.
            mine = torch.tensor([weight, seen, documents], dtype=torch.float64, device=self.device)
            weight, *counts = self.world.add(mine).tolist()
            weight, (seen, documents) = weight / size, map(int, counts)
        meter, finite = LossMeter(), torch.ones((), dtype=torch.bool, device=self.device)
        for number, part in enumerate(parts, 1):
            if self.shards is not None:
                self.shards.before_part(self.model, number == len(parts))
            batch = part.batch.to(self.device)
            with self._precision():
                report = self.taught.losses(self.model, batch, replays=part.replays)
            self._stop_if_broken()  # before more is queued: the device has just been waited for
            total = report.total / (weight or 1.0)  # nothing counts where all rows are text of weight 0
            finite = finite & torch.isfinite(total.detach())
            total.backward()
            if told:
                meter.add(batch, part.tasks, report)
        norm = self._update()
        # A gradient may overflow behind a loss that is finite: nothing that it touched is saved.
        self._unseen = self.step, finite & torch.isfinite(torch.as_tensor(norm))
        if not self.looks_late:
            self._stop_if_broken()
        self.step += 1
        self.documents += documents
        self.tokens += seen
        # What is told waits for the device, so that all that was queued is within the time.
        found = meter.values(self.world.gather) | {"norm": float(norm)} if told else {}
        self.speed.add(time.perf_counter() - begun, flops, seen / size, documents / size)
        return found

    def _stop_if_broken(self) -> None:
        unseen, self._unseen = self._unseen, None
        if unseen is not None and self.world.any(not unseen[1]):  # for all: the others would wait for ever
            raise FloatingPointError(
                f"the loss or its gradient is not finite at step {unseen[0]}: the last checkpoint is kept"
            )

    def _precision(self) -> torch.autocast:
        """Where the recipe's sharding says nothing else; shards are gathered in the dtype that they compute in."""
        sharding = self.recipe.sharding
        on = sharding is None or (sharding.params == "bfloat16" and not self.spread)
        return mixed_precision(self.device, self.recipe.products, on)

    def _update(self) -> Tensor | float:
        recipe = self.recipe
        if self.shards is None:
            self.world.average_gradients(self.model.parameters())
        else:
            self.shards.before_update(self.parameters.values())
        idle = self.trainable.idle(self.step, self.optimizer.names)
        norm = self.optimizer.step(recipe.optimizer.factor(self.step, self.pace.steps), idle)
        decay = min(recipe.ema, (1 + self.step) / (10 + self.step))
        move_averages(self.averages, self.parameters, decay)
        return norm

    def bundle(self, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> Bundle:
        """The averaged weights as a model ready to draw (shares nothing with the one in training), adapters merged.

        Of a model that is spread over processes see :meth:`_draw`; :meth:`export` writes that from its checkpoint.
        """
        place = device or self.device
        return self._bundle(adapters.averaged(self.model, self.averages, self.recipe.lora, place, dtype))

    def _bundle(self, model: NextFlowModel) -> Bundle:
        return Bundle(model, self.image_tokenizer, self.vocab, self._defaults())

    def _defaults(self) -> dict[str, Any]:
        loaders, tokenizer = self.loaders.values(), self.image_tokenizer.config
        return taught_defaults(self.recipe, self.generation, loaders, tokenizer)

    def _draw(self, preview: Preview) -> None:
        """A sample sheet, by the first process (all gather a model in shards there); none where memory is short."""
        whole = None
        if self.shards is not None and self.spread:
            whole = self.shards.gather(self.model, self.averages, self.device)
        if self.world.rank or (self.spread and whole is None):
            return
        try:
            bundle = self.bundle(dtype=best_dtype(self.device)) if whole is None else self._bundle(whole)
            self.run.sheet(f"sheet_{self.step:06d}", preview(bundle, self.step))
        except torch.OutOfMemoryError:
            _LOG.warning("no sample sheet at step %d: out of memory", self.step)

    def export(self, folder: Path, card: str) -> Path:
        """Write the averaged weights as a checkpoint folder; of adapters, themselves, as ``adapter`` beside it, too.

        A sharded run's come from this step's checkpoint, which has to be there; one process calls this.
        """
        if self.shards is not None:
            return export_bundle(
                self.shards.checkpoints.place(self.step), folder, self.config, self.image_tokenizer,
                self.text_tokenizer, self._defaults(), card,
            )  # fmt: skip
        bundle = self.bundle(torch.device("cpu"))  # a GPU may have no room for another one
        if self.recipe.lora is not None:
            adapters.save_adapter(folder.parent / "adapter", self.averages, self.recipe, self.bound, bundle)
        save_bundle(folder, bundle.model, self.image_tokenizer, self.text_tokenizer, bundle.generation, card)
        return folder

    def documents_ahead(self) -> Iterator[list[Document]]:
        """Of every source the first documents from here on; nothing moves."""
        for number in range(len(self.recipe.sources)):
            source = self.loaders.get(number) or self.episodes.sources.get(number)
            yield list((source or self.scenes[number]).peek(selftest.LOOK))

    def self_test(self) -> None:
        """What is checked before the first step, by the first process. Raises SelfTestError, one line, on every one; logs
        what the data does not teach. Of a model in shards, an untrained one of two layers is tried instead.
        """
        trouble = ""
        if self.world.rank == 0:
            try:
                selftest.self_test(self._whole_model(), self.image_tokenizer, self.vocab, self.layout)
            except selftest.SelfTestError as error:
                trouble = str(error)
            ahead, loaders, most = self.documents_ahead(), self.loaders.values(), self.config.max_positions
            room = selftest.Room(self.vocab, self.layout, most, self.image_tokenizer.config)
            selftest.check_material(ahead, self.recipe.sources, loaders, self.generation, room)
        if trouble := self.world.gather(trouble)[0]:
            raise selftest.SelfTestError(trouble)

    def _whole_model(self) -> NextFlowModel:
        if not self.spread:
            return self.model
        small = NextFlowModel(replace(self.config, layers=min(2, self.config.layers), intermediate=64))
        small.initialise(torch.Generator().manual_seed(self.recipe.seed))
        return small.to(self.device)

    def fit(self, preview: Preview | None = None) -> Path:
        """Train to the recipe's last step; returns the finished checkpoint folder."""
        recipe, first = self.recipe, self.world.rank == 0
        if self.step < self.pace.steps:
            self.self_test()
            if first:
                recipe.optimizer.warn(self.pace.steps)
        self.speed = Speedometer(peak_of(recipe.peak, self.device, recipe.products), self.world.size)
        board = Board(recipe.out, self.step + 1) if recipe.tensorboard and first else None
        save, sheet = Every(recipe.save_seconds), Every(recipe.sheet_seconds)
        name = f"transformer ({precision_name(self.device, recipe.products)})"
        with progress_bar(name, recipe.steps, self.step, shown=first) as update, stop_request() as stop:
            while self.step < self.pace.steps:
                told = (self.step + 1) % _TOLD == 0 or self.step + 1 == self.pace.steps
                found = self.advance(told=told)
                self.pace.passed(self.step)
                last = self.step == self.pace.steps
                if told and first:
                    update(self.step, self._report(found, board))
                if first and self.shards is not None:
                    self.shards.checkpoints.look()
                asked = self.world.any(stop())
                if self.world.any(first and save()) or last or asked:
                    self.save(background=not (last or asked))
                if preview is not None and (self.world.any(first and sheet()) or last):
                    self._draw(preview)
                if asked and not last:
                    raise Stopped(self.step, recipe.out)
        if board is not None:
            board.close()
        for feed in (self.episodes, *self.loaders.values()):
            feed.close()
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
            counts["skipped"] = self.episodes.skipped + sum(x.skipped for x in self.loaders.values())
        self.run.log(step=self.step, **counts, **speed, **found)
        if board:
            board.log(self.step, counts | speed | found)
        return f"loss {found['loss']:.3f} text {found.get('text', 0.0):.3f} {speed['tokens_per_s']:.0f} tok/s"


def train_model(
    recipe: ModelRecipe, values: dict[str, Any], preview: Preview | None = None, seconds: float | None = None
) -> Path:
    """Run one stage, resuming from its folder; returns the finished checkpoint folder. ``seconds``: see Pace."""
    return ModelTrainer(recipe, values, seconds).fit(preview)


__all__ = ["ModelRecipe", "ModelTrainer", "Part", "Preview", "Source", "swap_words", "train_model"]
