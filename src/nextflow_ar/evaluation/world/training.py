"""Training of the wide world's judge on one core, and how well it reads: true renders, renders through the tokenizer.

The learning rate follows the wall clock. A checkpoint is kept every minute or so; a stopped training goes on where it was.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from nextflow_ar.data.playground.canvases import base_of, canvas_sizes
from nextflow_ar.data.playground.scenes import Split
from nextflow_ar.evaluation.world.accuracy import accuracy, canvases
from nextflow_ar.evaluation.world.detector import BASE, Detector, DetectorConfig, to_base, to_input
from nextflow_ar.evaluation.world.examples import ExampleStream, Labels
from nextflow_ar.evaluation.world.judge import WorldJudge, detector_config, save_judge
from nextflow_ar.evaluation.world.targets import Targets, compressed, distort, targets
from nextflow_ar.precision import mixed_precision
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.pixels import to_unit
from nextflow_ar.tokenizer.quantizer import SelfCorrection

Log = Callable[[str], None]
_CHECKPOINT = "training.pt"
_POOL = 4096


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class WorldJudgeSettings:
    """How the judge is trained. ``minutes``: wall-clock length; the learning rate follows it (warm-up, then cosine).

    ``tasks``: share of true canvases of the playground's tasks, the rest are free mixtures with a chance of ``unknown``
    things. ``tokenizer``: name or folder of the image tokenizer whose reconstructions are ``reconstructed`` of every
    batch on a canvas of the lowest level (the others are halved before they are read, which takes the traces away);
    ``passed`` new ones are made in every such step, half of them with codes disturbed as a model's are.
    """

    minutes: float
    batch: int
    lr: float
    weight_decay: float
    ema: float
    seed: int
    tasks: float
    unknown: float
    tokenizer: str
    reconstructed: float
    passed: int
    widths: tuple[int, int, int, int]
    blocks: int
    threshold: float
    letter_threshold: float
    min_distance: float
    letter_distance: float
    accuracy_pictures: int


def focal(heat: Tensor, want: Tensor) -> Tensor:
    """CenterNet's loss of centre maps, per centre."""
    centre = want > 0.999
    p = heat.sigmoid()
    hit = F.logsigmoid(heat) * (1 - p) ** 2 * centre
    miss = F.logsigmoid(-heat) * p**2 * (1 - want) ** 4 * ~centre
    return -(hit.sum() + miss.sum()) / centre.sum().clamp(min=1)


def _weighted(per_cell: Tensor, weight: Tensor) -> Tensor:
    return (per_cell * weight).sum() / weight.sum().clamp(min=1e-6)


def _named(logits: Tensor, want: Tensor, weight: Tensor) -> Tensor:
    told = weight * (want >= 0)
    return _weighted(F.cross_entropy(logits, want, ignore_index=-1, reduction="none"), told)


def judge_loss(maps: dict[str, Tensor], want: Targets) -> dict[str, Tensor]:
    """The parts of the loss, by head."""
    parts = {
        "heat": focal(maps["heat"][:, 0], want.heat),
        "name": _named(maps["name"], want.name, want.weight),
        "colour": _named(maps["colour"], want.colour, want.colour_weight),
        "turn": 0.5 * _named(maps["turn"], want.turn, want.weight),
        "offset": 0.5 * _weighted((maps["offset"] - want.offset).abs().sum(1), want.weight),
        "size": _weighted((maps["size"][:, 0] - want.size).abs(), want.weight),
        "letter_heat": focal(maps["letter_heat"][:, 0], want.letter_heat),
        "letter": _named(maps["letter"], want.letter, want.letter_weight),
    }
    for head, index in want.whole.items():
        told = (index >= 0).float()
        each = F.cross_entropy(maps[head], index, ignore_index=-1, reduction="none")
        parts[head] = 0.5 * _weighted(each, told)
    return parts


class Pool:
    """Reconstructions with their labels, by canvas size; every step adds a few and draws from those of its size."""

    def __init__(self, tokenizer: ImageTokenizer, seed: int) -> None:
        self.tokenizer, self.generator = tokenizer, torch.Generator().manual_seed(seed)
        self.kept: dict[tuple[int, int], list[tuple[np.ndarray, Labels]]] = defaultdict(list)

    def add(self, pictures: np.ndarray, labels: list[Labels]) -> None:
        """Pass pictures of one size through the tokenizer; the second half with disturbed codes."""
        kept = self.kept[pictures.shape[1], pictures.shape[2]]
        through = reconstructed(self.tokenizer, pictures, self.generator)
        for picture, label in zip(through, labels, strict=True):
            if len(kept) < _POOL:
                kept.append((picture, label))
            else:
                kept[int(torch.randint(len(kept), (1,), generator=self.generator))] = (picture, label)

    def draw(self, size: tuple[int, int], count: int, rng: random.Random) -> list[tuple[np.ndarray, Labels]]:
        """Up to ``count`` of one size."""
        kept = self.kept[size]
        return rng.sample(kept, min(count, len(kept)))


@torch.inference_mode()
def reconstructed(
    tokenizer: ImageTokenizer, pictures: np.ndarray, generator: torch.Generator | None = None
) -> np.ndarray:
    """Pictures (B, H, W, 3) uint8 through the image tokenizer; with a ``generator`` half of them with disturbed codes."""
    unit = to_unit(torch.from_numpy(pictures))
    schedule = tokenizer.schedule_for(pictures.shape[1], pictures.shape[2])
    with mixed_precision(torch.device("cpu")):
        found = tokenizer.quantize(unit, schedule)
        codes = found.target
        if generator is not None and len(pictures) > 1:
            half = len(pictures) // 2
            share = 0.01 + 0.06 * float(torch.rand(1, generator=generator))
            disturbed = SelfCorrection(share=share, top_k=8, temperature=1.0)
            codes = codes.clone()
            codes[half:] = tokenizer.quantize(
                unit[half:], schedule, correction=disturbed, generator=generator
            ).input
        return tokenizer.decode_bytes(codes, schedule).numpy()


class WorldJudgeTraining:
    """One training: network, averaged weights, where it stands."""

    def __init__(self, settings: WorldJudgeSettings, out: Path) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.out = settings, out
        self.config: DetectorConfig = detector_config(
            settings.widths,
            settings.blocks,
            settings.threshold,
            settings.letter_threshold,
            settings.min_distance,
            settings.letter_distance,
        )
        self.network = Detector(self.config)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.99)
        )
        self.average = {key: value.detach().clone() for key, value in self.network.state_dict().items()}
        self.step, self.spent = 0, 0.0
        self.stream = ExampleStream(settings.seed, settings.tasks, settings.unknown)
        self.pool = Pool(ImageTokenizer.from_pretrained(settings.tokenizer), settings.seed)

    def resume(self) -> bool:
        """Take up the checkpoint in the folder, if there is one."""
        path = self.out / _CHECKPOINT
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.step, self.spent = state["average"], state["step"], state["spent"]
        return True

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "spent": self.spent,
        }
        fresh = self.out / (_CHECKPOINT + ".new")
        torch.save(state, fresh)
        os.replace(fresh, self.out / _CHECKPOINT)

    def _batch(self) -> tuple[Tensor, Targets]:
        settings, rng = self.settings, np.random.default_rng([self.settings.seed, self.step, 1])
        size_rng = random.Random(f"pool {settings.seed} {self.step}")
        size = self.stream.size(self.step)
        pooled: list[tuple[np.ndarray, Labels]] = []
        if size in canvas_sizes(8):
            pooled = self.pool.draw(size, round(settings.batch * settings.reconstructed), size_rng)
        pictures, labels = self.stream.batch(self.step, settings.batch - len(pooled))
        if size in canvas_sizes(8):
            self.pool.add(pictures[-settings.passed :], labels[-settings.passed :])
        if pooled:
            pictures = np.concatenate([pictures, np.stack([picture for picture, _ in pooled])])
            labels = labels + [label for _, label in pooled]
        order = rng.permutation(len(labels))
        pictures, labels = pictures[order], [labels[k] for k in order]
        x = to_base(to_input(compressed(pictures, rng)))
        inside = _inside(size)
        x, moves = distort(x, inside, rng)
        return x, targets(labels, moves, (x.shape[-2], x.shape[-1]), self.config)

    def advance(self, progress: float) -> dict[str, Tensor]:
        """One step at this share of the whole; returns the parts of the loss."""
        rate = min(1.0, (self.step + 1) / 200) * (
            0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * rate
        x, want = self._batch()
        with mixed_precision(torch.device("cpu")):
            maps = self.network(x.to(memory_format=torch.channels_last))
        parts = judge_loss(maps, want)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(parts.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        for key, value in self.network.state_dict().items():
            if value.is_floating_point():
                self.average[key].lerp_(value.detach(), 1 - decay)
        return parts

    def run(self, log: Log) -> None:
        """Train until the minutes are over."""
        goal = self.settings.minutes * 60
        before, shown, saved = time.monotonic(), 0.0, time.monotonic()
        while self.spent < goal:
            parts = self.advance(self.spent / goal)
            now = time.monotonic()
            self.spent, before = self.spent + now - before, now
            if now - shown > 20:
                shown = now
                told = "  ".join(f"{key} {float(value.detach()):.3f}" for key, value in parts.items())
                log(f"judge {self.spent / 60:.1f} min  step {self.step}  {told}")
            if now - saved > 90:
                saved = now
                self.save()
        self.save()

    def finish(self, record: dict[str, Any]) -> str:
        """Save the averaged weights as a judge; returns the hash."""
        network = Detector(self.config)
        network.load_state_dict(self.average)
        return save_judge(network, self.config, self.out, record)


def _inside(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) at base 64, without padding."""
    scale = BASE / base_of(size)
    return round(size[0] * scale), round(size[1] * scale)


def train_world_judge(settings: WorldJudgeSettings, out: Path, log: Log) -> dict[str, Any]:
    """Train a judge (or go on with it), save it to ``out``, measure it there; returns what was measured.

    ``log`` receives one line at a time. Raises SpritesMissing without the emoji font, StorageError without the tokenizer.
    """
    training = WorldJudgeTraining(settings, out)
    if training.resume():
        log(f"judge goes on at step {training.step}, {training.spent / 60:.1f} min")
    training.run(log)
    record: dict[str, Any] = {"settings": asdict(settings), "pictures": training.step * settings.batch}
    training.finish(record)
    record["accuracy"] = measured(WorldJudge.load(out), settings.accuracy_pictures, training.pool.tokenizer)
    training.finish(record)
    exact = {name: round(found["exact"], 4) for name, found in record["accuracy"].items()}
    log(f"judge trained on {record['pictures']} pictures; read fully right: {exact}")
    return record


def measured(judge: WorldJudge, pictures: int, tokenizer: ImageTokenizer) -> dict[str, dict[str, Any]]:
    """What the judge reads right and mistakes, by kind of picture: 64 px renders of both splits, any canvas of the level
    "wide", and a quarter as many through the image tokenizer, at two levels.
    """

    def through(several: Sequence[np.ndarray]) -> list[np.ndarray]:
        return list(reconstructed(tokenizer, np.stack(several)))

    square = (64, 64)
    few = max(1, pictures // 4)
    tests: tuple[tuple[str, Split], ...] = (
        ("renders, 64 px, level world", "train"),
        ("renders, 64 px, level world, test", "test"),
    )
    found = {name: accuracy(judge, canvases(pictures, split, "world", square)) for name, split in tests}
    found["renders, all canvases, level wide"] = accuracy(judge, canvases(pictures, "any", "wide"))
    for level in ("world", "blocks"):
        name = f"through the tokenizer, 64 px, level {level}"
        found[name] = accuracy(judge, canvases(few, "any", level, square), through)
    return found
