"""A small semantic teacher: SigLIP2's vision tower taught to name what covers each patch of playground scenes.

It stands in for SigLIP2 at nano size. Grounded naming is one of SigLIP2's own training losses (captions of regions); the
contrastive one is not used here. The teacher is frozen afterwards, and the image tokenizer's semantic branch learns its
features.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import ConfigDict
from torch import nn
from torch.nn import functional as F

from nextflow_ar.config import SemanticConfig, from_dict, to_dict
from nextflow_ar.data.playground.mixture import MixtureConfig, SceneMixture
from nextflow_ar.data.playground.scenes import Scene
from nextflow_ar.data.playground.words import COLOURS, NOUNS, SHAPES
from nextflow_ar.storage import pack_weights, read_checked, read_weights, write_atomic, write_folder
from nextflow_ar.tokenizer.pixels import to_unit
from nextflow_ar.tokenizer.semantic import SemanticEncoder
from nextflow_ar.training.memory import keep_freed_memory
from nextflow_ar.training.optim import OptimizerConfig, StageOptimizer
from nextflow_ar.training.runs import Every, RunFolder, progress_bar

_NAMES = {name: i + 1 for i, name in enumerate([n.name for n in NOUNS] + list(SHAPES))}
_COLOURS = {name: i + 1 for i, name in enumerate(COLOURS)}


@dataclass(frozen=True)
class TeacherRecipe:
    """Recipe of the nano teacher."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: str
    out: Path
    seed: int
    steps: int
    batch: int
    optimizer: OptimizerConfig
    data: MixtureConfig
    semantic: SemanticConfig


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


def train_teacher(recipe: TeacherRecipe, recipe_values: dict) -> Path:
    """Train, resuming from the run folder; returns the folder with the frozen teacher. Raises StorageError."""
    keep_freed_memory()
    run = RunFolder(recipe.out, recipe_values)
    torch.manual_seed(recipe.seed)
    encoder = SemanticEncoder(recipe.semantic)
    heads = nn.ModuleList(nn.Linear(recipe.semantic.hidden, n + 1) for n in (len(_NAMES), len(_COLOURS)))
    model = nn.ModuleDict({"encoder": encoder, "heads": heads})
    optimizer = StageOptimizer(model.named_parameters(), recipe.optimizer)
    step = 0
    if (state := run.load()) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    data, save = SceneMixture(recipe.data), Every(120)
    with progress_bar("teacher", recipe.steps, step) as update:
        while step < recipe.steps:
            scenes, pictures = data.pictures(step * recipe.batch, recipe.batch)
            names, colours = (torch.from_numpy(x) for x in patch_labels(scenes, recipe.semantic.patch))
            with torch.autocast("cpu", torch.bfloat16):
                x = encoder(to_unit(torch.from_numpy(pictures))).movedim(1, -1)
                name_logits, colour_logits = heads[0](x), heads[1](x)
            loss = F.cross_entropy(name_logits.float().flatten(0, 2), names.flatten())
            loss = loss + F.cross_entropy(colour_logits.float().flatten(0, 2), colours.flatten())
            loss.backward()
            optimizer.step(recipe.optimizer.factor(step, recipe.steps))
            step += 1
            if step % 50 == 0 or step == recipe.steps:
                right = (name_logits.argmax(-1) == names).float()
                covered = (names > 0).float()
                named = float((right * covered).sum() / covered.sum())
                run.log(step=step, loss=float(loss.detach()), named=named)
                update(step, f"loss {float(loss.detach()):.3f} named {named:.3f}")
            if save() or step == recipe.steps:
                run.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
    save_teacher(encoder, recipe.semantic, recipe.out / "final")
    return recipe.out / "final"


def save_teacher(encoder: SemanticEncoder, config: SemanticConfig, folder: Path) -> None:
    """Write a teacher's folder."""

    def fill(target: Path) -> None:
        write_atomic(target / "config.json", json.dumps(to_dict(config), indent=1).encode())
        write_atomic(target / "model.safetensors", pack_weights(encoder.state_dict()))

    write_folder(folder, fill)


def load_teacher(folder: Path) -> tuple[SemanticEncoder, SemanticConfig]:
    """A frozen teacher and its configuration. Raises StorageError."""
    config = from_dict(SemanticConfig, json.loads(read_checked(folder, "config.json")), str(folder))
    encoder = SemanticEncoder(config)
    encoder.load_state_dict(read_weights(folder, "model.safetensors"))
    return encoder.eval().requires_grad_(False), config
