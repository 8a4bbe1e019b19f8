"""A small semantic teacher: a whole SigLIP2 of nano size, trained on pictures and captions of the playground.

It stands in for SigLIP2 where its weights are too large. The loss is SigLIP2's: the sigmoid loss on (caption, picture)
pairs, and beside it grounding (what covers each patch), which SigLIP2 learns from captions of regions. The teacher is
frozen afterwards, and the image tokenizer's semantic branch learns its features.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from nextflow_ar.config import SemanticConfig, within
from nextflow_ar.data.grounded import CLASSES, Pairs, PairSource, SmallWorld, WideWorld, WorldPairs
from nextflow_ar.data.playground.mixture import MixtureConfig, SceneMixture
from nextflow_ar.data.playground.world import COLOUR_NAMES
from nextflow_ar.precision import mixed_precision
from nextflow_ar.sequence.vocab import PreTrainedTokenizerFast, load_text_tokenizer, train_text_tokenizer
from nextflow_ar.storage import write_folder
from nextflow_ar.tokenizer.pixels import to_unit
from nextflow_ar.tokenizer.semantic import contrastive_model, patches_of, quiet_transformers, sigmoid_loss
from nextflow_ar.training.memory import keep_freed_memory
from nextflow_ar.training.optim import OptimizerConfig, StageOptimizer
from nextflow_ar.training.prefetch import Ahead
from nextflow_ar.training.runs import Every, RunFolder, Stopped, progress_bar, stop_request

_CORPUS = 4000


@dataclass(frozen=True)
class TextTower:
    """``entries`` of its byte-level BPE, ``length``: most tokens of a text, ``layers`` as wide as the vision tower's."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    entries: int
    length: int
    layers: int

    def __post_init__(self) -> None:
        within("at least 1", entries=self.entries, length=self.length, layers=self.layers)


@dataclass(frozen=True)
class TeacherRecipe:
    """Recipe of the nano teacher. ``grounding``: weight of naming what covers each patch, beside the contrastive loss.

    ``data``: scenes of the small world; ``world``: pictures of the wide world. With both, every other batch is of each.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: str
    out: Path
    seed: int
    steps: int
    batch: int
    grounding: float
    optimizer: OptimizerConfig
    semantic: SemanticConfig
    text: TextTower
    data: MixtureConfig | None = None
    world: WorldPairs | None = None

    def __post_init__(self) -> None:
        within("at least 1", steps=self.steps, batch=self.batch)
        within("at least 0", seed=self.seed, grounding=self.grounding)
        if self.data is None and self.world is None:
            raise ValueError("a teacher needs data, world or both")


class TeacherTrainer:
    """Both towers, the naming heads, data and run folder."""

    def __init__(self, recipe: TeacherRecipe, values: dict[str, Any]) -> None:
        keep_freed_memory()
        self.recipe = recipe
        self.run = RunFolder(recipe.out, values)
        torch.manual_seed(recipe.seed)
        patch = recipe.semantic.patch
        self.sources: list[PairSource] = []
        if recipe.data is not None:
            self.sources.append(SmallWorld(SceneMixture(recipe.data), patch))
        if recipe.world is not None:
            self.sources.append(WideWorld(recipe.world, patch))
        self.text_tokenizer = self._text_tokenizer()
        text, semantic = recipe.text, recipe.semantic
        self.towers = contrastive_model(semantic, text.entries, text.length, text.layers)
        heads = nn.ModuleList(nn.Linear(semantic.hidden, n + 1) for n in (len(CLASSES), len(COLOUR_NAMES)))
        self.model = nn.ModuleDict({"towers": self.towers, "heads": heads})
        self.optimizer = StageOptimizer(self.model.named_parameters(), recipe.optimizer)
        self.step = 0
        if (state := self.run.load()) is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def _text_tokenizer(self) -> PreTrainedTokenizerFast:
        folder = self.recipe.out / "text_tokenizer"
        if not (
            self.run.resumes and folder.is_dir()
        ):  # one left without a checkpoint may be of another recipe
            corpus = itertools.chain.from_iterable(source.corpus(_CORPUS) for source in self.sources)
            made = train_text_tokenizer(corpus, self.recipe.text.entries)

            def fill(target: Path) -> None:
                made.save_pretrained(target)

            write_folder(folder, fill)
        return load_text_tokenizer(folder)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(B, length) ids, padded on the left: the text tower reads its last place. A longer text loses its beginning."""
        ids = torch.zeros(len(texts), self.recipe.text.length, dtype=torch.long)
        for row, text in enumerate(texts):
            found = self.text_tokenizer.encode(text, add_special_tokens=False)[-ids.shape[1] :]
            ids[row, -len(found) :] = torch.tensor(found)
        return ids

    def pairs(self, step: int) -> Pairs:
        """The batch of a step."""
        turn, number = divmod(step, len(self.sources))
        return self.sources[number].pairs(turn * self.recipe.batch, self.recipe.batch)

    def losses(self, batch: Pairs) -> dict[str, Tensor]:
        """Contrastive and grounding loss of a batch, and how often each is right."""
        pixels, patch = to_unit(torch.from_numpy(batch.pictures)), self.recipe.semantic.patch
        names, colours = torch.from_numpy(batch.names), torch.from_numpy(batch.colours)
        b, side = len(batch.texts), names.shape[1]
        with mixed_precision(torch.device("cpu")):
            seen = self.towers.vision_model(
                pixel_values=patches_of(pixels, patch),
                pixel_attention_mask=torch.ones(b, side * side, dtype=torch.int32),
                spatial_shapes=torch.tensor([[side, side]]).expand(b, 2),
            )
            read = self.towers.text_model(input_ids=self.texts(batch.texts))
            heads = self.model["heads"]
            assert isinstance(heads, nn.ModuleList)
            name_logits, colour_logits = heads[0](seen.last_hidden_state), heads[1](seen.last_hidden_state)
        vision, text = (F.normalize(x.pooler_output.float(), dim=1) for x in (seen, read))
        logits = vision @ text.T * self.towers.logit_scale.exp() + self.towers.logit_bias
        naming = F.cross_entropy(name_logits.float().flatten(0, 1), names.flatten())
        naming = naming + F.cross_entropy(colour_logits.float().flatten(0, 1), colours.flatten())
        covered = (names > 0).flatten(1)
        right = (name_logits.argmax(-1) == names.flatten(1))[covered]
        matched = logits.argmax(1) == torch.arange(b)
        return {
            "contrastive": sigmoid_loss(logits),
            "grounding": naming * self.recipe.grounding,
            "named": right.float().mean(),
            "matched": matched.float().mean(),
        }

    def _update(self, loss: Tensor) -> None:
        loss.backward()
        norm = self.optimizer.step(self.recipe.optimizer.factor(self.step, self.recipe.steps))
        # A gradient may overflow behind a loss that is finite: nothing that it touched is saved.
        if not bool(torch.isfinite(loss.detach()) & torch.isfinite(norm)):
            raise FloatingPointError(
                f"the loss or its gradient is not finite at step {self.step}: the last checkpoint is kept"
            )
        self.step += 1

    def save(self) -> None:
        """Checkpoint."""
        self.run.save(
            {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        )

    def fit(self) -> Path:
        """Train to the last step; returns the folder with the teacher, as transformers saves a SigLIP2."""
        recipe, save, ahead = self.recipe, Every(120), Ahead(self.pairs, self.recipe.steps)
        self.run.rewind(self.step)
        recipe.optimizer.warn(recipe.steps)
        with progress_bar("teacher", recipe.steps, self.step) as update, stop_request() as stop:
            while self.step < recipe.steps:
                found = self.losses(ahead.get(self.step))
                self._update(found["contrastive"] + found["grounding"])
                last = self.step == recipe.steps
                if self.step % 50 == 0 or last:
                    values = {name: float(value.detach()) for name, value in found.items()}
                    self.run.log(step=self.step, **values)
                    update(self.step, " ".join(f"{k} {v:.3f}" for k, v in values.items()))
                asked = stop()  # once: what is asked after the save below is answered a step later
                if save() or last or asked:
                    self.save()
                if asked and not last:
                    raise Stopped(self.step, recipe.out)

        ahead.close()

        def fill(target: Path) -> None:
            with quiet_transformers():
                self.towers.save_pretrained(target)
            self.text_tokenizer.save_pretrained(target)

        write_folder(recipe.out / "final", fill)
        return recipe.out / "final"


def train_teacher(recipe: TeacherRecipe, recipe_values: dict[str, Any]) -> Path:
    """Train, resuming from the run folder; returns the folder with the frozen teacher. Raises StorageError."""
    return TeacherTrainer(recipe, recipe_values).fit()
