"""The frozen judge of the wide world: loading, saving, and reading pictures of any playground canvas."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from nextflow_ar.data.playground.world import COLOUR_NAMES, LIGHTS, MOODS, NAMES, NATIVE, SHAPES, STYLES
from nextflow_ar.evaluation.judge import JudgeError
from nextflow_ar.evaluation.world.detector import Detector, DetectorConfig, read_maps, to_base, to_input
from nextflow_ar.evaluation.world.verdict import Verdict

BUNDLED = Path(__file__).resolve().parents[2] / "checkpoints" / "world_judge"
WEIGHTS, CONFIG = "judge.safetensors", "config.json"


def detector_config(
    widths: tuple[int, int, int, int],
    blocks: int,
    threshold: float,
    letter_threshold: float,
    min_distance: float,
    letter_distance: float,
) -> DetectorConfig:
    """The wide world's vocabulary and a network's size."""
    return DetectorConfig(
        names=NAMES,
        coloured=(*NATIVE, *SHAPES),
        colours=COLOUR_NAMES,
        styles=STYLES,
        moods=MOODS,
        lights=LIGHTS,
        letters="ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        widths=widths,
        blocks=blocks,
        threshold=threshold,
        letter_threshold=letter_threshold,
        min_distance=min_distance,
        letter_distance=letter_distance,
    )


def _read_config(stored: dict[str, Any]) -> DetectorConfig:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    return DetectorConfig(**values)


class WorldJudge:
    """The frozen detector. ``sha256``: hash of its weights, stored beside every score it gives."""

    def __init__(self, network: Detector, config: DetectorConfig, sha256: str) -> None:
        self.network = network.eval().requires_grad_(False)
        self.config, self.sha256 = config, sha256

    @classmethod
    def load(cls, folder: Path | str | None = None) -> WorldJudge:
        """The bundled judge, or one saved by :func:`save_judge` in ``folder``.

        Raises JudgeError (one line) when a file is missing or unreadable, or when the weights are not those that the config
        was written for.
        """
        root = Path(folder) if folder is not None else BUNDLED
        try:
            record = json.loads((root / CONFIG).read_text())
            blob = (root / WEIGHTS).read_bytes()
            config, expected = _read_config(record["architecture"]), record["sha256"]
        except OSError as error:
            raise JudgeError(f"judge: cannot read {error.filename}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise JudgeError(
                f"judge: {root / CONFIG} is not the config of a judge of the wide world"
            ) from error
        found = hashlib.sha256(blob).hexdigest()
        if found != expected:
            raise JudgeError(
                f"judge: {root / WEIGHTS} was altered: SHA-256 {found[:12]}..., expected {expected[:12]}..."
            )
        network = Detector(config)
        try:
            state = {key: value.float() for key, value in load_tensors(blob).items()}
            counters = {k: v for k, v in network.state_dict().items() if not v.is_floating_point()}
            network.load_state_dict(state | counters)
        except (RuntimeError, SafetensorError) as error:
            raise JudgeError(
                f"judge: the weights in {root} do not fit the architecture in its config"
            ) from error
        return cls(network, config, found)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray], batch: int = 64) -> list[Verdict]:
        """Pictures (H, W, 3) uint8, each of its own size -> verdicts in the same order, fp32.

        Raises ValueError for anything else.
        """
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, picture in enumerate(pictures):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                raise ValueError(
                    f"the judge reads uint8 pictures (H, W, 3), not {picture.dtype} {picture.shape}"
                )
            groups[picture.shape[0], picture.shape[1]].append(number)
        verdicts: dict[int, Verdict] = {}
        for size, numbers in groups.items():
            for start in range(0, len(numbers), batch):
                part = numbers[start : start + batch]
                maps = self.network(to_base(to_input(np.stack([pictures[k] for k in part]))))
                verdicts.update(zip(part, read_maps(maps, size, self.config), strict=True))
        return [verdicts[k] for k in range(len(pictures))]


def save_judge(network: Detector, config: DetectorConfig, folder: Path, record: dict[str, Any]) -> str:
    """Write bf16 weights and the config (with ``record``: how it was trained) to ``folder``; returns the SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    state = network.state_dict()
    blob = save_tensors({k: v.bfloat16().contiguous() for k, v in state.items() if v.is_floating_point()})
    digest = hashlib.sha256(blob).hexdigest()
    content = {"sha256": digest, "architecture": asdict(config), "training": record}
    (folder / WEIGHTS).write_bytes(blob)
    (folder / CONFIG).write_text(json.dumps(content, indent=1) + "\n")
    return digest
