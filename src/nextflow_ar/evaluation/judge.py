"""The judge: a small frozen detector that reads a 64 px playground picture into things, colours and a
background.

It scores generated pictures, so it shares nothing with what it scores: its own network, its own training
seeds, never a picture that went through the tokenizer or came out of the generator. One map of 16 x 16
cells (stride 4) says where the centres of things are and, at each of them, what, in which colour, how
large; a second head names the background. Things outside its vocabulary (other sprites, two halves glued
together) are read as :data:`UNKNOWN`, not as the nearest name.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from nextflow_ar.evaluation.blocks import Block, down

UNKNOWN = "unknown"
STRIDE = 4
SIZE_UNIT = 32.0  # sizes are predicted as log(size / 32 px)
BUNDLED = Path(__file__).resolve().parent.parent / "checkpoints" / "judge"
WEIGHTS, CONFIG = "judge.safetensors", "config.json"


class JudgeError(RuntimeError):
    """The judge's folder is incomplete or was altered; the message is one line."""


@dataclass(frozen=True)
class JudgeConfig:
    """Everything that the weights need to be read.

    ``names``: sprites, then shapes (without UNKNOWN); ``shapes``: the names that carry a colour.
    ``widths``: channels at strides 2, 4 and 8. ``threshold``: least centre score; ``min_distance``: pixels
    between two centres.
    """

    names: tuple[str, ...]
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    canvas: int
    widths: tuple[int, int, int]
    threshold: float
    min_distance: float


def _read_config(stored: dict[str, Any]) -> JudgeConfig:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    return JudgeConfig(**values)


@dataclass(frozen=True)
class Found:
    """One thing that the judge saw: centre and side of its box in pixels, centre score 0..1."""

    name: str
    colour: str | None
    x: float
    y: float
    size: float
    score: float

    @property
    def key(self) -> tuple[str, str | None]:
        """What it is, without where it is."""
        return self.name, self.colour

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        return self.x, self.y


@dataclass(frozen=True)
class Verdict:
    """What one picture shows, best centre score first, and its background's colour."""

    things: tuple[Found, ...]
    background: str

    def to_json(self) -> dict:
        """Plain data for JSON; :meth:`from_json` reads it back."""
        return {"things": [asdict(thing) for thing in self.things], "background": self.background}

    @classmethod
    def from_json(cls, data: dict) -> Verdict:
        """The verdict that :meth:`to_json` wrote."""
        return cls(tuple(Found(**thing) for thing in data["things"]), data["background"])

    def words(self) -> str:
        """A short line for people: "2 dog, red circle on blue"."""
        tally: dict[str, int] = {}
        for thing in self.things:
            what = f"{thing.colour} {thing.name}" if thing.colour else thing.name
            tally[what] = tally.get(what, 0) + 1
        listed = ", ".join(what if n == 1 else f"{n} {what}" for what, n in sorted(tally.items()))
        return f"{listed or 'nothing'} on {self.background}"


class JudgeNetwork(nn.Module):
    """Picture -> maps. Cell (i, j) speaks of the point (4 j, 4 i) in pixels.

    ``forward``: (B, 3, 64, 64) float in -1..1 -> dict of ``heat`` (B, 1, 16, 16) logits, ``name`` (B, N+1,
    16, 16) logits whose last row is UNKNOWN, ``colour`` (B, C, 16, 16) logits, ``offset`` (B, 2, 16, 16) x
    and y in cells, ``size`` (B, 1, 16, 16) as log(side / 32 px), ``background`` (B, C) logits.
    """

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        low, mid, high = config.widths
        colours = len(config.colours)
        self.splits = {"heat": 1, "name": len(config.names) + 1, "colour": colours, "offset": 2, "size": 1}
        self.stem = down(3, low)
        self.middle = nn.Sequential(down(low, mid), Block(mid))
        self.deep = nn.Sequential(down(mid, high), Block(high), Block(high))
        self.lift = nn.Conv2d(high, mid, 1)
        self.fuse = Block(mid)
        self.neck = nn.Sequential(nn.Conv2d(mid, mid, 1), nn.ReLU())
        self.heads = nn.Conv2d(mid, sum(self.splits.values()), 1)
        self.background = nn.Sequential(nn.Linear(2 * high, 64), nn.ReLU(), nn.Linear(64, colours))
        nn.init.constant_(self.heads.bias[:1], -3.0)  # type: ignore[index]  # centres are rare

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps of a batch."""
        mid = self.middle(self.stem(x))
        deep = self.deep(mid)
        up = F.interpolate(self.lift(deep), size=mid.shape[-2:], mode="bilinear", align_corners=False)
        maps = self.heads(self.neck(self.fuse(mid + up))).float()
        out = dict(zip(self.splits, maps.split(list(self.splits.values()), dim=1), strict=True))
        out["background"] = self.background(torch.cat((deep.mean((2, 3)), deep.amax((2, 3))), 1)).float()
        return out


def to_input(pictures: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def decode(maps: dict[str, Tensor], config: JudgeConfig) -> list[Verdict]:
    """Network maps -> verdicts: local maxima above the threshold, best first, none closer than the least
    distance.
    """
    heat = maps["heat"].sigmoid()
    peaks = (heat == F.max_pool2d(heat, 3, 1, 1)) & (heat >= config.threshold)
    names = (*config.names, UNKNOWN)
    name, colour = maps["name"].argmax(1), maps["colour"].argmax(1)
    verdicts = []
    for row, shade in enumerate(maps["background"].argmax(1).tolist()):
        candidates: list[Found] = []
        for i, j in peaks[row, 0].nonzero().tolist():
            dx, dy = maps["offset"][row, :, i, j].tolist()
            what = names[int(name[row, i, j])]
            candidates.append(
                Found(
                    name=what,
                    colour=config.colours[int(colour[row, i, j])] if what in config.shapes else None,
                    x=(j + dx) * STRIDE,
                    y=(i + dy) * STRIDE,
                    size=SIZE_UNIT * float(maps["size"][row, 0, i, j].clamp(-2, 2).exp()),
                    score=float(heat[row, 0, i, j]),
                )
            )
        verdicts.append(Verdict(_apart(candidates, config.min_distance), config.colours[shade]))
    return verdicts


def _apart(candidates: list[Found], least: float) -> tuple[Found, ...]:
    kept: list[Found] = []
    for one in sorted(candidates, key=lambda found: -found.score):
        if all((one.x - other.x) ** 2 + (one.y - other.y) ** 2 >= least**2 for other in kept):
            kept.append(one)
    return tuple(kept)


class Judge:
    """The frozen detector. ``sha256``: hash of its weights, stored beside every score it gives."""

    def __init__(self, network: JudgeNetwork, config: JudgeConfig, sha256: str) -> None:
        self.network = network.eval().requires_grad_(False)
        self.config, self.sha256 = config, sha256

    @classmethod
    def load(cls, folder: Path | str | None = None) -> Judge:
        """The bundled judge, or one saved by :func:`save_judge` in ``folder``.

        Raises JudgeError (one line) when a file is missing or unreadable, or when the weights are not those
        that the config was written for.
        """
        root = Path(folder) if folder is not None else BUNDLED
        try:
            record = json.loads((root / CONFIG).read_text())
            blob = (root / WEIGHTS).read_bytes()
            config = _read_config(record["architecture"])
            expected = record["sha256"]
        except OSError as error:
            raise JudgeError(f"judge: cannot read {error.filename}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise JudgeError(f"judge: {root / CONFIG} is not a judge's config") from error
        found = hashlib.sha256(blob).hexdigest()
        if found != expected:
            raise JudgeError(
                f"judge: {root / WEIGHTS} was altered: SHA-256 {found[:12]}..., expected {expected[:12]}..."
            )
        network = JudgeNetwork(config)
        try:
            state = {key: value.float() for key, value in load_tensors(blob).items()}
            batches = {
                key: value for key, value in network.state_dict().items() if not value.is_floating_point()
            }
            network.load_state_dict(state | batches)
        except (RuntimeError, SafetensorError) as error:
            raise JudgeError(
                f"judge: the weights in {root} do not fit the architecture in its config"
            ) from error
        return cls(network, config, found)

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray, batch: int = 128) -> list[Verdict]:
        """(N, 64, 64, 3) uint8 -> N verdicts, fp32. Raises ValueError for any other shape or dtype."""
        n = self.config.canvas
        pictures = np.asarray(pictures)
        if pictures.dtype != np.uint8 or pictures.shape[1:] != (n, n, 3):
            raise ValueError(
                f"the judge reads uint8 pictures (N, {n}, {n}, 3), not {pictures.dtype} {pictures.shape}"
            )
        verdicts: list[Verdict] = []
        for start in range(0, len(pictures), batch):
            maps = self.network(to_input(pictures[start : start + batch]))
            verdicts.extend(decode(maps, self.config))
        return verdicts


def save_judge(network: JudgeNetwork, config: JudgeConfig, folder: Path, record: dict) -> str:
    """Write fp16 weights and the config (with ``record``: how it was trained) to ``folder``; returns the
    SHA-256.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blob = save_tensors(
        {
            key: value.half().contiguous()
            for key, value in network.state_dict().items()
            if value.is_floating_point()
        }
    )
    digest = hashlib.sha256(blob).hexdigest()
    content = {"sha256": digest, "architecture": asdict(config), "training": record}
    (folder / WEIGHTS).write_bytes(blob)
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    return digest
