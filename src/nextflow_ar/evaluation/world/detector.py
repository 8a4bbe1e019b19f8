"""The network of the wide world's judge, and how its maps are read.

Every picture is first brought to a base of 64 px (a 128 x 128 picture is halved), so that one network sees things of one
scale on canvases of every size. A map of cells of 4 px says where the centres of things are and what stands there; one
of 2 px says where letters are and which: words are spelled out, not chosen from a list, so that a slip is seen as one.
Background, style, mood and light are read from the whole picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextflow_ar.data.playground.canvases import base_of
from nextflow_ar.evaluation.blocks import Block, down
from nextflow_ar.evaluation.world.lettering import box_of_letters
from nextflow_ar.evaluation.world.verdict import UNKNOWN, SeenThing, SeenWord, Verdict

STRIDE = 4
LETTER_STRIDE = 2
BASE = 64
SIZE_UNIT = 32.0
"""Sizes are predicted as log(size / 32 px)."""
_MULTIPLE = 8


@dataclass(frozen=True)
class DetectorConfig:
    """Everything that the weights need to be read.

    ``names``: things (without UNKNOWN); ``coloured``: those that always have a colour. ``widths``: channels at strides 2,
    4, 8 and of the neck. ``threshold``: least centre score of a thing, ``letter_threshold`` of a letter;
    ``min_distance``: pixels (at base 64) between two things, ``letter_distance`` between two letters.
    """

    names: tuple[str, ...]
    coloured: tuple[str, ...]
    colours: tuple[str, ...]
    styles: tuple[str, ...]
    moods: tuple[str, ...]
    lights: tuple[str, ...]
    letters: str
    widths: tuple[int, int, int, int]
    blocks: int
    threshold: float
    letter_threshold: float
    min_distance: float
    letter_distance: float


class Detector(nn.Module):
    """Picture -> maps and answers about the whole.

    ``forward``: (B, 3, H, W) float in -1..1, H and W multiples of 8 -> dict of, per cell of 4 px: ``heat`` (B, 1, h, w),
    ``name`` (B, N+1, h, w), ``colour`` (B, C, h, w), ``offset`` (B, 2, h, w) x and y in cells, ``size`` (B, 1, h, w) as
    log(side / 32 px), ``turn`` (B, 4, h, w); per cell of 2 px: ``letter_heat`` (B, 1, 2h, 2w), ``letter`` (B, 26, 2h, 2w);
    and (B, n) logits of ``background``, ``second``, ``style``, ``mood``, ``light`` (the first of the last two and of
    ``second`` is none).
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        low, mid, high, neck = config.widths
        colours = len(config.colours)
        self.cells = {
            "heat": 1,
            "name": len(config.names) + 1,
            "colour": colours,
            "offset": 2,
            "size": 1,
            "turn": 4,
        }
        self.whole = {
            "background": colours,
            "second": colours + 1,
            "style": len(config.styles),
            "mood": len(config.moods) + 1,
            "light": len(config.lights) + 1,
        }
        self.stem = down(3, low)
        self.middle = nn.Sequential(down(low, mid), Block(mid))
        self.deep = nn.Sequential(down(mid, high), *(Block(high) for _ in range(config.blocks)))
        self.lift = nn.Conv2d(high, mid, 1)
        self.fuse = Block(mid)
        self.neck = nn.Sequential(nn.Conv2d(mid, neck, 1), nn.ReLU())
        self.heads = nn.Conv2d(neck, sum(self.cells.values()), 1)
        self.spell = nn.Conv2d(neck, 4 * (1 + len(config.letters)), 1)
        self.about = nn.Sequential(
            nn.Linear(2 * high + 9 * mid, 128), nn.ReLU(), nn.Linear(128, sum(self.whole.values()))
        )
        nn.init.constant_(self.heads.bias[:1], -3.0)  # type: ignore[index]  # centres are rare
        nn.init.constant_(self.spell.bias[:4], -4.0)  # type: ignore[index]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps and answers of a batch."""
        mid = self.middle(self.stem(x))
        deep = self.deep(mid)
        up = F.interpolate(self.lift(deep), size=mid.shape[-2:], mode="bilinear", align_corners=False)
        fused = self.fuse(mid + up)
        neck = self.neck(fused)
        maps = self.heads(neck).float()
        out = dict(zip(self.cells, maps.split(list(self.cells.values()), dim=1), strict=True))
        letters = F.pixel_shuffle(self.spell(neck).float(), 2)
        out["letter_heat"], out["letter"] = letters[:, :1], letters[:, 1:]
        pooled = torch.cat(
            (deep.mean((2, 3)), deep.amax((2, 3)), F.adaptive_avg_pool2d(fused, 3).flatten(1)), 1
        )
        about = self.about(pooled).float()
        return out | dict(zip(self.whole, about.split(list(self.whole.values()), dim=1), strict=True))


def to_base(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) in -1..1 at any base -> the same at base 64, padded at its right and lower edge to multiples of 8."""
    height, width = pictures.shape[-2:]
    scale = BASE / base_of((height, width))
    if scale != 1:
        size = (round(height * scale), round(width * scale))
        pictures = F.interpolate(pictures, size=size, mode="bilinear", antialias=True, align_corners=False)
    height, width = pictures.shape[-2:]
    return F.pad(pictures, (0, -width % _MULTIPLE, 0, -height % _MULTIPLE), mode="replicate")


def to_input(pictures: np.ndarray) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def read_maps(maps: dict[str, Tensor], size: tuple[int, int], config: DetectorConfig) -> list[Verdict]:
    """Network outputs of pictures of (height, width) pixels -> verdicts in those pixels."""
    scale = base_of(size) / BASE
    best = {
        key: maps[key].argmax(1)
        for key in ("name", "colour", "turn", "background", "second", "style", "mood", "light")
    }
    things, words = _things(maps, best, size, scale, config), _words(maps, base_of(size), config)
    return [
        Verdict(
            *size,
            things=things[row],
            background=config.colours[int(best["background"][row])],
            second=(None, *config.colours)[int(best["second"][row])],
            style=config.styles[int(best["style"][row])],
            mood=(None, *config.moods)[int(best["mood"][row])],
            light=(None, *config.lights)[int(best["light"][row])],
            word=words[row],
        )
        for row in range(len(things))
    ]


def _peaks(heat: Tensor, threshold: float) -> list[list[tuple[int, int, float]]]:
    """Local maxima (row, column, score) of every picture's (B, 1, h, w) scores, best first."""
    found = (heat == F.max_pool2d(heat, 3, 1, 1)) & (heat >= threshold)
    out: list[list[tuple[int, int, float]]] = [[] for _ in range(len(heat))]
    for b, _, i, j in found.nonzero().tolist():
        out[b].append((i, j, float(heat[b, 0, i, j])))
    return [sorted(peaks, key=lambda peak: -peak[2]) for peaks in out]


def _things(
    maps: dict[str, Tensor],
    best: dict[str, Tensor],
    size: tuple[int, int],
    scale: float,
    config: DetectorConfig,
) -> list[tuple[SeenThing, ...]]:
    names = (*config.names, UNKNOWN)
    verdicts = []
    for row, peaks in enumerate(_peaks(maps["heat"].sigmoid(), config.threshold)):
        kept: list[SeenThing] = []
        for i, j, score in peaks:
            dx, dy = maps["offset"][row, :, i, j].tolist()
            x, y = (j + dx) * STRIDE * scale, (i + dy) * STRIDE * scale
            near = config.min_distance * scale
            if x > size[1] or y > size[0] or any((x - o.x) ** 2 + (y - o.y) ** 2 < near**2 for o in kept):
                continue
            what = names[int(best["name"][row, i, j])]
            colour = config.colours[int(best["colour"][row, i, j])] if what in config.coloured else None
            side = SIZE_UNIT * float(maps["size"][row, 0, i, j].clamp(-2, 2).exp()) * scale
            kept.append(SeenThing(what, colour, x, y, side, int(best["turn"][row, i, j]), score))
        verdicts.append(tuple(kept))
    return verdicts


@dataclass(frozen=True)
class _Letter:
    """A letter at base 64."""

    name: str
    x: float
    y: float


def _words(maps: dict[str, Tensor], base: int, config: DetectorConfig) -> list[SeenWord | None]:
    found: list[SeenWord | None] = []
    colours, which = maps["colour"].log_softmax(1), maps["letter"].argmax(1)
    for row, peaks in enumerate(_peaks(maps["letter_heat"].sigmoid(), config.letter_threshold)):
        kept: list[_Letter] = []
        for i, j, _ in peaks:
            x, y = j * float(LETTER_STRIDE), i * float(LETTER_STRIDE)
            if any((x - o.x) ** 2 + (y - o.y) ** 2 < config.letter_distance**2 for o in kept):
                continue
            kept.append(_Letter(config.letters[int(which[row, i, j])], x, y))
        if not kept:
            found.append(None)
            continue
        found.append(_word(kept, base, config.colours[_ink(colours[row], kept)]))
    return found


def _ink(colours: Tensor, letters: Sequence[_Letter]) -> int:
    """The colour of (C, h, w) log-probabilities in which all letters agree best. A letter's place is known to 2 px, so all
    cells of 4 px that its middle may lie in have a say.
    """
    total = torch.zeros(len(colours))
    for letter in letters:
        rows = {int(max(0.0, letter.y + d) / STRIDE) for d in (-0.99, 0.99)}
        columns = {int(max(0.0, letter.x + d) / STRIDE) for d in (-0.99, 0.99)}
        for i in rows:
            for j in columns:
                if i < colours.shape[1] and j < colours.shape[2]:
                    total += colours[:, i, j]
    return int(total.argmax())


def _lines(letters: Sequence[_Letter], line: float = 9.0) -> list[list[_Letter]]:
    """Letters in reading order; another line begins where the next letter lies ``line`` px (at base 64) lower."""
    lines: list[list[_Letter]] = []
    for one in sorted(letters, key=lambda letter: letter.y):
        if lines and one.y - lines[-1][0].y < line:
            lines[-1].append(one)
        else:
            lines.append([one])
    return [sorted(row, key=lambda letter: letter.x) for row in lines]


def _word(letters: Sequence[_Letter], base: int, colour: str) -> SeenWord:
    """The word that letters at base 64 make on a canvas of ``base``; its box is that of the first line."""
    lines = _lines(letters)
    text = ["".join(letter.name for letter in row) for row in lines]
    centres = [(letter.x * base / BASE, letter.y * base / BASE) for letter in lines[0]]
    return SeenWord(" ".join(text), colour, box_of_letters(text[0], centres, base))
