"""A small semantic teacher: a whole SigLIP2 of nano size, trained on pictures and captions of the playground.

It stands in for SigLIP2 where its weights are too large. The loss is SigLIP2's: the sigmoid loss on (caption, picture)
pairs, and beside it grounding (what covers each patch), which SigLIP2 learns from captions of regions. The teacher is
frozen afterwards, and the image tokenizer's semantic branch learns its features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from nextflow_ar.config import SemanticConfig
from nextflow_ar.data.playground.captions import caption, plan, prompt
from nextflow_ar.data.playground.mixture import MixtureConfig, SceneMixture
from nextflow_ar.data.playground.scenes import Scene
from nextflow_ar.data.playground.words import COLOURS, NOUNS, SHAPES
from nextflow_ar.data.tasks import caption_corpus
from nextflow_ar.sequence.vocab import PreTrainedTokenizerFast, load_text_tokenizer, train_text_tokenizer
from nextflow_ar.storage import write_folder
from nextflow_ar.tokenizer.pixels import to_unit
from nextflow_ar.tokenizer.semantic import contrastive_model, patches_of, quiet_transformers, sigmoid_loss
from nextflow_ar.training.memory import keep_freed_memory
from nextflow_ar.training.optim import OptimizerConfig, StageOptimizer
from nextflow_ar.training.runs import Every, RunFolder, progress_bar, stop_request

_NAMES = {name: i + 1 for i, name in enumerate([n.name for n in NOUNS] + list(SHAPES))}
_COLOURS = {name: i + 1 for i, name in enumerate(COLOURS)}


@dataclass(frozen=True)
class TextTower:
    """``entries`` of its byte-level BPE, ``length``: most tokens of a text, ``layers`` as wide as the vision tower's."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    entries: int
    length: int
    layers: int


@dataclass(frozen=True)
class TeacherRecipe:
    """Recipe of the nano teacher. ``grounding``: weight of naming what covers each patch, beside the contrastive loss."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: str
    out: Path
    seed: int
    steps: int
    batch: int
    grounding: float
    optimizer: OptimizerConfig
    data: MixtureConfig
    semantic: SemanticConfig
    text: TextTower


def patch_labels(scenes: list[Scene], patch: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, h, w) class of the thing whose box covers each patch's centre (0: background), and (B, h, w) its colour.

    Background patches carry the background's colour, sprites colour 0.
    """
    n = scenes[0].canvas // patch
    names, colours = np.zeros((2, len(scenes), n, n), np.int64)
    centres = (np.arange(n) + 0.5) * patch
    for b, scene in enumerate(scenes):
        colours[b] = _COLOURS[scene.background]
        for thing in scene.things:
            rows = (centres > thing.y) & (centres < thing.y + thing.size)
            columns = (centres > thing.x) & (centres < thing.x + thing.size)
            names[b][np.ix_(rows, columns)] = _NAMES[thing.name]
            colours[b][np.ix_(rows, columns)] = _COLOURS.get(thing.colour or "", 0)
    return names, colours


class TeacherTrainer:
    """Both towers, the naming heads, data and run folder."""

    def __init__(self, recipe: TeacherRecipe, values: dict[str, Any]) -> None:
        keep_freed_memory()
        self.recipe = recipe
        self.run = RunFolder(recipe.out, values)
        torch.manual_seed(recipe.seed)
        self.data = SceneMixture(recipe.data)
        self.text_tokenizer = self._text_tokenizer()
        text, semantic = recipe.text, recipe.semantic
        self.towers = contrastive_model(semantic, text.entries, text.length, text.layers)
        heads = nn.ModuleList(nn.Linear(semantic.hidden, n + 1) for n in (len(_NAMES), len(_COLOURS)))
        self.model = nn.ModuleDict({"towers": self.towers, "heads": heads})
        self.optimizer = StageOptimizer(self.model.named_parameters(), recipe.optimizer)
        self.step = 0
        if (state := self.run.load()) is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    def _text_tokenizer(self) -> PreTrainedTokenizerFast:
        folder = self.recipe.out / "text_tokenizer"
        if not folder.is_dir():
            made = train_text_tokenizer(caption_corpus(self.data, 4000), self.recipe.text.entries)

            def fill(target: Path) -> None:
                made.save_pretrained(target)

            write_folder(folder, fill)
        return load_text_tokenizer(folder)

    def texts(self, scenes: list[Scene], first: int) -> Tensor:
        """A text per scene, (B, length) ids: its caption, a request for it, or its plan, which tells places."""
        ids = torch.zeros(len(scenes), self.recipe.text.length, dtype=torch.long)
        for row, scene in enumerate(scenes):
            number = first + row
            told = (caption(scene), prompt(scene, self.data.sampler(number).rng(number, 1), 1.0), plan(scene))
            found = self.text_tokenizer.encode(told[number % 3], add_special_tokens=False)[-ids.shape[1] :]
            ids[row, -len(found) :] = torch.tensor(found)  # the text tower reads its last place
        return ids

    def losses(self, scenes: list[Scene], pictures: np.ndarray, first: int) -> dict[str, Tensor]:
        """Contrastive and grounding loss of a batch, and how often each is right."""
        pixels, patch = to_unit(torch.from_numpy(pictures)), self.recipe.semantic.patch
        names, colours = (torch.from_numpy(x) for x in patch_labels(scenes, patch))
        b, side = len(scenes), names.shape[1]
        with torch.autocast("cpu", torch.bfloat16):
            seen = self.towers.vision_model(
                pixel_values=patches_of(pixels, patch),
                pixel_attention_mask=torch.ones(b, side * side, dtype=torch.int32),
                spatial_shapes=torch.tensor([[side, side]]).expand(b, 2),
            )
            read = self.towers.text_model(input_ids=self.texts(scenes, first))
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

    def save(self) -> None:
        """Checkpoint."""
        self.run.save(
            {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        )

    def fit(self) -> Path:
        """Train to the last step; returns the folder with the teacher, as transformers saves a SigLIP2."""
        recipe, save = self.recipe, Every(120)
        with progress_bar("teacher", recipe.steps, self.step) as update, stop_request() as stop:
            while self.step < recipe.steps:
                first = self.step * recipe.batch
                scenes, pictures = self.data.pictures(first, recipe.batch)
                found = self.losses(scenes, pictures, first)
                loss = found["contrastive"] + found["grounding"]
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"the loss is not finite at step {self.step}: the last checkpoint is kept"
                    )
                loss.backward()
                self.optimizer.step(recipe.optimizer.factor(self.step, recipe.steps))
                self.step += 1
                last = self.step == recipe.steps
                if self.step % 50 == 0 or last:
                    values = {name: float(value.detach()) for name, value in found.items()}
                    self.run.log(step=self.step, **values)
                    update(self.step, " ".join(f"{k} {v:.3f}" for k, v in values.items()))
                if save() or last or stop():
                    self.save()
                if stop() and not last:
                    raise KeyboardInterrupt

        def fill(target: Path) -> None:
            with quiet_transformers():
                self.towers.save_pretrained(target)
            self.text_tokenizer.save_pretrained(target)

        write_folder(recipe.out / "final", fill)
        return recipe.out / "final"


def train_teacher(recipe: TeacherRecipe, recipe_values: dict[str, Any]) -> Path:
    """Train, resuming from the run folder; returns the folder with the frozen teacher. Raises StorageError."""
    return TeacherTrainer(recipe, recipe_values).fit()
