"""Training of the judge (two CPU cores, eight minutes) and the report of its accuracy on true
renders.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from nextflow_ar.data.playground.scenes import LEVELS, SHAPES, Scene, SceneSampler, Split, render
from nextflow_ar.evaluation.judge import Judge, JudgeConfig, JudgeNetwork, Verdict, save_judge
from nextflow_ar.evaluation.judge_scenes import (
    ACCURACY_SEED,
    FIRST_SEED,
    ExampleStream,
    Targets,
    distort,
    targets,
)
from nextflow_ar.precision import mixed_precision

Log = Callable[[str], None]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class JudgeSettings:
    """How the judge is trained. ``minutes``: wall-clock length; the learning rate follows it (warm-up, then
    cosine).

    ``shares``: easy scenes, medium scenes, free mixtures. ``unknown``: chance that a mixture's thing has no
    name. ``accuracy_scenes``: fresh easy scenes per split on which it is reported.
    """

    minutes: float
    batch: int
    lr: float
    weight_decay: float
    ema: float
    seed: int
    shares: tuple[float, float, float]
    unknown: float
    widths: tuple[int, int, int]
    threshold: float
    min_distance: float
    accuracy_scenes: int


DEFAULTS = JudgeSettings(
    minutes=8.0,
    batch=96,
    lr=2e-3,
    weight_decay=1e-3,
    ema=0.999,
    seed=FIRST_SEED,
    shares=(0.4, 0.25, 0.35),
    unknown=0.12,
    widths=(24, 48, 96),
    threshold=0.35,
    min_distance=12.0,
    accuracy_scenes=2000,
)


def judge_config(settings: JudgeSettings) -> JudgeConfig:
    """The vocabulary of the easy level and the settings' architecture."""
    easy = LEVELS["easy"]
    return JudgeConfig(
        names=(*easy.nouns, *SHAPES),
        shapes=SHAPES,
        colours=easy.colours,
        canvas=easy.canvas,
        widths=settings.widths,
        threshold=settings.threshold,
        min_distance=settings.min_distance,
    )


def judge_loss(maps: dict[str, Tensor], want: Targets) -> Tensor:
    """CenterNet's focal loss on the centres plus weighted errors of name, colour, offset, size and
    background.
    """
    heat = maps["heat"][:, 0]
    centre = want.heat > 0.999
    p = heat.sigmoid()
    hit = F.logsigmoid(heat) * (1 - p) ** 2 * centre
    miss = F.logsigmoid(-heat) * p**2 * (1 - want.heat) ** 4 * ~centre
    count = centre.sum().clamp(min=1)
    total = want.weight.sum().clamp(min=1e-6)

    def mean(per_cell: Tensor) -> Tensor:
        return (per_cell * want.weight).sum() / total

    name = mean(F.cross_entropy(maps["name"], want.name, reduction="none"))
    colour = mean(F.cross_entropy(maps["colour"], want.colour, ignore_index=-1, reduction="none"))
    offset = mean((maps["offset"] - want.offset).abs().sum(1))
    size = mean((maps["size"][:, 0] - want.size).abs())
    background = F.cross_entropy(maps["background"], want.background)
    return -(hit.sum() + miss.sum()) / count + name + colour + 0.5 * offset + size + 0.5 * background


def scene_right(scene: Scene, verdict: Verdict, tolerance: float = 4.0) -> bool:
    """Whether a verdict gives all things (names, colours, counts), their centres to ``tolerance`` px, the
    background.
    """
    if verdict.background != scene.background:
        return False
    if Counter(found.key for found in verdict.things) != Counter(thing.key for thing in scene.things):
        return False
    return all(
        any(f.key == t.key and math.dist(f.centre, t.centre) <= tolerance for f in verdict.things)
        for t in scene.things
    )


def accuracy(
    judge: Judge, split: Split, scenes: int, level: str = "easy", seed: int = ACCURACY_SEED
) -> tuple[float, list[tuple[Scene, Verdict]]]:
    """Share of fresh scenes read fully right, and those that were not."""
    sampler = SceneSampler(LEVELS[level], split, seed)
    truth = [sampler.scene(index) for index in range(scenes)]
    wrong: list[tuple[Scene, Verdict]] = []
    for start in range(0, scenes, 256):
        part = truth[start : start + 256]
        verdicts = judge(np.stack([render(scene) for scene in part]))
        wrong += [(s, v) for s, v in zip(part, verdicts, strict=True) if not scene_right(s, v)]
    return 1 - len(wrong) / scenes, wrong


def _rate(progress: float, step: int, settings: JudgeSettings) -> float:
    warm = min(1.0, (step + 1) / 200)
    return settings.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def _fit(network: JudgeNetwork, config: JudgeConfig, settings: JudgeSettings, log: Log) -> tuple[dict, int]:
    """Train for the settings' minutes; returns the averaged weights and the number of pictures seen."""
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.99)
    )
    stream = ExampleStream(settings.seed, settings.shares, settings.unknown)
    rng = np.random.default_rng([settings.seed, 1])
    average = {key: value.detach().clone() for key, value in network.state_dict().items()}
    begin = shown = time.monotonic()
    step = seen = 0
    while (spent := time.monotonic() - begin) < settings.minutes * 60:
        for group in optimizer.param_groups:
            group["lr"] = _rate(spent / (settings.minutes * 60), step, settings)
        examples = [stream.example(seen + k) for k in range(settings.batch)]
        pictures, moves = distort(examples, rng)
        want = targets(examples, moves.numpy(), config)
        with mixed_precision(torch.device("cpu")):
            maps = network(pictures.to(memory_format=torch.channels_last))
        loss = judge_loss(maps, want)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        step, seen = step + 1, seen + settings.batch
        decay = min(settings.ema, (1 + step) / (10 + step))
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                average[key].lerp_(value.detach(), 1 - decay)
        if time.monotonic() - shown > 20:
            shown = time.monotonic()
            log(f"judge {spent / 60:.1f} min  step {step}  pictures {seen}  loss {float(loss.detach()):.3f}")
    return average, seen


def train_judge(settings: JudgeSettings, out: Path, log: Log) -> dict[str, float]:
    """Train a judge, save it to ``out`` and measure it there.

    Returns the share of fresh scenes read fully right: easy scenes of each split, and medium ones of any.
    ``log`` receives one line at a time. Raises SpritesMissing without the emoji font.
    """
    torch.manual_seed(settings.seed)
    config = judge_config(settings)
    network = JudgeNetwork(config)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average, seen = _fit(network, config, settings, log)
    network.load_state_dict(average)
    record = {"settings": asdict(settings), "pictures": seen}
    save_judge(network, config, out, record)
    judge = Judge.load(out)
    splits: tuple[Split, ...] = ("train", "test", "any")
    report = {split: accuracy(judge, split, settings.accuracy_scenes)[0] for split in splits}
    report["medium"] = accuracy(judge, "any", settings.accuracy_scenes, "medium")[0]
    save_judge(
        network, config, out, record | {"accuracy": report, "accuracy_scenes": settings.accuracy_scenes}
    )
    log(f"judge trained on {seen} pictures; scenes read fully right: {json.dumps(report)}")
    return report


def main(arguments: list[str] | None = None) -> int:
    """``python -m nextflow_ar.evaluation.judge_training --minutes M --out DIR``."""
    parser = argparse.ArgumentParser(description="train the playground's judge")
    parser.add_argument("--minutes", type=float, default=DEFAULTS.minutes)
    parser.add_argument("--seed", type=int, default=DEFAULTS.seed)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = JudgeSettings(**(asdict(DEFAULTS) | {"minutes": given.minutes, "seed": given.seed}))
    train_judge(settings, given.out, logging.getLogger(__name__).info)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
